"""Sampling of anchors and RoIs: torchvision's draws, and draws of a fixed size, for which no device is waited for.

torchvision's sampler asks the device how many positives there are before it draws among them. Here each image gets
as many slots as the sampler draws at most, filled on the device with positives, then negatives, then nothing
that counts. How many of each there are follows later: the copy to the host is under way while the device goes
on with what needs the slots alone, and is waited for when that has been handed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler


@dataclass(frozen=True)
class SampledSlots:
    """What was sampled of each of N images, on the device.

    Attributes:
        indices: (N, B) int64, which anchor or RoI is in a slot: the positives first, then the negatives, then
            some that were not sampled.
        num_positives: (N,) int64.
        num_sampled: (N,) int64, positives and negatives.
    """

    indices: Tensor
    num_positives: Tensor
    num_sampled: Tensor


def sample_slots(labels: Sequence[Tensor], sampler: BalancedPositiveNegativeSampler) -> SampledSlots:
    """Draw as many positives and negatives as torchvision's sampler, uniformly, without waiting for the device.

    The largest of random keys are drawn, instead of the first of a random permutation, so the draws are others
    than torchvision's.

    Args:
        labels: of N images, (A_i,): at least 1 of positives, 0 of negatives, below 0 of what may not be drawn.
        sampler: how many to draw of an image, and which fraction of them may be positive.

    Returns:
        B = min(the sampler's number, the largest A_i) slots of each image.

    Source: random permutations by sorting random keys, Knuth, The Art of Computer Programming, vol. 2, 3.4.2.
    """
    padded = pad_sequence(list(labels), batch_first=True, padding_value=-1)  # (N, A)
    available = padded.shape[1]
    size = min(sampler.batch_size_per_image, available)
    max_positives = min(int(sampler.batch_size_per_image * sampler.positive_fraction), size)
    keys = torch.rand(padded.shape, device=padded.device)
    positive, negative = padded >= 1, padded == 0
    positives = keys.masked_fill(~positive, -1.0).topk(max_positives, dim=1).indices  # (N, K)
    negatives = keys.masked_fill(~negative, -1.0).topk(size, dim=1).indices  # (N, B)
    num_positives = positive.sum(1, keepdim=True).clamp(max=max_positives)  # (N, 1)
    num_sampled = num_positives + torch.minimum(
        negative.sum(1, keepdim=True), sampler.batch_size_per_image - num_positives
    )
    # Slot s holds positive s, and from slot num_positives on the negatives in turn.
    slot = torch.arange(size, device=padded.device)
    place = torch.where(slot < num_positives, slot, max_positives + slot - num_positives)
    indices = torch.cat([positives, negatives], dim=1).gather(1, place)
    return SampledSlots(indices, num_positives[:, 0], num_sampled[:, 0])


@dataclass(frozen=True)
class SampleCounts:
    """How many slots of each of N images hold what, on the host.

    Attributes:
        num_positives: of each image.
        num_sampled: of each image, positives and negatives.
    """

    num_positives: list[int]
    num_sampled: list[int]

    @classmethod
    def of(cls, num_positives: Tensor, num_sampled: Tensor) -> SampleCounts:
        """Read the counts of `SampledSlots` that have arrived on the host."""
        return cls(num_positives.tolist(), num_sampled.tolist())

    def positives(self, by_slot: Tensor) -> list[Tensor]:
        """Of values by slot, (N, B, ...), give each image's that belong to positives."""
        return [values[:count] for values, count in zip(by_slot, self.num_positives, strict=True)]

    def negatives(self, by_slot: Tensor) -> list[Tensor]:
        """Of values by slot, (N, B, ...), give each image's that belong to negatives."""
        ends = zip(by_slot, self.num_positives, self.num_sampled, strict=True)
        return [values[first:last] for values, first, last in ends]

    def both(self, by_slot: Tensor) -> list[Tensor]:
        """Of values by slot, (N, B, ...), give each image's that something was sampled into."""
        return [values[:count] for values, count in zip(by_slot, self.num_sampled, strict=True)]
