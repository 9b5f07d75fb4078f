"""Accuracy in float32, also of large masks, and losses without a host sync."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torchvision.ops
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from maskloss import losses
from maskloss.losses import BoxRegression, mask_lovasz_loss

from .test_contract import ALL, OF_BOXES, OF_MASKS, each, inputs
from .test_criterion import Batches


def square_in(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random logits and a square of half the side, as dense masks have them."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.zeros(1, size, size)
    target[:, size // 4 : 3 * size // 4, size // 4 : 3 * size // 4] = 1
    return torch.randn(1, size, size, generator=generator), target


def gradient(function: Any, logits: Tensor, target: Tensor, **knobs: Any) -> Tensor:
    logits = logits.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(function(logits, target, **knobs).sum(), logits)
    return found.double()


@each(OF_MASKS)
@pytest.mark.parametrize(
    ("objects", "sure"),
    [("square", 0.0), ("square", 8.0), ("square", 12.0), ("all", 0.0), ("none", 0.0), ("none", 8.0)],
)
def test_values_and_gradients_of_a_large_mask_in_float32_are_those_of_float64(case, objects, sure):
    logits, target = square_in(1024)
    target = {"square": target, "all": torch.ones_like(target), "none": torch.zeros_like(target)}[objects]
    logits = logits + sure * (2 * target - 1)
    value = case.function(logits, target, **case.knobs).double()
    torch.testing.assert_close(
        value, case.function(logits.double(), target.double(), **case.knobs), rtol=1e-4, atol=0
    )
    # The slope of torch's cross-entropy, p - t, has three digits there, in torchvision too.
    if sure < 12 or case.function is not losses.mask_bce_loss:
        found = gradient(case.function, logits, target, **case.knobs)
        expected = gradient(case.function, logits.double(), target.double(), **case.knobs)
        assert (found - expected).norm() <= 1e-4 * expected.norm()
        assert not ((found == 0) & (expected != 0)).any()


def test_lovasz_at_2048_px_is_exact_too():
    # The size at which the steps as differences of 1 - I / U were 8 % off.
    logits, target = square_in(2048)
    found = gradient(mask_lovasz_loss, logits, target)
    expected = gradient(mask_lovasz_loss, logits.double(), target.double())
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert not ((found == 0) & (expected != 0)).any()


@pytest.mark.parametrize("targets", [[1.0, 0.0, 0.3], [0.0, 0.0, 0.0]])
@pytest.mark.parametrize("logits", [[0.0, -0.0, 0.0], [1.0, -1.0, 0.0]])
def test_region_losses_have_a_slope_at_a_logit_of_zero(logits, targets):
    # sigmoid's slope is 1/4 there; the two branches of `probabilities` meet.
    x = torch.tensor([[logits]], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([[targets]], dtype=torch.float64)
    p = x.sigmoid()
    expected = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
    found = losses.mask_dice_loss(x, t)
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), x)[0], torch.autograd.grad(expected, x)[0], rtol=1e-12, atol=1e-15
    )


def brute_force_lovasz(logits: Tensor, target: Tensor) -> float:
    """Algorithm 1 of the paper with Δ as a set function: 1 - IoU of the mask that is wrong in these pixels."""
    wanted = target.flatten().bool().tolist()
    errors = [1 - (x if t else -x) for x, t in zip(logits.flatten().tolist(), wanted, strict=True)]
    order = sorted(range(len(errors)), key=lambda i: -errors[i])

    def jaccard(wrong: set[int]) -> float:
        mask = {i for i, t in enumerate(wanted) if t != (i in wrong)}
        truth = {i for i, t in enumerate(wanted) if t}
        union = mask | truth
        return 1 - len(mask & truth) / len(union) if union else 0.0

    total, before, wrong = 0.0, 0.0, set()
    for i in order:
        wrong.add(i)
        after = jaccard(wrong)
        total += max(errors[i], 0.0) * (after - before)
        before = after
    return total


@pytest.mark.parametrize("objects", ["some", "none", "all", "one"])
def test_lovasz_is_the_papers_set_function(objects, generator):
    logits = torch.randn(3, 5, 5, generator=generator, dtype=torch.float64)
    target = (torch.rand(3, 5, 5, generator=generator) > 0.6).double()
    if objects == "none":
        target = torch.zeros_like(target)
    elif objects == "all":
        target = torch.ones_like(target)
    elif objects == "one":
        target = torch.zeros_like(target)
        target[:, 2, 3] = 1
    expected = [brute_force_lovasz(x, t) for x, t in zip(logits, target, strict=True)]
    torch.testing.assert_close(mask_lovasz_loss(logits, target), torch.tensor(expected, dtype=torch.float64))


# Host syncs


class HostSyncs(TorchDispatchMode):
    """Record the operations that synchronize the host with a device: a result's size or a branch depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if "index" in name:
            for argument in args:
                if isinstance(argument, list | tuple):
                    by_bool = [
                        i for i in argument if isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)
                    ]
                    self.found += [name] * len(by_bool)
        if any(part in name for part in ("nonzero", "_local_scalar_dense", "masked_select", "unique")):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@each(ALL)
