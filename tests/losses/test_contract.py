"""Properties that all losses share: shapes, dtypes, empty input, extreme logits, Modules, torch.compile."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from maskloss import losses
from maskloss.losses import BoxRegression
from maskloss.training.loss_probe import probe

C, M = 5, 6


class Case(NamedTuple):
    """A loss as a function, its Module and their knobs."""

    function: Callable[..., Any]
    module: type[nn.Module]
    knobs: dict[str, Any]

    @property
    def name(self) -> str:
        return self.function.__name__


WEIGHTS = {"positive_weight": 3.0, "negative_weight": 0.5}
OF_MASKS = [
    Case(losses.mask_bce_loss, losses.MaskBCELoss, {}),
    Case(losses.mask_weighted_bce_loss, losses.MaskWeightedBCELoss, WEIGHTS),
    Case(losses.mask_focal_loss, losses.MaskFocalLoss, {"alpha": 0.4, "gamma": 1.5}),
    Case(losses.mask_boundary_bce_loss, losses.MaskBoundaryBCELoss, {"boundary_weight": 4.0, "width": 3}),
    Case(losses.mask_dice_loss, losses.MaskDiceLoss, {"smooth": 0.5}),
    Case(losses.mask_weighted_dice_loss, losses.MaskWeightedDiceLoss, {**WEIGHTS, "smooth": 0.5}),
    Case(losses.mask_background_dice_loss, losses.MaskBackgroundDiceLoss, {"smooth": 0.5}),
    Case(losses.mask_generalized_dice_loss, losses.MaskGeneralizedDiceLoss, {}),
    Case(
        losses.mask_tversky_loss,
        losses.MaskTverskyLoss,
        {"alpha": 0.2, "beta": 0.9, "gamma": 0.75, "smooth": 0.5},
    ),
    Case(losses.mask_lovasz_loss, losses.MaskLovaszLoss, {}),
]
OF_BOXES = [
    Case(losses.box_smooth_l1_loss, losses.BoxSmoothL1Loss, {"beta": 0.3}),
    Case(losses.box_balanced_l1_loss, losses.BoxBalancedL1Loss, {"alpha": 0.4, "gamma": 1.2, "beta": 0.9}),
    Case(losses.box_iou_loss, losses.BoxIoULoss, {}),
    Case(losses.box_giou_loss, losses.BoxGIoULoss, {}),
    Case(losses.box_diou_loss, losses.BoxDIoULoss, {}),
    Case(losses.box_ciou_loss, losses.BoxCIoULoss, {}),
]
OF_CLASSES = [
    Case(losses.class_focal_loss, losses.ClassFocalLoss, {"gamma": 1.5}),
    Case(losses.class_sigmoid_loss, losses.ClassSigmoidLoss, {}),
]
OF_OBJECTNESS = [
    Case(losses.objectness_focal_loss, losses.ObjectnessFocalLoss, {"alpha": 0.4, "gamma": 1.5}),
    Case(losses.quality_focal_loss, losses.QualityFocalLoss, {"beta": 1.5}),
]
OF_ALL_MASKS = [Case(losses.mask_softmax_loss, losses.MaskSoftmaxLoss, {})]
OF_POINTS = [Case(losses.mask_point_loss, losses.MaskPointLoss, {})]
OF_BOX_GRIDS = [Case(losses.mask_projection_loss, losses.MaskProjectionLoss, {})]
OF_COLORS = [
    Case(losses.mask_pairwise_loss, losses.MaskPairwiseLoss, {"color_threshold": 0.2, "dilation": 1})
]
#: Their Modules collect the statistics that the functions take; `test_long_tail` compares the two.
#: Its Module has a warm-up besides the function's knobs; `test_mask_weak` tests it.
OF_WARM_UP = [
    Case(
        losses.mask_box_loss,
        losses.MaskBoxLoss,
        {"pairwise_weight": 0.6, "color_threshold": 0.2, "dilation": 1},
    )
]
OF_GATHERED = [
    Case(losses.seesaw_loss, losses.SeesawLoss, {"class_counts": torch.tensor([0.0, 9.0, 1.0, 40.0, 3.0])}),
    Case(
        losses.equalization_loss_v2,
        losses.EqualizationLossV2,
        {"gradient_ratio": torch.tensor([0.0, 0.2, 0.9, 1.5, 100.0])},
    ),
    Case(
        losses.federated_loss,
        losses.FederatedLoss,
        {"counted_classes": torch.tensor([False, True, False, True, True])},
    ),
]
#: The losses whose targets have the shape of the predictions, or are classes, so that the best prediction is known.
WITH_TARGETS = [*OF_MASKS, *OF_BOXES, *OF_CLASSES, *OF_OBJECTNESS]
WITH_KNOBS = [*WITH_TARGETS, *OF_ALL_MASKS, *OF_POINTS, *OF_BOX_GRIDS, *OF_COLORS]
ALL = [*WITH_KNOBS, *OF_WARM_UP, *OF_GATHERED]
#: These return values and weights, or take a model: `test_classification` and `test_regularization` test them.
ELSEWHERE = {
    "active_class_cross_entropy_loss",
    "class_weighted_cross_entropy_loss",
    "l1_regularization_loss",
    "matterport_l2_loss",
    "weight_decay_loss",
}
#: Their gradient is not the derivative of their value, because their papers hold a weight constant.
WITH_A_CONSTANT_WEIGHT = (losses.box_ciou_loss, losses.seesaw_loss)
WITH_THEIR_OWN_GRADIENT = [case for case in ALL if case.function not in WITH_A_CONSTANT_WEIGHT]


def inputs(
    case: Case, generator: torch.Generator, count: int = 4, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Callable[[Tensor], tuple[Any, ...]]]:
    """Return predictions of `count` RoIs, and a function that makes the loss's arguments from predictions."""
    if case in OF_MASKS:
        predictions = 2 * torch.randn(count, M, M, generator=generator, dtype=dtype)
        targets = torch.rand(count, M, M, generator=generator, dtype=dtype)
        return predictions, lambda logits: (logits, targets)
    if case in OF_BOXES:
        low = 40 * torch.rand(count, 2, generator=generator, dtype=dtype)
        sides = 10 + 20 * torch.rand(count, 2, generator=generator, dtype=dtype)
        wanted = torch.cat([low, low + sides], dim=1)
        predictions = wanted + 3 * torch.randn(count, 4, generator=generator, dtype=dtype)
        return predictions, lambda boxes: (
            BoxRegression(boxes, wanted.to(boxes.dtype), lambda deltas: deltas),
        )
    if case in OF_ALL_MASKS:
        predictions = 2 * torch.randn(count, C, M, M, generator=generator, dtype=dtype)
        targets = torch.rand(count, M, M, generator=generator, dtype=dtype)
        labels = torch.randint(1, C, (count,), generator=generator)
        return predictions, lambda logits: (logits, targets, labels)
    if case in [*OF_POINTS, *OF_BOX_GRIDS, *OF_COLORS, *OF_WARM_UP]:
        predictions = 2 * torch.randn(count, M, M, generator=generator, dtype=dtype)
        grids = torch.rand(count, M, M, generator=generator, dtype=dtype)
        if case in OF_BOX_GRIDS:
            return predictions, lambda logits: (logits, grids)
        if case in [*OF_COLORS, *OF_WARM_UP]:
            # Colors that are close enough for some edges to count.
            crops = 0.1 * torch.rand(count, 3, M, M, generator=generator, dtype=dtype)
            return predictions, lambda logits: (logits, crops, grids)
        points = torch.rand(count, 10, 2, generator=generator, dtype=dtype)
        point_labels = torch.randint(-1, 2, (count, 10), generator=generator)
        return predictions, lambda logits: (logits, points, point_labels)
    if case in [*OF_CLASSES, *OF_GATHERED]:
        predictions = 2 * torch.randn(count, C, generator=generator, dtype=dtype)
        labels = torch.randint(C, (count,), generator=generator)
        return predictions, lambda logits: (logits, labels)
    predictions = 2 * torch.randn(count, generator=generator, dtype=dtype)
    targets = torch.rand(count, generator=generator, dtype=dtype)
    return predictions, lambda logits: (logits, targets)


