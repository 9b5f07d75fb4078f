"""maskloss/training/freezing.py: frozen parts keep their weights and statistics while the others train."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from maskloss.errors import InputError
from maskloss.training.freezing import freeze
from maskloss.training.loop import train
from maskloss.training.setup import guest, set_up
from tests.training.small_runs import small_config, tensors


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)))


@pytest.mark.parametrize(
    ("names", "trained"),
    [
        ([], ["0.weight", "0.bias", "1.0.weight", "1.0.bias", "1.1.weight", "1.1.bias"]),
        (["0"], ["1.0.weight", "1.0.bias", "1.1.weight", "1.1.bias"]),
        (["1.0", "0.weight"], ["0.bias", "1.1.weight", "1.1.bias"]),
        (["*.bias"], ["0.weight", "1.0.weight", "1.1.weight"]),
        (["1"], ["0.weight", "0.bias"]),
    ],
)
def test_names_of_modules_and_parameters_and_patterns(names: list[str], trained: list[str]) -> None:
    model = small_model()
    freeze(model, names)
    assert [name for name, value in model.named_parameters() if value.requires_grad] == trained


def test_an_unknown_name_lists_the_parts() -> None:
    with pytest.raises(
        InputError, match=r"no part of the model is named 'backbone'; its parts are 0, 1, 1\.0, 1\.1"
    ):
        freeze(small_model(), ["backbone"])


def test_something_must_be_left_to_train() -> None:
    with pytest.raises(InputError, match="--freeze 0,1 leaves nothing to train"):
        freeze(small_model(), ["0", "1"])


def test_a_run_changes_only_what_is_not_frozen(shapes: Path, tmp_path: Path) -> None:
    """Runs of one and three steps end with the same backbone, statistics included, and with other heads."""
    ends = []
    for steps in (1, 3):
        output = tmp_path / f"run{steps}"
        config = small_config(shapes, output, max_steps=steps, freeze="backbone,rpn.head", evaluate_every=1)
        train(config)
        ends.append(tensors(output))
    first, last = ends
    assert any(name.endswith("running_mean") for name in first)
    changed = {name for name, value in last.items() if not torch.equal(value, first[name])}
    assert not any(name.startswith(("backbone", "rpn.head")) for name in changed)
    assert {name.split(".")[0] for name in changed} == {"roi_heads"}


def test_an_unknown_name_is_refused_before_anything_is_written(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--freeze: no part of the model is named 'neck'"):
        train(small_config(shapes, tmp_path / "run", freeze="neck"))
    assert not (tmp_path / "run").exists()


def test_a_part_of_the_mask_branch_is_frozen(shapes: Path, tmp_path: Path) -> None:
    part = "roi_heads.mask_branch.coarse_head"
    config = small_config(shapes, tmp_path / "run", freeze=part, mask_branch="point_rend")
    device = torch.device("cpu")
    with guest(device):
        run = set_up(config, device)
    of_branch = {
        name: parameter.requires_grad
        for name, parameter in run.model.named_parameters()
        if name.startswith("roi_heads.mask_branch.")
    }
    trained = {name: not name.startswith(f"{part}.") for name in of_branch}
    assert of_branch == trained
    assert 0 < sum(trained.values()) < len(trained)
