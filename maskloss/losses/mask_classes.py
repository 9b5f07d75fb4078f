"""Which channels of the mask head a term reads: each RoI's own class, all classes, or one channel for all classes.

Shapes: see `maskloss.losses`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskloss.losses.arithmetic import at_least_float32, reduced
from maskloss.losses.checks import Reduction, check_labels, check_same_shape
from maskloss.losses.modules import LossModule
from maskloss.losses.term_checks import check_term, register_parts
from maskloss.losses.terms import MaskTerm


def select_class_masks(mask_logits: Tensor, labels: Tensor) -> Tensor:
    """Return the channel of each RoI's own class.

    The other channels get no gradient, so classes do not compete for pixels.

    Args:
        mask_logits: (P, C, M, M), pre-sigmoid; C = 1 is a class-agnostic head with one channel for all classes.
        labels: (P,) int64, in [0, C) unless C = 1.

    Returns:
        (P, M, M): a view of the class-agnostic channel, or a copy of the selected channels.

    Example:
        >>> import torch
        >>> mask_logits = torch.arange(6.0).reshape(2, 3, 1, 1)  # channels 0, 1, 2 and 3, 4, 5
        >>> select_class_masks(mask_logits, torch.tensor([2, 0])).flatten()
        tensor([2., 3.])

    Source: He et al., Mask R-CNN, 2017, arXiv:1703.06870, section 3: for a RoI with ground-truth class k, L_mask is
    only defined on the k-th mask.
    """
    check_labels(labels, mask_logits.shape[0])
    if mask_logits.shape[1] == 1:
        return mask_logits[:, 0]
    return mask_logits[torch.arange(labels.shape[0], device=labels.device), labels]


def mask_softmax_loss(
    mask_logits: Tensor, mask_targets: Tensor, labels: Tensor, *, reduction: Reduction = "none"
) -> Tensor:
    r"""Compute the mean multinomial cross-entropy over each RoI's mask, in which classes compete for pixels.

    With q = softmax(mask_logits) over the C channels, k the RoI's class, 0 the background and t = mask_targets,
    loss = -(1/M²) Σ t log q_k + (1 - t) log q_0.

    This is the baseline to which the paper compares its per-class sigmoid. It needs other probabilities in inference:
    see `MaskSoftmaxLoss.mask_probs`.

    Args:
        mask_logits: (P, C, M, M), pre-softmax, with C >= 2.
        mask_targets: (P, M, M), in [0, 1], of the matched object.
        labels: (P,) int64 in [1, C).
        reduction: "none" returns (P,); "sum" and "mean" return a scalar.

    Returns:
        At least float32, >= 0. P = 0 returns shape (0,), or 0 when reduced.

    Raises:
        ValueError: `mask_targets` or `labels` do not fit the logits, or C = 1: a class-agnostic head has no classes
            that could compete.

    Example:
        >>> import torch
        >>> mask_softmax_loss(torch.zeros(1, 4, 2, 2), torch.ones(1, 2, 2), torch.tensor([3]))  # ln 4
        tensor([1.3863])

    Source: He et al., Mask R-CNN, 2017, arXiv:1703.06870, table 2b.
    """
    check_same_shape(mask_logits_of_a_class=mask_logits[:, 0], mask_targets=mask_targets)
    check_same_shape(mask_targets_of_a_pixel=mask_targets[:, 0, 0], labels=labels)
    if mask_logits.shape[1] < 2:
        raise ValueError(
            "a softmax over classes needs a mask head with a channel per class, but this one has 1"
        )
    log_q = F.log_softmax(at_least_float32(mask_logits), dim=1)  # (P, C, M, M)
    targets = mask_targets.to(log_q.dtype)
    per_pixel = -(targets * select_class_masks(log_q, labels) + (1 - targets) * log_q[:, 0])
    return reduced(per_pixel.mean(dim=(-2, -1)), reduction)


class MaskSoftmaxLoss(LossModule):
    """`mask_softmax_loss` as a term, with the probabilities for inference."""

    all_classes = True

    def __init__(self, reduction: Reduction = "none") -> None:
        no_labels = torch.zeros(0, dtype=torch.int64)
        super().__init__(
            mask_softmax_loss, torch.zeros(0, 2, 1, 1), torch.zeros(0, 1, 1), no_labels, reduction=reduction
        )

    def forward(self, mask_logits: Tensor, mask_targets: Tensor, labels: Tensor) -> Tensor:
        """Compute `mask_softmax_loss`."""
        return mask_softmax_loss(mask_logits, mask_targets, labels, **self.knobs)

    def mask_probs(self, mask_logits: Tensor, labels: Tensor) -> Tensor:
        """Return the probabilities (D, M, M) of each label's class (D,) against its strongest rival.

        With k the class, r the other class or background with the highest logit and q the softmax, this is
        q_k / (q_k + q_r). It is at least 1/2 exactly where class k has the highest logit, as in the decision of an
        FCN.
        """
        logits = at_least_float32(mask_logits)
        own = select_class_masks(logits, labels)
        classes = torch.arange(logits.shape[1], device=labels.device)
        is_own = (labels[:, None] == classes)[:, :, None, None]
        rival = logits.masked_fill(is_own, -torch.inf).amax(dim=1)
        return (own - rival).sigmoid()


class ClassAgnosticMaskLoss(nn.Module):
    """A mask term on channel 0 of the mask head, for all classes.

    The other channels get no gradient. This makes a model's masks class-agnostic without a change of its head.

    Args:
        mask: the term for channel 0, (mask_logits (P, M, M), mask_targets (P, M, M)) -> (P,) or (P, M, M).

    Raises:
        TypeError: the term is a class or not callable, or takes other arguments.
        ValueError: the term reduces its values to one number.

    Example:
        >>> import torch
        >>> from maskloss.losses import MaskBCELoss
        >>> mask_logits = torch.tensor([0.0, 9.0, 9.0]).reshape(1, 3, 1, 1)
        >>> loss = ClassAgnosticMaskLoss(MaskBCELoss())
        >>> loss(mask_logits, torch.ones(1, 1, 1), torch.tensor([2]))  # ln 2, of channel 0
        tensor([0.6931])

    Source: He et al., Mask R-CNN, 2017, arXiv:1703.06870, section 4.1: one M x M output regardless of class.
    """

    all_classes = True
    #: The only channel that the term reads, so that a head can skip the others.
    channel = 0

    def __init__(self, mask: MaskTerm) -> None:
        super().__init__()
        check_term("mask", mask)
        if any(getattr(mask, name, False) for name in ("all_classes", "uses_image", "uses_mask_labels")):
            raise TypeError(
                "mask: the term of one channel must take (mask_logits, mask_targets) and nothing else"
            )
        self.mask = mask
        register_parts(self, [mask])

    def forward(self, mask_logits: Tensor, mask_targets: Tensor, labels: Tensor) -> Tensor:
        """Compute the term on channel 0, for any labels."""
        return self.mask(mask_logits[:, 0], mask_targets)

    def mask_probs(self, mask_logits: Tensor, labels: Tensor) -> Tensor:
        """Return the probabilities (D, M, M) of channel 0, for any labels."""
        return at_least_float32(mask_logits[:, 0]).sigmoid()
