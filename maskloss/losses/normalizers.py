"""The divisors of a term's summed values, as functions of a batch's counts. Shapes: see `maskloss.losses`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class BatchCounts:
    """The counts of a batch, from which a normalizer computes a divisor.

    With `MaskRCNNLoss(synchronized=True)` and several processes, they are means over the processes, and tensors.

    Attributes:
        num_images: N, images in the batch.
        sampled: sampled anchors (RPN, S) or RoIs (detector, R) of all images.
        positives: P, the sampled ones that are matched to an object.
        batch_size_per_image: how many the sampler samples from an image that has enough; 0 if the sampler does not
            have this attribute.
        weight_sum: sum of the weights that a classification term returned with its values; the number of
            sampled RoIs if it returned no weights.
        locations: feature-map positions with anchors, in all images (RPN only).

    Example:
        >>> counts = BatchCounts(num_images=2, sampled=8, positives=3, batch_size_per_image=512)
        >>> per_sampled(counts), per_positive(counts)
        (8, 3)
    """

    num_images: int
    sampled: int
    positives: int
    batch_size_per_image: int
    weight_sum: float | Tensor = 0.0
    locations: int = 0


Normalizer = Callable[[BatchCounts], "float | Tensor"]


def per_sampled(counts: BatchCounts) -> int:
    """Return the number of sampled anchors or RoIs, so that each positive weighs the same in every image.

    Example:
        >>> per_sampled(BatchCounts(num_images=2, sampled=8, positives=3, batch_size_per_image=512))
        8
    """
    return counts.sampled


def per_weight_sum(counts: BatchCounts) -> float | Tensor:
    """Return the sum of the term's weights, the divisor of torch's weighted cross-entropy.

    Example:
        >>> per_weight_sum(BatchCounts(2, sampled=8, positives=3, batch_size_per_image=512, weight_sum=6.5))
        6.5
    """
    return counts.weight_sum


def per_positive(counts: BatchCounts) -> int:
    """Return the number of positives.

    Example:
        >>> per_positive(BatchCounts(num_images=2, sampled=8, positives=3, batch_size_per_image=512))
        3
    """
    return counts.positives


def per_positive_coordinate(counts: BatchCounts) -> int:
    """Return the number of box coordinates of the positives, the divisor of matterport's mean.

    Example:
        >>> per_positive_coordinate(BatchCounts(num_images=2, sampled=8, positives=3, batch_size_per_image=512))
        12
    """
    return 4 * counts.positives


def per_full_batch(counts: BatchCounts) -> int:
    """Return how many would be sampled if every image had enough, Detectron2's constant divisor.

    Raises:
        ValueError: the sampler has no `batch_size_per_image`.

    Example:
        >>> per_full_batch(BatchCounts(num_images=2, sampled=8, positives=3, batch_size_per_image=512))  # 2 · 512
        1024
    """
    if counts.batch_size_per_image == 0:
        raise ValueError("per_full_batch needs a sampler with `batch_size_per_image`, as torchvision's is")
    return counts.num_images * counts.batch_size_per_image


def per_location(counts: BatchCounts) -> int:
    """Return the number of anchor locations, N_reg of the Faster R-CNN paper.

    Example:
        >>> per_location(BatchCounts(2, sampled=8, positives=3, batch_size_per_image=256, locations=50))
        50
    """
    return counts.locations
