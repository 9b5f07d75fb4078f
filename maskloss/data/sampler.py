"""Training batches that depend only on the seed and the step.

So a run that is resumed at any step, with any number of workers, sees the same batches as without the interruption.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler


class TrainingBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (index, augmentation seed), reshuffled every epoch, each with images of a single group.

    Images are padded to the largest image of their batch, so mixing portrait and landscape images wastes the most
    compute. The epochs of each group are concatenated, and cut into chunks of the batch size of all processes. The
    images left over at the end of an epoch start the next chunk, so no image is left out or seen twice as often as
    others. The batches of an epoch come in a random order.

    Source: torchvision's reference scripts group by aspect ratio (`GroupedBatchSampler`) and drop the images that do
    not fill a batch.

    Args:
        groups: Group of each image, such as 0 for portrait images. A group with too few images for one batch of all
            processes is merged into the largest group.
        batch_size: Images per batch of one process.
        num_batches: Batches of one process until the end of training.
        start: First batch to return.
        seed: Seed of the run.
        rank: Rank of this process, below `world_size`.
        world_size: Number of processes that share each step.
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
        self.joint_batch_size = batch_size * world_size
        group_of = torch.as_tensor(list(groups), dtype=torch.int64)
        names, sizes = group_of.unique(return_counts=True)
        largest = names[sizes.argmax()]
        small = names[sizes < self.joint_batch_size]
        merged = torch.where(torch.isin(group_of, small), largest, group_of)
        self._members = [torch.where(merged == name)[0] for name in merged.unique()]

    def __len__(self) -> int:
        return max(self.num_batches - self.start, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self._epoch_of(self.start)
        batch = self._batches_before(epoch)
        # For each group, the last used epoch and its order of the images, which nearly all batches of an epoch share.
        orders: dict[int, tuple[int, Tensor]] = {}
        while batch < self.num_batches:
            for group, number in self._plan(epoch):
                if self.start <= batch < self.num_batches:
                    yield self._batch(group, number, orders)
                batch += 1
            epoch += 1

    def _batches_before(self, epoch: int) -> int:
        """Return the number of complete batches after the first `epoch` epochs."""
        return sum(epoch * len(members) // self.joint_batch_size for members in self._members)

    def _epoch_of(self, batch: int) -> int:
        """Return the epoch of a batch: the last one that at most `batch` batches precede."""
        low, high = 0, 1
        while self._batches_before(high) <= batch:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._batches_before(middle) <= batch else (low, middle)
        return low

    def _plan(self, epoch: int) -> list[tuple[int, int]]:
        """Return (group, batch number within the group) of the batches that an epoch completes, in random order."""
        plan = [
            (group, number)
            for group, members in enumerate(self._members)
            for number in range(
                epoch * len(members) // self.joint_batch_size,
                (epoch + 1) * len(members) // self.joint_batch_size,
            )
        ]
        if len(self._members) == 1:
            return plan  # the images are in a random order already
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch, len(self._members)))
        return [plan[place] for place in torch.randperm(len(plan), generator=generator).tolist()]

    def _batch(self, group: int, number: int, orders: dict[int, tuple[int, Tensor]]) -> list[tuple[int, int]]:
        members = self._members[group]
        first = number * self.joint_batch_size + self.rank * self.batch_size
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
    """Mix several numbers into a 63-bit seed, so that neighboring numbers give unrelated random streams.

    Source: The finalizer of SplitMix64 (Steele et al., 2014).
    """
    state = seed & (2**64 - 1)
    for number in numbers:
        state = (state + (number + 1) * 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1
