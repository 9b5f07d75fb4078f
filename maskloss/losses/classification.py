"""Classification losses of the detector's class branch.

Softmax cross-entropy and binary cross-entropy are torch's own: `torch.nn.CrossEntropyLoss` and
`torch.nn.BCEWithLogitsLoss`, with `reduction="none"`, are terms as they stand.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from maskloss.losses.conventions import at_least_float32


def active_class_cross_entropy_loss(
    class_logits: Tensor, labels: Tensor, *, active_classes: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Softmax cross-entropy that counts only RoIs *predicted* as an active class.

    With k = argmax(class_logits) and a = active_classes, weight = a[k] and value = a[k] * CE. When data
    sets with different classes are mixed, a prediction of a class that the image's own data set does not
    annotate may be right, so it is not punished.

    Args:
        class_logits: (R, C), pre-softmax.
        labels: (R,) int64 in [0, C), 0 is background.
        active_classes: (C,) bool; True where the class is annotated in this data. Entry 0, the background,
            should be True.

    Returns:
        Values (R,), at least float32, and weights (R,) of 0 and 1. The sum of the values over the sum of
        the weights is the loss; R = 0 gives two tensors of shape (0,).

    Raises:
        ValueError: `active_classes` has not one entry per class.

    Source: matterport/Mask_RCNN 0038eff, `mrcnn_class_loss_graph`; it reads the active classes of the
    batch's first image only, as does this function, which takes one mask for the whole batch.
    """
    if active_classes.shape != class_logits.shape[1:]:
        raise ValueError(
            f"active_classes has shape {tuple(active_classes.shape)}, but class_logits has "
            f"{class_logits.shape[1]} classes"
        )
    class_logits = at_least_float32(class_logits)
    weights = active_classes.to(class_logits.device)[class_logits.argmax(dim=1)].to(class_logits.dtype)
    return weights * F.cross_entropy(class_logits, labels, reduction="none"), weights


class ActiveClassCrossEntropyLoss(nn.Module):
    """`active_class_cross_entropy_loss` with its mask of active classes, which moves with the model."""

    active_classes: Tensor

    def __init__(self, active_classes: Tensor) -> None:
        super().__init__()
        if active_classes.dim() != 1:
            raise ValueError(
                f"active_classes must have one entry per class, got shape {tuple(active_classes.shape)}"
            )
        self.register_buffer("active_classes", active_classes.bool())

    def extra_repr(self) -> str:
        """Show how many classes count."""
        return f"active={int(self.active_classes.sum())} of {self.active_classes.numel()}"

    def forward(self, class_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See `active_class_cross_entropy_loss`."""
        return active_class_cross_entropy_loss(class_logits, labels, active_classes=self.active_classes)
