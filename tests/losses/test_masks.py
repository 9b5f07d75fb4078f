"""`maskloss.losses.masks`."""

import math

import pytest
import torch

from maskloss.losses import MaskBCELoss, mask_bce_loss, select_class_masks
from tests import reference

# select_class_masks


def test_each_roi_gets_the_channel_of_its_own_class():
    # Channel c of RoI p holds 10 p + c everywhere.
    mask_logits = (10.0 * torch.arange(3)[:, None] + torch.arange(4))[:, :, None, None].expand(3, 4, 2, 2)
    selected = select_class_masks(mask_logits, torch.tensor([3, 0, 2]))
    assert selected.shape == (3, 2, 2)
    assert selected[:, 0, 0].tolist() == [3, 10, 22]
    assert (selected == selected[:, :1, :1]).all()


def test_a_class_agnostic_channel_serves_every_label(generator):
    mask_logits = torch.randn(3, 1, 2, 2, generator=generator)
    selected = select_class_masks(mask_logits, torch.tensor([1, 5, 90]))
    torch.testing.assert_close(selected, mask_logits[:, 0], rtol=0, atol=0)


def test_gradient_is_zero_on_every_other_class_channel(generator):
    mask_logits = torch.randn(4, 5, 3, 3, generator=generator, requires_grad=True)
    labels = torch.tensor([1, 4, 2, 1])
    mask_bce_loss(select_class_masks(mask_logits, labels), torch.ones(4, 3, 3)).sum().backward()
    own = torch.zeros(4, 5, dtype=torch.bool)
    own[torch.arange(4), labels] = True
    assert mask_logits.grad[~own].count_nonzero() == 0
    assert (mask_logits.grad[own] != 0).all()


@pytest.mark.parametrize("channels", [1, 4])
def test_selecting_from_no_rois_backpropagates(channels):
    mask_logits = torch.zeros(0, channels, 2, 2, requires_grad=True)
    selected = select_class_masks(mask_logits, torch.zeros(0, dtype=torch.int64))
    selected.sum().backward()
    assert selected.shape == (0, 2, 2)
    assert mask_logits.grad.shape == (0, channels, 2, 2)


# mask_bce_loss


def test_value_by_hand():
    # p = 3/4 and 1/2 against t = 1 and 0: -(log 3/4 + log 1/2) / 2. The second RoI's soft target 1/2 at
    # p = 1/4 costs -(log 1/4 + log 3/4) / 2 a cell.
    mask_logits = torch.tensor([[[math.log(3), 0.0]], [[-math.log(3), -math.log(3)]]])
    mask_targets = torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]])
    expected = [-(math.log(3 / 4) + math.log(1 / 2)) / 2, -(math.log(1 / 4) + math.log(3 / 4)) / 2]
    assert mask_bce_loss(mask_logits, mask_targets).tolist() == pytest.approx(expected, rel=1e-6)


def test_agrees_with_the_reference_on_soft_targets(generator, tolerance):
    mask_logits = 3 * torch.randn(6, 4, 4, generator=generator, dtype=torch.float64)
    mask_targets = torch.rand(6, 4, 4, generator=generator, dtype=torch.float64)
    values = mask_bce_loss(mask_logits, mask_targets)
    expected = reference.mask_bce(mask_logits, mask_targets)
    torch.testing.assert_close(values.tolist(), expected, **tolerance[torch.float64])


def test_a_perfect_prediction_costs_nothing_and_the_worst_its_logit():
    mask_targets = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    right = 200 * mask_targets - 100
    torch.testing.assert_close(mask_bce_loss(right, mask_targets), torch.zeros(1))
    torch.testing.assert_close(mask_bce_loss(-right, mask_targets), torch.full((1,), 100.0))


def test_the_best_logits_for_soft_targets_cost_their_entropy():
    soft = torch.tensor([[[0.25, 0.25], [0.25, 0.25]]], dtype=torch.float64)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    at_best = mask_bce_loss(soft.logit(), soft)
    assert at_best.item() == pytest.approx(entropy, rel=1e-12)
    assert mask_bce_loss(soft.logit() + 0.1, soft) > at_best
    assert mask_bce_loss(soft.logit() - 0.1, soft) > at_best


def test_permuting_rois_permutes_values(generator):
    mask_logits, mask_targets = torch.randn(2, 5, 3, 3, generator=generator)
    mask_targets = mask_targets.sigmoid()
    order = torch.randperm(5, generator=generator)
    torch.testing.assert_close(
        mask_bce_loss(mask_logits[order], mask_targets[order]),
        mask_bce_loss(mask_logits, mask_targets)[order],
    )


