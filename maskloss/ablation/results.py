"""Results of a sweep: results.json for programs, table.md to paste, report.html to read."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
import yaml
from pycocotools import mask as coco_mask

from maskloss.ablation.analysis import COMPARED, Summary, metric_of, summarized
from maskloss.ablation.plan import Plan
from maskloss.ablation.running import Outcome
from maskloss.ablation.tuning import Tuned, format_values, score_of
from maskloss.data.coco import ImageRecord
from maskloss.data.images import read_image
from maskloss.files import write_text
from maskloss.report.curves import compared_curves, forest_plot
from maskloss.report.page import embedded, rendered
from maskloss.report.pictures import draw_results, draw_truth, jpeg

#: Outcomes by variant, then by seed.
Outcomes = dict[str, dict[int, Outcome]]

#: Metrics whose differences are drawn.
_PLOTTED = ("mask AP", "boundary AP", "box AP")
_NUM_PICTURES = 5
_LONGEST_SIDE = 320
_SCORE_THRESHOLD = 0.5
#: COCO's ranges of object areas, in px² of the image.
_SIZES = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, math.inf)}


def _summaries(plan: Plan, outcomes: Outcomes) -> dict[str, dict[str, Summary]]:
    """Return the summaries by metric, then by variant."""
    summaries = {}
    for name in COMPARED:
        values = {
            variant: {seed: metric_of(o.metrics, name) for seed, o in by_seed.items() if o.failure is None}
            for variant, by_seed in outcomes.items()
        }
        summaries[name] = summarized(values, plan.baseline)
    return summaries


def write_results(
    folder: Path, plan: Plan, outcomes: Outcomes, tuned: Mapping[str, Tuned] | None = None
) -> None:
    """Write results.json and table.md for the runs that are complete.

    Args:
        folder: folder of the sweep.
        plan: its plan.
        outcomes: outcomes of the runs.
        tuned: results of tuning, by variant; None if nothing is tuned.

    Raises:
        RunError: the disk is full, or the folder is not writable.
    """
    summaries = _summaries(plan, outcomes)
    variants = {
        variant: {
            "changes": changes,
            **({"tuning": _tuning_document(tuned[variant])} if tuned else {}),
            "summary": {name: asdict(by_variant[variant]) for name, by_variant in summaries.items()},
            "milliseconds_per_step": _cost(outcomes[variant], "seconds_per_step", 1e-3),
            "peak_mebibytes": _cost(outcomes[variant], "peak_bytes", 2**20),
            "runs": [
                {
                    "seed": seed,
                    "failure": outcome.failure,
                    "metrics": outcome.metrics or None,
                    "seconds_per_step": outcome.seconds_per_step,
                    "peak_bytes": outcome.peak_bytes,
                    "seconds": outcome.seconds,
                }
                for seed, outcome in sorted(outcomes[variant].items())
            ],
        }
        for variant, changes in plan.variants.items()
    }
    document = {
        "baseline": plan.baseline,
        "seeds": list(plan.seeds),
        "environment": _environment(),
        "variants": variants,
    }
    write_text(folder / "results.json", json.dumps(document, indent=1, allow_nan=False) + "\n")
    write_text(folder / "table.md", _table(plan, outcomes, summaries, tuned or {}))


def _tuning_document(tuned: Tuned) -> dict[str, Any]:
    return {
        "chosen": None if tuned.chosen is None else tuned.chosen.values,
        "trials": [
            {
                "values": trial.values,
                "AP": score_of(outcome),
                "failure": outcome.failure,
                "seconds": outcome.seconds,
            }
            for trial, outcome in tuned.trials
        ],
    }


def _minutes(outcomes: Iterable[Outcome]) -> float:
    return sum(outcome.seconds or 0.0 for outcome in outcomes) / 60


def _describe_tuning(plan: Plan, tuned: Mapping[str, Tuned]) -> str:
    """Describe in two sentences how the variants were tuned, and what that cost."""
    assert plan.tuning is not None
    grid = "; ".join(f"{name} {', '.join(map(str, values))}" for name, values in plan.tuning.grid.items())
    minutes = _minutes(outcome for one in tuned.values() for _, outcome in one.trials)
    return (
        f"Each variant is tuned over {grid}: one run for each combination, with seed {plan.seeds[0]}, on "
        f"{100 * (1 - plan.tuning.fraction):.0f} % of the training images, and the best AP on the others is chosen. "
        f"Tuning took {minutes:.0f} minutes."
    )


def _environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def _table(
    plan: Plan,
    outcomes: Outcomes,
    summaries: Mapping[str, Mapping[str, Summary]],
    tuned: Mapping[str, Tuned],
) -> str:
    """Make a Markdown table of the mean and spread of every metric, and of the differences in mask and box AP."""
    header = [
        "variant",
        *(["tuned"] if tuned else []),
        "runs",
        *COMPARED,
        "mask AP minus " + plan.baseline,
        "box AP minus " + plan.baseline,
        "ms / step",
        "MiB",
    ]
    lines = [_row(header), _row(["---"] * len(header))]
    for variant in plan.variants:
        cells = [variant, *([_chosen(tuned[variant])] if tuned else []), _runs(plan, outcomes[variant])]
        for name in COMPARED:
            summary = summaries[name][variant]
            spread = "" if summary.deviation is None else f" ± {100 * summary.deviation:.1f}"
            cells.append(f"{percent(summary.mean)}{spread}")
        for name in ("mask AP", "box AP"):
            cells.append("" if variant == plan.baseline else _format_difference(summaries[name][variant]))
        cells.append(_number(_cost(outcomes[variant], "seconds_per_step", 1e-3)))
        cells.append(_number(_cost(outcomes[variant], "peak_bytes", 2**20)))
        lines.append(_row(cells))
    seeds = ", ".join(map(str, plan.seeds))
    minutes = _minutes(outcome for by_seed in outcomes.values() for outcome in by_seed.values())
    lines += [
        "",
        f"AP in percent, mean ± standard deviation over seeds {seeds}. Differences on the same seeds: mean, 95 % "
        "bootstrap interval in brackets, half width of Student's 95 % interval after ±, and a verdict if both exclude "
        f"0. All runs together took {minutes:.0f} minutes."
        + (f" {_describe_tuning(plan, tuned)}" if tuned else ""),
        *(f"\nFailed: {failure}" for failure in _failures(outcomes)),
    ]
    return "\n".join(lines) + "\n"


def _chosen(tuned: Tuned) -> str:
    return "nothing" if tuned.chosen is None else format_values(tuned.chosen.values)


def _runs(plan: Plan, outcomes: Mapping[int, Outcome]) -> str:
    """Format the number of a variant's runs that succeeded and failed."""
    failed = sum(outcome.failure is not None for outcome in outcomes.values())
    good = len(outcomes) - failed
    text = str(good) if good == len(plan.seeds) else f"{good} of {len(plan.seeds)}"
    return text + (f", {failed} failed" if failed else "")


