"""The terms of the loss: a Protocol for each, the batches that they are computed on, and the table of all of them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol

from torch import Tensor, nn

from maskloss.losses.boxes import BoxRegression, BoxSmoothL1Loss
from maskloss.losses.mask_pixels import MaskBCELoss
from maskloss.losses.normalizers import BatchCounts, Normalizer, per_positive, per_sampled, per_weight_sum


class ObjectnessTerm(Protocol):
    """Compare the logits (S,) of sampled anchors with their labels (S,), 1. for an object and 0. for background."""

    def __call__(self, logits: Tensor, labels: Tensor, /) -> Tensor:
        """Return one value per anchor, (S,)."""


class BoxTerm(Protocol):
    """Compare the predicted boxes or deltas of P positives with what they should be."""

    def __call__(self, regression: BoxRegression, /) -> Tensor:
        """Return one value per positive, (P,), or one per coordinate, (P, 4)."""


class ClassificationTerm(Protocol):
    """Compare class logits (R, C) with labels (R,) int64."""

    def __call__(self, class_logits: Tensor, labels: Tensor, /) -> Tensor | tuple[Tensor, Tensor]:
        """Return one value per RoI, (R,), or values and the weights (R,) that enter the divisor."""


class MaskTerm(Protocol):
    """Compare the logits (P, M, M) of each positive's own class with its targets (P, M, M)."""

    def __call__(self, mask_logits: Tensor, mask_targets: Tensor, /) -> Tensor:
        """Return one value per positive, (P,), or one per cell, (P, M, M)."""


class AllClassesMaskTerm(Protocol):
    """Compare the logits (P, C, M, M) of all classes with the targets (P, M, M) of the labels (P,).

    Attributes:
        all_classes: True.
    """

    all_classes: bool

    def __call__(self, mask_logits: Tensor, mask_targets: Tensor, labels: Tensor, /) -> Tensor:
        """Return one value per positive, (P,), or one per cell, (P, M, M)."""


class KeypointTerm(Protocol):
    """Compare the logits (V, S * S) of V visible keypoints' heatmaps with the cells (V,) int64 that they are in."""

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
        key: in torchvision's dict of losses.
        arguments: what it is called with, for error messages.
        per: what it returns a value for; empty of a scalar.
        default: makes torchvision's term; None where torchvision has none.
        normalizer: gives torchvision's divisor; None of a scalar, which nothing divides.
    """

    key: str
    arguments: tuple[str, ...]
    per: str = ""
    default: Callable[[], Any] | None = None
    normalizer: Normalizer | None = None


#: The terms by name, in the order in which losses are shown. What repeats them loops over this table.
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
    # Divided by all sampled RoIs, not by the positives, which would make a lone positive weigh as much as a hundred.
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
    """What each term is multiplied by, each >= 0. 0 skips the term's work and leaves a zero in its place."""

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
            # A plain number, also of numpy's scalars, so that the weights can be written to a file.
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
        box: the P positives among them.
        counts: S is `counts.sampled`.
    """

    objectness: Tensor
    labels: Tensor
    box: BoxRegression
    counts: BatchCounts


@dataclass(frozen=True)
class RoIBatch:
    """The sampled RoIs of all images, without their masks.

    Attributes:
        class_logits: (R, C).
        labels: (R,) int64, 0 is background.
        box: the P positives among them, each with the deltas of its own class.
        counts: R is `counts.sampled`.
    """

    class_logits: Tensor
    labels: Tensor
    box: BoxRegression
    counts: BatchCounts


@dataclass(frozen=True)
class MaskBatch:
    """The masks of the P positive RoIs.

    Attributes:
        mask_logits: (P, 1, M, M), the channel of each RoI's own class; (P, C, M, M) where the head computes
            all of them.
        mask_targets: (P, M, M) in [0, 1].
        labels: (P,) int64, each RoI's own class.
        counts: of the RoI batch.
    """

    mask_logits: Tensor
    mask_targets: Tensor
    labels: Tensor
    counts: BatchCounts


@dataclass(frozen=True)
class KeypointBatch:
    """The visible keypoints of the positive RoIs.

    Attributes:
        keypoint_logits: (V, S * S), each keypoint's heatmap.
        cells: (V,) int64 in [0, S * S), the cell of its heatmap that each keypoint is in.
        counts: V is `counts.sampled`.
    """

    keypoint_logits: Tensor
    cells: Tensor
    counts: BatchCounts
