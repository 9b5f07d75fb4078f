"""Loss curves, one small panel per term."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

_NOT_CURVES = {"step", "learning_rate", "seconds"}


def loss_curves(history: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]) -> str:
    """Draw each term over the steps, with the validation loss where there was an evaluation.

    Args:
        history: lines of history.jsonl.
        evaluations: lines of evaluations.jsonl.

    Returns:
        An SVG element.
    """
    keys = [key for key in history[0] if key not in _NOT_CURVES]
    columns = 3
    rows = math.ceil(len(keys) / columns)
    figure = Figure(figsize=(11, 2.6 * rows), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, key in zip(axes, keys, strict=False):
        axis.plot(
            [line["step"] for line in history], [line[key] for line in history], color="#2563eb", lw=1.3
        )
        validated = [line for line in evaluations if key in line["loss"]]
        if validated:
            axis.plot(
                [line["step"] for line in validated],
                [line["loss"][key] for line in validated],
                "o-",
                color="#dc2626",
                ms=4,
                lw=1,
            )
        axis.set_title(key, fontsize=10)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    for axis in list(axes)[len(keys) :]:
        axis.set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