def _failures(outcomes: Outcomes) -> list[str]:
    return [
        f"{variant}, seed {seed}: {outcome.failure}"
        for variant, by_seed in outcomes.items()
        for seed, outcome in by_seed.items()
        if outcome.failure is not None
    ]


def _format_difference(summary: Summary) -> str:
    """Format a variant's difference to the baseline, with its intervals and verdict."""
    difference = summary.difference
    if difference is None:
        return _verdict(summary)
    interval = f"[{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
    half = f"±{100 * difference.half_width:.1f}"
    return f"{100 * difference.mean:+.1f} {interval} {half} {_verdict(summary)}"


def _verdict(summary: Summary) -> str:
    """Format a variant's verdict, with the number of seeds that it would take if there is none."""
    difference = summary.difference
    if summary.mean is None:
        return "nothing to compare"
    if difference is None:
        return "cannot tell: fewer than two common seeds with the baseline"
    if difference.verdict != "cannot tell":
        return difference.verdict
    if difference.more_seeds is not None:
        return f"cannot tell; needs about {difference.more_seeds} more seeds"
    return "cannot tell" + ("" if difference.half_width == 0 else "; 200 seeds would not suffice")


def _cost(outcomes: Mapping[int, Outcome], name: str, unit: float) -> float | None:
    """Return the median of a cost over the runs that measured it, in multiples of `unit`."""
    values = _costs(outcomes, name, unit)
    return statistics.median(values) if values else None


def _format_cost(outcomes: Mapping[int, Outcome], name: str, unit: float) -> str:
    """Format the median of a cost over the runs, with its minimum and maximum."""
    values = _costs(outcomes, name, unit)
    if not values:
        return ""
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


