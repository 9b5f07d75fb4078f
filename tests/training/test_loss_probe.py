"""maskloss/training/loss_probe.py: terms that cannot train are found on random RoIs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskloss.errors import InputError
from maskloss.losses import SeesawLoss, WeightDecayLoss, mask_dice_loss
from maskloss.losses.criterion import MaskRCNNLoss
from maskloss.training.loop import train
from maskloss.training.loss_config import make_loss
from maskloss.training.loss_probe import probe, probe_copy
from tests.training.small_runs import small_config
from tests.training.test_loss_config import my_mask_loss, not_finite, scalar


def bad_gradient(mask_logits: Tensor, mask_targets: Tensor) -> Tensor:
    return (mask_logits * 0).sqrt().sum((1, 2))


def no_gradient(mask_logits: Tensor, mask_targets: Tensor) -> Tensor:
    return my_mask_loss(mask_logits.detach(), mask_targets)


def raising(mask_logits: Tensor, mask_targets: Tensor) -> Tensor:
    raise KeyError("no such thing")


@pytest.mark.parametrize("preset", ["torchvision", "detectron2", "matterport", "paper", "aligned"])
@pytest.mark.parametrize("num_classes", [2, 5, 1204])
def test_good_losses_pass(preset: str, num_classes: int):
    probe(make_loss(preset), num_classes)


def test_terms_of_all_classes_and_of_weight_zero_pass():
    probe(make_loss({"mask": "maskloss.losses.MaskSoftmaxLoss"}), 5)
    probe(make_loss({"weights": dict.fromkeys(("objectness", "box", "mask"), 0.0)}), 5)
    probe(make_loss({"classification": "maskloss.losses.ClassSigmoidLoss"}), 5)


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (scalar, "the loss fails on random RoIs: the mask term must return one value per positive"),
        (raising, "the mask term fails on random RoIs: KeyError: 'no such thing'"),
        (not_finite, "loss_mask of random RoIs is nan, not finite"),
        (bad_gradient, "the gradient of loss_mask of random RoIs is not finite"),
        (no_gradient, "loss_mask of random RoIs has no gradient"),
    ],
)
def test_bad_terms_are_named(term: Callable[..., Tensor], message: str):
    with pytest.raises(InputError, match=message):
        probe(MaskRCNNLoss(mask=term), num_classes=4)


def test_a_term_in_the_place_of_another_is_named():
    with pytest.raises(InputError, match="the objectness term fails on random RoIs: labels must have shape"):
        probe(make_loss({"objectness": "maskloss.losses.ClassFocalLoss"}), 4)


def test_another_number_of_classes_than_the_models_is_found():
    config = {"classification": {"class_path": "maskloss.losses.SeesawLoss", "init_args": {"num_classes": 4}}}
    probe(make_loss(config), 4)
    with pytest.raises(InputError, match="class_counts has shape"):
        probe(make_loss(config), 9)


def test_probing_leaves_the_random_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    probe(MaskRCNNLoss(mask=mask_dice_loss), 4)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("(l - t).abs().mean()", "must return one value per positive"),
        ("(l.detach() - t).abs()", "loss_mask of random RoIs has no gradient"),
    ],
)
def test_a_bad_term_is_refused_before_the_folder_is_written_and_the_fixed_one_trains(
    shapes: Path, tmp_path: Path, body: str, message: str
) -> None:
    term = eval(f"lambda l, t: {body}")
    config = small_config(shapes, tmp_path / "run", max_steps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(config), "make_loss", lambda _: MaskRCNNLoss(mask=term))
        with pytest.raises(InputError, match=message):
            train(config)
    assert not (tmp_path / "run").exists()
    train(config)


def test_not_finite_values_pass_where_the_first_step_checks_them() -> None:
    probe(MaskRCNNLoss(mask=not_finite), 4, require_finite=False)
    with pytest.raises(InputError, match="no gradient"):
        probe(MaskRCNNLoss(mask=no_gradient), 4, require_finite=False)


def no_penalty(model: nn.Module) -> Tensor:
    return torch.tensor(0.5)


def test_the_regularization_term_is_probed_on_the_model_alone() -> None:
    loss = MaskRCNNLoss(regularization=no_penalty)
    probe(loss, 4)
    with pytest.raises(InputError, match="loss_regularization of the model has no gradient"):
        probe(loss, 4, nn.Linear(2, 2))
    probe(MaskRCNNLoss(regularization=WeightDecayLoss()), 4, nn.Linear(2, 2))


def test_the_statistics_of_a_probed_copy_do_not_change() -> None:
    loss = MaskRCNNLoss(classification=SeesawLoss(4))
    probe_copy(loss, 4, nn.Linear(2, 2))
    assert loss.classification.class_counts.sum() == 0
    # The test can fail: the probe itself counts its 12 RoIs.
    probe(loss, 4)
    assert loss.classification.class_counts.sum() > 0


class Uncopyable(nn.Module):
    """A mask term that counts its calls and cannot be copied."""

    def __init__(self, *, fails: bool) -> None:
        super().__init__()
        self.fails = fails
        self.register_buffer("calls", torch.tensor(5))

    def __deepcopy__(self, memo: Any) -> Uncopyable:
        raise TypeError("holds a lock")

    def forward(self, mask_logits: Tensor, mask_targets: Tensor) -> Tensor:
        self.calls += 1
        return raising(mask_logits, mask_targets) if self.fails else my_mask_loss(mask_logits, mask_targets)


@pytest.mark.parametrize("fails", [False, True])
def test_the_state_of_a_loss_that_cannot_be_copied_is_restored(fails: bool) -> None:
    loss = MaskRCNNLoss(mask=Uncopyable(fails=fails))
    with pytest.raises(InputError, match="no such thing") if fails else contextlib.nullcontext():
        probe_copy(loss, 4, nn.Linear(2, 2))
    assert loss.mask.calls == 5
