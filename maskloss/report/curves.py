"""Curves of losses and AP, one small panel each, and the differences of a sweep with their intervals."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from maskloss.report.pictures import shortened

#: Line styles; each is used for ten variants, because there are ten colors.
_LINES = ("-", "--", ":", "-.")
_NOT_CURVES = {"step", "learning_rate", "seconds"}


def literal(name: str) -> str:
    """Escape a name so that Matplotlib draws it as it is: it takes text between $ as a formula.

    Matplotlib also leaves names that begin with _ out of legends.
    """
    escaped = name.replace("$", r"\$")
    return f" {escaped}" if name.startswith("_") else escaped


@contextlib.contextmanager
def without_glyph_warnings() -> Iterator[None]:
    """Draw letters that the font lacks as boxes, without a Python warning for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from", UserWarning)
        yield


def loss_curves(history: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]) -> str:
    """Draw each loss term over the steps, with the validation loss where the run was evaluated.

    Args:
        history: lines of history.jsonl.
        evaluations: lines of evaluations.jsonl.

    Returns:
        An SVG element.
    """
    keys = _terms(history[0])
    figure, axes = _panels(keys)
    for key, axis in axes.items():
        # A line through a single point is invisible.
        marker = "o" if len(history) == 1 else None
        axis.plot(
            [line["step"] for line in history],
            [line[key] for line in history],
            color="#2563eb",
            lw=1.3,
            marker=marker,
        )
        validated = [line for line in evaluations if key in (line["loss"] or {})]
        if validated:
            axis.plot(
                [line["step"] for line in validated],
                [line["loss"][key] for line in validated],
                "o-",
                color="#dc2626",
                ms=4,
                lw=1,
            )
        _from_zero(axis)
    return _svg(figure)


def precision_curves(evaluations: Sequence[dict[str, Any]], labels: Mapping[str, str]) -> str:
    """Draw the AP of each metric over the steps, in percent.

    Args:
        evaluations: lines of evaluations.jsonl.
        labels: names of the metrics, by their key.

    Returns:
        An SVG element; empty for fewer than two evaluations.
    """
    if len(evaluations) < 2:
        return ""
    figure, panels = _panels([f"{label} AP" for label in labels.values()])
    for kind, axis in zip(labels, panels.values(), strict=True):
        known = [
            (line["step"], 100 * line[kind]["AP"]) for line in evaluations if line[kind]["AP"] is not None
        ]
        axis.plot(
            [step for step, _ in known], [value for _, value in known], "o-", color="#2563eb", ms=4, lw=1.3
        )
        axis.set_ylim(bottom=0)
    return _svg(figure)


def threshold_curves(
    names: Sequence[str],
    recall: npt.NDArray[np.float64],
    precision: npt.NDArray[np.float64],
    scores: npt.NDArray[np.float64],
) -> str:
    """Draw precision over recall, and F1 over the score threshold, for each category and as their mean.

    Args:
        names: K categories.
        recall: (N,) from 0 to 1.
        precision: (K, N) at each recall.
        scores: (K, N), the score threshold with which each recall is reached, 0 where it is not.

    Returns:
        An SVG element; empty without categories.
    """
    if not names:
        return ""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    thresholds = np.linspace(0, 1, 201)
    f1 = np.array([_f1_over(thresholds, recall, *own) for own in zip(precision, scores, strict=True)])
    few = len(names) <= 10
    for index, name in enumerate(names):
        style: dict[str, Any] = (
            {"label": literal(shortened(name)), "lw": 1.1} if few else {"color": "#9ca3af", "lw": 0.6}
        )
        left.plot(recall, precision[index], **style)
        right.plot(thresholds, f1[index], **style)
    for axis, x, mean in ((left, recall, precision.mean(axis=0)), (right, thresholds, f1.mean(axis=0))):
        axis.plot(x, mean, color="#111827", lw=2, label="mean")
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1.02)
        axis.grid(alpha=0.3)
    left.set(title="precision over recall", xlabel="recall")
    right.set(title="F1 over the score threshold", xlabel="score threshold")
    if few:
        right.legend(fontsize=7, frameon=False)
    return _svg(figure)


