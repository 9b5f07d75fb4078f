"""`maskloss.losses.boxes`."""

import math

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou, complete_box_iou_loss

from maskloss import BoxRegression, losses
from maskloss.losses import (
    BoxGIoULoss,
    BoxSmoothL1Loss,
    box_balanced_l1_loss,
    box_ciou_loss,
    box_diou_loss,
    box_giou_loss,
    box_iou_loss,
    box_smooth_l1_loss,
)
from tests import reference


def of_deltas(deltas: torch.Tensor, target_deltas: torch.Tensor | None = None) -> BoxRegression:
    return BoxRegression(deltas, torch.zeros_like(deltas) if target_deltas is None else target_deltas)


def of_boxes(boxes: torch.Tensor, target_boxes: torch.Tensor) -> BoxRegression:
    """A regression whose deltas are the boxes themselves."""
    return BoxRegression(boxes, target_boxes, lambda deltas: deltas)


def random_boxes(count: int, generator: torch.Generator) -> torch.Tensor:
    low = 10 * torch.rand(count, 2, generator=generator, dtype=torch.float64)
    return torch.cat(
        [low, low + 1 + 10 * torch.rand(count, 2, generator=generator, dtype=torch.float64)], dim=1
    )


# BoxRegression


def test_boxes_are_decoded_on_first_use_and_once():
    calls = []
    deltas, target_deltas = torch.zeros(1, 4), torch.ones(1, 4)
    regression = BoxRegression(deltas, target_deltas, lambda encoded: calls.append(encoded) or encoded + 1)
    assert calls == []
    assert regression.boxes.tolist() == [[1] * 4]
    assert regression.target_boxes.tolist() == [[2] * 4]
    assert regression.boxes is regression.boxes
    assert len(calls) == 2
    assert calls[0] is deltas
    assert calls[1] is target_deltas


def test_boxes_carry_gradients_to_the_deltas():
    deltas = torch.tensor([[0.5, -0.5, 0.1, 0.2]], requires_grad=True)
    proposals = torch.tensor([[10.0, 20.0, 30.0, 60.0]])
    coder = BoxCoder(weights=(10.0, 10.0, 5.0, 5.0))
    regression = BoxRegression(
        deltas, torch.zeros(1, 4), lambda encoded: coder.decode_single(encoded, proposals)
    )
    regression.boxes[0, 0].backward()
    # x1 = (cx + dx w / 10) - w exp(dw / 5) / 2, and w = 20: d/d(dx) = 2, d/d(dw) = -2 exp(0.02).
    torch.testing.assert_close(deltas.grad, torch.tensor([[2.0, 0.0, -2.0 * math.exp(0.02), 0.0]]))
    torch.testing.assert_close(regression.target_boxes, proposals)


def test_boxes_that_were_first_read_without_gradients_have_them_later():
    deltas = torch.tensor([[0.0, 0.0, 2.0, 2.0]], requires_grad=True)
    regression = BoxRegression(deltas, torch.tensor([[1.0, 1.0, 3.0, 3.0]]), lambda encoded: 1.0 * encoded)
    with torch.no_grad():
        overlap = box_iou(regression.boxes, regression.target_boxes).diagonal()
    assert not overlap.requires_grad
    (overlap * box_giou_loss(regression)).sum().backward()
    assert deltas.grad.count_nonzero() == 4
    # And what has gradients is kept, under no_grad too.
    boxes = regression.boxes
    with torch.no_grad():
        assert regression.boxes is boxes


def test_boxes_without_decode_raise():
    with pytest.raises(ValueError, match="made without `decode`"):
        _ = of_deltas(torch.zeros(1, 4)).boxes


def test_deltas_of_different_shapes_raise():
    with pytest.raises(ValueError, match=r"deltas \(2, 4\), target_deltas \(1, 4\)"):
        BoxRegression(torch.zeros(2, 4), torch.zeros(1, 4))


# box_smooth_l1_loss


def test_smooth_l1_by_hand():
    # beta 1: |0.5| < 1 costs 0.5² / 2 = 0.125; |-2| costs 2 - 0.5 = 1.5; 0 costs 0; |1| costs 1 - 0.5 = 0.5.
    values = box_smooth_l1_loss(of_deltas(torch.tensor([[0.5, -2.0, 0.0, 1.0]])), beta=1.0)
    torch.testing.assert_close(values, torch.tensor([2.125]))


def test_smooth_l1_is_linear_beyond_beta():
    # beta 1/9: |0.5| costs 0.5 - 1/18 a coordinate.
    values = box_smooth_l1_loss(of_deltas(torch.full((1, 4), 0.5)), beta=1 / 9)
    torch.testing.assert_close(values, torch.tensor([4 * (0.5 - 1 / 18)]))


