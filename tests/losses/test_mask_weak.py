"""`maskloss.losses.mask_weak`: by hand, against plain loops, and with empty and extreme input."""

from __future__ import annotations

import math

import kornia
import pytest
import torch
from torch import Tensor

from maskloss import losses
from maskloss.losses import mask_pairwise_loss, mask_point_loss, mask_projection_loss
from maskloss.losses.mask_weak import color_similarity, neighbors, pairwise_disagreement, rgb_to_lab

P, K, M = 3, 5, 6


def point_inputs(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    logits = 2 * torch.randn(P, M, M, generator=generator, dtype=torch.float64)
    coords = torch.rand(P, K, 2, generator=generator, dtype=torch.float64)
    labels = torch.randint(-1, 2, (P, K), generator=generator)
    return logits, coords, labels


def box_inputs(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    logits = 2 * torch.randn(P, M, M, generator=generator, dtype=torch.float64)
    crops = torch.rand(P, 3, M, M, generator=generator, dtype=torch.float64)
    boxes = torch.zeros(P, M, M, dtype=torch.float64)
    boxes[0, 1:4, 2:6], boxes[1, :, :] = 1, 1
    return logits, crops, boxes


def bilinear(values: Tensor, x: float, y: float) -> float:
    """Interpolate between the centers of the cells around a point, zeros beyond the border."""
    size = len(values)
    column, row = x * size - 0.5, y * size - 0.5
    total = 0.0
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < size and 0 <= j < size:
                total += float(values[i, j]) * (1 - abs(row - i)) * (1 - abs(column - j))
    return total


def test_the_point_loss_is_a_loop_over_points(generator):
    logits, coords, labels = point_inputs(generator)
    expected = []
    for i in range(P):
        total = 0.0
        for k in range(K):
            value = bilinear(logits[i], *coords[i, k].tolist())
            if labels[i, k] >= 0:
                total += math.log1p(math.exp(-value if labels[i, k] else value))
        expected.append(total / K)
    found = mask_point_loss(logits, coords, labels)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_points_without_a_label_have_no_gradient(generator):
    logits, coords, labels = point_inputs(generator)
    labels[1] = -1
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(mask_point_loss(logits, coords, labels).sum(), logits)
    assert gradient[1].abs().max() == 0
    assert gradient[0].abs().max() > 0


def test_the_projection_loss_is_that_of_maxima(generator):
    logits, _, boxes = box_inputs(generator)
    expected = []
    for p, b in zip(logits.sigmoid(), boxes, strict=True):
        total = 0.0
        for axis in (0, 1):
            m, t = p.max(dim=axis).values, b.max(dim=axis).values
            total += 1 - 2 * float((m * t).sum()) / (float((m * m).sum() + (t * t).sum()) + 1e-5)
        expected.append(total)
    torch.testing.assert_close(
        mask_projection_loss(logits, boxes), torch.tensor(expected, dtype=torch.float64)
    )


def test_a_mask_that_touches_all_sides_has_the_best_projection():
    # A diagonal line has the shadows of its whole box.
    box = torch.zeros(1, M, M)
    box[0, 1:5, 1:5] = 1
    diagonal = torch.full((1, M, M), -40.0)
    for i in range(1, 5):
        diagonal[0, i, i] = 40
    assert mask_projection_loss(diagonal, box).item() == pytest.approx(0, abs=1e-5)
    diagonal[0, 0, 0] = 40  # it leaves the box
    assert mask_projection_loss(diagonal, box).item() > 0.1


def test_the_pairwise_loss_is_a_loop_over_edges(generator):
    logits, crops, boxes = box_inputs(generator)
    lab, p = rgb_to_lab(crops), logits.sigmoid()
    expected = []
    for i in range(P):
        total, count = 0.0, 0
        for y in range(M):
            for x in range(M):
                if boxes[i, y, x] < 0.5:
                    continue
                for dy in (-1, 0, 1):
                    for dx in (-1, 0, 1):
                        v, u = y + dy, x + dx
                        if (dy, dx) == (0, 0):
                            continue
                        if not (0 <= v < M and 0 <= u < M):
                            continue
                        if math.exp(-0.5 * float((lab[i, :, y, x] - lab[i, :, v, u]).norm())) < 1e-9:
                            continue
                        count += 1
                        mine, other = float(p[i, y, x]), float(p[i, v, u])
                        total -= math.log(mine * other + (1 - mine) * (1 - other))
        expected.append(total / max(count, 1))
    found = mask_pairwise_loss(logits, crops, boxes, color_threshold=1e-9, dilation=1)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert found[2] == 0  # it has no box


def test_only_edges_of_like_color_count():
    # Left half red, right half blue: no edge joins the halves.
    crops = torch.zeros(1, 3, M, M)
    crops[0, 0, :, :3], crops[0, 2, :, 3:] = 1, 1
    box = torch.ones(1, M, M)
    halves = torch.full((1, M, M), 30.0)
    halves[..., 3:] = -30
    inner = box.clone()
    inner[0, 0], inner[0, -1], inner[0, :, 0], inner[0, :, -1] = 0, 0, 0, 0
    assert mask_pairwise_loss(halves, crops, inner, dilation=1).item() < 1e-6
    assert mask_pairwise_loss(halves.transpose(1, 2), crops, inner, dilation=1).item() > 1


def test_neighbors_by_hand():
    values = torch.arange(9.0).reshape(1, 1, 3, 3)
    around = neighbors(values, dilation=1)[0, 0]
    assert around[:, 1, 1].tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert around[:, 0, 0].tolist() == [0, 0, 0, 0, 1, 0, 3, 4]
    assert neighbors(values, dilation=2)[0, 0, :, 0, 0].tolist() == [0, 0, 0, 0, 2, 0, 6, 8]


def test_lab_is_kornias(generator):
    images = torch.rand(2, 3, 9, 8, generator=generator)
    images[0, :, 0] = 0.01  # the straight piece of the curve
    expected = kornia.color.rgb_to_lab(images.double())
    torch.testing.assert_close(rgb_to_lab(images.double()), expected, rtol=1e-5, atol=1e-7)
    # A and b are 200 to 500 times the difference of two rounded numbers.
    torch.testing.assert_close(rgb_to_lab(images), expected.float(), rtol=0, atol=1e-4)
    white = rgb_to_lab(torch.ones(1, 3, 1, 1))[0, :, 0, 0]
    torch.testing.assert_close(white, torch.tensor([100.0, 0.0, 0.0]), atol=1e-2, rtol=0)


CASES = {
    "points": (losses.mask_point_loss, losses.MaskPointLoss, {}, point_inputs),
    "projection": (
        losses.mask_projection_loss,
        losses.MaskProjectionLoss,
        {},
        lambda generator: box_inputs(generator)[::2],
    ),
    "pairwise": (
        losses.mask_pairwise_loss,
        losses.MaskPairwiseLoss,
        {"color_threshold": 0.05, "dilation": 1},
        box_inputs,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_module_reductions_half_and_gradcheck(name, generator):
    function, module, knobs, make = CASES[name]
    logits, *rest = make(generator)
    expected = function(logits, *rest, **knobs)
    assert expected.shape == (P,)
    assert (expected >= 0).all()
    assert torch.equal(module(**knobs)(logits, *rest), expected)
    assert torch.equal(function(logits, *rest, **knobs, reduction="sum"), expected.sum())
    assert torch.equal(function(logits, *rest, **knobs, reduction="mean"), expected.mean())
    for knob in knobs:
        assert knob in repr(module(**knobs))
    half = function(logits.bfloat16(), *rest, **knobs)
    assert half.dtype == torch.float32
    assert torch.autograd.gradcheck(lambda x: function(x, *rest, **knobs), logits.requires_grad_())


@pytest.mark.parametrize("name", CASES)
def test_empty_input_returns_a_zero_that_backpropagates(name, generator):
    function, _, knobs, make = CASES[name]
    logits, *rest = (value[:0] for value in make(generator))
    logits.requires_grad_()
    assert function(logits, *rest, **knobs).shape == (0,)
    for reduction in ("sum", "mean"):
        loss = function(logits, *rest, **knobs, reduction=reduction)
        assert loss == 0
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient.shape == logits.shape


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("value", [-1e4, 1e4])
def test_extreme_logits_are_finite(name, value, generator):
    function, _, knobs, make = CASES[name]
    logits, *rest = make(generator)
    logits = torch.full_like(logits, value, dtype=torch.float32).requires_grad_()
    loss = function(logits, *rest, **knobs).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: mask_point_loss(torch.zeros(2, 4, 4), torch.zeros(3, 5, 2), torch.zeros(3, 5)),
            r"\(P, K, 2\)",
        ),
        (
            lambda: mask_point_loss(torch.zeros(2, 4, 4), torch.zeros(2, 5, 2), torch.zeros(2, 4)),
            "shapes differ",
        ),
        (lambda: mask_projection_loss(torch.zeros(2, 4, 4), torch.zeros(2, 4, 5)), "shapes differ"),
        (
            lambda: mask_pairwise_loss(torch.zeros(2, 4, 4), torch.zeros(2, 3, 5, 5), torch.zeros(2, 4, 4)),
            r"image_crops must have three channels for each mask, \(2, 3, 4, 4\), got \(2, 3, 5, 5\)",
        ),
        (
            lambda: mask_pairwise_loss(torch.zeros(2, 4, 4), torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 1)),
            "shapes differ: mask_logits .*, gt_box_grids",
        ),
        (lambda: losses.MaskPairwiseLoss(color_threshold=1.5), r"color_threshold must be in \[0, 1\]"),
        (lambda: losses.MaskPairwiseLoss(dilation=0), "dilation must be at least 1"),
    ],
)
def test_other_shapes_and_knobs_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_without_points_the_loss_is_zero():
    logits = torch.zeros(2, 4, 4, requires_grad=True)
    loss = mask_point_loss(logits, torch.zeros(2, 0, 2), torch.zeros(2, 0))
    assert loss.tolist() == [0, 0]
    loss.sum().backward()


