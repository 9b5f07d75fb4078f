"""`maskloss.losses.modules`, and the base class of each family of losses."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from maskloss import losses
from maskloss.losses.boxes import BoxLoss
from maskloss.losses.checks import check_positive
from maskloss.losses.classification import ClassLoss
from maskloss.losses.modules import LossModule, MaskLoss
from maskloss.losses.objectness import ObjectnessLoss
from maskloss.losses.regularization import RegularizationLoss

from .test_contract import OF_BOXES, OF_CLASSES, OF_MASKS, OF_OBJECTNESS


def scaled_difference(
    mask_logits: Tensor,
    mask_targets: Tensor,
    *,
    scale: float = 2.0,
    mode: str = "plain",
    reduction: str = "none",
) -> Tensor:
    """A mask loss of a user."""
    check_positive(scale=scale)
    return scale * (mask_logits - mask_targets).abs().mean(dim=(1, 2))


class ScaledDifference(MaskLoss):
    """Its Module."""

    def __init__(self, scale: float = 2.0, mode: str = "plain", reduction: str = "none") -> None:
        super().__init__(scaled_difference, scale=scale, mode=mode, reduction=reduction)


def test_a_module_calls_its_function_with_its_knobs_as_they_are_now():
    module = ScaledDifference(scale=3.0)
    logits, targets = torch.ones(2, 4, 4), torch.zeros(2, 4, 4)
    assert module(logits, targets).tolist() == [3, 3]
    assert module.knobs == {"scale": 3.0, "mode": "plain", "reduction": "none"}
    module.scale = 5.0
    assert module(logits, targets).tolist() == [5, 5]
    assert module.knobs["scale"] == 5


def test_the_constructor_calls_the_function_once_without_rois_to_check_the_knobs():
    calls = []

    def function(*arguments: Tensor, **knobs: float) -> Tensor:
        calls.append((*(tuple(argument.shape) for argument in arguments), knobs))
        return torch.zeros(0)

    LossModule(function, torch.zeros(0, 3), torch.zeros(0), gamma=1.5)
    assert calls == [((0, 3), (0,), {"gamma": 1.5})]
    with pytest.raises(ValueError, match="scale must be > 0 and finite, got -1"):
        ScaledDifference(scale=-1.0)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (ScaledDifference(), "ScaledDifference(scale=2, mode='plain')"),
        (
            ScaledDifference(1 / 3, "other", "sum"),
            "ScaledDifference(scale=0.333333, mode='other', reduction='sum')",
        ),
        (losses.MaskFocalLoss(alpha=None), "MaskFocalLoss(alpha=None, gamma=2)"),
        (losses.BoxGIoULoss(), "BoxGIoULoss()"),
    ],
)
def test_a_module_shows_its_knobs_but_not_the_default_reduction(module, expected):
    assert repr(module) == expected


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_has_the_same_knobs(make_copy):
    module = ScaledDifference(scale=4.0)
    twin = make_copy(module)
    assert twin.knobs == module.knobs
    assert twin(torch.ones(1, 2, 2), torch.zeros(1, 2, 2)).item() == 4
    twin.scale = 1.0
    assert module.knobs["scale"] == 4


REGULARIZATIONS = (losses.L1RegularizationLoss, losses.MatterportL2Loss, losses.WeightDecayLoss)


@pytest.mark.parametrize(
    ("family", "members"),
    [
        (MaskLoss, [case.module for case in OF_MASKS]),
        (BoxLoss, [case.module for case in OF_BOXES]),
        (ClassLoss, [case.module for case in OF_CLASSES]),
        (ObjectnessLoss, [case.module for case in OF_OBJECTNESS]),
        (RegularizationLoss, REGULARIZATIONS),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_modules_of_a_family_only_add_a_constructor(family, members):
    for member in members:
        assert issubclass(member, family), member
        assert {name for name in vars(member) if not name.startswith("__")} == set(), member
