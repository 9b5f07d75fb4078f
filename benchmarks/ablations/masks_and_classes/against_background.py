"""Softmax masks that are trained with competing classes, but compared only with the background in inference."""

from __future__ import annotations

from torch import Tensor

from maskloss.losses import MaskSoftmaxLoss
from maskloss.losses.mask_classes import select_class_masks


class SoftmaxAgainstBackgroundLoss(MaskSoftmaxLoss):
    """`MaskSoftmaxLoss` whose masks depend only on the background and the class that the box branch predicts."""

    def mask_probs(self, mask_logits: Tensor, labels: Tensor) -> Tensor:
        """Return probabilities (D, M, M) of the classes in `labels` (D,), with background as the only alternative."""
        logits = mask_logits.float()
        return (select_class_masks(logits, labels) - logits[:, 0]).sigmoid()
