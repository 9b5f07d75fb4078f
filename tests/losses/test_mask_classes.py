"""`maskloss.losses.mask_classes`."""

from __future__ import annotations

import pytest
import torch

from maskloss import losses
from maskloss.losses import (
    ClassAgnosticMaskLoss,
    MaskBCELoss,
    MaskSoftmaxLoss,
    mask_bce_loss,
    mask_softmax_loss,
    select_class_masks,
)
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


def test_selecting_compiles_with_the_loss_of_the_selected(generator):
    def loss(mask_logits, labels, mask_targets):
        return mask_bce_loss(select_class_masks(mask_logits, labels), mask_targets, reduction="mean")

    mask_logits = torch.randn(4, 3, 2, 2, generator=generator)
    labels, mask_targets = torch.tensor([0, 2, 1, 1]), torch.rand(4, 2, 2, generator=generator)
    # fullgraph: no branch on the data, no .item().
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(mask_logits, labels, mask_targets), loss(mask_logits, labels, mask_targets)
    )


# mask_softmax_loss


def test_softmax_agrees_with_the_reference_and_its_classes_compete(generator):
    mask_logits = torch.randn(3, 4, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    mask_targets = torch.rand(3, 3, 3, generator=generator, dtype=torch.float64)
    labels = torch.tensor([1, 3, 2])
    values = mask_softmax_loss(mask_logits, mask_targets, labels)
    torch.testing.assert_close(
        values.tolist(), reference.mask_softmax(mask_logits.detach(), mask_targets, labels.tolist())
    )
    values.sum().backward()
    assert (mask_logits.grad != 0).all()
    assert torch.autograd.gradcheck(
        lambda logits: mask_softmax_loss(logits, mask_targets, labels), mask_logits.detach().requires_grad_()
    )


def test_softmax_with_two_classes_is_a_sigmoid_of_their_difference(generator):
    mask_logits = torch.randn(3, 2, 4, 4, generator=generator)
    mask_targets = torch.rand(3, 4, 4, generator=generator)
    labels = torch.ones(3, dtype=torch.int64)
    expected = mask_bce_loss(mask_logits[:, 1] - mask_logits[:, 0], mask_targets)
    torch.testing.assert_close(mask_softmax_loss(mask_logits, mask_targets, labels), expected)
    probs = MaskSoftmaxLoss().mask_probs(mask_logits, labels)
    torch.testing.assert_close(probs, (mask_logits[:, 1] - mask_logits[:, 0]).sigmoid())


def test_a_softmax_needs_classes_and_a_label_for_each_roi():
    with pytest.raises(ValueError, match="channel per class, but this one has 1"):
        mask_softmax_loss(torch.zeros(3, 1, 2, 2), torch.zeros(3, 2, 2), torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"labels \(1,\)"):
        mask_softmax_loss(torch.zeros(3, 4, 2, 2), torch.zeros(3, 2, 2), torch.tensor([1]))


def test_softmax_masks_are_where_their_class_wins_the_pixel(generator):
    mask_logits = torch.randn(20, 5, 4, 4, generator=generator)
    labels = torch.randint(1, 5, (20,), generator=generator)
    probs = MaskSoftmaxLoss().mask_probs(mask_logits, labels)
    assert torch.equal(probs >= 0.5, mask_logits.argmax(dim=1) == labels[:, None, None])
    q = mask_logits.softmax(dim=1)
    own = q[torch.arange(20), labels]
    rival = q.scatter(1, labels[:, None, None, None].expand(20, 1, 4, 4), 0.0).amax(dim=1)
    torch.testing.assert_close(probs, own / (own + rival))
    nothing = MaskSoftmaxLoss().mask_probs(mask_logits[:0], labels[:0])
    assert nothing.shape == (0, 4, 4)


def test_softmax_of_empty_half_precision_and_other_shapes(generator):
    nothing = torch.zeros(0, 4, 3, 3, requires_grad=True)
    value = mask_softmax_loss(
        nothing, torch.zeros(0, 3, 3), torch.zeros(0, dtype=torch.int64), reduction="mean"
    )
    value.backward()
    assert value == 0
    half = torch.randn(2, 4, 3, 3, generator=generator).half()
    labels = torch.tensor([1, 2])
    assert mask_softmax_loss(half, torch.ones(2, 3, 3), labels).dtype == torch.float32
    with pytest.raises(ValueError, match="shapes differ"):
        mask_softmax_loss(half, torch.ones(2, 4, 4), labels)


# ClassAgnosticMaskLoss


def test_class_agnostic_masks_are_channel_0_whatever_the_label(generator):
    mask_logits = torch.randn(3, 4, 5, 5, generator=generator, requires_grad=True)
    mask_targets = torch.rand(3, 5, 5, generator=generator)
    labels = torch.tensor([1, 2, 3])
    loss = ClassAgnosticMaskLoss(MaskBCELoss())
    values = loss(mask_logits, mask_targets, labels)
    torch.testing.assert_close(values, mask_bce_loss(mask_logits[:, 0], mask_targets))
    values.sum().backward()
    assert mask_logits.grad[:, 1:].count_nonzero() == 0
    torch.testing.assert_close(loss.mask_probs(mask_logits, labels), mask_logits[:, 0].sigmoid())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "labels", [torch.tensor([1]), torch.tensor([1, 2], dtype=torch.uint8), torch.tensor([[1], [2]])]
)
def test_labels_that_are_not_one_integer_per_mask_are_refused(channels, labels):
    """uint8 labels would be read as a mask of RoIs."""
    with pytest.raises(ValueError, match=r"labels must have shape \(2,\) and dtype int64"):
        losses.select_class_masks(torch.zeros(2, channels, 1, 1), labels)


def test_a_loss_of_all_classes_is_no_loss_of_one_channel():
    for term in (MaskSoftmaxLoss(), ClassAgnosticMaskLoss(MaskBCELoss())):
        with pytest.raises(TypeError, match=r"of one channel must take \(mask_logits, mask_targets\)"):
            ClassAgnosticMaskLoss(term)
