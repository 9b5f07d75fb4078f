"""Training batches that depend only on the seed and the step.

Therefore a run that is resumed at any step, with any number of workers, sees the same batches as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Sampler

IntArray = npt.NDArray[np.int64]


class TrainingBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (index, augmentation seed), reshuffled every epoch, each with images of a single group.

    Images are padded to the largest image of their batch, so mixing portrait and landscape images wastes the most
    compute. The epochs of each group are concatenated, and cut into chunks of the batch size of all processes. The
    images left over at the end of an epoch start the next chunk, so no image is left out or seen twice as often as
    others. The batches of an epoch come in a random order.

    Source: torchvision's reference scripts group by aspect ratio (`GroupedBatchSampler`) and drop the images that do
    not fill a batch.

    Args:
        groups: group of each image, such as 0 for portrait images. A group with too few images for one batch of all
            processes is merged into the largest group.
        batch_size: images per batch of one process.
        num_batches: batches of one process until the end of training.
        repeats: how often each image is seen per epoch, at least 1; all once if omitted. An image with 1.5 is seen once
            and twice in alternating epochs. See `repeat_factors`.
        start: first batch to return.
        seed: seed of the run.
        rank: rank of this process, below `world_size`.
        world_size: number of processes that share each step.
    """

    def __init__(
        self,
        groups: Sequence[int],
        batch_size: int,
        num_batches: int,
        *,
        repeats: Tensor | None = None,
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
        repeats = torch.ones(len(group_of)) if repeats is None else repeats
        # After e epochs, image i has been seen floor(e r_i + u_i) times, with a fixed random phase u_i in [0, 1). So
        # the number of images in any number of epochs is known without going through them.
        generator = torch.Generator().manual_seed(mixed_seed(seed, 2**32))
        phases = torch.rand(len(group_of), generator=generator, dtype=torch.float64)
        self._repeats = [repeats[members].double().numpy() for members in self._members]
        self._phases = [phases[members].numpy() for members in self._members]

    def __len__(self) -> int:
        return max(self.num_batches - self.start, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self._epoch_of(self.start)
        batch = self._batches_before(epoch)
        # For each group, the last used epoch, which nearly all batches of an epoch share.
        orders: dict[int, _Epoch] = {}
        while batch < self.num_batches:
            for group, number in self._plan(epoch):
                if self.start <= batch < self.num_batches:
                    yield self._batch(group, number, orders)
                batch += 1
            epoch += 1

    def _seen(self, group: int, epochs: int) -> IntArray:
        """Return how often each image of a group was seen in the first epochs, (I,)."""
        return np.floor(epochs * self._repeats[group] + self._phases[group]).astype(np.int64)

    def _images_before(self, group: int, epoch: int) -> int:
        """Return the number of images of a group in the first `epoch` epochs."""
        return int(self._seen(group, epoch).sum())

    def _batches_before(self, epoch: int) -> int:
        """Return the number of complete batches after the first `epoch` epochs."""
        return sum(
            self._images_before(group, epoch) // self.joint_batch_size for group in range(len(self._members))
        )

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
            for group in range(len(self._members))
            for number in range(
                self._images_before(group, epoch) // self.joint_batch_size,
                self._images_before(group, epoch + 1) // self.joint_batch_size,
            )
        ]
        if len(self._members) == 1:
            return plan  # the images are in a random order already
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch, len(self._members)))
        return [plan[place] for place in torch.randperm(len(plan), generator=generator).tolist()]

    def _batch(self, group: int, number: int, orders: dict[int, _Epoch]) -> list[tuple[int, int]]:
        first = number * self.joint_batch_size + self.rank * self.batch_size
        keys = []
        for position in range(first, first + self.batch_size):
            order = orders.get(group)
            if order is None or not order.first <= position < order.first + len(order.images):
                order = orders[group] = self._order_at(group, position)
            image = int(order.images[position - order.first])
            keys.append((image, mixed_seed(self.seed, group, position)))
        return keys

    def _order_at(self, group: int, position: int) -> _Epoch:
        """Return the order of the epoch that has the group's image number `position`."""
        low, high = 0, 1
        while self._images_before(group, high) <= position:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._images_before(group, middle) <= position else (low, middle)
        times = self._seen(group, low + 1) - self._seen(group, low)
        images = self._members[group].repeat_interleave(torch.from_numpy(times))
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, low, group))
        return _Epoch(
            self._images_before(group, low), images[torch.randperm(len(images), generator=generator)]
        )


@dataclass(frozen=True)
class _Epoch:
    """The images of one epoch of a group in their order, and the number of the group's images before it."""

    first: int
    images: Tensor


def repeat_factors(category_ids: IntArray, images: IntArray, num_images: int, threshold: float) -> Tensor:
    """Return how often each image should be seen per epoch so that rare categories are seen more often.

    With f_c the fraction of the images that contain category c, r_c = max(1, sqrt(t / f_c)), and an image has the
    largest r_c of its categories.

    Args:
        category_ids: (A,) category of each annotation.
        images: (A,) index of each annotation's image.
        num_images: number of images.
        threshold: t in [0, 1]: categories in a smaller fraction of the images are repeated. LVIS has 0.001.

    Returns:
        (num_images,) float64, at least 1.

    Example:
        >>> repeat_factors(np.array([1, 1, 1, 2]), np.array([0, 1, 2, 3]), num_images=4, threshold=0.5)
        tensor([1.0000, 1.0000, 1.0000, 1.4142], dtype=torch.float64)

    Source: Gupta et al., LVIS, 2019, arXiv:1908.03195, section 4.2.
    """
    factors = np.ones(num_images)
    for category in np.unique(category_ids):
        own = np.unique(images[category_ids == category])
        factors[own] = np.maximum(factors[own], np.sqrt(threshold * num_images / len(own)))
    return torch.from_numpy(factors)


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
