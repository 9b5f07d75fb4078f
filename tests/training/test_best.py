"""maskloss/training/best.py: the best evaluation of a run."""

from __future__ import annotations

from typing import Any

import pytest

from maskloss.training.best import Best, precision_of


def metrics(mask: float | None, box: float | None = 0.5) -> dict[str, Any]:
    return {"segm": {"AP": mask}, "bbox": {"AP": box}}


def test_the_best_evaluation_is_the_first_one_with_the_highest_mask_ap() -> None:
    best = Best()
    found = []
    for precision in (0.0, 0.2, 0.1, 0.2, 0.3):
        best = best.after(metrics(precision))
        found.append((best.precision, best.since))
    assert found == [(0.0, 0), (0.2, 0), (0.2, 1), (0.2, 2), (0.3, 0)]


@pytest.mark.parametrize(
    ("mask", "box", "expected"), [(0.25, 0.5, 0.25), (None, 0.5, 0.5), (None, None, 0.0)]
)
def test_boxes_decide_where_there_are_no_masks(mask: Any, box: Any, expected: float) -> None:
    assert precision_of(metrics(mask, box)) == expected


def test_it_survives_a_checkpoint() -> None:
    best = Best(0.25, 3)
    assert Best.from_checkpoint({"best": best.to_state()}) == best
    assert Best.from_checkpoint({"step": 4}) == Best.from_checkpoint(None) == Best()