def test_no_loss_synchronizes_with_a_device(case, generator):
    predictions, arguments = inputs(case, generator)
    predictions.requires_grad_()
    given = arguments(predictions)
    with HostSyncs() as counted:
        case.function(*given, **case.knobs).sum().backward()
    assert counted.found == []


def other_losses() -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    """The public losses that are not in the contract test's list, each with arguments for it."""
    classes = torch.randn(6, 4, requires_grad=True), torch.tensor([0, 3, 1, 1, 0, 2])
    masks = torch.randn(3, 4, 6, 6, requires_grad=True), torch.rand(3, 6, 6), torch.tensor([1, 3, 2])
    model = (nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)),)
    of_own_class = masks[0][:, 1], masks[1]
    return {
        "ActiveClassCrossEntropyLoss": (
            losses.ActiveClassCrossEntropyLoss([True, True, False, True]),
            classes,
        ),
        "ClassWeightedCrossEntropyLoss": (losses.ClassWeightedCrossEntropyLoss([1.0, 2, 3, 4]), classes),
        "SeesawLoss": (losses.SeesawLoss(4), classes),
        "EqualizationLossV2": (losses.EqualizationLossV2(4), classes),
        "FederatedLoss": (losses.FederatedLoss([0, 5, 3, 1], num_classes=2), classes),
        "ClassAgnosticMaskLoss": (losses.ClassAgnosticMaskLoss(losses.MaskDiceLoss()), masks),
        "MaskBySupervision": (
            losses.MaskBySupervision(),
            (of_own_class[0], losses.MaskLabels.of_masks(masks[1])),
        ),
        "WeightedSum": (losses.WeightedSum([losses.MaskBCELoss(), losses.MaskDiceLoss()]), of_own_class),
        "L1RegularizationLoss": (losses.L1RegularizationLoss(), model),
        "MatterportL2Loss": (losses.MatterportL2Loss(), model),
        "WeightDecayLoss": (losses.WeightDecayLoss(), model),
    }


def test_every_public_loss_is_checked_here():
    public = {name for name in losses.__all__ if isinstance(getattr(losses, name), type)}
    public = {name for name in public if issubclass(getattr(losses, name), nn.Module)}
    assert public == {case.module.__name__ for case in ALL} | set(other_losses()) | {"MaskRCNNLoss"}


@pytest.mark.parametrize("name", other_losses())
def test_no_other_loss_synchronizes_with_a_device(name):
    loss, arguments = other_losses()[name]
    with HostSyncs() as counted:
        values = loss(*arguments)
        (values[0] if isinstance(values, tuple) else values).sum().backward()
    assert counted.found == []


