"""`maskloss.losses.normalizers`; `test_criterion` tests that a loss is divided by them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from maskloss import losses
from maskloss.losses import BatchCounts

#: Each number tells which count was returned.
COUNTS = BatchCounts(
    num_images=3, sampled=50, positives=7, batch_size_per_image=20, weight_sum=31.5, locations=1000
)
EXPECTED = {
    "per_sampled": 50,
    "per_weight_sum": 31.5,
    "per_positive": 7,
    "per_positive_coordinate": 28,  # 4 * 7
    "per_full_batch": 60,  # 3 * 20
    "per_location": 1000,
}


def test_every_exported_normalizer_is_worked_out_here():
    assert {name for name in losses.__all__ if name.startswith("per_")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_divisors_by_hand(name):
    assert getattr(losses, name)(COUNTS) == EXPECTED[name]


def test_a_weight_sum_on_a_device_stays_a_tensor():
    weight_sum = torch.tensor(31.5)
    assert losses.per_weight_sum(dataclasses.replace(COUNTS, weight_sum=weight_sum)) is weight_sum


def test_a_full_batch_needs_a_batch_size():
    counts = dataclasses.replace(COUNTS, batch_size_per_image=0)
    with pytest.raises(ValueError, match="per_full_batch needs a sampler with `batch_size_per_image`"):
        losses.per_full_batch(counts)


def test_counts_of_a_detector_have_no_locations_and_cannot_be_changed():
    counts = BatchCounts(num_images=3, sampled=50, positives=7, batch_size_per_image=20)
    assert (losses.per_location(counts), losses.per_weight_sum(counts)) == (0, 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        counts.sampled = 51
