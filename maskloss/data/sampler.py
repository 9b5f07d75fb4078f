"""Which images each training step sees, computed from the seed and the step alone.

So a run can be taken up at any step, with any number of workers, and sees what it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler


class TrainingBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (index, augmentation seed), shuffled anew every epoch, each of images of one group.

    A batch is padded to its largest image, so images that are wide and images that are high cost most beside each
    other. Each group's images follow each other epoch after epoch without a gap, and every so many of them are a batch
    of all processes: what an epoch leaves over begins the next one's batches, so no image is left out or seen twice as
    often. The batches of an epoch come in a random order.

    Source: torchvision's reference scripts group by aspect ratio, `GroupedBatchSampler`, and leave out what does not
    fill a batch.

    Args:
        groups: of each image, such as 0 for an upright one; a group that does not fill one batch of all processes joins
            the largest.
        batch_size: images per batch of one process.
        num_batches: batches of one process up to the end of training.
        start: the first batch to give.
        seed: of the run.
        rank: this process, of `world_size`.
        world_size: processes that share each step.
    """

    def __init__(
        self,
        groups: Sequence[int],
        batch_size: int,
        num_batches: int,
        *,
        start: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.start = start
        self.seed = seed
        self.rank = rank
        self.together = batch_size * world_size
        given = torch.as_tensor(list(groups), dtype=torch.int64)
        names, sizes = given.unique(return_counts=True)
        largest = names[sizes.argmax()]
        small = names[sizes < self.together]
        joined = torch.where(torch.isin(given, small), largest, given)
        self._members = [torch.where(joined == name)[0] for name in joined.unique()]

    def __len__(self) -> int:
        return max(self.num_batches - self.start, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self._epoch_of(self.start)
        batch = self._batches_before(epoch)
        # Of each group the epoch whose order was used last, and the order: nearly all batches of an epoch share it.
        orders: dict[int, tuple[int, Tensor]] = {}
        while batch < self.num_batches:
            for group, number in self._plan(epoch):
                if self.start <= batch < self.num_batches:
                    yield self._batch(group, number, orders)
                batch += 1
            epoch += 1

    def _batches_before(self, epoch: int) -> int:
        """How many batches are full when so many epochs are over."""
        return sum(epoch * len(members) // self.together for members in self._members)

    def _epoch_of(self, batch: int) -> int:
        """In which epoch a batch comes: the last that begins with no more batches behind it."""
        low, high = 0, 1
        while self._batches_before(high) <= batch:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._batches_before(middle) <= batch else (low, middle)
        return low

    def _plan(self, epoch: int) -> list[tuple[int, int]]:
        """Which groups' batches fill up in an epoch, by their number in the group, in random order."""
        plan = [
            (group, number)
            for group, members in enumerate(self._members)
            for number in range(
                epoch * len(members) // self.together, (epoch + 1) * len(members) // self.together
            )
        ]
        if len(self._members) == 1:
            return plan  # whose images are in a random order already
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch, len(self._members)))
        return [plan[place] for place in torch.randperm(len(plan), generator=generator).tolist()]

    def _batch(self, group: int, number: int, orders: dict[int, tuple[int, Tensor]]) -> list[tuple[int, int]]:
        members = self._members[group]
        first = number * self.together + self.rank * self.batch_size
        keys = []
        epoch, order = orders.get(group, (-1, members))
        for position in range(first, first + self.batch_size):
            if position // len(members) != epoch:
                epoch = position // len(members)
                generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch, group))
                order = members[torch.randperm(len(members), generator=generator)]
                orders[group] = epoch, order
            keys.append((int(order[position % len(members)]), mixed_seed(self.seed, group, position)))
        return keys


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