@pytest.mark.parametrize("beta", [0.0, 1 / 9, 1.0, 3.0])
def test_smooth_l1_agrees_with_the_reference(generator, tolerance, beta):
    deltas, targets = 2 * torch.randn(2, 12, 4, generator=generator, dtype=torch.float64)
    values = box_smooth_l1_loss(of_deltas(deltas, targets), beta=beta)
    expected = reference.smooth_l1(deltas, targets, beta)
    torch.testing.assert_close(values.tolist(), expected, **tolerance[torch.float64])


def test_smooth_l1_with_beta_zero_is_l1(generator):
    deltas = torch.randn(5, 4, generator=generator)
    torch.testing.assert_close(box_smooth_l1_loss(of_deltas(deltas), beta=0.0), deltas.abs().sum(dim=1))


def test_smooth_l1_of_a_perfect_prediction_is_zero_with_zero_gradient():
    deltas = torch.full((2, 4), 0.3, requires_grad=True)
    values = box_smooth_l1_loss(of_deltas(deltas, torch.full((2, 4), 0.3)), beta=1 / 9)
    values.sum().backward()
    assert values.tolist() == [0, 0]
    assert deltas.grad.count_nonzero() == 0


def test_smooth_l1_gradient_is_capped_at_one():
    # Inside beta the gradient is d / beta = 0.05 / 0.5; outside it is the sign.
    deltas = torch.tensor([[0.05, -7.0, 1e4, 0.5]], requires_grad=True)
    box_smooth_l1_loss(of_deltas(deltas), beta=0.5).sum().backward()
    torch.testing.assert_close(deltas.grad, torch.tensor([[0.1, -1.0, 1.0, 1.0]]))


def test_smooth_l1_gradcheck(generator):
    deltas = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d: box_smooth_l1_loss(of_deltas(d), beta=1 / 9), deltas)


def test_smooth_l1_refuses_a_negative_beta():
    with pytest.raises(ValueError, match="beta must be >= 0 and finite, got -1"):
        box_smooth_l1_loss(of_deltas(torch.zeros(1, 4)), beta=-1)


def test_smooth_l1_module_refuses_a_negative_beta_when_made():
    with pytest.raises(ValueError, match="beta must be >= 0 and finite, got -1"):
        BoxSmoothL1Loss(beta=-1)


def test_smooth_l1_module_shows_its_beta():
    assert repr(BoxSmoothL1Loss(beta=0.5)) == "BoxSmoothL1Loss(beta=0.5)"


# box_giou_loss


def test_giou_by_hand():
    # Two 2 x 2 boxes, one moved by (1, 1): intersection 1, union 7, hull 9, GIoU = 1/7 - 2/9.
    regression = of_boxes(torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[1.0, 1.0, 3.0, 3.0]]))
    torch.testing.assert_close(box_giou_loss(regression), torch.tensor([1 - (1 / 7 - 2 / 9)]))


def test_giou_of_boxes_apart_by_hand():
    # Unit boxes with a gap of 2: no intersection, union 2, hull 4, GIoU = 0 - 2/4.
    regression = of_boxes(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[3.0, 0.0, 4.0, 1.0]]))
    torch.testing.assert_close(box_giou_loss(regression), torch.tensor([1.5]))


def test_giou_agrees_with_the_reference(generator):
    boxes, targets = random_boxes(15, generator), random_boxes(15, generator)
    expected = reference.giou(boxes, targets)
    # torchvision adds 1e-7 to the two divisors.
    assert box_giou_loss(of_boxes(boxes, targets)).tolist() == pytest.approx(expected, rel=1e-6)


def test_giou_is_between_zero_and_two(generator):
    boxes, targets = (
        random_boxes(50, generator),
        random_boxes(50, generator) + 30 * (torch.arange(50) % 2)[:, None],
    )
    values = box_giou_loss(of_boxes(boxes, targets))
    assert values.min() >= 0
    assert 1 < values.max() <= 2
    torch.testing.assert_close(
        box_giou_loss(of_boxes(boxes, boxes)), torch.zeros_like(values), rtol=0, atol=1e-6
    )


def test_giou_does_not_change_when_both_boxes_are_scaled(generator):
    boxes, targets = random_boxes(8, generator), random_boxes(8, generator)
    torch.testing.assert_close(
        box_giou_loss(of_boxes(boxes, targets)),
        box_giou_loss(of_boxes(8 * boxes, 8 * targets)),
        rtol=1e-6,
        atol=0,
    )


