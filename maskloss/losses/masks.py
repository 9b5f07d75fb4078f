"""Mask losses: what is compared inside each RoI's M x M grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskloss.losses.conventions import Reduction, at_least_float32, reduced, same_shape


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


def mask_bce_loss(mask_logits: Tensor, mask_targets: Tensor, *, reduction: Reduction = "none") -> Tensor:
    r"""Average binary cross-entropy over each RoI's mask.

    With p = sigmoid(mask_logits) and t = mask_targets, loss = -(1/M²) Σ t log p + (1 - t) log(1 - p).

    Args:
        mask_logits: (P, M, M), pre-sigmoid, channel of the RoI's own class (`select_class_masks`).
        mask_targets: (P, M, M), in [0, 1]; soft values allowed (`maskloss.mask_targets`).
        reduction: "none" gives (P,); "sum" and "mean" give a scalar.

    Returns:
        At least float32, >= 0 per RoI; for soft targets the best value is the targets' entropy. P = 0 gives
        shape (0,), or 0 when reduced; both still backpropagate.

    Raises:
        ValueError: shapes differ.

    Example:
        >>> mask_bce_loss(torch.zeros(1, 2, 2), torch.ones(1, 2, 2))
        tensor([0.6931])

    Source: He et al., Mask R-CNN, 2017, arXiv:1703.06870, section 3.
    """
    same_shape(mask_logits=mask_logits, mask_targets=mask_targets)
    mask_logits = at_least_float32(mask_logits)
    per_pixel = F.binary_cross_entropy_with_logits(
        mask_logits, mask_targets.to(mask_logits.dtype), reduction="none"
    )  # (P, M, M)
    return reduced(per_pixel.mean(dim=(1, 2)), reduction)


class MaskBCELoss(nn.Module):
    """`mask_bce_loss` as a term."""

    def __init__(self, reduction: Reduction = "none") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, mask_logits: Tensor, mask_targets: Tensor) -> Tensor:
        """See `mask_bce_loss`."""
        return mask_bce_loss(mask_logits, mask_targets, reduction=self.reduction)
