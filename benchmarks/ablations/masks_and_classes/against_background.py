"""Softmax masks without the competition where it hurts: trained with it, decided against the background alone."""

from __future__ import annotations

from torch import Tensor

from maskloss.losses import MaskSoftmaxLoss
from maskloss.losses.mask_classes import select_class_masks


class SoftmaxAgainstBackgroundLoss(MaskSoftmaxLoss):
    """`MaskSoftmaxLoss`, of whose classes only the box branch's enters a mask."""

    def mask_probs(self, mask_logits: Tensor, labels: Tensor) -> Tensor:
        """Probabilities (D, M, M) of the labels' classes (D,) where background were the only other."""
        logits = mask_logits.float()
        return (select_class_masks(logits, labels) - logits[:, 0]).sigmoid()
