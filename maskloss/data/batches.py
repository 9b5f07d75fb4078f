"""Which images each training step sees, computed from the seed and the step alone.

So a run can be taken up at any step, with any number of workers, and sees what it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class TrainingBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (index, augmentation seed), shuffled anew every epoch.

    Epochs follow each other without a gap: a batch may hold the end of one and the start of the next.

    Args:
        num_images: in the data set.
        batch_size: images per batch of one process.
        num_batches: batches of one process up to the end of training.
        start: the first batch to give.
        seed: of the run.
        rank: this process, of `world_size`.
        world_size: processes that share each step.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        num_batches: int,
        *,
        start: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.num_images = num_images
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.start = start
        self.seed = seed
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return max(self.num_batches - self.start, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, torch.empty(0, dtype=torch.int64)
        for batch in range(self.start, self.num_batches):
            first = (batch * self.world_size + self.rank) * self.batch_size
            keys = []
            for position in range(first, first + self.batch_size):
                if position // self.num_images != epoch:
                    epoch = position // self.num_images
                    generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
                    order = torch.randperm(self.num_images, generator=generator)
                keys.append((int(order[position % self.num_images]), mixed_seed(self.seed, position)))
            yield keys


def mixed_seed(seed: int, *numbers: int) -> int:
    """Make a seed of 63 bits out of several numbers, so that neighbours start unlike streams.

    Source: the finaliser of SplitMix64 (Steele et al., 2014).
    """
    state = seed & (2**64 - 1)
    for number in numbers:
        state = (state + (number + 1) * 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1
