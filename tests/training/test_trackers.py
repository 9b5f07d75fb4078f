"""maskloss/training/trackers.py: TensorBoard, a user's own tracker, and trackers of other packages."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from maskloss.errors import InputError
from maskloss.training.loop import train
from maskloss.training.trackers import make_trackers
from tests.training.small_runs import TERMS, history, small_config


class ListTracker(GeneralTracker):
    """Keeps what it is sent."""

    name = "list"
    requires_logging_directory = False
    made: list[ListTracker] = []  # noqa: RUF012

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.calls: list[Any] = []
        self.made.append(self)

    @property
    def tracker(self) -> list[Any]:
        return self.calls

    def start(self) -> None:
        self.calls.append("start")

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.calls.append((step, values))

    def finish(self) -> None:
        self.calls.append("finish")


class FailingTracker(ListTracker):
    """Fails at step 2."""

    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        if step == 2:
            raise ConnectionError("the server is gone")
        super().log(values, step, **options)


class UnreachableTracker(ListTracker):
    """Does not start."""

    def start(self) -> None:
        raise ConnectionError("no route to host")


@pytest.fixture(autouse=True)
def none_made() -> None:
    ListTracker.made.clear()


def own(name: str) -> str:
    return f"{__name__}.{name}"


def curve(folder: Path, key: str) -> dict[int, float]:
    """Return a curve as TensorBoard itself reads it, after checking that no step occurs twice."""
    events = EventAccumulator(str(folder / "tensorboard/maskloss"))
    events.Reload()
    points = events.Scalars(key)
    assert len({point.step for point in points}) == len(points)
    return {point.step: point.value for point in points}


def test_tensorboard_shows_every_logged_step(shapes: Path, tmp_path: Path) -> None:
    train(small_config(shapes, tmp_path / "run", max_steps=3, log_every=1))
    lines = history(tmp_path / "run")
    for key in ("loss", *TERMS, "learning_rate"):
        assert curve(tmp_path / "run", f"train/{key}") == pytest.approx(
            {line["step"]: line[key] for line in lines}
        )
    assert list(curve(tmp_path / "run", "validation/loss/loss")) == [3]


def test_the_curves_of_a_resumed_run_are_those_of_an_uninterrupted_one(shapes: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"log_every": 1, "checkpoint_every": 2, "schedule": "constant"}
    train(small_config(shapes, tmp_path / "whole", max_steps=4, **settings))
    # Killed after step 3, whose values are logged and no part of the checkpoint of step 2.
    train(small_config(shapes, tmp_path / "run", max_steps=3, **settings))
    (tmp_path / "run/checkpoints/step-00000003.pt").unlink()
    train(small_config(shapes, tmp_path / "run", max_steps=4, resume=True, **settings))
    key = "train/loss_mask"
    assert curve(tmp_path / "run", key) == curve(tmp_path / "whole", key)


def test_a_users_tracker_gets_the_values_of_the_history(shapes: Path, tmp_path: Path) -> None:
    train(
        small_config(
            shapes, tmp_path / "run", max_steps=2, log_every=1, trackers=["tensorboard", own("ListTracker")]
        )
    )
    (tracker,) = ListTracker.made
    assert tracker.folder == tmp_path / "run"
    start, *logged, finish = tracker.calls
    assert (start, finish) == ("start", "finish")
    assert [step for step, _ in logged] == [1, 2, 2]
    for (_, values), line in zip(logged[:2], history(tmp_path / "run"), strict=True):
        assert values == {f"train/{key}": line[key] for key in ("loss", *TERMS, "learning_rate")}
    assert set(curve(tmp_path / "run", "train/loss")) == {1, 2}


def test_none_writes_no_events(shapes: Path, tmp_path: Path) -> None:
    train(small_config(shapes, tmp_path / "run", max_steps=1, trackers="none"))
    assert not (tmp_path / "run/tensorboard").exists()
    assert not (tmp_path / "run/trackers.json").exists()


def test_a_tracker_that_fails_is_dropped_and_the_run_goes_on(
    shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = f"{own('FailingTracker')},{own('ListTracker')}"
    with caplog.at_level(logging.WARNING):
        train(small_config(shapes, tmp_path / "run", max_steps=3, log_every=1, trackers=names))
    failing, good = ListTracker.made
    assert [call[0] for call in failing.calls[1:]] == [1]
    assert [call[0] for call in good.calls[1:-1]] == [1, 2, 3, 3]
    assert [line["step"] for line in history(tmp_path / "run")] == [1, 2, 3]
    (warning,) = [record.getMessage() for record in caplog.records if "tracker" in record.getMessage()]
    assert warning == ("tracker list failed at step 2 and is dropped: the server is gone")


def test_a_tracker_that_does_not_start_stops_the_run_before_its_first_step(
    shapes: Path, tmp_path: Path
) -> None:
    config = small_config(shapes, tmp_path / "run", max_steps=1, trackers=own("UnreachableTracker"))
    with pytest.raises(InputError, match=r"--trackers list: cannot be started: no route to host"):
        train(config)
    assert history(tmp_path / "run") == []
    # Nothing is there to resume from, so the same folder does for the next try.
    train(small_config(shapes, tmp_path / "run", max_steps=1, trackers="none"))


def test_a_full_disk_under_tensorboard_is_warned_of_and_the_run_continues(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    with caplog.at_level(logging.WARNING):
        train(small_config(shapes, tmp_path / "run", max_steps=1))
    assert "tracker tensorboard failed at step 1 and is dropped: No space left" in caplog.text
    assert [line["step"] for line in history(tmp_path / "run")] == [1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorbord", "--trackers 'tensorbord': no such tracker; available: .*tensorboard.*import path"),
        (
            "no_such_module.Tracker",
            "--trackers 'no_such_module.Tracker': cannot be imported: No module named",
        ),
        (own("TERMS"), "--trackers .*: must be callable, but is a tuple"),
        (own("history"), "--trackers .*: cannot be made: FileNotFoundError"),
        ("collections.Counter", "--trackers 'collections.Counter': .*TypeError"),
        ("pathlib.Path", "--trackers 'pathlib.Path': must return an accelerate.tracking.*, not a PosixPath"),
    ],
)
def test_an_invalid_tracker_is_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_trackers([name], tmp_path)


def test_a_tracker_whose_package_is_missing_is_refused_before_anything_is_written(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maskloss.training.trackers.get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(
        InputError, match="--trackers wandb: its package is not installed; install it with pip"
    ):
        train(small_config(shapes, tmp_path / "run", trackers="tensorboard, wandb"))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_a_run_at_wandb_keeps_its_id(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings: dict[str, Any] = {"trackers": "wandb", "schedule": "constant", "checkpoint_every": 1}
    train(small_config(shapes, tmp_path / "run", max_steps=1, **settings))
    kept = json.loads((tmp_path / "run/trackers.json").read_text())["wandb"]
    train(small_config(shapes, tmp_path / "run", max_steps=2, resume=True, **settings))
    folders = [path.name for path in (tmp_path / "run/wandb").glob("offline-run-*")]
    assert len(folders) == 2
    assert all(name.endswith(f"-{kept}") for name in folders)


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
def test_a_run_at_mlflow_keeps_its_id(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    settings: dict[str, Any] = {"trackers": "mlflow", "schedule": "constant", "checkpoint_every": 1}
    train(small_config(shapes, tmp_path / "run", max_steps=1, **settings))
    train(small_config(shapes, tmp_path / "run", max_steps=2, resume=True, **settings))
    (points,) = (tmp_path / "mlruns").glob("*/*/metrics/train/loss")
    assert [line.split()[2] for line in points.read_text().splitlines()] == ["1", "2"]