def _f1_over(
    thresholds: npt.NDArray[np.float64],
    recall: npt.NDArray[np.float64],
    precision: npt.NDArray[np.float64],
    scores: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Return the F1 of the detections with at least each score."""
    reached = scores[None, :] >= np.maximum(thresholds, 1e-9)[:, None]  # (T, N)
    last = reached.sum(axis=1) - 1
    values = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
    return np.where(last >= 0, values[np.maximum(last, 0)], 0.0)


def learning_rate_curve(
    rates: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], suggestion: float
) -> str:
    """Draw the losses of a search for the learning rate, and mark the suggested rate.

    Args:
        rates: learning rate of each step.
        losses: total loss of each step.
        smoothed: their moving average.
        suggestion: the suggested rate.

    Returns:
        An SVG element.
    """
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot(rates, losses, color="#93c5fd", lw=0.8, label="loss")
    axis.plot(rates, smoothed, color="#2563eb", lw=1.6, label="moving average")
    axis.axvline(suggestion, color="#dc2626", lw=1, label=f"suggestion, {suggestion:.2g}")
    axis.set(xscale="log", xlabel="learning rate", ylabel="total loss", ylim=(0, 1.5 * max(smoothed)))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return _svg(figure)


def compared_curves(histories: Mapping[str, Sequence[Sequence[dict[str, Any]]]]) -> str:
    """Draw the mean of each loss term over the seeds, with one line per variant.

    Args:
        histories: lines of history.jsonl, by variant and then one sequence per seed.

    Returns:
        An SVG element.
    """
    keys = list(dict.fromkeys(key for runs in histories.values() for run in runs for key in _terms(run[0])))
    figure, axes = _panels(keys)
    for key, axis in axes.items():
        for number, (variant, runs) in enumerate(histories.items()):
            by_step: dict[int, list[float]] = {}
            for line in (line for run in runs for line in run if key in line):
                by_step.setdefault(line["step"], []).append(line[key])
            steps = sorted(by_step)
            means = [sum(by_step[step]) / len(by_step[step]) for step in steps]
            axis.plot(steps, means, _LINES[number // 10 % len(_LINES)], lw=1.2, label=literal(variant))
        _from_zero(axis)
    handles, labels = next(iter(axes.values())).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    return _svg(figure)


def _from_zero(axis: Any) -> None:
    """Start the y axis of a panel at 0 if no loss is negative."""
    if axis.dataLim.ymin >= 0:
        axis.set_ylim(bottom=0)


def _terms(line: dict[str, Any]) -> list[str]:
    return [key for key in line if key not in _NOT_CURVES]


def _panels(keys: Sequence[str]) -> tuple[Figure, dict[str, Any]]:
    """Make a figure with a titled panel per term, three in a row, over steps."""
    columns = 3
    rows = math.ceil(len(keys) / columns)
    figure = Figure(figsize=(11, 2.6 * rows), layout="constrained")
    FigureCanvasSVG(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, key in zip(panels, keys, strict=False):
        axis.set_title(literal(key), fontsize=10)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in panels[len(keys) :]:
        axis.set_visible(False)
    return figure, dict(zip(keys, panels, strict=False))


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with without_glyph_warnings():
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def forest_plot(intervals: Mapping[str, Mapping[str, tuple[float, float]]], baseline: str) -> str:
    """Draw the differences of variants to the baseline, each with its interval, one panel per metric.

    Args:
        intervals: mean and half width of the interval, in percent, by metric and then by variant.
        baseline: name of the baseline.

    Returns:
        An SVG element; empty if there is no difference.
    """
    shown = {metric: by_variant for metric, by_variant in intervals.items() if by_variant}
    if not shown:
        return ""
    variants = list(dict.fromkeys(variant for by_variant in shown.values() for variant in by_variant))
    figure = Figure(figsize=(11, 0.8 + 0.28 * len(variants)), layout="constrained")
    FigureCanvasSVG(figure)
    panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    for axis, (metric, by_variant) in zip(panels, shown.items(), strict=True):
        for place, variant in enumerate(variants):
            if variant not in by_variant:
                continue
            mean, half = by_variant[variant]
            color = "#6b7280" if abs(mean) <= half else "#15803d" if mean > 0 else "#b91c1c"
            axis.errorbar(mean, place, xerr=half, fmt="o", color=color, ms=4, lw=1.4, capsize=2)
        axis.axvline(0, color="#9ca3af", lw=0.8)
        axis.set_title(literal(f"{metric} minus {baseline}"), fontsize=10)
        axis.set_yticks(range(len(variants)), [literal(variant[:30]) for variant in variants])
        axis.set_ylim(len(variants) - 0.5, -0.5)
        axis.grid(alpha=0.25, axis="x")
        axis.tick_params(labelsize=8)
    return _svg(figure)
