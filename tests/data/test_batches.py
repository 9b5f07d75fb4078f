"""maskloss/data/batches.py: the order of the images follows from the seed and the step alone."""

from __future__ import annotations

import pytest

from maskloss.data.batches import TrainingBatches, mixed_seed


def indices(batches: TrainingBatches) -> list[int]:
    return [index for batch in batches for index, _ in batch]


@pytest.mark.parametrize(("num_images", "batch_size"), [(6, 2), (7, 3), (5, 8), (1, 2)])
def test_each_image_is_seen_once_per_epoch(num_images: int, batch_size: int) -> None:
    seen = indices(TrainingBatches(num_images, batch_size, 3 * num_images, seed=1))
    for epoch in range(3):
        in_epoch = seen[epoch * num_images : (epoch + 1) * num_images]
        assert sorted(in_epoch) == list(range(num_images))


def test_epochs_are_shuffled_unlike_each_other() -> None:
    seen = indices(TrainingBatches(20, 4, 10, seed=1))
    assert seen[:20] != list(range(20))
    assert seen[:20] != seen[20:]


@pytest.mark.parametrize("start", [0, 1, 4, 9, 10])
def test_a_later_start_gives_the_tail(start: int) -> None:
    whole = list(TrainingBatches(7, 3, 10, seed=5))
    assert list(TrainingBatches(7, 3, 10, start=start, seed=5)) == whole[start:]


@pytest.mark.parametrize("start", [0, 4, 10, 12])
def test_the_length_is_the_number_of_batches_that_come(start: int) -> None:
    batches = TrainingBatches(7, 3, 10, start=start)
    assert len(batches) == len(list(batches))


def test_the_same_seed_gives_the_same_batches_and_another_seed_others() -> None:
    first = list(TrainingBatches(9, 2, 6, seed=3))
    assert first == list(TrainingBatches(9, 2, 6, seed=3))
    assert indices(TrainingBatches(9, 2, 6, seed=3)) != indices(TrainingBatches(9, 2, 6, seed=4))


def test_one_object_gives_the_same_batches_again() -> None:
    batches = TrainingBatches(9, 2, 6, seed=3)
    assert list(batches) == list(batches)


def test_ranks_share_what_one_process_with_their_joint_batch_would_see() -> None:
    ranks = [list(TrainingBatches(7, 2, 5, seed=2, rank=rank, world_size=3)) for rank in range(3)]
    joint = list(TrainingBatches(7, 6, 5, seed=2))
    for step in range(5):
        assert ranks[0][step] + ranks[1][step] + ranks[2][step] == joint[step]


def test_every_sample_has_an_augmentation_seed_of_its_own() -> None:
    seeds = [seed for batch in TrainingBatches(4, 2, 50, seed=2) for _, seed in batch]
    assert len(set(seeds)) == len(seeds) == 100


def test_a_mixed_seed_is_one_that_torch_takes() -> None:
    seeds = [mixed_seed(seed, number) for seed in (0, 1, 2**31, 2**63) for number in range(50)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len(set(seeds)) == len(seeds)


def test_a_mixed_seed_depends_on_the_order_of_its_numbers() -> None:
    assert mixed_seed(0, 1, 2) != mixed_seed(0, 2, 1)
    assert mixed_seed(0, 1) != mixed_seed(0, 1, 0)


def test_neighbouring_seeds_differ_in_about_half_of_their_bits() -> None:
    # 63 bits that are as good as random: 31.5 differ on average over 200 pairs, and the mean's standard deviation
    # is sqrt(63 / 4 / 200) = 0.28.
    differing = [(mixed_seed(7, n) ^ mixed_seed(7, n + 1)).bit_count() for n in range(200)]
    assert 30 < sum(differing) / len(differing) < 33