def test_giou_reads_the_decoded_boxes_and_not_the_deltas():
    # These deltas are equal, so a loss that read them would be 0. Decoded they are the boxes above.
    first, second = torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[1.0, 1.0, 3.0, 3.0]])
    deltas, target_deltas = torch.zeros(1, 4), torch.zeros(1, 4)
    regression = BoxRegression(deltas, target_deltas, lambda encoded: first if encoded is deltas else second)
    torch.testing.assert_close(box_giou_loss(regression), torch.tensor([1 - (1 / 7 - 2 / 9)]))


def test_giou_gradcheck(generator):
    boxes = random_boxes(4, generator).requires_grad_()
    targets = random_boxes(4, generator)
    assert torch.autograd.gradcheck(lambda b: box_giou_loss(of_boxes(b, targets)), boxes)


def test_giou_without_decode_raises():
    with pytest.raises(ValueError, match="made without `decode`"):
        box_giou_loss(of_deltas(torch.zeros(1, 4)))


# Both

LOSSES = {
    "smooth_l1": (lambda regression, **knobs: box_smooth_l1_loss(regression, beta=0.5, **knobs)),
    "giou": box_giou_loss,
}


@pytest.fixture(params=LOSSES)
def box_loss(request):
    return LOSSES[request.param]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(generator, box_loss, dtype):
    boxes, targets = random_boxes(6, generator).to(dtype), random_boxes(6, generator).to(dtype)
    values = box_loss(of_boxes(boxes, targets))
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, box_loss(of_boxes(boxes.float(), targets.float())), rtol=0, atol=0)


def test_permuting_boxes_permutes_values(generator, box_loss):
    boxes, targets = random_boxes(6, generator), random_boxes(6, generator)
    order = torch.randperm(6, generator=generator)
    permuted = box_loss(of_boxes(boxes[order], targets[order]))
    torch.testing.assert_close(permuted, box_loss(of_boxes(boxes, targets))[order])


def test_sum_and_mean_reduce_the_values(generator, box_loss):
    regression = of_boxes(random_boxes(5, generator), random_boxes(5, generator))
    values = box_loss(regression)
    torch.testing.assert_close(box_loss(regression, reduction="sum"), values.sum())
    torch.testing.assert_close(box_loss(regression, reduction="mean"), values.mean())


@pytest.mark.parametrize(("reduction", "shape"), [("none", (0,)), ("sum", ()), ("mean", ())])
def test_no_boxes_give_zero_with_a_gradient(box_loss, reduction, shape):
    boxes = torch.zeros(0, 4, requires_grad=True)
    value = box_loss(of_boxes(boxes, torch.zeros(0, 4)), reduction=reduction)
    value.sum().backward()
    assert value.shape == shape
    assert value.sum() == 0
    assert boxes.grad.shape == (0, 4)


def test_an_unknown_reduction_raises(box_loss):
    with pytest.raises(ValueError, match='reduction must be "none", "sum" or "mean", not \'average\''):
        box_loss(of_boxes(torch.ones(1, 4), torch.ones(1, 4)), reduction="average")


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_modules_equal_functions(generator, reduction):
    regression = of_boxes(random_boxes(5, generator), random_boxes(5, generator))
    torch.testing.assert_close(
        BoxSmoothL1Loss(beta=0.3, reduction=reduction)(regression),
        box_smooth_l1_loss(regression, beta=0.3, reduction=reduction),
        rtol=0,
        atol=0,
    )
    torch.testing.assert_close(
        BoxGIoULoss(reduction=reduction)(regression),
        box_giou_loss(regression, reduction=reduction),
        rtol=0,
        atol=0,
    )


# The other box losses, against torchvision's IoU, torchmetrics and the reference


@pytest.fixture
def decoded(generator) -> BoxRegression:
    """Boxes that overlap their targets, only touch them, are far from them, or are equal to them."""
    boxes = torch.tensor(
        [[0, 0, 10, 20], [10, 0, 20, 8], [50, 60, 70, 61], [3, 4, 9, 9], [0, 0, 5, 5]], dtype=torch.float64
    )
    targets = torch.tensor(
        [[2, 3, 14, 15], [0, 0, 10, 10], [0, 0, 30, 30], [3, 4, 9, 9], [1, 1, 4, 4]], dtype=torch.float64
    )
    return BoxRegression(boxes, targets, lambda deltas: deltas)


def test_iou_loss_is_one_minus_torchvisions_iou(decoded):
    expected = 1 - box_iou(decoded.boxes, decoded.target_boxes).diagonal()
    torch.testing.assert_close(box_iou_loss(decoded), expected)


@pytest.mark.parametrize(
    ("loss", "metric"),
    [
        (box_iou_loss, "intersection_over_union"),
        (box_giou_loss, "generalized_intersection_over_union"),
        (box_diou_loss, "distance_intersection_over_union"),
        (box_ciou_loss, "complete_intersection_over_union"),
    ],
)
def test_iou_losses_are_one_minus_torchmetrics_metrics(decoded, loss, metric):
    metrics = pytest.importorskip("torchmetrics.functional.detection", reason="torchmetrics is not installed")
    matrix = getattr(metrics, metric)(decoded.boxes, decoded.target_boxes, aggregate=False)
    torch.testing.assert_close(loss(decoded), 1 - matrix.diagonal(), rtol=1e-6, atol=1e-6)


