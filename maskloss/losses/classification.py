"""Classification losses of the detector; those that depend on class frequencies are in `long_tail`.

torch's losses with `reduction="none"` are valid terms, such as `torch.nn.CrossEntropyLoss`, also with
`label_smoothing=` or `weight=`. With `weight=`, `MaskRCNNLoss` divides by the number of RoIs, as mmdetection does, and
not by the sum of their weights. Shapes: see `maskloss.losses`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskloss.losses.arithmetic import at_least_float32, power, reduced
from maskloss.losses.checks import Reduction, check_class_values, check_in_range, check_labels
from maskloss.losses.modules import LossModule

#: A label that no data has.
_NO_LABEL = -(2**62)


def active_class_cross_entropy_loss(
    class_logits: Tensor, labels: Tensor, *, active_classes: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Compute softmax cross-entropy that counts only RoIs *predicted* as an active class.

    With k = argmax(class_logits) and a = active_classes, weight = a[k] and value = a[k] * CE. In a mix of data
    sets with different classes, an image may contain objects of classes that its own data set does not annotate.
    A prediction of such a class may be right, so it is not penalized.

    Args:
        class_logits: (R, C), pre-softmax.
        labels: (R,) int64 in [0, C), 0 is background.
        active_classes: (C,) bool, True for classes that are annotated in this data set. Entry 0, the background,
            should be True.

    Returns:
        Values (R,), at least float32, and weights (R,) of 0 and 1. The loss is the sum of the values divided by the
        sum of the weights. R = 0 returns two tensors of shape (0,).

    Raises:
        ValueError: `active_classes` does not have one entry per class.

    Example:
        >>> import torch
        >>> class_logits = torch.tensor([[0., 0., -9.], [0., 0., 9.]])  # the second RoI is predicted as class 2
        >>> active = torch.tensor([True, True, False])
        >>> active_class_cross_entropy_loss(class_logits, torch.tensor([1, 1]), active_classes=active)
        (tensor([0.6932, 0.0000]), tensor([1., 0.]))

    Source: matterport/Mask_RCNN 0038eff, `mrcnn_class_loss_graph`, which applies the active classes of the first image
    to the whole batch; likewise, this function takes one `active_classes` for the whole batch.
    """
    if active_classes.shape != class_logits.shape[1:]:
        raise ValueError(
            f"active_classes has shape {tuple(active_classes.shape)}, but class_logits has "
            f"{class_logits.shape[1]} classes"
        )
    class_logits = at_least_float32(class_logits)
    weights = active_classes.to(class_logits.device)[class_logits.argmax(dim=1)].to(class_logits.dtype)
    return weights * cross_entropy(class_logits, labels), weights


