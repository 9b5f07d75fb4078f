"""What a term's summed values are divided by: functions of a batch's counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class BatchCounts:
    """What a normalizer may divide by.

    Attributes:
        num_images: N, in the batch.
        sampled: anchors (RPN) or RoIs (detector) that were sampled, over the batch.
        positives: those of them that are matched to an instance.
        batch_size_per_image: how many the sampler draws for one image if there are enough; 0 of a sampler that does
            not say.
        weight_sum: sum of the weights that a classification term returned beside its values; the number of
            sampled RoIs where it returned none.
        locations: feature-map positions with anchors, over the batch (RPN only).
    """

    num_images: int
    sampled: int
    positives: int
    batch_size_per_image: int
    weight_sum: float | Tensor = 0.0
    locations: int = 0


Normalizer = Callable[[BatchCounts], "float | Tensor"]


def per_sampled(counts: BatchCounts) -> int:
    """Divide by all that were sampled, so that each positive weighs the same in every image."""
    return counts.sampled


def per_weight_sum(counts: BatchCounts) -> float | Tensor:
    """Divide by the term's own weights, as torch's weighted cross-entropy does."""
    return counts.weight_sum


def per_positive(counts: BatchCounts) -> int:
    """Divide by the positives alone."""
    return counts.positives


def per_positive_coordinate(counts: BatchCounts) -> int:
    """Divide by four numbers per positive box: matterport's mean."""
    return 4 * counts.positives


def per_full_batch(counts: BatchCounts) -> int:
    """Divide by what would be sampled if every image had enough: Detectron2's constant.

    Raises:
        ValueError: the sampler has no `batch_size_per_image`.
    """
    if counts.batch_size_per_image == 0:
        raise ValueError("per_full_batch needs a sampler with `batch_size_per_image`, as torchvision's is")
    return counts.num_images * counts.batch_size_per_image


def per_location(counts: BatchCounts) -> int:
    """Divide by the anchor locations: N_reg of the Faster R-CNN paper."""
    return counts.locations