def test_similar_colors_and_disagreement_by_hand():
    same = torch.full((1, 3, 3, 3), 50.0)
    assert color_similarity(same, dilation=1)[0, :, 1, 1].tolist() == [1.0] * 8
    logits = torch.zeros(1, 3, 3)
    # Half and half: both in or both out with 1/4 + 1/4.
    assert pairwise_disagreement(logits, dilation=1)[0, 0, 1, 1].item() == pytest.approx(math.log(2))


# Boxes: projection and pairwise loss with a warm-up.


def box_arguments(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.randn(3, 6, 6, generator=generator)
    crops = 0.1 * torch.rand(3, 3, 6, 6, generator=generator)
    boxes = torch.zeros(3, 6, 6)
    boxes[:, 1:5, 2:6] = 1
    return logits, crops, boxes


def test_the_box_loss_is_the_sum_of_both(generator):
    logits, crops, boxes = box_arguments(generator)
    projection = losses.mask_projection_loss(logits, boxes)
    pairwise = losses.mask_pairwise_loss(logits, crops, boxes, color_threshold=0.2, dilation=1)
    found = losses.mask_box_loss(logits, crops, boxes, pairwise_weight=0.7, color_threshold=0.2, dilation=1)
    torch.testing.assert_close(found, projection + 0.7 * pairwise)
    module = losses.MaskBoxLoss(pairwise_weight=0.7, color_threshold=0.2, dilation=1)
    torch.testing.assert_close(module(logits, crops, boxes), found)


@pytest.mark.parametrize("warmup_steps", [4, 1])
def test_the_pairwise_weight_warms_up_in_training_steps(generator, warmup_steps):
    arguments = box_arguments(generator)
    module = losses.MaskBoxLoss(pairwise_weight=2.0, warmup_steps=warmup_steps)
    expected = [
        losses.mask_box_loss(*arguments, pairwise_weight=2.0 * min(k / warmup_steps, 1)) for k in range(6)
    ]
    for step in range(6):
        with torch.no_grad():
            torch.testing.assert_close(module(*arguments), expected[step])
        module.eval()
        torch.testing.assert_close(module(*arguments), expected[step])
        module.train()
        torch.testing.assert_close(module(*arguments), expected[step])
    restored = losses.MaskBoxLoss(pairwise_weight=2.0, warmup_steps=warmup_steps)
    restored.load_state_dict(module.state_dict())
    assert restored.steps == 6
    assert restored.steps.dtype == torch.int64


def test_knobs_of_the_box_loss_out_of_range_raise():
    for knobs in ({"warmup_steps": -1}, {"pairwise_weight": -1.0}, {"color_threshold": 2.0}, {"dilation": 0}):
        with pytest.raises(ValueError, match=next(iter(knobs))):
            losses.MaskBoxLoss(**knobs)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_crops_without_three_channels_are_refused(channels):
    crops, grids = torch.rand(2, channels, 4, 4), torch.ones(2, 4, 4)
    for loss in (losses.MaskPairwiseLoss(), losses.MaskBoxLoss()):
        with pytest.raises(ValueError, match=rf"image_crops .* \(2, 3, 4, 4\), got \(2, {channels}, 4, 4\)"):
            loss(torch.randn(2, 4, 4), crops, grids)


@pytest.mark.parametrize("color_threshold", [0.0, 1e-9, 0.3])
def test_only_edges_inside_the_grid_count(color_threshold):
    """Of one color and undecided, each of the 40 edges of 3 x 3 cells has the loss ln 2."""
    found = losses.mask_pairwise_loss(
        torch.zeros(1, 3, 3),
        torch.zeros(1, 3, 3, 3),
        torch.ones(1, 3, 3),
        dilation=1,
        color_threshold=color_threshold,
    )
    assert found.item() == pytest.approx(math.log(2))
