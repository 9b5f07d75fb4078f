"""The terms of the loss: a Protocol for each, the batches that they are computed on, and a table of all terms.

Shapes: see `maskloss.losses`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from maskloss.losses.boxes import BoxRegression, BoxSmoothL1Loss
from maskloss.losses.mask_pixels import MaskBCELoss
from maskloss.losses.normalizers import BatchCounts, Normalizer, per_positive, per_sampled, per_weight_sum


class ObjectnessTerm(Protocol):
    """A loss of the logits (S,) of sampled anchors and their labels (S,), 1.0 for an object and 0.0 for background."""

    def __call__(self, logits: Tensor, labels: Tensor, /) -> Tensor:
        """Return one value per anchor, (S,)."""


class BoxTerm(Protocol):
    """A loss of the predicted and target boxes or deltas of P positives."""

    def __call__(self, regression: BoxRegression, /) -> Tensor:
        """Return one value per positive, (P,), or one per coordinate, (P, 4)."""


class ClassificationTerm(Protocol):
    """A loss of class logits (R, C) and labels (R,) int64."""

    def __call__(self, class_logits: Tensor, labels: Tensor, /) -> Tensor | tuple[Tensor, Tensor]:
        """Return one value per RoI, (R,), or a tuple of values (R,) and weights (R,) for the divisor."""


class MaskTerm(Protocol):
    """A loss of the mask logits (P, M, M) of each positive's own class and the mask targets (P, M, M)."""

    def __call__(self, mask_logits: Tensor, mask_targets: Tensor, /) -> Tensor:
        """Return one value per positive, (P,), or one per cell, (P, M, M)."""


class AllClassesMaskTerm(Protocol):
    """A loss of the mask logits (P, C, M, M) of all classes, the mask targets (P, M, M) and the labels (P,) int64.

    Attributes:
        all_classes: True; it distinguishes the term from a `MaskTerm`.
    """

    all_classes: bool

    def __call__(self, mask_logits: Tensor, mask_targets: Tensor, labels: Tensor, /) -> Tensor:
        """Return one value per positive, (P,), or one per cell, (P, M, M)."""


class Supervision(IntEnum):
    """The best label that an object has for its mask."""

    BOX = 0
    POINTS = 1
    MASK = 2


@dataclass(frozen=True)
class MaskLabels:
    """All labels for the masks of P positives, in the grids of their RoIs.

    Attributes:
        mask_targets: (P, M, M) in [0, 1]; 0 for objects without a mask.
        rows: for each kind of supervision, the indices (P_k,) int64 of the positives whose best label is of this
            kind. Each positive belongs to exactly one kind.
        gt_box_grids: (P, M, M) in [0, 1], the share of each cell inside the object's box.
        point_coords: labeled points (P, K, 2), x and y relative to the RoI, in [0, 1] inside it.
        point_labels: (P, K), 1 inside the object, 0 outside, -1 for points outside the RoI and for padding.
        image_crops: (P, 3, M, M), RGB in [0, 1], the image under the RoI; None unless the term has `uses_image`.
    """

    mask_targets: Tensor
    rows: dict[Supervision, Tensor]
    gt_box_grids: Tensor
    point_coords: Tensor
    point_labels: Tensor
    image_crops: Tensor | None = None

    @classmethod
    def of_masks(cls, mask_targets: Tensor) -> MaskLabels:
        """Return the labels of positives that all have a mask, but no points, box or image."""
        every = torch.arange(mask_targets.shape[0], device=mask_targets.device)
        no_points = mask_targets.new_zeros((mask_targets.shape[0], 0, 2))
        return cls(
            mask_targets,
            {Supervision.MASK: every},
            torch.zeros_like(mask_targets),
            no_points,
            no_points[..., 0],
        )


class ImageMaskTerm(Protocol):
    """A loss of mask logits, mask targets, and the image and the object's box in the grid of each RoI.

    Attributes:
        uses_image: True; it distinguishes the term from a `MaskTerm`.
    """

    uses_image: bool

    def __call__(
        self, mask_logits: Tensor, mask_targets: Tensor, image_crops: Tensor, gt_box_grids: Tensor, /
    ) -> Tensor:
        """Return one value per positive, (P,), or one per cell, (P, M, M); image_crops is (P, 3, M, M) in [0, 1]."""


class LabeledMaskTerm(Protocol):
    """A loss of mask logits (P, M, M) and the labels that their objects have, such as `MaskBySupervision`.

    Attributes:
        uses_mask_labels: True; it distinguishes the term from a `MaskTerm`.
        uses_image: whether it reads `MaskLabels.image_crops`.
        supervision: the kinds of labels that it learns from. Positives of objects without any of them are left out.
    """

    uses_mask_labels: bool
    uses_image: bool
    supervision: frozenset[Supervision]

    def __call__(self, mask_logits: Tensor, labels: MaskLabels, /) -> Tensor:
        """Return one value per positive, (P,)."""


#: The terms that `MaskRCNNLoss(mask=)` takes.
AnyMaskTerm = MaskTerm | AllClassesMaskTerm | ImageMaskTerm | LabeledMaskTerm


class KeypointTerm(Protocol):
    """A loss of the heatmap logits (V, M * M) of V visible keypoints and their target cells (V,) int64."""

    def __call__(self, keypoint_logits: Tensor, cells: Tensor, /) -> Tensor:
        """Return one value per keypoint, (V,)."""


class RegularizationTerm(Protocol):
    """A penalty on a model's parameters."""

    def __call__(self, model: nn.Module, /) -> Tensor:
        """Return a scalar."""


