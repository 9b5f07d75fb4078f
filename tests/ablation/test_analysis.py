"""Tests of `maskloss.ablation.analysis`: verdicts, intervals and summaries."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from maskloss.ablation.analysis import Difference, Summary, metric_of, paired_difference, summarized


def test_clear_differences_of_either_sign_get_a_verdict():
    differences = [0.051, 0.048, 0.055, 0.050, 0.046]
    better = paired_difference(differences)
    assert better.verdict == "better"
    assert better.mean == pytest.approx(0.05)
    assert min(differences) <= better.low < better.mean < better.high <= max(differences)
    worse = paired_difference([-d for d in differences])
    assert worse.verdict == "worse"
    assert (worse.low, worse.high) == pytest.approx((-better.high, -better.low), abs=1e-4)


def test_interval_is_that_of_a_bootstrap_of_the_mean():
    # A resample of two differences has the mean of the first, the second or both, by 1/4, 1/4 and 1/2.
    difference = paired_difference([0.0, 1.0])
    assert (difference.low, difference.high) == (0.0, 1.0)
    sample = np.random.default_rng(0).normal(1.0, 2.0, size=40)
    found = paired_difference(sample.tolist())
    # With many seeds the bootstrap interval approaches the normal one.
    half = 1.96 * sample.std(ddof=1) / np.sqrt(40)
    assert found.low == pytest.approx(sample.mean() - half, abs=0.1)
    assert found.high == pytest.approx(sample.mean() + half, abs=0.1)


def test_difference_without_verdict_has_the_number_of_seeds_it_needs():
    differences = [0.03, -0.01, 0.02]
    found = paired_difference(differences)
    assert found.verdict == "cannot tell"
    deviation, mean = np.std(differences, ddof=1), np.mean(differences)
    rng = np.random.default_rng(0)

    def told(count: int) -> float:
        """Return the share of simulated sweeps with `count` seeds that get a verdict."""
        samples = rng.normal(mean, deviation, size=(20_000, count))
        return (stats.ttest_1samp(samples, 0.0, axis=1).pvalue < 0.05).mean()

    assert found.more_seeds is not None
    assert told(3 + found.more_seeds) == pytest.approx(0.8, abs=0.04)
    assert told(3 + found.more_seeds) > 0.79
    assert told(3 + found.more_seeds - 1) < 0.81


def test_half_width_is_that_of_students_interval():
    differences = [0.03, -0.01, 0.02, 0.015]
    found = paired_difference(differences)
    expected = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    assert found.mean - found.half_width == pytest.approx(expected.low)
    assert found.mean + found.half_width == pytest.approx(expected.high)


def test_three_seeds_of_one_sign_get_no_verdict_although_the_bootstrap_excludes_zero():
    found = paired_difference([0.001, 0.030, 0.002])
    assert found.low > 0
    assert found.verdict == "cannot tell"


def test_zero_differences_and_differences_too_small_for_200_seeds():
    assert paired_difference([0.0, 0.0, 0.0]) == Difference(0.0, 0.0, 0.0, 0.0, "cannot tell")
    assert paired_difference([0.1, 0.1]).verdict == "better"
    tiny = paired_difference([1.0, -1.0, 1e-6])
    assert tiny.verdict == "cannot tell"
    assert tiny.more_seeds is None


@pytest.mark.parametrize("count", [3, 5])
def test_one_in_twenty_variants_that_change_nothing_gets_a_verdict(count):
    rng = np.random.default_rng(1)
    told = [paired_difference(rng.normal(size=count).tolist()).verdict != "cannot tell" for _ in range(300)]
    assert np.mean(told) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 300)


def test_summaries_pair_by_seed():
    values = {
        "base": {0: 0.10, 1: 0.20, 2: 0.30},
        "same but for a step": {0: 0.15, 1: 0.25, 2: 0.35},
        "one seed missing": {0: 0.20, 2: 0.40, 7: 0.90},
        "one seed": {1: 0.2},
        "nothing to find": {0: None, 1: None, 2: None},
    }
    found = summarized(values, "base")
    assert found["base"] == Summary(pytest.approx(0.2), pytest.approx(0.1))
    # The seeds differ much and the variant little, which a paired comparison detects.
    step = found["same but for a step"].difference
    assert step.mean == pytest.approx(0.05)
    assert step.verdict == "better"
    # Only the seeds that both have count.
    assert found["one seed missing"].mean == pytest.approx(0.5)
    assert found["one seed missing"].difference.mean == pytest.approx(0.1)
    assert found["one seed"] == Summary(pytest.approx(0.2), None)
    assert found["nothing to find"] == Summary(None, None)


def test_metrics_by_name():
    metrics = {"bbox": {"AP": 0.5}, "segm": {"AP": 0.4, "AP75": 0.3, "APs": None}}
    assert metric_of(metrics, "box AP") == 0.5
    assert metric_of(metrics, "mask AP75") == 0.3
    assert metric_of(metrics, "mask AP small") is None
