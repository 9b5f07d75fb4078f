"""maskloss/training/loss_config.py: losses from a preset, an import path or a mapping, and faults in them."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskloss import LossWeights, MaskRCNNLoss, MaskTargets
from maskloss.errors import InputError
from maskloss.losses import (
    BoxGIoULoss,
    BoxSmoothL1Loss,
    MaskDiceLoss,
    MatterportL2Loss,
    SeesawLoss,
    WeightedSum,
    per_positive,
    per_positive_coordinate,
)
from maskloss.training.loss_config import make_loss

HERE = "tests.training.test_loss_config"


def my_mask_loss(mask_logits: Tensor, mask_targets: Tensor) -> Tensor:
    return (mask_logits.sigmoid() - mask_targets).abs()


def scalar(mask_logits: Tensor, mask_targets: Tensor) -> Tensor:
    return my_mask_loss(mask_logits, mask_targets).mean()


def not_finite(mask_logits: Tensor, mask_targets: Tensor) -> Tensor:
    return (mask_logits.mean((1, 2)) - 1e6).log()


def exits(mask_logits: Tensor, mask_targets: Tensor) -> Tensor:
    sys.exit(3)


def of_nothing(mask_logits: Tensor, mask_targets: Tensor) -> Tensor:
    return torch.zeros(len(mask_logits), requires_grad=True)


def of_three(model: nn.Module) -> Tensor:
    return torch.zeros(3, requires_grad=True)


def not_a_number(model: nn.Module) -> Tensor:
    return next(model.parameters()).sum() * float("nan")


def whole() -> MaskRCNNLoss:
    return MaskRCNNLoss(mask=my_mask_loss)


class NeedsArguments(nn.Module):
    def __init__(self, knob: float) -> None:
        super().__init__()


A_NUMBER = 3


# Valid configs.


def test_a_preset_by_name_and_parts_replaced():
    loss = make_loss(
        {
            "preset": "matterport",
            "mask": f"{HERE}.my_mask_loss",
            "box": {"class_path": "maskloss.losses.BoxSmoothL1Loss", "init_args": {"beta": 0.5}},
            "rpn_box": "maskloss.losses.BoxGIoULoss",
            "weights": {"mask": 2.0},
            "mask_targets": {"aligned": True},
            "normalizers": {"box": "maskloss.losses.per_positive"},
        }
    )
    assert loss.mask is my_mask_loss
    assert isinstance(loss.box, BoxSmoothL1Loss)
    assert loss.box.beta == 0.5
    assert isinstance(loss.rpn_box, BoxGIoULoss)
    assert loss.weights == LossWeights(mask=2.0)
    # Of the preset's own what was not replaced stays: binary targets, RPN boxes over coordinates, L2.
    assert loss.mask_targets == MaskTargets(aligned=True, binary=True)
    assert loss.normalizers["box"] is per_positive
    assert loss.normalizers["rpn_box"] is per_positive_coordinate
    assert isinstance(loss.regularization, MatterportL2Loss)


def test_nothing_replaced_is_torchvision_and_weights_add_to_the_presets():
    assert repr(make_loss({})) == repr(MaskRCNNLoss())
    assert make_loss({"preset": "paper", "weights": {"mask": 2.0}}).weights == LossWeights(
        rpn_box=10.0, mask=2.0
    )
    assert make_loss({"preset": "matterport", "regularization": None}).regularization is None


def test_arguments_may_be_made_the_same_way():
    loss = make_loss(
        {
            "mask": {
                "class_path": "maskloss.losses.WeightedSum",
                "init_args": {
                    "terms": [
                        {"class_path": "torch.nn.Identity"},
                        {"class_path": "maskloss.losses.MaskDiceLoss", "init_args": {"smooth": 0.5}},
                    ],
                    "weights": [1.0, 3.0],
                },
            },
            "classification": {"class_path": "maskloss.losses.SeesawLoss", "init_args": {"num_classes": 4}},
        }
    )
    assert isinstance(loss.mask, WeightedSum)
    assert isinstance(loss.mask.terms[0], nn.Identity)
    assert isinstance(loss.mask.terms[1], MaskDiceLoss)
    assert loss.mask.terms[1].smooth == 0.5
    assert isinstance(loss.classification, SeesawLoss)


# Faults.


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mask": "nowhere.to.be_found"}, "--loss mask 'nowhere.to.be_found': cannot be imported: No module"),
        ({"mask": f"{HERE}.nothing"}, "cannot be imported: module .* has no attribute 'nothing'"),
        ({"mask": f"{HERE}.A_NUMBER"}, "--loss mask .*: must be callable, but is a int"),
        ({"mask": 3}, "--loss mask: expected an import path, or class_path with init_args, got 3"),
        ({"mask": {"class": "torch.nn.Identity"}}, "--loss mask: expected an import path"),
        (
            {"box": f"{HERE}.NeedsArguments"},
            r'--loss box: NeedsArguments needs knob; write \{"class_path": ".*", "init_args": \{"knob": \.\.\.\}\}',
        ),
        (
            {
                "mask": {
                    "class_path": "maskloss.losses.MaskWeightedBCELoss",
                    "init_args": {"positive_weight": 2},
                }
            },
            "--loss mask: MaskWeightedBCELoss needs negative_weight; write",
        ),
        (
            {"box": {"class_path": "maskloss.losses.BoxSmoothL1Loss", "init_args": {"beta": 1, "betta": 1}}},
            "--loss box init_args: BoxSmoothL1Loss has no argument betta; it has beta",
        ),
        (
            {"box": {"class_path": "maskloss.losses.BoxSmoothL1Loss", "init_args": {"beta": -1}}},
            "--loss box: cannot be made: beta must be >= 0",
        ),
        ({"masks": f"{HERE}.my_mask_loss"}, "--loss: no key is named masks; available: preset, objectness"),
        ({"preset": "caffe"}, "--loss preset 'caffe': no such preset"),
        ({"weights": {"mask": -1}}, "--loss: the weight of mask must be"),
        ({"weights": {"msk": 1}}, "--loss weights msk: unknown; available: objectness, .*keypoint"),
        ({"weights": 3}, "--loss weights: expected a mapping, got 3"),
        (
            {"mask_targets": {"alligned": True}},
            "--loss mask_targets alligned: unknown; available: aligned, binary",
        ),
        (
            {"normalizers": {"bx": "maskloss.losses.per_positive"}},
            "--loss normalizers bx: unknown; available: objectness",
        ),
        ({"normalizers": {"box": "nowhere.f"}}, "--loss normalizers box 'nowhere.f': cannot be imported"),
    ],
)
def test_a_fault_in_a_config_is_named_with_its_key(config: Any, message: str):
    with pytest.raises(InputError, match=message):
        make_loss(config)


@pytest.mark.parametrize("config", ["maskloss.losses.mask_dice_loss", "maskloss.losses.MaskDiceLoss"])
def test_a_term_in_the_place_of_a_loss_is_told_where_to_go(config: str) -> None:
    with pytest.raises(InputError, match=rf"for a single term, write --loss '\{{mask: {config}\}}'"):
        make_loss(config)