def test_boxes_without_an_area_have_an_iou_loss_of_one_and_a_finite_gradient():
    boxes = torch.tensor([[5.0, 5.0, 5.0, 5.0]], requires_grad=True)
    value = box_iou_loss(BoxRegression(boxes, boxes.detach(), lambda deltas: deltas))
    value.sum().backward()
    assert value.item() == 1
    assert boxes.grad.isfinite().all()


@pytest.mark.parametrize("loss", [box_iou_loss, box_giou_loss, box_diou_loss, box_ciou_loss])
@pytest.mark.parametrize("shrunk", [(0.0, 0.0, 0.0, -90.0), (0.0, 0.0, -90.0, 0.0), (0.0, 0.0, -50.0, -90.0)])
@pytest.mark.parametrize("low", [1000.0, -16.0])
def test_boxes_that_have_shrunk_to_nothing_give_finite_losses_and_gradients(loss, shrunk, low):
    # Far from the origin a side is rounded to 0. Near the origin it stays a number whose square is 0.
    coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
    proposals = torch.tensor([[low, low, low + 32, low + 32]])
    deltas = torch.tensor([shrunk], requires_grad=True)
    regression = BoxRegression(
        deltas, torch.zeros(1, 4), lambda encoded: coder.decode_single(encoded, proposals)
    )
    values = loss(regression)
    values.sum().backward()
    assert values.isfinite().all()
    assert values.item() >= 1
    assert deltas.grad.isfinite().all()


def test_ciou_is_torchvisions_with_its_gradient(generator):
    boxes, targets = random_boxes(20, generator), random_boxes(20, generator)
    # Some agree with their targets, in shape or altogether.
    boxes[:4], boxes[4:8] = targets[:4], targets[4:8] + 0.5
    found, expected = (boxes.clone().requires_grad_() for _ in range(2))
    ours = box_ciou_loss(of_boxes(found, targets))
    theirs = complete_box_iou_loss(expected, targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    ours.sum().backward()
    theirs.sum().backward()
    # torchvision holds α constant; with a gradient through α the two differ by more than a tenth.
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [box_iou_loss, box_giou_loss, box_diou_loss, box_ciou_loss])
def test_iou_losses_do_not_depend_on_the_scale_and_need_decode(decoded, loss):
    scaled = BoxRegression(7 * decoded.deltas, 7 * decoded.target_deltas, lambda deltas: deltas)
    torch.testing.assert_close(loss(scaled), loss(decoded), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="decode"):
        loss(BoxRegression(decoded.deltas, decoded.target_deltas))


@pytest.mark.parametrize(("alpha", "gamma", "beta"), [(0.5, 1.5, 1.0), (0.3, 1.0, 0.5)])
def test_balanced_l1_agrees_with_the_reference(generator, alpha, gamma, beta):
    deltas, targets = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    found = box_balanced_l1_loss(BoxRegression(deltas, targets), alpha=alpha, gamma=gamma, beta=beta)
    expected = reference.balanced_l1(deltas, targets, alpha, gamma, beta)
    torch.testing.assert_close(found.tolist(), expected)


def test_balanced_l1_has_no_step_at_beta_and_a_slope_of_gamma_beyond():
    def value(d: float) -> float:
        deltas = torch.tensor([[d, 0.0, 0.0, 0.0]], dtype=torch.float64)
        return box_balanced_l1_loss(BoxRegression(deltas, torch.zeros_like(deltas))).item()

    assert value(1 - 1e-9) == pytest.approx(value(1 + 1e-9), abs=1e-7)
    assert value(3.0) - value(2.0) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("d", "knobs", "slope"),
    [
        (10.0, {"alpha": 0.1, "gamma": 8.0, "beta": 1e-3}, 8.0),
        (1e4, {"alpha": 0.1, "gamma": 8.0}, 8.0),
        (1.0, {"beta": 1e-38}, 1.5),
        (3e38, {}, 1.5),
    ],
)
def test_the_balanced_l1_loss_has_its_slope_gamma_at_any_distance(d, knobs, slope):
    """Below β, the formula overflows at distances far above it; its gradient must not become NaN."""
    deltas = torch.full((1, 4), d, requires_grad=True)
    losses.box_balanced_l1_loss(BoxRegression(deltas, torch.zeros(1, 4)), **knobs).sum().backward()
    torch.testing.assert_close(deltas.grad, torch.full((1, 4), slope))