class ActiveClassCrossEntropyLoss(nn.Module):
    """`active_class_cross_entropy_loss` with its active classes (C,), a buffer that moves with the model."""

    active_classes: Tensor

    def __init__(self, active_classes: Tensor | Sequence[bool]) -> None:
        super().__init__()
        active_classes = torch.as_tensor(active_classes)
        if active_classes.dim() != 1:
            raise ValueError(
                f"active_classes must have one entry per class, got shape {tuple(active_classes.shape)}"
            )
        if ((active_classes != 0) & (active_classes != 1)).any():
            raise ValueError(
                "active_classes must be True or False for each class, background included, not the active labels "
                f"{active_classes.tolist()}"
            )
        self.register_buffer("active_classes", active_classes.bool())

    def extra_repr(self) -> str:
        """Show how many classes are active."""
        return f"active={int(self.active_classes.sum())} of {self.active_classes.numel()}"

    def forward(self, class_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See `active_class_cross_entropy_loss`."""
        return active_class_cross_entropy_loss(class_logits, labels, active_classes=self.active_classes)


def class_weighted_cross_entropy_loss(
    class_logits: Tensor, labels: Tensor, *, class_weights: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Compute softmax cross-entropy in which a RoI of class k has the weight w_k, also in the divisor.

    Args:
        class_logits: (R, C), pre-softmax.
        labels: (R,) int64 in [0, C), 0 is background.
        class_weights: (C,), w >= 0.

    Returns:
        Values w_k CE (R,), at least float32, and weights w_k (R,). The loss is the sum of the values divided by the
        sum of the weights: torch's weighted mean. `torch.nn.CrossEntropyLoss(weight=w, reduction="none")` returns only
        the values, so `MaskRCNNLoss` divides their sum by R. That is mmdetection's loss: this one times Σ w / R.

    Raises:
        ValueError: `class_weights` does not have one entry per class.

    Example:
        >>> import torch
        >>> weights = torch.tensor([1., 2., 1., 1.])
        >>> class_weighted_cross_entropy_loss(torch.zeros(2, 4), torch.tensor([0, 1]), class_weights=weights)  # ln 4
        (tensor([1.3863, 2.7726]), tensor([1., 2.]))

    Source: the two divisors are those of `CrossEntropyLoss` in torch and in mmdetection 3.3.0.
    """
    if class_weights.shape != class_logits.shape[1:]:
        raise ValueError(
            f"class_weights has shape {tuple(class_weights.shape)}, but class_logits has "
            f"{class_logits.shape[1]} classes"
        )
    class_logits = at_least_float32(class_logits)
    values = cross_entropy(class_logits, labels)
    weights = class_weights.to(class_logits)[labels]
    return weights * values, weights


class ClassWeightedCrossEntropyLoss(nn.Module):
    """`class_weighted_cross_entropy_loss` with its weights (C,), a buffer that moves with the model."""

    class_weights: Tensor

    def __init__(self, class_weights: Tensor | Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("class_weights", check_class_values(class_weights, "class_weights"))

    def extra_repr(self) -> str:
        """Show the number of classes."""
        return f"{self.class_weights.numel()} classes"

    def forward(self, class_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See `class_weighted_cross_entropy_loss`."""
        return class_weighted_cross_entropy_loss(class_logits, labels, class_weights=self.class_weights)


class ClassLoss(LossModule):
    """A classification loss: a term for `MaskRCNNLoss(classification=)`."""

    def __init__(self, function: Callable[..., Tensor], **knobs: Any) -> None:
        super().__init__(function, torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), **knobs)

    def forward(self, class_logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of `class_logits` (R, C) against `labels` (R,)."""
        loss: Tensor = self.function(class_logits, labels, **self.knobs)
        return loss


def class_focal_loss(
    class_logits: Tensor, labels: Tensor, *, gamma: float = 2.0, reduction: Reduction = "none"
) -> Tensor:
    r"""Compute the focal loss of each RoI's class over a softmax.

    With p the softmax probability of the RoI's class, loss = -(1 - p)^γ log p. It fits torchvision's inference, which
    takes scores from a softmax; the sigmoids of RetinaNet's focal loss do not.

    Args:
        class_logits: (R, C), pre-softmax.
        labels: (R,) int64 in [0, C), 0 is background.
        gamma: γ >= 0; 0 is cross-entropy.
        reduction: "none" returns (R,); "sum" and "mean" return a scalar.

    Returns:
        At least float32, >= 0. R = 0 returns shape (0,), or 0 when reduced.

    Raises:
        ValueError: γ < 0.

    Example:
        >>> import torch
        >>> class_focal_loss(torch.zeros(1, 2), torch.tensor([1]))  # (1/2)² · ln 2
        tensor([0.1733])

    Source: Lin et al., Focal loss for dense object detection, 2017, arXiv:1708.02002, equation 4, over a softmax
    as section 3 allows.
    """
    check_in_range(0, gamma=gamma)
    ce = cross_entropy(at_least_float32(class_logits), labels)
    # expm1 keeps the digits of 1 - p where p rounds to 1.
    return reduced(power(-torch.expm1(-ce), gamma) * ce, reduction)


class ClassFocalLoss(ClassLoss):
    """`class_focal_loss` with its γ."""

    def __init__(self, gamma: float = 2.0, reduction: Reduction = "none") -> None:
        super().__init__(class_focal_loss, gamma=gamma, reduction=reduction)


def class_sigmoid_loss(class_logits: Tensor, labels: Tensor, *, reduction: Reduction = "none") -> Tensor:
    r"""Compute binary cross-entropy for each foreground class separately, summed over the classes.

    A RoI is background where no class is present, so the logit of the background is not trained. In a new class layer
    it stays near 0, and torchvision's softmax in inference becomes e^z_k / (1 + Σ_j e^z_j); where one class is likely,
    that is the sigmoid of its logit. A class layer that was trained with a softmax should be initialized again.

    Args:
        class_logits: (R, C), pre-sigmoid; channel 0 is ignored.
        labels: (R,) int64 in [0, C), 0 is background.
        reduction: "none" returns (R,); "sum" and "mean" return a scalar.

    Returns:
        At least float32, >= 0. R = 0 returns shape (0,), or 0 when reduced.

    Example:
        >>> import torch
        >>> class_sigmoid_loss(torch.zeros(1, 3), torch.tensor([1]))  # 2 ln 2
        tensor([1.3863])

    Source: Detectron2 02b5c4e, `FastRCNNOutputLayers.sigmoid_cross_entropy_loss`.
    """
    logits, targets = foreground_of(class_logits, labels)
    per_class = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return reduced(per_class.sum(dim=1), reduction)


class ClassSigmoidLoss(ClassLoss):
    """`class_sigmoid_loss` as a term."""

    def __init__(self, reduction: Reduction = "none") -> None:
        super().__init__(class_sigmoid_loss, reduction=reduction)


def cross_entropy(class_logits: Tensor, labels: Tensor) -> Tensor:
    """Return the softmax cross-entropy (R,); a label outside [0, C) is an error."""
    check_labels(labels, class_logits.shape[0])
    # By default, torch ignores the label -100.
    return F.cross_entropy(class_logits, labels, reduction="none", ignore_index=_NO_LABEL)


def foreground_of(class_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of the foreground classes, at least float32, and their one-hot targets, both (R, C - 1).

    Example:
        >>> import torch
        >>> foreground_of(torch.zeros(2, 3), torch.tensor([0, 2]))[1]
        tensor([[0., 0.],
                [0., 1.]])
    """
    check_labels(labels, class_logits.shape[0])
    logits = at_least_float32(class_logits)
    # scatter raises for a label outside [0, C), which a comparison would turn into background.
    targets = torch.zeros_like(logits).scatter(1, labels[:, None], 1.0)
    return logits[:, 1:], targets[:, 1:]
