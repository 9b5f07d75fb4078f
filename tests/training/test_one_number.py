"""The losses and AP of a model are the same from train and from evaluate, and for every batch size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskloss import MaskRCNNLoss
from maskloss.cli import main
from maskloss.data.coco import read_coco
from maskloss.losses import MaskBCELoss
from maskloss.training.checkpoints import checkpoint_files, load_checkpoint
from maskloss.training.evaluation import evaluate
from maskloss.training.loop import train
from maskloss.training.model_file import load_model

from .small_runs import full_models, narrow_models, small_config, write_data


class LearnedScale(nn.Module):
    """A mask term with a learned temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, mask_logits: Tensor, mask_targets: Tensor) -> Tensor:
        return MaskBCELoss()(mask_logits * self.log_scale.exp(), mask_targets) + 0.1 * self.log_scale.square()


def learned() -> MaskRCNNLoss:
    """For --loss."""
    return MaskRCNNLoss(mask=LearnedScale())


OWN = "tests.training.test_one_number.learned"


@pytest.fixture(scope="module", autouse=True)
def narrow() -> Iterator[None]:
    with narrow_models():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def evaluated(data: Path, model: Path, output: Path, *options: str) -> dict[str, Any]:
    main(
        ["evaluate", "--checkpoint", str(model), "--images", str(data / "val/images"), "--annotations",
         str(data / "val/annotations.json"), "--output", str(output), "--device", "cpu", *options]
    )  # fmt: skip
    return json.loads((output / "metrics.json").read_text())


LOSSES: dict[str, Any] = {
    "detectron2": "detectron2",
    "matterport": "matterport",
    "terms and weights": {
        "preset": "aligned",
        "mask": "maskloss.losses.MaskDiceLoss",
        "box": {"class_path": "maskloss.losses.BoxSmoothL1Loss", "init_args": {"beta": 1.0}},
        "weights": {"mask": 3.0, "objectness": 0.5},
        "normalizers": {"box": "maskloss.losses.per_positive"},
        "mask_targets": {"binary": True},
    },
    "a penalty": {"regularization": "maskloss.losses.WeightDecayLoss"},
    "counted classes": {
        "classification": {"class_path": "maskloss.losses.SeesawLoss", "init_args": {"num_classes": 4}}
    },
}


@pytest.mark.parametrize("name", LOSSES)
def test_evaluate_gives_the_losses_that_train_wrote(name, data, tmp_path):
    changes = {"frozen_normalization": True} if name == "a penalty" else {}
    train(small_config(data, tmp_path / "run", loss=LOSSES[name], **changes))
    written = json.loads((tmp_path / "run/metrics.json").read_text())
    for batch_size in ("1", "2"):
        found = evaluated(
            data, tmp_path / "run/model.safetensors", tmp_path / batch_size, "--batch-size", batch_size
        )
        assert found == written


def test_bf16_is_evaluated_in_float32_by_both(data, tmp_path):
    train(small_config(data, tmp_path / "run", mixed_precision="bf16"))
    written = json.loads((tmp_path / "run/metrics.json").read_text())
    assert evaluated(data, tmp_path / "run/model.safetensors", tmp_path / "out") == written


def test_losses_and_ap_do_not_depend_on_batches_or_processes(data, tmp_path):
    train(small_config(data, tmp_path / "run"))
    loaded = load_model(tmp_path / "run/model.safetensors")
    validation = read_coco(data / "train/images", data / "train/annotations.json")
    cpu = torch.device("cpu")
    expected = evaluate(loaded.model, validation, batch_size=1, device=cpu)
    for batch_size in (2, 3, 4):
        found = evaluate(loaded.model, validation, batch_size=batch_size, device=cpu)
        assert found.metrics == expected.metrics
        assert found.results == expected.results


def test_a_users_loss_is_evaluated_only_if_given_again(data, tmp_path, capsys):
    train(small_config(data, tmp_path / "run", loss=OWN))
    written = json.loads((tmp_path / "run/metrics.json").read_text())
    model = tmp_path / "run/model.safetensors"
    capsys.readouterr()
    without = evaluated(data, model, tmp_path / "without")
    message = capsys.readouterr().err
    assert (
        f"no losses: the model was trained with {OWN}, which is imported only if it is given by --loss"
        in message
    )
    assert without == {**written, "loss": None}
    assert evaluated(data, model, tmp_path / "with", "--loss", OWN) == written


# A loss with parameters of its own.


def scale_of(state: dict[str, Tensor]) -> float:
    return next(float(value) for key, value in state.items() if key.endswith("mask.log_scale"))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_losss_own_parameters_are_trained_and_kept(optimizer, data, tmp_path):
    config = small_config(
        data,
        tmp_path / "run",
        loss=OWN,
        optimizer=optimizer,
        learning_rate=0.01,
        max_steps=3,
        checkpoint_every=1,
    )
    train(config)
    scales = [
        scale_of(load_checkpoint(file)["loss"]) for file in checkpoint_files(tmp_path / "run/checkpoints")
    ]
    assert scales[0] != 0
    assert scales[1] != scales[0]
    loaded = load_model(tmp_path / "run/model.safetensors", loss=OWN)
    assert scale_of(loaded.model.roi_heads.loss.state_dict()) == scales[1]


def test_the_losss_own_parameters_resume_exactly(data, tmp_path):
    from .small_runs import history, interrupted_after

    def config(name: str, **changes: Any) -> Any:
        return small_config(
            data, tmp_path / name, loss=OWN, learning_rate=0.01, max_steps=4, checkpoint_every=1, **changes
        )

    train(config("whole"))
    with interrupted_after(2):
        train(config("parts"))
    train(config("parts", resume=True))
    assert history(tmp_path / "parts") == history(tmp_path / "whole")
    one, other = (load_model(tmp_path / name / "model.safetensors", loss=OWN) for name in ("whole", "parts"))
    assert scale_of(one.model.roi_heads.loss.state_dict()) == scale_of(
        other.model.roi_heads.loss.state_dict()
    )


@pytest.mark.slow
def test_two_processes_write_the_losses_that_one_evaluates(data, tmp_path):
    # The loss's own parameters, too: were they to drift apart, the ranks' shares of the evaluation would not be those
    # of the model that was written.
    options = [
        f"--{key.replace('_', '-')}={value}"
        for key, value in vars(small_config(data, tmp_path / "run", loss=OWN, learning_rate=0.01)).items()
        if value is not None and key not in ("resume",)
    ]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29533",
    ]
    done = subprocess.run(
        [*command, "-m", "maskloss", "train", *options],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    written = json.loads((tmp_path / "run/metrics.json").read_text())
    with full_models():
        found = evaluated(data, tmp_path / "run/model.safetensors", tmp_path / "out", "--loss", OWN)
    for key, value in written["loss"].items():
        assert found["loss"][key] == pytest.approx(value, rel=1e-6), key
    assert found["segm"] == written["segm"]
