"""What each mask loss gains over cross-entropy, on synthetic shapes and on photographs, with Student's intervals."""

import json
from pathlib import Path

import matplotlib.pyplot as plt

from maskloss.ablation.analysis import summarized

# Sphinx runs a figure in docs/, without __file__.
BENCHMARKS = Path("../benchmarks")
NAMES = {
    "lovasz": "Lovász",
    "bce_dice": "BCE + Dice",
    "boundary_bce": "boundary BCE",
    "focal": "focal",
    "tversky": "Tversky",
    "dice": "Dice",
    "binary_targets": "BCE, binary targets",
    "unaligned_targets": "BCE, unaligned targets",
}


def on_shapes() -> dict[str, tuple[float, float]]:
    """Read mean and half width of the differences in the sweep on shapes, in points of mask AP."""
    results = json.loads((BENCHMARKS / "ablations/mask_losses/results.json").read_text("utf-8"))
    differences = {
        name: variant["summary"]["mask AP"]["difference"] for name, variant in results["variants"].items()
    }
    return {name: (100 * one["mean"], 100 * one["half_width"]) for name, one in differences.items() if one}


def on_photographs() -> dict[str, tuple[float, float]]:
    """Compute the differences of the runs on the features of a published network."""
    lines = (BENCHMARKS / "real_network/results/mask_losses.jsonl").read_text("utf-8").splitlines()
    runs: dict[str, dict[int, float]] = {}
    for run in map(json.loads, lines):
        if run["kind"] == "run":
            runs.setdefault(run["variant"], {})[run["seed"]] = run["metrics"]["AP"]
    found = {name: summary.difference for name, summary in summarized(runs, "bce").items()}
    return {name: (100 * one.mean, 100 * one.half_width) for name, one in found.items() if one is not None}


figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
axes.axvline(0, color="0.6", linewidth=1)
rows = {name: -place for place, name in enumerate(NAMES)}
for offset, color, label, found in (
    (0.14, "tab:orange", "synthetic shapes, rate not tuned", on_shapes()),
    (-0.14, "tab:blue", "photographs, rate tuned", on_photographs()),
):
    shown = [name for name in NAMES if name in found]
    axes.errorbar(
        [found[name][0] for name in shown],
        [rows[name] + offset for name in shown],
        xerr=[found[name][1] for name in shown],
        fmt="o",
        color=color,
        capsize=3,
        label=label,
    )
axes.set_yticks(list(rows.values()), list(NAMES.values()))
axes.set_xlabel("points of mask AP over cross-entropy, with 95 % intervals")
axes.legend(loc="lower left")
