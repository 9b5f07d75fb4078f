"""`maskloss.detection.sampling`: samples of torchvision's sizes and distribution, padded to one size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from maskloss.detection.sampling import SampleCounts, SeededSampler, sample_padded


@settings(max_examples=200)
@given(
    labels=st.lists(st.lists(st.sampled_from([-1, 0, 0, 1, 7]), max_size=25), min_size=1, max_size=3),
    size=st.integers(1, 12),
    fraction=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
)
def test_samples_have_torchvisions_sizes_and_no_duplicates(
    labels: list[list[int]], size: int, fraction: float
) -> None:
    by_image = [torch.tensor(image, dtype=torch.int64) for image in labels]
    sampler = BalancedPositiveNegativeSampler(size, fraction)
    padded = sample_padded(by_image, sampler)
    expected_positives, expected_negatives = sampler(by_image)
    known = SampleCounts.of(padded.num_positives, padded.num_sampled)
    assert known.num_positives == [int(mask.sum()) for mask in expected_positives]
    of_images = zip(
        by_image,
        known.positives(padded.indices),
        known.negatives(padded.indices),
        expected_negatives,
        strict=True,
    )
    for image, positives, negatives, expected in of_images:
        assert len(negatives) == int(expected.sum())
        assert (image[positives] >= 1).all()
        assert (image[negatives] == 0).all()
        assert len(set(positives.tolist())) == len(positives)
        assert len(set(negatives.tolist())) == len(negatives)


def test_sampling_is_uniform() -> None:
    torch.manual_seed(0)
    labels = torch.tensor([1] * 6 + [0] * 10 + [-1] * 4)
    sampler = BalancedPositiveNegativeSampler(8, 0.25)
    counted = torch.zeros(len(labels))
    times = 4000
    for _ in range(times):
        padded = sample_padded([labels], sampler)
        counted[padded.indices[0, : int(padded.num_sampled[0])]] += 1
    # Two of six positives and six of ten negatives are sampled; the tolerance is five standard deviations.
    share = torch.tensor([2 / 6] * 6 + [6 / 10] * 10 + [0.0] * 4)
    deviation = (share * (1 - share) / times).sqrt()
    assert ((counted / times - share).abs() <= 5 * deviation).all()


def test_positives_come_first_then_negatives_then_entries_that_were_not_sampled() -> None:
    # Image 0: one positive and two negatives of four entries; image 1: five positives, of which two may be sampled.
    labels = [torch.tensor([-1, 3, 0, 0]), torch.tensor([1, 1, 1, 1, 1])]
    sampled = sample_padded(labels, BalancedPositiveNegativeSampler(4, 0.5))
    assert sampled.indices.shape == (2, 4)
    assert sampled.num_positives.tolist() == [1, 2]
    assert sampled.num_sampled.tolist() == [3, 2]
    assert sampled.indices[0, 0] == 1
    assert sorted(sampled.indices[0, 1:3].tolist()) == [2, 3]
    assert len(set(sampled.indices[1, :2].tolist())) == 2
    # The padding, too, consists of valid indices into the padded entries, so that gathering by it cannot fail.
    assert ((sampled.indices >= 0) & (sampled.indices < 5)).all()


def test_samples_are_not_padded_beyond_the_number_of_entries() -> None:
    labels = [torch.tensor([0, 0]), torch.tensor([0, 1, 0])]
    sampled = sample_padded(labels, BalancedPositiveNegativeSampler(512, 0.5))
    assert sampled.indices.shape == (2, 3)
    assert sampled.num_sampled.tolist() == [2, 3]
    none = sample_padded([torch.zeros(0, dtype=torch.int64)], BalancedPositiveNegativeSampler(512, 0.5))
    assert none.indices.shape == (1, 0)
    assert none.num_sampled.tolist() == [0]


def test_counts_select_the_samples_of_each_image() -> None:
    counts = SampleCounts.of(torch.tensor([1, 0]), torch.tensor([3, 2]))
    assert counts == SampleCounts([1, 0], [3, 2])
    padded = torch.tensor([[7, 8, 9, 0], [4, 5, 6, 0]])
    assert [values.tolist() for values in counts.positives(padded)] == [[7], []]
    assert [values.tolist() for values in counts.negatives(padded)] == [[8, 9], [4, 5]]
    assert [values.tolist() for values in counts.both(padded)] == [[7, 8, 9], [4, 5]]
    boxes = torch.arange(16).reshape(2, 4, 2)
    assert [values.tolist() for values in counts.positives(boxes)] == [[[0, 1]], []]


@pytest.mark.parametrize("method", ["positives", "negatives", "both"])
def test_values_of_another_number_of_images_raise(method: str) -> None:
    with pytest.raises(ValueError, match="argument 2 is"):
        getattr(SampleCounts([1], [2]), method)(torch.zeros(2, 4))


def test_a_seeded_sample_does_not_depend_on_the_other_images() -> None:
    sampler = SeededSampler(16, 0.25)
    labels = [torch.randint(-1, 2, (50 + 10 * image,)).float() for image in range(3)]
    with sampler.seeded([3, 4, 5]):
        positives, negatives = sampler(labels)
    torch.manual_seed(99)
    for image in (2, 0, 1):
        with sampler.seeded([3 + image]):
            (positive,), (negative,) = sampler([labels[image]])
        assert torch.equal(positive, positives[image])
        assert torch.equal(negative, negatives[image])


def test_a_seeded_sample_without_synchronization_does_not_depend_on_the_other_images() -> None:
    sampler = SeededSampler(16, 0.25)
    labels = [torch.randint(-1, 2, (60,)) for _ in range(3)]
    with sampler.seeded([3, 4, 5]):
        together = sample_padded(labels, sampler)
    for image in (2, 0, 1):
        with sampler.seeded([3 + image]):
            alone = sample_padded([labels[image]], sampler)
        count = int(alone.num_sampled[0])
        assert count == together.num_sampled[image]
        assert torch.equal(alone.indices[0, :count], together.indices[image, :count])


def test_without_seeds_the_sampler_is_torchvisions() -> None:
    labels = [torch.randint(-1, 2, (50,)).float() for _ in range(2)]
    found = []
    for kind in (BalancedPositiveNegativeSampler, SeededSampler):
        torch.manual_seed(1)
        found.append([torch.stack(masks) for masks in kind(16, 0.25)(labels)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