def each(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def test_every_exported_loss_is_tested_here():
    exported = {name for name in losses.__all__ if "loss" in name and name.islower()}
    assert exported == {case.name for case in ALL} | ELSEWHERE


@each(WITH_KNOBS)
def test_module_and_function_have_the_same_knobs_and_defaults(case):
    knobs = [
        (parameter.name, parameter.default, parameter.annotation)
        for parameter in inspect.signature(case.function).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    assert knobs == [
        (parameter.name, parameter.default, parameter.annotation)
        for parameter in inspect.signature(case.module).parameters.values()
    ]


def another(knob: str) -> float:
    """Return a valid value of a knob that differs from the one in its case."""
    return {"width": 5, "dilation": 2}.get(knob, 0.77)


@each(WITH_KNOBS)
def test_the_module_is_the_function_with_its_knobs(case, generator):
    predictions, arguments = inputs(case, generator)
    module = case.module(**case.knobs)
    expected = case.function(*arguments(predictions), **case.knobs)
    torch.testing.assert_close(module(*arguments(predictions)), expected, rtol=0, atol=0)
    for knob in case.knobs:
        assert knob in repr(module)
        other = case.module(**{**case.knobs, knob: another(knob)})
        assert not torch.equal(other(*arguments(predictions)), expected), knob
    module.reduction = "mean"
    torch.testing.assert_close(module(*arguments(predictions)), expected.mean())
    summed = case.module(**case.knobs, reduction="sum")(*arguments(predictions))
    torch.testing.assert_close(summed, expected.sum())
    with pytest.raises(ValueError, match="reduction"):
        case.module(**case.knobs, reduction="average")


@each(ALL)
def test_reductions(case, generator):
    predictions, arguments = inputs(case, generator)
    values = case.function(*arguments(predictions), **case.knobs)
    assert values.shape == (4,)
    for reduction in ("sum", "mean"):
        value = case.function(*arguments(predictions), **case.knobs, reduction=reduction)
        torch.testing.assert_close(value, getattr(values, reduction)())
    with pytest.raises(ValueError, match="reduction"):
        case.function(*arguments(predictions), **case.knobs, reduction="average")


@each(ALL)
def test_no_rois_give_zero_and_a_gradient(case, generator):
    predictions, arguments = inputs(case, generator, count=0)
    predictions.requires_grad_()
    for reduction in ("none", "sum", "mean"):
        value = case.function(*arguments(predictions), **case.knobs, reduction=reduction)
        assert value.shape == ((0,) if reduction == "none" else ())
        (gradient,) = torch.autograd.grad(value.sum(), predictions)
        assert value.sum() == 0
        assert gradient.shape == predictions.shape


@each(ALL)
def test_permuting_rois_permutes_values(case, generator):
    predictions, arguments = inputs(case, generator, count=6)
    values = case.function(*arguments(predictions), **case.knobs)
    for roi in range(6):
        rest = torch.randperm(6, generator=generator)
        rest = torch.cat([torch.tensor([roi]), rest[rest != roi]])

        def permuted(argument: Any, order: Tensor = rest) -> Any:
            if isinstance(argument, BoxRegression):
                return BoxRegression(argument.deltas[order], argument.target_deltas[order], argument.decode)
            return argument[order]

        found = case.function(*(permuted(argument) for argument in arguments(predictions)), **case.knobs)
        torch.testing.assert_close(found, values[rest])


@each(WITH_THEIR_OWN_GRADIENT)
def test_gradcheck(case, generator):
    predictions, arguments = inputs(case, generator, count=3)
    assert torch.autograd.gradcheck(
        lambda values: case.function(*arguments(values), **case.knobs), predictions.requires_grad_()
    )


@each([case for case in ALL if case not in OF_BOXES])
@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_values_and_gradients_are_finite_at_extreme_logits(case, generator, scale):
    predictions, arguments = inputs(case, generator, count=6, dtype=torch.float32)
    predictions = (scale * predictions.sign()).requires_grad_()
    values = case.function(*arguments(predictions), **case.knobs)
    (gradient,) = torch.autograd.grad(values.sum(), predictions)
    assert values.isfinite().all()
    assert gradient.isfinite().all()


@each(WITH_TARGETS)
def test_right_predictions_give_finite_gradients(case, generator):
    predictions, arguments = inputs(case, generator, dtype=torch.float32)
    call = arguments(predictions)
    if isinstance(call[0], BoxRegression):
        wanted = call[0].target_deltas.clone().requires_grad_()
        call = (BoxRegression(wanted, call[0].target_deltas, lambda deltas: deltas),)
    elif case in OF_CLASSES:
        wanted = (400.0 * nn.functional.one_hot(call[1], C) - 200).requires_grad_()
        call = (wanted, call[1])
    else:
        targets = (call[1] > 0.5).float()
        wanted = (200 * targets - 100).requires_grad_()
        call = (wanted, targets)
    values = case.function(*call, **case.knobs)
    (gradient,) = torch.autograd.grad(values.sum(), wanted)
    assert gradient.isfinite().all()
    worst = 1e-4 if case.function is losses.mask_tversky_loss else 1e-6
    assert values.max() <= worst


@pytest.mark.parametrize("logit", [0.0, 20.0, 1e4])
@pytest.mark.parametrize(
    ("function", "exponent"),
    [
        (losses.mask_focal_loss, "gamma"),
        (losses.mask_tversky_loss, "gamma"),
        (losses.class_focal_loss, "gamma"),
        (losses.objectness_focal_loss, "gamma"),
        (losses.quality_focal_loss, "beta"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_exponents_below_one_have_finite_gradients_where_nothing_is_wrong(function, exponent, logit):
    if function is losses.class_focal_loss:
        predictions, targets = torch.tensor([[logit, -logit], [-logit, logit]]), torch.tensor([0, 1])
    else:
        predictions = torch.tensor([logit, -logit])
        # At 0 the quality focal loss is right where the quality is 1/2.
        targets = torch.full((2,), 0.5) if logit == 0 else torch.tensor([1.0, 0.0])
        if function in (losses.mask_focal_loss, losses.mask_tversky_loss):
            predictions, targets = (
                values[:, None, None].expand(2, 3, 3) for values in (predictions, targets)
            )
    predictions = predictions.clone().requires_grad_()
    values = function(predictions, targets, **{exponent: 0.5})
    (gradient,) = torch.autograd.grad(values.sum(), predictions)
    assert values.isfinite().all()
    assert gradient.isfinite().all()


@each(ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(case, generator, dtype):
    predictions, arguments = inputs(case, generator, dtype=torch.float32)
    # Only the predictions are rounded to half precision.
    call = arguments(predictions.to(dtype))
    values = case.function(*call, **case.knobs)
    assert values.dtype == torch.float32
    in_float32 = arguments(predictions.to(dtype).float())
    if case in OF_BOXES:
        targets = call[0].target_deltas.float()
        in_float32 = (BoxRegression(in_float32[0].deltas, targets, lambda deltas: deltas),)
    torch.testing.assert_close(values, case.function(*in_float32, **case.knobs), rtol=0, atol=0)


@each(ALL)
def test_float64_stays_float64(case, generator):
    predictions, arguments = inputs(case, generator)
    assert case.function(*arguments(predictions), **case.knobs).dtype == torch.float64


@each([*OF_MASKS, *OF_OBJECTNESS, *OF_ALL_MASKS, *OF_BOX_GRIDS])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16, torch.bfloat16])
def test_targets_of_any_dtype_are_computed_in_float32(case, generator, dtype):
    predictions, arguments = inputs(case, generator, dtype=torch.float32)
    _, targets, *labels = arguments(predictions)
    targets = targets.to(dtype) if dtype.is_floating_point else (targets > 0.5).to(dtype)
    values = case.function(predictions, targets, *labels, **case.knobs)
    expected = case.function(predictions, targets.float(), *labels, **case.knobs)
    torch.testing.assert_close(values, expected, rtol=0, atol=0)


@each([*OF_MASKS, *OF_OBJECTNESS])
def test_shapes_that_differ_raise_with_both(case, generator):
    predictions, arguments = inputs(case, generator)
    _, targets = arguments(predictions)
    with pytest.raises(ValueError, match=r"shapes differ: .*\(4.*\(1"):
        case.function(predictions, targets[:1], **case.knobs)


@each([*OF_MASKS, *OF_BOX_GRIDS])
def test_dense_logits_keep_their_first_axes(case, generator):
    logits = torch.randn(2, 3, 5, 7, generator=generator)
    targets = torch.rand(2, 3, 5, 7, generator=generator)
    values = case.function(logits, targets, **case.knobs)
    expected = case.function(logits.flatten(0, 1), targets.flatten(0, 1), **case.knobs)
    assert values.shape == (2, 3)
    torch.testing.assert_close(values.flatten(), expected)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@each(ALL)
def test_compiled_equals_eager_without_a_break(case, generator, fresh_compiler):
    compiled = torch.compile(
        lambda *arguments: case.function(*arguments, **case.knobs), backend="aot_eager", fullgraph=True
    )
    predictions, arguments = inputs(case, generator, dtype=torch.float32)
    torch.testing.assert_close(
        compiled(*arguments(predictions)), case.function(*arguments(predictions), **case.knobs)
    )


BAD_KNOBS = [
    (losses.mask_weighted_bce_loss, losses.MaskWeightedBCELoss, {**WEIGHTS, "positive_weight": -1.0}),
    (losses.mask_weighted_bce_loss, losses.MaskWeightedBCELoss, {**WEIGHTS, "negative_weight": float("nan")}),
    (losses.mask_focal_loss, losses.MaskFocalLoss, {"alpha": 1.5}),
    (losses.mask_focal_loss, losses.MaskFocalLoss, {"gamma": -0.1}),
    (losses.mask_boundary_bce_loss, losses.MaskBoundaryBCELoss, {"boundary_weight": -1.0}),
    (losses.mask_boundary_bce_loss, losses.MaskBoundaryBCELoss, {"width": 4}),
    (losses.mask_dice_loss, losses.MaskDiceLoss, {"smooth": 0.0}),
    (losses.mask_background_dice_loss, losses.MaskBackgroundDiceLoss, {"smooth": 0.0}),
    (losses.mask_weighted_dice_loss, losses.MaskWeightedDiceLoss, {**WEIGHTS, "smooth": 0.0}),
    (losses.mask_weighted_dice_loss, losses.MaskWeightedDiceLoss, {**WEIGHTS, "negative_weight": -1.0}),
    (losses.mask_tversky_loss, losses.MaskTverskyLoss, {"alpha": -1.0}),
    (losses.mask_tversky_loss, losses.MaskTverskyLoss, {"beta": -1.0}),
    (losses.mask_tversky_loss, losses.MaskTverskyLoss, {"gamma": 0.0}),
    (losses.mask_tversky_loss, losses.MaskTverskyLoss, {"smooth": 0.0}),
    (losses.box_smooth_l1_loss, losses.BoxSmoothL1Loss, {"beta": -1.0}),
    (losses.box_balanced_l1_loss, losses.BoxBalancedL1Loss, {"alpha": 0.0}),
    (losses.box_balanced_l1_loss, losses.BoxBalancedL1Loss, {"gamma": 0.0}),
    (losses.box_balanced_l1_loss, losses.BoxBalancedL1Loss, {"beta": 0.0}),
    (losses.box_balanced_l1_loss, losses.BoxBalancedL1Loss, {"beta": 1.5}),
    (losses.box_balanced_l1_loss, losses.BoxBalancedL1Loss, {"alpha": 0.01}),
    (losses.box_smooth_l1_loss, losses.BoxSmoothL1Loss, {"beta": float("nan")}),
    (losses.mask_dice_loss, losses.MaskDiceLoss, {"smooth": float("inf")}),
    (losses.mask_weighted_bce_loss, losses.MaskWeightedBCELoss, {**WEIGHTS, "positive_weight": float("inf")}),
    (losses.class_focal_loss, losses.ClassFocalLoss, {"gamma": -1.0}),
    (losses.objectness_focal_loss, losses.ObjectnessFocalLoss, {"alpha": -0.5}),
    (losses.objectness_focal_loss, losses.ObjectnessFocalLoss, {"gamma": -1.0}),
    (losses.quality_focal_loss, losses.QualityFocalLoss, {"beta": -1.0}),
]


@pytest.mark.parametrize(
    ("function", "module", "knobs"), BAD_KNOBS, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_knob_out_of_its_range_raises_by_name_in_function_and_module(function, module, knobs, generator):
    case = next(case for case in ALL if case.function is function)
    wrong = [knob for knob, value in knobs.items() if value != {**case.knobs, **WEIGHTS}.get(knob)]
    predictions, arguments = inputs(case, generator)
    with pytest.raises(ValueError, match=wrong[0]):
        module(**knobs)
    with pytest.raises(ValueError, match=wrong[0]):
        function(*arguments(predictions), **knobs)


PLACES = [
    *((case, "mask") for case in OF_MASKS),
    *((case, "box") for case in OF_BOXES),
    *((case, "rpn_box") for case in OF_BOXES),
    *((case, "classification") for case in OF_CLASSES),
    *((case, "objectness") for case in OF_OBJECTNESS),
]


@pytest.mark.parametrize(("case", "place"), PLACES, ids=lambda value: getattr(value, "name", value))
def test_every_loss_is_a_valid_term_of_the_criterion(case, place):
    terms = {place: case.module(**case.knobs)}
    probe(losses.MaskRCNNLoss(**terms), num_classes=C)
    # As a function with its knobs, too.
    probe(losses.MaskRCNNLoss(**{place: partial(case.function, **case.knobs)}), num_classes=C)