@pytest.mark.parametrize("preset", ["torchvision", "detectron2", "matterport", "paper", "aligned"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_criterion_does_not_synchronize_with_a_device(preset, weighted, generator):
    active = torch.tensor([True, True, False]) if preset == "matterport" else None
    loss = losses.MaskRCNNLoss.preset(preset, active_classes=active)
    if weighted:
        # Its divisor is a sum of weights, a tensor on the device.
        loss.classification = losses.ClassWeightedCrossEntropyLoss([1.0, 2.0, 3.0])
    batches = Batches(generator)
    with HostSyncs() as counted:
        sum(batches.losses(loss).values()).backward()
    assert counted.found == []


def test_a_synchronization_is_detected():
    with HostSyncs() as counted:
        torchvision.ops.generalized_box_iou_loss(torch.rand(2, 4), torch.rand(2, 4))
        torch.ones(1).item()
    assert len(counted.found) >= 2


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (losses.box_giou_loss, torchvision.ops.generalized_box_iou_loss),
        (losses.box_diou_loss, torchvision.ops.distance_box_iou_loss),
        (losses.box_ciou_loss, torchvision.ops.complete_box_iou_loss),
    ],
)
def test_boxes_and_gradients_are_torchvisions(ours, theirs, generator):
    low = 40 * torch.rand(200, 2, generator=generator, dtype=torch.float64)
    targets = torch.cat(
        [low, low + 5 + 20 * torch.rand(200, 2, generator=generator, dtype=torch.float64)], dim=1
    )
    shift = 12 * torch.randn(200, 2, generator=generator, dtype=torch.float64)
    # Some apart, some inside each other, some equal.
    boxes = (targets + shift.repeat(1, 2)).clone()
    boxes[:20] = targets[:20]
    boxes[20:40, 2:] -= 2
    boxes.requires_grad_()
    found = ours(BoxRegression(boxes, targets, lambda deltas: deltas))
    expected = theirs(boxes, targets, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    one, other = (torch.autograd.grad(values[20:].sum(), boxes)[0] for values in (found, expected))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@each(ALL)
def test_a_loss_of_each_roi_by_vmap_is_the_loss_of_all(case, generator):
    predictions, arguments = inputs(case, generator)
    expected = case.function(*arguments(predictions), **case.knobs)
    if case in OF_BOXES:
        wanted = [arguments(predictions)[0].target_deltas]

        def of_one(boxes: Tensor, target: Tensor) -> Tensor:
            regression = BoxRegression(boxes[None], target[None], lambda deltas: deltas)
            return case.function(regression, **case.knobs)[0]
    else:
        wanted = arguments(predictions)[1:]

        def of_one(*values: Tensor) -> Tensor:
            return case.function(*(value[None] for value in values), **case.knobs)[0]

    torch.testing.assert_close(torch.func.vmap(of_one)(predictions, *wanted), expected)


@pytest.mark.parametrize("gamma", [0.5, 1.5, 2.0, 3.7])
def test_focal_losses_of_right_and_certain_predictions_are_nearly_zero(gamma):
    logits, ones = torch.full((3, 4, 4), 40.0), torch.ones(3, 4, 4)
    # (1 - p)^γ times -log p, where 1 - p and -log p are e^-40 to float64's rounding, and α = 1/4.
    expected = torch.full((3,), 0.25 * math.exp(-40 * (gamma + 1)))
    torch.testing.assert_close(losses.mask_focal_loss(logits, ones, gamma=gamma), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(
        losses.objectness_focal_loss(logits[0, 0, :3], ones[0, 0, :3], gamma=gamma),
        expected,
        rtol=1e-4,
        atol=0,
    )
    # For targets that rounding has moved above 1, 1 - p_t is negative.
    beyond = logits.clone().requires_grad_()
    values = losses.mask_focal_loss(beyond, ones + 2e-7, gamma=gamma)
    (slope,) = torch.autograd.grad(values.sum(), beyond)
    assert values.abs().max() < 1e-6
    assert slope.isfinite().all()
    assert losses.objectness_focal_loss(logits[0, 0], ones[0, 0] + 2e-7, gamma=gamma).abs().max() < 1e-6
    assert losses.quality_focal_loss(logits[0, 0], ones[0, 0] + 2e-7, beta=gamma).abs().max() < 1e-4
    classes = torch.tensor([[60.0, 0.0, 0.0]])
    assert losses.class_focal_loss(classes, torch.tensor([0]), gamma=gamma) == 0
