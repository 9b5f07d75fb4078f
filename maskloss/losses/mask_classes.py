"""Mask terms that differ in which classes' channels they read: the own class's, all of them, or one for all."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskloss.losses.arithmetic import at_least_float32, reduced
from maskloss.losses.checks import Reduction, check_same_shape
from maskloss.losses.modules import LossModule
from maskloss.losses.term_checks import check_term, register_parts
from maskloss.losses.terms import MaskTerm


def select_class_masks(mask_logits: Tensor, labels: Tensor) -> Tensor:
    """Take the channel of each RoI's own class.

    The other channels get no gradient, so classes do not compete for pixels.

    Args:
        mask_logits: (P, C, M, M), pre-sigmoid; C = 1 is a class-agnostic head, whose channel serves all.
        labels: (P,) int64, in [0, C) unless C = 1.

    Returns:
        (P, M, M), a view of the class-agnostic channel or a gather of the selected ones.

    Source: He et al., Mask R-CNN, 2017, arXiv:1703.06870, section 3: L_mask is only defined on the k-th
    mask for a RoI associated with ground-truth class k.
    """
    if mask_logits.shape[1] == 1:
        return mask_logits[:, 0]
    return mask_logits[torch.arange(labels.shape[0], device=labels.device), labels]


def mask_softmax_loss(
    mask_logits: Tensor, mask_targets: Tensor, labels: Tensor, *, reduction: Reduction = "none"
) -> Tensor:
    r"""Average multinomial cross-entropy over each RoI's mask, in which classes compete for pixels.

    With q = softmax(mask_logits) over the C channels, k the RoI's class and 0 the background,
    loss = -(1/M²) Σ t log q_k + (1 - t) log q_0.

    The baseline that the per-class sigmoid was compared with; see `MaskSoftmaxLoss` for what has to change in
    inference.

    Args:
        mask_logits: (P, C, M, M), pre-softmax, with C >= 2.
        mask_targets: (P, M, M), in [0, 1], of the RoI's own object.
        labels: (P,) int64 in [1, C).
        reduction: "none" gives (P,); "sum" and "mean" give a scalar.

    Returns:
        At least float32, >= 0. P = 0 gives shape (0,), or 0 when reduced.

    Raises:
        ValueError: `mask_targets` is not (P, M, M) of the logits, `labels` not (P,), or C = 1: a class-agnostic head
            has no classes that could compete.

    Source: He et al., Mask R-CNN, 2017, arXiv:1703.06870, table 2b.
    """
    check_same_shape(mask_logits_of_a_class=mask_logits[:, 0], mask_targets=mask_targets)
    check_same_shape(mask_targets_of_a_pixel=mask_targets[:, 0, 0], labels=labels)
    if mask_logits.shape[1] < 2:
        raise ValueError("a softmax over classes needs a mask head with a channel per class, this one has 1")
    log_q = F.log_softmax(at_least_float32(mask_logits), dim=1)  # (P, C, M, M)
    targets = mask_targets.to(log_q.dtype)
    per_pixel = -(targets * select_class_masks(log_q, labels) + (1 - targets) * log_q[:, 0])
    return reduced(per_pixel.mean(dim=(-2, -1)), reduction)


class MaskSoftmaxLoss(LossModule):
    """`mask_softmax_loss` as a term, and the probabilities that go with it."""

    all_classes = True

    def __init__(self, reduction: Reduction = "none") -> None:
        no_labels = torch.zeros(0, dtype=torch.int64)
        super().__init__(
            mask_softmax_loss, torch.zeros(0, 2, 1, 1), torch.zeros(0, 1, 1), no_labels, reduction=reduction
        )

    def forward(self, mask_logits: Tensor, mask_targets: Tensor, labels: Tensor) -> Tensor:
        """See `mask_softmax_loss`."""
        return mask_softmax_loss(mask_logits, mask_targets, labels, **self.knobs)

    def mask_probs(self, mask_logits: Tensor, labels: Tensor) -> Tensor:
        """Probabilities (D, M, M) of the labels' classes (D,), each against its strongest rival.

        With r the other class, or background, of the highest logit this is q_k / (q_k + q_r): at least 1/2 exactly
        where class k wins the pixel, which is how an FCN decides.
        """
        logits = at_least_float32(mask_logits)
        own = select_class_masks(logits, labels)
        classes = torch.arange(logits.shape[1], device=labels.device)
        is_own = (labels[:, None] == classes)[:, :, None, None]
        rival = logits.masked_fill(is_own, -torch.inf).amax(dim=1)
        return (own - rival).sigmoid()


class ClassAgnosticMaskLoss(nn.Module):
    """A mask term on one channel that serves all classes, the head's channel 0.

    The other channels get no gradient. With this a model of any number of classes is class-agnostic in its
    masks, without another head.

    Args:
        mask: the term for that channel, (mask_logits (P, M, M), mask_targets (P, M, M)) -> (P,) or (P, M, M).

    Raises:
        TypeError: the term is a class or no callable, or takes other arguments.
        ValueError: the term reduces its values to one number.

    Source: He et al., Mask R-CNN, 2017, arXiv:1703.06870, section 4.1: one M x M output regardless of class.
    """

    all_classes = True
    #: The only one that is read, so that a head need not compute the others.
    channel = 0

    def __init__(self, mask: MaskTerm) -> None:
        super().__init__()
        check_term("mask", mask)
        self.mask = mask
        register_parts(self, [mask])

    def forward(self, mask_logits: Tensor, mask_targets: Tensor, labels: Tensor) -> Tensor:
        """Compute the term of channel 0, whatever the labels."""
        return self.mask(mask_logits[:, 0], mask_targets)

    def mask_probs(self, mask_logits: Tensor, labels: Tensor) -> Tensor:
        """Probabilities (D, M, M) of channel 0, whatever the labels."""
        return at_least_float32(mask_logits[:, 0]).sigmoid()