def test_gradient_is_probability_minus_target_over_the_cells(generator):
    mask_logits = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    mask_targets = torch.rand(2, 3, 3, generator=generator, dtype=torch.float64)
    mask_bce_loss(mask_logits, mask_targets).sum().backward()
    torch.testing.assert_close(mask_logits.grad, (mask_logits.detach().sigmoid() - mask_targets) / 9)


def test_gradcheck(generator):
    mask_logits = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    mask_targets = torch.rand(2, 3, 3, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda logits: mask_bce_loss(logits, mask_targets), mask_logits)


def test_values_and_gradients_are_finite_at_extreme_logits():
    mask_logits = torch.tensor([[[1e4, -1e4], [1e4, -1e4]]], requires_grad=True)
    value = mask_bce_loss(mask_logits, torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]))
    value.sum().backward()
    assert value.item() == 5000  # two cells of four cost 1e4
    assert mask_logits.grad.tolist() == [[[0.25, -0.25], [0, 0]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(generator, tolerance, dtype):
    mask_logits = 5 * torch.randn(4, 3, 3, generator=generator)
    mask_targets = torch.rand(4, 3, 3, generator=generator)
    values = mask_bce_loss(mask_logits.to(dtype), mask_targets)
    assert values.dtype == torch.float32
    # Only the rounding of the logits is lost ...
    torch.testing.assert_close(values, mask_bce_loss(mask_logits, mask_targets), **tolerance[dtype])
    # ... and nothing of the arithmetic.
    torch.testing.assert_close(
        values, mask_bce_loss(mask_logits.to(dtype).float(), mask_targets), rtol=0, atol=0
    )


def test_float64_stays_float64():
    assert (
        mask_bce_loss(torch.zeros(1, 2, 2, dtype=torch.float64), torch.ones(1, 2, 2)).dtype == torch.float64
    )


def test_bool_targets_are_taken():
    mask_targets = torch.tensor([[[True, False], [False, True]]])
    mask_logits = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    torch.testing.assert_close(
        mask_bce_loss(mask_logits, mask_targets),
        mask_bce_loss(mask_logits, mask_targets.float()),
        rtol=0,
        atol=0,
    )


def test_sum_and_mean_reduce_the_values(generator):
    mask_logits = torch.randn(3, 2, 2, generator=generator)
    mask_targets = torch.ones(3, 2, 2)
    values = mask_bce_loss(mask_logits, mask_targets)
    torch.testing.assert_close(mask_bce_loss(mask_logits, mask_targets, reduction="sum"), values.sum())
    torch.testing.assert_close(mask_bce_loss(mask_logits, mask_targets, reduction="mean"), values.mean())


@pytest.mark.parametrize(("reduction", "shape"), [("none", (0,)), ("sum", ()), ("mean", ())])
def test_no_rois_give_zero_with_a_gradient(reduction, shape):
    mask_logits = torch.zeros(0, 28, 28, requires_grad=True)
    value = mask_bce_loss(mask_logits, torch.zeros(0, 28, 28), reduction=reduction)
    value.sum().backward()
    assert value.shape == shape
    assert value.sum() == 0
    assert mask_logits.grad.shape == (0, 28, 28)


def test_different_shapes_raise_and_do_not_broadcast():
    with pytest.raises(ValueError, match=r"mask_logits \(2, 3, 3\), mask_targets \(1, 3, 3\)"):
        mask_bce_loss(torch.zeros(2, 3, 3), torch.zeros(1, 3, 3))


def test_an_unknown_reduction_raises():
    with pytest.raises(ValueError, match="not 'batchmean'"):
        mask_bce_loss(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), reduction="batchmean")


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_module_equals_function(generator, reduction):
    mask_logits, mask_targets = torch.randn(3, 2, 2, generator=generator), torch.ones(3, 2, 2)
    torch.testing.assert_close(
        MaskBCELoss(reduction=reduction)(mask_logits, mask_targets),
        mask_bce_loss(mask_logits, mask_targets, reduction=reduction),
        rtol=0,
        atol=0,
    )


def test_compiled_equals_eager(generator):
    def loss(mask_logits, labels, mask_targets):
        return mask_bce_loss(select_class_masks(mask_logits, labels), mask_targets, reduction="mean")

    mask_logits = torch.randn(4, 3, 2, 2, generator=generator)
    labels, mask_targets = torch.tensor([0, 2, 1, 1]), torch.rand(4, 2, 2, generator=generator)
    # fullgraph: no branch on the data, no .item().
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(mask_logits, labels, mask_targets), loss(mask_logits, labels, mask_targets)
    )
