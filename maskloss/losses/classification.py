"""Losses of the detector's classes and of the RPN's objectness; those that count classes are in `long_tail`.

What torch has is not here, and is a term as it stands, with `reduction="none"`: `torch.nn.CrossEntropyLoss`, with
`label_smoothing=` where wanted; the same with `weight=`, which then divides by the RoIs and not by their weights,
as mmdetection does; and `torch.nn.BCEWithLogitsLoss` for the objectness.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskloss.losses.arithmetic import at_least_float32, power, reduced
from maskloss.losses.checks import Reduction, check_in_range
from maskloss.losses.modules import LossModule


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

    def __init__(self, active_classes: Tensor | Sequence[bool]) -> None:
        super().__init__()
        active_classes = torch.as_tensor(active_classes)
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


def class_weighted_cross_entropy_loss(
    class_logits: Tensor, labels: Tensor, *, class_weights: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Softmax cross-entropy in which a RoI of class k counts w_k, also in the divisor.

    Args:
        class_logits: (R, C), pre-softmax.
        labels: (R,) int64 in [0, C), 0 is background.
        class_weights: (C,), w >= 0.

    Returns:
        Values w_k CE (R,), at least float32, and weights w_k (R,): their sums' quotient is the loss, torch's
        weighted mean. `torch.nn.CrossEntropyLoss(weight=w, reduction="none")` gives the values alone, whose sum
        `MaskRCNNLoss` divides by R: mmdetection's loss, R / Σ w times this one.

    Raises:
        ValueError: `class_weights` has not one entry per class.

    Source: the two divisors are those of torch's and of mmdetection 3.3.0's `CrossEntropyLoss`.
    """
    if class_weights.shape != class_logits.shape[1:]:
        raise ValueError(
            f"class_weights has shape {tuple(class_weights.shape)}, but class_logits has "
            f"{class_logits.shape[1]} classes"
        )
    class_logits = at_least_float32(class_logits)
    weights = class_weights.to(class_logits)[labels]
    return weights * F.cross_entropy(class_logits, labels, reduction="none"), weights


class ClassWeightedCrossEntropyLoss(nn.Module):
    """`class_weighted_cross_entropy_loss` with its weights, which move with the model.

    Args:
        class_weights: one w >= 0 per class, background first.
    """

    class_weights: Tensor

    def __init__(self, class_weights: Tensor | Sequence[float]) -> None:
        super().__init__()
        weights = torch.as_tensor(class_weights, dtype=torch.float32)
        if weights.dim() != 1 or not (weights.isfinite() & (weights >= 0)).all():
            raise ValueError(f"class_weights must be one finite number >= 0 per class, got {class_weights}")
        self.register_buffer("class_weights", weights)

    def extra_repr(self) -> str:
        """Show for how many classes there are weights."""
        return f"{self.class_weights.numel()} classes"

    def forward(self, class_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See `class_weighted_cross_entropy_loss`."""
        return class_weighted_cross_entropy_loss(class_logits, labels, class_weights=self.class_weights)


class ClassLoss(LossModule):
    """A classification loss: a term for `MaskRCNNLoss(classification=)`."""

    def __init__(self, function: Callable[..., Tensor], **knobs: Any) -> None:
        super().__init__(function, torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), **knobs)

    def forward(self, class_logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of class_logits (R, C) and labels (R,)."""
        loss: Tensor = self.function(class_logits, labels, **self.knobs)
        return loss


def class_focal_loss(
    class_logits: Tensor, labels: Tensor, *, gamma: float = 2.0, reduction: Reduction = "none"
) -> Tensor:
    r"""Focal loss over a softmax: with p = softmax(class_logits) of the RoI's class, -(1 - p)^γ log p.

    It fits torchvision's inference, which takes scores from a softmax, where RetinaNet's sigmoids do not.

    Args:
        class_logits: (R, C), pre-softmax.
        labels: (R,) int64 in [0, C), 0 is background.
        gamma: γ >= 0; 0 is cross-entropy.
        reduction: "none" gives (R,); "sum" and "mean" give a scalar.

    Returns:
        At least float32, >= 0. R = 0 gives shape (0,), or 0 when reduced.

    Raises:
        ValueError: γ < 0.

    Source: Lin et al., Focal loss for dense object detection, 2017, arXiv:1708.02002, equation 4, over a softmax
    as its section 3 allows.
    """
    check_in_range(0, gamma=gamma)
    cross_entropy = F.cross_entropy(at_least_float32(class_logits), labels, reduction="none")
    # 1 - p, which p itself would round to 0.
    return reduced(power(-torch.expm1(-cross_entropy), gamma) * cross_entropy, reduction)


class ClassFocalLoss(ClassLoss):
    """`class_focal_loss` with its γ."""

    def __init__(self, gamma: float = 2.0, reduction: Reduction = "none") -> None:
        super().__init__(class_focal_loss, gamma=gamma, reduction=reduction)


def class_sigmoid_loss(class_logits: Tensor, labels: Tensor, *, reduction: Reduction = "none") -> Tensor:
    r"""Binary cross-entropy of each foreground class by itself, summed over the classes.

    The background is that no class is there, so its logit is not trained. Where the class layer is new it stays near 0,
    which makes torchvision's softmax in inference e^z_k / (1 + Σ_j e^z_j): with one likely class that class's own
    sigmoid. A class layer that a softmax has trained is better begun anew.

    Args:
        class_logits: (R, C), pre-sigmoid; channel 0 is ignored.
        labels: (R,) int64 in [0, C), 0 is background.
        reduction: "none" gives (R,); "sum" and "mean" give a scalar.

    Returns:
        At least float32, >= 0. R = 0 gives shape (0,), or 0 when reduced.

    Source: Detectron2 02b5c4e, `FastRCNNOutputLayers.sigmoid_cross_entropy_loss`.
    """
    logits, targets = foreground_of(class_logits, labels)
    per_class = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return reduced(per_class.sum(dim=1), reduction)


class ClassSigmoidLoss(ClassLoss):
    """`class_sigmoid_loss` as a term."""

    def __init__(self, reduction: Reduction = "none") -> None:
        super().__init__(class_sigmoid_loss, reduction=reduction)


def foreground_of(class_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Give the logits of the foreground classes, at least float32, and their targets, both (R, C - 1)."""
    logits = at_least_float32(class_logits)
    # By scatter, which refuses a label that is no class, where a comparison would make it background.
    targets = torch.zeros_like(logits).scatter(1, labels[:, None], 1.0)
    return logits[:, 1:], targets[:, 1:]
