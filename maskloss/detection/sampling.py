"""Sample anchors and RoIs without synchronizing with the device.

torchvision's sampler synchronizes to count the positives before it samples. Here the sample of every image is padded to
the largest size that the sampler could return: positives, then negatives, then, as padding, entries that were not
sampled. The counts are copied to the host asynchronously, while the device works on the padded tensors, whose shapes
are known. The host synchronizes only after it has launched this work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler


class SeededSampler(BalancedPositiveNegativeSampler):
    """torchvision's sampler, with a seed for each image inside `seeded`.

    Then an image's sample does not depend on the other images of its batch, on the number of processes that share the
    batch, or on what was sampled before.

    Args:
        batch_size_per_image: number of anchors or RoIs to sample in an image.
        positive_fraction: largest share of positives.

    Example:
        >>> sampler = SeededSampler(batch_size_per_image=2, positive_fraction=0.5)
        >>> labels = torch.tensor([1.0, 0.0, 0.0, 0.0])
        >>> with sampler.seeded([7, 8]):
        ...     _, (first, _) = sampler([labels, labels])
        >>> with sampler.seeded([7]):
        ...     _, (alone,) = sampler([labels])
        >>> bool((first == alone).all())
        True
    """

    def __init__(self, batch_size_per_image: int, positive_fraction: float) -> None:
        super().__init__(batch_size_per_image, positive_fraction)
        self._seeds: Sequence[int] | None = None

    @classmethod
    def like(cls, sampler: BalancedPositiveNegativeSampler) -> SeededSampler:
        """Return a sampler with the settings of another."""
        return cls(sampler.batch_size_per_image, sampler.positive_fraction)

    @contextlib.contextmanager
    def seeded(self, seeds: Sequence[int]) -> Iterator[None]:
        """Seed torch's generators before each image is sampled; seeds has one number per image of the batch."""
        self._seeds = seeds
        try:
            yield
        finally:
            self._seeds = None

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return masks (A_i,) of the sampled positives and negatives of each image."""
        if self._seeds is None:
            both: tuple[list[Tensor], list[Tensor]] = super().__call__(matched_idxs)
            return both
        positives, negatives = [], []
        for seed, labels in zip(self._seeds, matched_idxs, strict=True):
            torch.manual_seed(seed)
            (positive,), (negative,) = super().__call__([labels])
            positives.append(positive)
            negatives.append(negative)
        return positives, negatives

    def keys(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Return random numbers (N, A) in [0, 1), each row from the seed of its image."""
        if self._seeds is None:
            return torch.rand(shape, device=device, dtype=torch.float32)
        rows = []
        for seed in self._seeds:
            torch.manual_seed(seed)
            rows.append(torch.rand(shape[1], device=device, dtype=torch.float32))
        return torch.stack(rows)


@dataclass(frozen=True)
class PaddedSample:
    """The samples of N images, padded to B entries per image, on the device.

    Attributes:
        indices: (N, B) int64, indices of anchors or RoIs: first the positives, then the negatives, then, as padding,
            entries that were not sampled.
        num_positives: (N,) int64.
        num_sampled: (N,) int64, number of positives and negatives.

    Example:
        >>> sampled = PaddedSample(torch.tensor([[4, 0, 2]]), torch.tensor([1]), torch.tensor([2]))
        >>> SampleCounts.of(sampled.num_positives, sampled.num_sampled).both(sampled.indices)
        [tensor([4, 0])]
    """

    indices: Tensor
    num_positives: Tensor
    num_sampled: Tensor


def sample_padded(labels: Sequence[Tensor], sampler: BalancedPositiveNegativeSampler) -> PaddedSample:
    """Sample as many positives and negatives as torchvision's sampler, uniformly, without synchronizing.

    Entries with the largest random keys are sampled, instead of the first entries of a random permutation. Therefore
    the sample differs from torchvision's.

    Args:
        labels: N tensors (A_i,): at least 1 for positives, 0 for negatives, negative for entries that must not be
            sampled.
        sampler: its `batch_size_per_image` and `positive_fraction` are used.

    Returns:
        The samples, padded to B = min(batch_size_per_image, largest A_i).

    Example:
        >>> sampled = sample_padded([torch.tensor([0, 1, 0, -1])], BalancedPositiveNegativeSampler(3, 0.5))
        >>> sampled.indices[0, 0], sampled.num_positives, sampled.num_sampled
        (tensor(1), tensor([1]), tensor([3]))

    Source: random permutations by sorting random keys, Knuth, The Art of Computer Programming, vol. 2, 3.4.2.
    """
    padded = pad_sequence(list(labels), batch_first=True, padding_value=-1)  # (N, A)
    available = padded.shape[1]
    size = min(sampler.batch_size_per_image, available)
    max_positives = min(int(sampler.batch_size_per_image * sampler.positive_fraction), size)
    if isinstance(sampler, SeededSampler):
        keys = sampler.keys(padded.shape, padded.device)
    else:
        keys = torch.rand(
            padded.shape, device=padded.device, dtype=torch.float32
        )  # in bfloat16, many are equal
    positive, negative = padded >= 1, padded == 0
    positives = keys.masked_fill(~positive, -1.0).topk(max_positives, dim=1).indices  # (N, K)
    negatives = keys.masked_fill(~negative, -1.0).topk(size, dim=1).indices  # (N, B)
    num_positives = positive.sum(1, keepdim=True).clamp(max=max_positives)  # (N, 1)
    num_sampled = num_positives + torch.minimum(
        negative.sum(1, keepdim=True), sampler.batch_size_per_image - num_positives
    )
    # The first num_positives columns hold the positives in order, and the next ones the negatives.
    column = torch.arange(size, device=padded.device)
    place = torch.where(column < num_positives, column, max_positives + column - num_positives)
    indices = torch.cat([positives, negatives], dim=1).gather(1, place)
    return PaddedSample(indices, num_positives[:, 0], num_sampled[:, 0])


@dataclass(frozen=True)
class SampleCounts:
    """The counts of `PaddedSample` on the host.

    Attributes:
        num_positives: per image, the number of positives.
        num_sampled: per image, the number of positives and negatives.

    Example:
        >>> SampleCounts([1], [3]).negatives(torch.tensor([[7, 8, 9, 0]]))
        [tensor([8, 9])]
    """

    num_positives: list[int]
    num_sampled: list[int]

    @classmethod
    def of(cls, num_positives: Tensor, num_sampled: Tensor) -> SampleCounts:
        """Make the counts from tensors (N,) on the host."""
        return cls(num_positives.tolist(), num_sampled.tolist())

    def positives(self, padded: Tensor) -> list[Tensor]:
        """Select each image's positives from padded values (N, B, ...)."""
        return [values[:count] for values, count in zip(padded, self.num_positives, strict=True)]

    def negatives(self, padded: Tensor) -> list[Tensor]:
        """Select each image's negatives from padded values (N, B, ...)."""
        ends = zip(padded, self.num_positives, self.num_sampled, strict=True)
        return [values[first:last] for values, first, last in ends]

    def both(self, padded: Tensor) -> list[Tensor]:
        """Select each image's positives and negatives from padded values (N, B, ...)."""
        return [values[:count] for values, count in zip(padded, self.num_sampled, strict=True)]
