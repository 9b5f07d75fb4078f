"""maskloss/data/sampler.py: the order of the images depends only on the seed and the step."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from maskloss.data.sampler import TrainingBatches, mixed_seed, repeat_factors


def indices(batches: TrainingBatches) -> list[int]:
    return [index for batch in batches for index, _ in batch]


@pytest.mark.parametrize(("num_images", "batch_size"), [(6, 2), (7, 3), (5, 8), (1, 2)])
def test_each_image_is_seen_once_per_epoch(num_images: int, batch_size: int) -> None:
    seen = indices(TrainingBatches([0] * num_images, batch_size, 3 * num_images, seed=1))
    for epoch in range(3):
        in_epoch = seen[epoch * num_images : (epoch + 1) * num_images]
        assert sorted(in_epoch) == list(range(num_images))


def test_epochs_are_shuffled_differently() -> None:
    seen = indices(TrainingBatches([0] * 20, 4, 10, seed=1))
    assert seen[:20] != list(range(20))
    assert seen[:20] != seen[20:]


@pytest.mark.parametrize("start", [0, 1, 4, 9, 10])
def test_a_later_start_returns_the_remaining_batches(start: int) -> None:
    whole = list(TrainingBatches([0] * 7, 3, 10, seed=5))
    assert list(TrainingBatches([0] * 7, 3, 10, start=start, seed=5)) == whole[start:]


@pytest.mark.parametrize("start", [0, 4, 10, 12])
def test_the_length_is_the_number_of_remaining_batches(start: int) -> None:
    batches = TrainingBatches([0] * 7, 3, 10, start=start)
    assert len(batches) == len(list(batches))


def test_the_same_seed_gives_the_same_batches_and_another_seed_others() -> None:
    first = list(TrainingBatches([0] * 9, 2, 6, seed=3))
    assert first == list(TrainingBatches([0] * 9, 2, 6, seed=3))
    assert indices(TrainingBatches([0] * 9, 2, 6, seed=3)) != indices(TrainingBatches([0] * 9, 2, 6, seed=4))


def test_iterating_twice_returns_the_same_batches() -> None:
    batches = TrainingBatches([0] * 9, 2, 6, seed=3)
    assert list(batches) == list(batches)


def test_ranks_share_what_one_process_with_their_joint_batch_would_see() -> None:
    ranks = [list(TrainingBatches([0] * 7, 2, 5, seed=2, rank=rank, world_size=3)) for rank in range(3)]
    joint = list(TrainingBatches([0] * 7, 6, 5, seed=2))
    for step in range(5):
        assert ranks[0][step] + ranks[1][step] + ranks[2][step] == joint[step]


def test_every_sample_has_an_augmentation_seed_of_its_own() -> None:
    seeds = [seed for batch in TrainingBatches([0] * 4, 2, 50, seed=2) for _, seed in batch]
    assert len(set(seeds)) == len(seeds) == 100


def test_torch_accepts_a_mixed_seed() -> None:
    seeds = [mixed_seed(seed, number) for seed in (0, 1, 2**31, 2**63) for number in range(50)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len(set(seeds)) == len(seeds)


def test_a_mixed_seed_depends_on_the_order_of_its_numbers() -> None:
    assert mixed_seed(0, 1, 2) != mixed_seed(0, 2, 1)
    assert mixed_seed(0, 1) != mixed_seed(0, 1, 0)


def test_neighboring_seeds_differ_in_about_half_of_their_bits() -> None:
    # Of 63 random bits, 31.5 differ on average. The standard deviation of the mean over 200 pairs is
    # sqrt(63 / 4 / 200) = 0.28.
    differing = [(mixed_seed(7, n) ^ mixed_seed(7, n + 1)).bit_count() for n in range(200)]
    assert 30 < sum(differing) / len(differing) < 33


# Groups.

#: 9 of 23 images are portraits.
GROUPS = [int(index % 5 > 1) for index in range(23)]


def batches_of(num_batches: int, batch_size: int = 2, **options: int) -> list[list[int]]:
    return [
        [i for i, _ in batch] for batch in TrainingBatches(GROUPS, batch_size, num_batches, seed=3, **options)
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_a_batch_has_images_of_one_group(batch_size: int) -> None:
    for batch in batches_of(60, batch_size):
        assert len({GROUPS[index] for index in batch}) == 1
        assert len(batch) == batch_size


@pytest.mark.parametrize("batch_size", [2, 3, 4])
def test_no_image_of_a_group_is_seen_twice_as_often(batch_size: int) -> None:
    # 23 * batch_size batches are batch_size * batch_size epochs, after which no images are left over.
    seen = [index for batch in batches_of(23 * batch_size, batch_size) for index in batch]
    counts = [seen.count(index) for index in range(23)]
    assert counts == [batch_size * batch_size] * 23
    # Before that, no image is ahead of another by more than one epoch and the images left over for the next batch.
    for end in range(0, len(seen), 23):
        counts = [seen[:end].count(index) for index in range(23)]
        assert max(counts) - min(counts) <= 2


def test_groups_come_in_a_random_order_that_depends_on_the_seed() -> None:
    order = [GROUPS[batch[0]] for batch in batches_of(40)]
    assert {0, 1} == set(order[:12])
    assert order != sorted(order)
    assert order[:11] != order[11:22]


@pytest.mark.parametrize("start", [0, 1, 7, 11, 12, 30, 39, 40])
def test_with_groups_a_later_start_returns_the_remaining_batches(start: int) -> None:
    whole = list(TrainingBatches(GROUPS, 2, 40, seed=3))
    batches = TrainingBatches(GROUPS, 2, 40, seed=3, start=start)
    assert list(batches) == whole[start:]
    assert len(batches) == 40 - start


def test_with_groups_ranks_share_a_batch_of_one_group() -> None:
    ranks = [batches_of(12, 2, rank=rank, world_size=3) for rank in range(3)]
    joint = batches_of(12, 6)
    for step in range(12):
        together = [index for rank in ranks for index in rank[step]]
        assert together == joint[step]
        assert len({GROUPS[index] for index in together}) == 1


def test_a_group_too_small_for_a_batch_is_merged_into_the_largest() -> None:
    groups = [0, *[1] * 9, 2, 2]
    seen = [index for batch in TrainingBatches(groups, 4, 9, seed=0) for index, _ in batch]
    assert sorted(seen) == sorted([*range(12)] * 3)
    assert all(len(set(batch)) == 4 for batch in zip(*[iter(seen)] * 4, strict=True))


def test_with_groups_every_sample_has_an_augmentation_seed_of_its_own() -> None:
    seeds = [seed for batch in TrainingBatches(GROUPS, 2, 100, seed=2) for _, seed in batch]
    assert len(set(seeds)) == 200


@pytest.mark.parametrize("repeats", [[1.0, 1.5, 2.25, 1.0], [1.0, 3.0], [1.3] * 7])
def test_images_are_repeated_by_their_factors(repeats: list[float]) -> None:
    epochs = 40
    batches = TrainingBatches(
        [0] * len(repeats), 1, round(epochs * sum(repeats)), repeats=torch.tensor(repeats)
    )
    seen = Counter(indices(batches))
    for image, factor in enumerate(repeats):
        assert abs(seen[image] - epochs * factor) <= 2 * factor


@pytest.mark.parametrize("start", [0, 3, 17, 40])
def test_a_later_start_with_repeats_returns_the_remaining_batches(start: int) -> None:
    arguments = {"repeats": torch.tensor([1.0, 1.7, 2.2, 1.0, 1.0, 3.1]), "seed": 4}
    groups = [0, 0, 1, 1, 0, 1]
    whole = list(TrainingBatches(groups, 2, 40, **arguments))  # type: ignore[arg-type]
    assert list(TrainingBatches(groups, 2, 40, start=start, **arguments)) == whole[start:]  # type: ignore[arg-type]


def test_repeats_differ_between_epochs() -> None:
    """An image with a factor of 1.5 is seen once in one epoch and twice in the other."""
    batches = TrainingBatches([0, 0], 1, 10, repeats=torch.tensor([1.5, 1.0]), seed=0)
    first, second = indices(batches)[:5].count(0), indices(batches)[5:].count(0)
    assert (first, second) == (3, 3)


def test_repeat_factors_follow_the_formula_of_lvis() -> None:
    # Category 1 is in 4 of 4 images, 2 in 2 and 3 in 1; t = 0.9.
    categories = np.array([1, 1, 1, 1, 2, 2, 2, 3])
    images = np.array([0, 1, 2, 3, 1, 1, 2, 2])
    expected = [1.0, (0.9 / 0.5) ** 0.5, (0.9 / 0.25) ** 0.5, 1.0]
    assert repeat_factors(categories, images, 4, 0.9).tolist() == pytest.approx(expected)
    assert repeat_factors(categories, images, 4, 0.25).tolist() == [1.0] * 4