def _costs(outcomes: Mapping[int, Outcome], name: str, unit: float) -> list[float]:
    values = [getattr(outcome, name) for outcome in outcomes.values()]
    return [value / unit for value in values if value is not None]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def percent(value: float | None) -> str:
    """Format an AP in percent."""
    return "none" if value is None else f"{100 * value:.1f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def write_page(
    folder: Path, plan: Plan, outcomes: Outcomes, tuned: Mapping[str, Tuned] | None = None
) -> Path:
    """Write report.html; see `write_results` for the arguments.

    Raises:
        RunError: the disk is full, or the folder is not writable.
    """
    summaries = _summaries(plan, outcomes)
    good = {
        variant: {seed: outcome for seed, outcome in by_seed.items() if outcome.failure is None}
        for variant, by_seed in outcomes.items()
    }
    histories = {
        variant: [outcome.history for outcome in by_seed.values()]
        for variant, by_seed in good.items()
        if by_seed
    }
    page = rendered(
        "ablation.html.j2",
        title=folder.resolve().name,
        variants=plan.variants,
        seeds=plan.seeds,
        baseline=plan.baseline,
        one_validation=plan.one_validation,
        environment=_environment(),
        done=sum(map(len, good.values())),
        total=len(plan.runs),
        num_images=len(plan.validation.images),
        num_objects=plan.validation.num_objects,
        differences=forest_plot(
            {
                name: {
                    variant: (100 * summary.difference.mean, 100 * summary.difference.half_width)
                    for variant, summary in summaries[name].items()
                    if summary.difference is not None
                }
                for name in _PLOTTED
            },
            plan.baseline,
        ),
        tables=[
            {
                "metric": name,
                "objects": _objects_of_size(plan, name),
                "rows": [
                    {"runs": _runs(plan, outcomes[variant]), **_page_row(plan, variant, by_variant[variant])}
                    for variant in plan.variants
                ],
            }
            for name, by_variant in summaries.items()
            if any(summary.mean is not None for summary in by_variant.values())
        ],
        costs=[
            {
                "variant": variant,
                "milliseconds": _format_cost(outcomes[variant], "seconds_per_step", 1e-3),
                "mebibytes": _format_cost(outcomes[variant], "peak_bytes", 2**20),
            }
            for variant in plan.variants
        ],
        tuning=_describe_tuning(plan, tuned) if tuned else "",
        trials=[
            {
                "variant": variant,
                "values": format_values(trial.values),
                "ap": percent(score_of(outcome)) if outcome.failure is None else f"failed: {outcome.failure}",
                "is_chosen": one.chosen is not None and trial.values == one.chosen.values,
            }
            for variant, one in (tuned or {}).items()
            for trial, outcome in one.trials
        ],
        curves=compared_curves(histories) if histories else "",
        pictures=_pictures(plan, good),
        score_threshold=_SCORE_THRESHOLD,
        failures=_failures(outcomes),
        base=yaml.safe_dump(plan.base, sort_keys=False),
        changes=yaml.safe_dump(plan.variants, sort_keys=False),
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def _objects_of_size(plan: Plan, metric: str) -> int:
    """Count the objects of the validation set that a metric covers."""
    low, high = next((bounds for size, bounds in _SIZES.items() if metric.endswith(size)), (0.0, math.inf))
    areas = [o.area for record in plan.validation.images for o in record.objects]
    return sum(low <= area < high for area in areas)


def _page_row(plan: Plan, variant: str, summary: Summary) -> dict[str, str]:
    row = {
        "variant": variant,
        "mean": percent(summary.mean),
        "deviation": "" if summary.deviation is None else f"{100 * summary.deviation:.1f}",
        "difference": "",
        "interval": "",
        "half_width": "",
        "verdict": "" if variant == plan.baseline else _verdict(summary),
        "kind": "tell",
    }
    difference = summary.difference
    if difference is not None:
        row |= {
            "difference": f"{100 * difference.mean:+.1f}",
            "interval": f"{100 * difference.low:+.1f} to {100 * difference.high:+.1f}",
            "half_width": f"±{100 * difference.half_width:.1f}",
            "kind": difference.verdict if difference.verdict in ("better", "worse") else "tell",
        }
    return row


def _pictures(plan: Plan, good: Outcomes) -> list[list[dict[str, str]]]:
    """Draw the images on which variants differ most: ground truth and each variant's masks, with their coverage."""
    results: dict[str, dict[int, list[dict[str, Any]]]] = {}  # by variant, then by image
    if not plan.one_validation:
        return []
    for variant in plan.variants:
        run = next((r for r in plan.runs if r.variant == variant and r.seed in good[variant]), None)
        if run is not None:
            try:
                found = json.loads((run.config.output_folder / "results.json").read_text("utf-8"))
            except (OSError, ValueError):
                continue
            results[variant] = defaultdict(list)
            for result in found:
                if result["score"] >= _SCORE_THRESHOLD:
                    results[variant][result["image_id"]].append(result)
    if len(results) < 2:
        return []
    shown = [record for record in plan.validation.images if record.objects]
    covered = {
        record.id: {variant: _coverage(record, found[record.id]) for variant, found in results.items()}
        for record in shown
    }

    def disagreement(record: ImageRecord) -> float:
        values = covered[record.id].values()
        return max(values) - min(values)

    names = {category.id: category.name for category in plan.validation.categories}
    strips = []
    for record in sorted(shown, key=disagreement, reverse=True)[:_NUM_PICTURES]:
        if disagreement(record) == 0:
            break
        image = read_image(plan.validation.image_path(record), (record.width, record.height))
        enlarge = max(1, _LONGEST_SIDE // max(image.size))
        panels = {f"{record.file_name}, ground truth": draw_truth(image, record, names, enlarge=enlarge)}
        for variant, found in results.items():
            text = f"{variant} ({covered[record.id][variant]:.2f})"
            panels[text] = draw_results(image, found[record.id], names, enlarge=enlarge)
        strips.append(
            [{"text": text, "image": embedded(jpeg(panel, _LONGEST_SIDE))} for text, panel in panels.items()]
        )
    return strips


def _coverage(record: ImageRecord, results: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean over an image's objects of the best mask IoU among the detections of the same category."""
    masks = record.object_masks()
    best = []
    # One by one, because thousands of bitmaps do not fit into memory.
    for index, annotation in enumerate(record.objects):
        same = [r["segmentation"] for r in results if r["category_id"] == annotation.category_id]
        truth = coco_mask.encode(np.asfortranarray(masks[[index]].bitmaps()[0].numpy()))
        best.append(float(coco_mask.iou(same, [truth], [0]).max()) if same else 0.0)
    return statistics.fmean(best)
