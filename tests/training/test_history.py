"""maskloss/training/history.py: the lines of steps and evaluations, in files, trackers and the log."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from maskloss.training.config import TrainConfig
from maskloss.training.evaluation import Evaluation
from maskloss.training.history import History
from maskloss.training.loop import train
from tests.training.conftest import UNINTERRUPTED
from tests.training.small_runs import (
    TERMS,
    assert_same_run,
    history,
    lines,
    small_config,
)


def test_the_history_has_every_logged_step_and_the_first_and_the_last(finished: Path) -> None:
    assert [line["step"] for line in history(finished)] == [1, 4, 6]


def test_a_line_of_the_history_has_the_terms_their_sum_the_learning_rate_and_the_seconds(
    finished: Path, shapes: Path
) -> None:
    config = small_config(shapes, finished, **UNINTERRUPTED)
    for line in lines(finished / "history.jsonl"):
        assert set(line) == {"step", "loss", *TERMS, "learning_rate", "seconds"}
        assert line["loss"] == pytest.approx(sum(line[term] for term in TERMS))
        assert all(np.isfinite(line[term]) and line[term] > 0 for term in TERMS)
        assert line["learning_rate"] == config.learning_rate_at(line["step"])


def test_seconds_rise(finished: Path) -> None:
    seconds = [line["seconds"] for line in lines(finished / "history.jsonl")]
    assert 0 < seconds[0] < seconds[1] < seconds[2]


def test_a_half_line_at_the_end_of_the_history_is_dropped_on_resume(
    finished: Path, shapes: Path, tmp_path: Path
) -> None:
    # What a machine that lost its power may leave.
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run/checkpoints/step-00000006.pt").unlink()
    content = (tmp_path / "run/history.jsonl").read_bytes()
    (tmp_path / "run/history.jsonl").write_bytes(content[:-30])
    train(small_config(shapes, tmp_path / "run", **UNINTERRUPTED, resume=True))
    assert_same_run(tmp_path / "run", finished)


class Tracker:
    """Keeps what it is sent."""

    name = "list"

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def log(self, values: dict[str, float], step: int) -> None:
        self.calls.append((step, values))

    def finish(self) -> None:
        self.calls.append("finish")


def accelerator(*trackers: Tracker, main: bool = True) -> Any:
    """The attributes of accelerate's `Accelerator` that a history reads."""
    return SimpleNamespace(
        is_main_process=main,
        trackers=list(trackers),
        log_with=list(trackers),
        init_trackers=lambda *_, **__: None,
    )


def config(folder: Path, **changes: Any) -> TrainConfig:
    return small_config(folder, folder, max_steps=4, **changes)


METRICS: dict[str, Any] = {
    "bbox": {"AP": 0.25, "APl": None},
    "segm": {"AP": None, "APl": None},
    "boundary": {"AP": 0.125, "APl": 0.5},
    "loss": {"loss_a": 1.0, "loss": 1.5},
}


def test_a_step_is_one_line_with_its_total_and_goes_to_the_trackers_and_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker()
    with caplog.at_level(logging.INFO, "maskloss"), History(config(tmp_path), 0, accelerator(tracker)) as log:
        log.step(2, {"loss_a": torch.tensor(0.5), "loss_b": torch.tensor(1.25)}, 0.1, 3.25)
    assert lines(tmp_path / "history.jsonl") == [
        {"step": 2, "loss": 1.75, "loss_a": 0.5, "loss_b": 1.25, "learning_rate": 0.1, "seconds": 3.25}
    ]
    sent = {"train/loss": 1.75, "train/loss_a": 0.5, "train/loss_b": 1.25, "train/learning_rate": 0.1}
    assert tracker.calls == [(2, sent), "finish"]
    # There is no terminal here, so a line stands for the progress bar.
    assert caplog.messages == ["step 2/4  loss 1.750  a 0.500  b 1.250  3 s"]


def test_an_evaluation_is_one_line_and_the_trackers_get_its_numbers_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker()
    with caplog.at_level(logging.INFO, "maskloss"), History(config(tmp_path), 0, accelerator(tracker)) as log:
        log.evaluation(3, Evaluation(METRICS, []))
    assert lines(tmp_path / "evaluations.jsonl") == [{"step": 3, **METRICS}]
    sent = {
        "validation/bbox/AP": 0.25,
        "validation/boundary/AP": 0.125,
        "validation/boundary/APl": 0.5,
        "validation/loss/loss_a": 1.0,
        "validation/loss/loss": 1.5,
    }
    assert tracker.calls == [(3, sent), "finish"]
    assert caplog.messages == ["step 3: box AP 0.250, mask AP none, boundary AP 0.125, validation loss 1.500"]


def test_a_new_run_starts_with_its_config_and_empty_files(tmp_path: Path) -> None:
    for name in ("history.jsonl", "evaluations.jsonl"):
        (tmp_path / name).write_text('{"step": 1}\n')
    with History(config(tmp_path, resume=True), 0, accelerator()):
        pass
    assert lines(tmp_path / "history.jsonl") == lines(tmp_path / "evaluations.jsonl") == []
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert "resume" not in saved
    assert TrainConfig(**saved) == config(tmp_path)


@pytest.mark.parametrize(
    ("start", "steps", "evaluations"),
    [
        (2, [1, 2], [2]),
        # A resumed run repeats the last evaluation.
        (4, [1, 2, 3, 4], [2, 3]),
    ],
)
def test_lines_after_the_checkpoint_and_damaged_ones_are_dropped(
    tmp_path: Path, start: int, steps: list[int], evaluations: list[int]
) -> None:
    damaged = ["[1]", "3", '{"loss": 1}', '{"step": null}', "\x00\x00", '{"step": 1, "lo']
    for name, first in (("history.jsonl", 1), ("evaluations.jsonl", 2)):
        kept = [json.dumps({"step": step, "loss": 0.5}) for step in range(first, 5)]
        (tmp_path / name).write_text("\n".join([*kept, *damaged]))
    with History(config(tmp_path), start, accelerator()):
        pass
    assert [line["step"] for line in lines(tmp_path / "history.jsonl")] == steps
    assert [line["step"] for line in lines(tmp_path / "evaluations.jsonl")] == evaluations
    assert (tmp_path / "history.jsonl").read_text().endswith("}\n")


def test_other_processes_write_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker()
    with (
        caplog.at_level(logging.INFO, "maskloss"),
        History(config(tmp_path), 0, accelerator(tracker, main=False)) as log,
    ):
        log.step(1, {"loss_a": torch.tensor(0.5)}, 0.1, 3.0)
        log.advance()
        log.evaluation(1, Evaluation(METRICS, []))
    assert list(tmp_path.iterdir()) == []
    assert tracker.calls == []
    assert caplog.messages == []
