"""The best evaluation so far, which selects best.safetensors and stops a run that no longer improves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from maskloss.training.metrics import Metrics


@dataclass(frozen=True)
class Best:
    """The best evaluation so far.

    Attributes:
        precision: its mask AP in [0, 1], or its box AP if masks have none; None before the first evaluation.
        since: number of evaluations after it.

    Example:
        >>> best = Best().after({"segm": {"AP": 0.25}, "bbox": {"AP": 0.5}})
        >>> best.after({"segm": {"AP": 0.125}, "bbox": {"AP": 0.5}})
        Best(precision=0.25, since=1)
    """

    precision: float | None = None
    since: int = 0

    def after(self, metrics: Metrics) -> Best:
        """Return the best evaluation after one more."""
        precision = precision_of(metrics)
        if self.precision is None or precision > self.precision:
            return Best(precision)
        return Best(self.precision, self.since + 1)

    def to_state(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return {"precision": self.precision, "since": self.since}

    @classmethod
    def from_checkpoint(cls, checkpoint: Mapping[str, Any] | None) -> Best:
        """Read the best evaluation from a checkpoint; there is none in checkpoints of maskloss 0.1.0."""
        state = (checkpoint or {}).get("best", {})
        return cls(state.get("precision"), state.get("since", 0))


def precision_of(metrics: Metrics) -> float:
    """Return the AP that models are compared by: of masks, else of boxes; 0 if there is neither.

    Example:
        >>> precision_of({"segm": {"AP": None}, "bbox": {"AP": 0.5}})
        0.5
    """
    found = [metrics[kind]["AP"] for kind in ("segm", "bbox")]
    return next((value for value in found if value is not None), 0.0)
