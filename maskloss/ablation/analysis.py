"""What a sweep's numbers say: means over seeds, paired differences to the baseline, and whether they are any."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from maskloss.training.metrics import METRICS

#: What is compared, by its place in metrics.json: AP of each metric, and of masks more than that.
COMPARED = {
    **{f"{metric.label} AP": (kind, "AP") for kind, metric in METRICS.items()},
    "mask AP75": ("segm", "AP75"),
    "mask AP small": ("segm", "APs"),
    "mask AP medium": ("segm", "APm"),
    "mask AP large": ("segm", "APl"),
}
_CONFIDENCE = 0.95
_RESAMPLES = 9999
#: How probably a number of seeds that is given would tell.
_POWER = 0.8
#: Of seeds beyond these no number is given.
_MOST_SEEDS = 200

Verdict = Literal["baseline", "better", "worse", "cannot tell"]


@dataclass(frozen=True)
class Difference:
    """A variant's metric less the baseline's, on the same seeds.

    Attributes:
        mean: over the seeds that both have.
        low: of the 95 % interval of a bootstrap over these seeds.
        high: of it.
        half_width: of Student's 95 % interval for paired differences, mean ± half_width. Of few seeds it is the one to
            go by: the bootstrap's covers the truth in about 76 of 100 cases of three seeds, 85 of five, 89 of ten.
        verdict: "better" or "worse" where both intervals leave out 0; "cannot tell" otherwise. A bootstrap alone is
            too sure of itself: of three seeds all on one side, which happens to every fourth variant that changes
            nothing, it gives an interval without 0.
        more_seeds: how many more it would take to tell in four cases of five, if mean and spread are what they seem;
            None where it can be told, where there is nothing to tell, or where it would take more than 200 in all.
    """

    mean: float
    low: float
    high: float
    half_width: float
    verdict: Verdict
    more_seeds: int | None = None


@dataclass(frozen=True)
class Summary:
    """One metric of one variant.

    Attributes:
        mean: over the seeds; None where there is no such object, or no run.
        deviation: standard deviation over the seeds; None of fewer than two.
        difference: to the baseline; None for the baseline itself, and of fewer than two common seeds.
    """

    mean: float | None
    deviation: float | None
    difference: Difference | None = None


def summarized(values: Mapping[str, Mapping[int, float | None]], baseline: str) -> dict[str, Summary]:
    """Summarise one metric of every variant.

    Args:
        values: by variant, then by seed; None where a run has no such value.
        baseline: the variant to compare with.
    """
    known = {
        variant: {seed: value for seed, value in by_seed.items() if value is not None}
        for variant, by_seed in values.items()
    }
    return {
        variant: Summary(
            statistics.fmean(by_seed.values()) if by_seed else None,
            statistics.stdev(by_seed.values()) if len(by_seed) > 1 else None,
            None if variant == baseline else _against(known[baseline], by_seed),
        )
        for variant, by_seed in known.items()
    }


def _against(baseline: Mapping[int, float], variant: Mapping[int, float]) -> Difference | None:
    common = sorted(set(baseline) & set(variant))
    if len(common) < 2:
        return None
    return paired_difference([variant[seed] - baseline[seed] for seed in common])


def paired_difference(differences: Sequence[float]) -> Difference:
    """Say what differences on the same seeds, at least two, show.

    Source: Efron, Bootstrap methods, 1979, for the interval, by `scipy.stats.bootstrap` (percentiles); Student's
    t for paired differences beside it, and for the number of seeds.
    """
    sample = np.asarray(differences, dtype=np.float64)
    mean, deviation = float(sample.mean()), float(sample.std(ddof=1))
    if deviation == 0:
        # The same difference on each seed: no interval to speak of.
        verdict: Verdict = "cannot tell" if mean == 0 else ("better" if mean > 0 else "worse")
        return Difference(mean, mean, mean, 0.0, verdict)
    interval = stats.bootstrap(
        (sample,),
        np.mean,
        confidence_level=_CONFIDENCE,
        n_resamples=_RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    low, high = float(interval.low), float(interval.high)
    half = _half_width(deviation, len(sample))
    if min(low, mean - half) > 0:
        return Difference(mean, low, high, half, "better")
    if max(high, mean + half) < 0:
        return Difference(mean, low, high, half, "worse")
    counts = np.arange(len(sample) + 1, _MOST_SEEDS + 1)
    enough = counts[_power(abs(mean) / deviation, counts) >= _POWER]
    more = int(enough[0]) - len(sample) if len(enough) else None
    return Difference(mean, low, high, half, "cannot tell", more)


def _half_width(deviation: float, count: int) -> float:
    return float(stats.t.ppf((1 + _CONFIDENCE) / 2, count - 1) * deviation / np.sqrt(count))


def _power(effect: float, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """How probably a difference of so many standard deviations is told, by the number of seeds.

    Source: the noncentral t of a paired test, Cohen, Statistical power analysis, 1988, chapter 2.
    """
    thresholds = stats.t.ppf((1 + _CONFIDENCE) / 2, counts - 1)
    power: npt.NDArray[np.float64] = stats.nct.sf(thresholds, counts - 1, effect * np.sqrt(counts))
    return power


def metric_of(metrics: Mapping[str, Any], name: str) -> float | None:
    """Return one of `COMPARED` out of metrics.json; None where it was not measured."""
    kind, statistic = COMPARED[name]
    value: float | None = metrics.get(kind, {}).get(statistic)
    return value
