"""benchmarks/profile_step.py: its timers find every phase of the stock and of the converted model."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from maskloss import convert
from tests.detection.small_models import batch, tiny_mask_rcnn

IN_TRAINING = {
    "transform", "backbone and FPN", "RPN head", "anchors", "proposals", "RPN matching and sampling", "RPN loss",
    "detector matching and sampling", "box branch", "mask branch", "mask targets", "losses", "backward",
}  # fmt: skip


@pytest.fixture
def profile_step(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("profile_step")


@pytest.mark.parametrize("side", ["torchvision", "ours", "sync_free"])
def test_every_phase_is_timed(side: str, profile_step: Any) -> None:
    model = tiny_mask_rcnn()
    if side != "torchvision":
        convert(model, sync_free=side == "sync_free")
    device = torch.device("cpu")
    phases = profile_step.phases_of(profile_step.training_step, model, batch(), device)
    assert phases.keys() >= IN_TRAINING
    assert all(seconds > 0 for phase, seconds in phases.items() if phase in IN_TRAINING)
    in_evaluation = profile_step.phases_of(profile_step.inference, model, batch(), device)
    assert in_evaluation.keys() >= {"detections", "mask branch", "paste"}
    # The timers are removed.
    model.train()(*batch())


def test_the_time_of_a_nested_phase_counts_only_for_it(
    profile_step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 1.0, 4.0, 5.0])
    monkeypatch.setattr(profile_step.Phases, "_now", lambda self: next(clock))
    phases = profile_step.Phases(cuda=False)
    with phases.phase("outer"), phases.phase("inner"):
        pass
    assert phases.seconds == {"inner": 3.0, "outer": 2.0}