@dataclass(frozen=True)
class Term:
    """One term of the loss.

    Attributes:
        key: key in torchvision's dict of losses.
        arguments: the term's arguments, for error messages.
        per: the unit of the returned values, such as "positive"; empty for a scalar.
        default: factory of torchvision's term; None where torchvision has no such term.
        normalizer: the normalizer with torchvision's divisor; None for a scalar, which is not divided.
    """

    key: str
    arguments: tuple[str, ...]
    per: str = ""
    default: Callable[[], Any] | None = None
    normalizer: Normalizer | None = None


#: The terms by name, in the order in which losses are shown.
TERMS: dict[str, Term] = {
    "objectness": Term(
        "loss_objectness",
        ("logits", "labels"),
        "sampled anchor",
        lambda: nn.BCEWithLogitsLoss(reduction="none"),
        per_sampled,
    ),
    "rpn_box": Term(
        "loss_rpn_box_reg", ("a BoxRegression",), "positive", lambda: BoxSmoothL1Loss(beta=1 / 9), per_sampled
    ),
    "classification": Term(
        "loss_classifier",
        ("class_logits", "labels"),
        "sampled RoI",
        lambda: nn.CrossEntropyLoss(reduction="none"),
        per_weight_sum,
    ),
    # The divisor is all sampled RoIs. With the positives, a single positive would weigh as much as a hundred together.
    "box": Term(
        "loss_box_reg", ("a BoxRegression",), "positive", lambda: BoxSmoothL1Loss(beta=1 / 9), per_sampled
    ),
    "mask": Term("loss_mask", ("mask_logits", "mask_targets"), "positive", MaskBCELoss, per_positive),
    "keypoint": Term(
        "loss_keypoint",
        ("keypoint_logits", "cells"),
        "visible keypoint",
        lambda: nn.CrossEntropyLoss(reduction="none"),
        per_sampled,
    ),
    "regularization": Term("loss_regularization", ("the model",)),
}


@dataclass(frozen=True)
class LossWeights:
    """The weight of each term, a number >= 0. A weight of 0 skips the computation of the term, and its loss is 0.

    Raises:
        TypeError: a weight is not a number.
        ValueError: a weight is negative or not finite.

    Example:
        >>> LossWeights(mask=2.0).mask, LossWeights(mask=2.0).box
        (2.0, 1.0)
    """

    objectness: float = 1.0
    rpn_box: float = 1.0
    classification: float = 1.0
    box: float = 1.0
    mask: float = 1.0
    keypoint: float = 1.0
    regularization: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            weight = getattr(self, field.name)
            if not isinstance(weight, numbers.Real) or isinstance(weight, bool):
                raise TypeError(f"the weight of {field.name} must be a number, got {type(weight).__name__}")
            # NumPy scalars become plain floats, so that the weights can be written to a file.
            weight = float(weight)
            object.__setattr__(self, field.name, weight)
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"the weight of {field.name} must be a finite number >= 0, got {weight}")


@dataclass(frozen=True)
class RPNBatch:
    """The sampled anchors of all images.

    Attributes:
        objectness: (S,) logits.
        labels: (S,) float, 1 for an object and 0 for background.
        box: the P positive anchors.
        counts: counts of the batch; `counts.sampled` is S.
        weights: (S,), factors of the anchors' objectness losses; None for 1.
        box_weights: (P,), factors of the positives' box losses; None for 1.
    """

    objectness: Tensor
    labels: Tensor
    box: BoxRegression
    counts: BatchCounts
    weights: Tensor | None = None
    box_weights: Tensor | None = None


@dataclass(frozen=True)
class RoIBatch:
    """The sampled RoIs of all images, without their masks.

    Attributes:
        class_logits: (R, C).
        labels: (R,) int64, 0 is background.
        box: the P positive RoIs, each with the deltas of its own class.
        counts: counts of the batch; `counts.sampled` is R.
        weights: (R,), factors of the RoIs' classification losses; None for 1.
        box_weights: (P,), factors of the positives' box losses; None for 1.
    """

    class_logits: Tensor
    labels: Tensor
    box: BoxRegression
    counts: BatchCounts
    weights: Tensor | None = None
    box_weights: Tensor | None = None


@dataclass(frozen=True)
class MaskBatch:
    """The masks of the P positive RoIs.

    Attributes:
        mask_logits: (P, 1, M, M), the channel of each RoI's own class; or (P, C, M, M) if the head computes all
            channels.
        mask_targets: (P, M, M) in [0, 1].
        labels: (P,) int64, the class of each RoI.
        counts: counts of the RoI batch; `counts.positives` is P.
        weights: (P,), factors of the RoIs' mask losses; None for 1.
        mask_labels: all labels for the masks, for terms with `uses_image` or `uses_mask_labels`; None if all objects
            have a mask and the term needs no image.
    """

    mask_logits: Tensor
    mask_targets: Tensor
    labels: Tensor
    counts: BatchCounts
    weights: Tensor | None = None
    mask_labels: MaskLabels | None = None


@dataclass(frozen=True)
class KeypointBatch:
    """The visible keypoints of the positive RoIs.

    Attributes:
        keypoint_logits: (V, M * M), the heatmap of each keypoint.
        cells: (V,) int64 in [0, M * M), the heatmap cell that contains the keypoint.
        counts: counts of the batch; `counts.sampled` is V.
        weights: (V,), factors of the keypoints' losses; None for 1.
    """

    keypoint_logits: Tensor
    cells: Tensor
    counts: BatchCounts
    weights: Tensor | None = None
