"""Statistics of a sweep: means over seeds, paired differences to the baseline, and verdicts on them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from maskloss.training.metrics import METRICS

#: Compared statistics, with their keys in metrics.json: the AP of every metric, and more statistics of mask AP.
COMPARED = {
    **{f"{metric.label} AP": (kind, "AP") for kind, metric in METRICS.items()},
    "mask AP75": ("segm", "AP75"),
    "mask AP small": ("segm", "APs"),
    "mask AP medium": ("segm", "APm"),
    "mask AP large": ("segm", "APl"),
}
_CONFIDENCE = 0.95
_RESAMPLES = 9999
#: Probability of a verdict with the suggested number of seeds.
_POWER = 0.8
#: Maximum number of seeds that is suggested.
_MOST_SEEDS = 200

Verdict = Literal["baseline", "better", "worse", "cannot tell"]


@dataclass(frozen=True)
class Difference:
    """Difference of a variant's metric to the baseline's, on the same seeds.

    Attributes:
        mean: mean over the seeds that both have.
        low: lower end of the 95 % bootstrap interval over these seeds.
        high: upper end of the 95 % bootstrap interval.
        half_width: half the width of Student's 95 % interval for paired differences, mean ± half_width. Prefer it for
            few seeds: the bootstrap interval covers the true value in about 76 % of cases with three seeds, 85 % with
            five and 89 % with ten.
        verdict: "better" or "worse" if both intervals exclude 0; otherwise "cannot tell". The bootstrap alone is
            overconfident: its interval excludes 0 if all of three seeds are on one side of 0, which happens for every
            fourth variant that changes nothing.
        more_seeds: number of additional seeds that would give a verdict in four cases of five, if mean and spread are
            as estimated; None if there is a verdict, if the difference is 0 on every seed, or if it would take more
            than 200 seeds in total.
    """

    mean: float
    low: float
    high: float
    half_width: float
    verdict: Verdict
    more_seeds: int | None = None


@dataclass(frozen=True)
class Summary:
    """Summary of one metric of one variant.

    Attributes:
        mean: mean over the seeds; None if the metric has no objects, or the variant no runs.
        deviation: standard deviation over the seeds; None for fewer than two.
        difference: difference to the baseline; None for the baseline itself, and for fewer than two common seeds.
    """

    mean: float | None
    deviation: float | None
    difference: Difference | None = None


def summarized(values: Mapping[str, Mapping[int, float | None]], baseline: str) -> dict[str, Summary]:
    """Summarize one metric of every variant.

    Args:
        values: metric by variant, then by seed; None if a run has no value.
        baseline: variant to compare with.
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
    """Compute intervals and the verdict from a variant's differences to the baseline on the same seeds, at least two.

    Source: Efron, Bootstrap methods, 1979, for the bootstrap interval, by `scipy.stats.bootstrap` (percentiles);
    Student's t for paired differences, for the second interval and the number of seeds.
    """
    sample = np.asarray(differences, dtype=np.float64)
    mean, deviation = float(sample.mean()), float(sample.std(ddof=1))
    if deviation == 0:
        # The difference is the same on each seed, so the interval is a point.
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
    """Return the probability of a verdict by number of seeds, for a mean difference of `effect` standard deviations.

    Source: the noncentral t of a paired test, Cohen, Statistical power analysis, 1988, chapter 2.
    """
    thresholds = stats.t.ppf((1 + _CONFIDENCE) / 2, counts - 1)
    power: npt.NDArray[np.float64] = stats.nct.sf(thresholds, counts - 1, effect * np.sqrt(counts))
    return power


def metric_of(metrics: Mapping[str, Any], name: str) -> float | None:
    """Return a statistic of `COMPARED` from the content of metrics.json, or None if it was not measured."""
    kind, statistic = COMPARED[name]
    value: float | None = metrics.get(kind, {}).get(statistic)
    return value
