"""Trackers of a run: accelerate's, such as TensorBoard, by name, and a user's own by import path."""

from __future__ import annotations

import contextlib
import json
import logging
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from maskloss.errors import InputError, one_line
from maskloss.files import reason_of, write_text
from maskloss.training.import_paths import called, described, imported

logger = logging.getLogger(__name__)

#: Name of the project or experiment to which trackers add a run.
_PROJECT = "maskloss"


def make_trackers(names: list[str], folder: Path) -> list[str | GeneralTracker]:
    """Make the trackers for `Accelerator(log_with=...)`. accelerate's own trackers are passed on by name.

    Args:
        names: names of accelerate's trackers, such as "tensorboard", "wandb" or "mlflow", or import paths of functions
            or classes (folder) -> `accelerate.tracking.GeneralTracker`.
        folder: the run's folder.

    Raises:
        InputError: accelerate has no tracker of this name, its package is not installed, or a function or class
            cannot be imported, raises, or does not return a tracker.
    """
    return [_make_tracker(name, folder) for name in names]


def _make_tracker(name: str, folder: Path) -> str | GeneralTracker:
    if "." in name:
        tracker = called(imported(name, "--trackers"), f"--trackers {name!r}", folder)
        if not isinstance(tracker, GeneralTracker):
            raise InputError(
                f"--trackers {name!r}: must return an accelerate.tracking.GeneralTracker, not a "
                f"{type(tracker).__name__}"
            )
        return tracker
    if name not in LOGGER_TYPE_TO_CLASS:
        raise InputError(
            f"--trackers {one_line(name, 80)!r}: no such tracker; available: {', '.join(LOGGER_TYPE_TO_CLASS)}, or "
            "give an import path package.module.name"
        )
    if name not in [str(available) for available in get_available_trackers()]:
        raise InputError(f"--trackers {name}: its package is not installed; install it with pip")
    return name


class Trackers:
    """The started trackers of a run, on its main process.

    A tracker that fails during the run is dropped with a warning, because `history.jsonl` has all values.

    Args:
        accelerator: an accelerator with the trackers of `make_trackers`.
        folder: the run's folder.
        start: step of the checkpoint that the run resumes from, 0 for a new run. Curves continue from there.

    Raises:
        InputError: a tracker cannot be started, for example without an account or a network.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, start: int) -> None:
        self._trackers: list[GeneralTracker] = accelerator.trackers
        if not accelerator.log_with:
            return
        ids = folder / "trackers.json"
        runs = _read_ids(ids) if start else {}
        runs.setdefault("wandb", uuid.uuid4().hex)
        try:
            accelerator.init_trackers(
                _PROJECT,
                init_kwargs={
                    # Discard the events that the interrupted run logged after its checkpoint.
                    "tensorboard": {"purge_step": start + 1},
                    "wandb": {
                        "id": runs["wandb"],
                        "resume": "allow",
                        "name": folder.name,
                        "dir": str(folder),
                    },
                    "mlflow": {"run_id": runs["mlflow"]} if "mlflow" in runs else {"run_name": folder.name},
                },
            )
        except (Exception, SystemExit) as error:  # a tracker may raise anything
            names = ", ".join(tracker.name for tracker in self._trackers)
            raise InputError(
                f"--trackers {names}: cannot be started: {_reason(error)}; --trackers none trains without"
            ) from error
        for tracker in self._trackers:
            if tracker.name == "mlflow":
                runs["mlflow"] = tracker.tracker.info.run_id
        write_text(ids, json.dumps(runs))

    def log(self, values: dict[str, float], step: int) -> None:
        """Send the values of a step to each tracker."""
        self._send(lambda tracker: tracker.log(values, step=step), step)

    def log_pictures(self, pictures: dict[str, npt.NDArray[np.uint8]], step: int) -> None:
        """Send pictures (N, H, W, 3) to each tracker that shows pictures."""

        def send(tracker: Any) -> None:
            if pictures and hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images(pictures, step=step, **layout)

        self._send(send, step)

    def _send(self, send: Callable[[GeneralTracker], object], step: int) -> None:
        for tracker in list(self._trackers):
            try:
                send(tracker)
            except Exception as error:  # a tracker may raise anything
                self._trackers.remove(tracker)
                logger.warning(
                    "tracker %s failed at step %d and is dropped: %s",
                    tracker.name,
                    step,
                    _reason(error),
                )

    def close(self) -> None:
        """Finish each tracker's run."""
        for tracker in self._trackers:
            try:
                tracker.finish()
            except Exception as error:  # a tracker may raise anything
                logger.warning("tracker %s cannot be closed: %s", tracker.name, _reason(error))


def _read_ids(path: Path) -> dict[str, str]:
    """Return the ids of an interrupted run by tracker, or an empty dict if the file cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        ids: Any = json.loads(path.read_bytes())
        if isinstance(ids, dict):
            return ids
    return {}


def _reason(error: BaseException) -> str:
    return one_line(reason_of(error) if isinstance(error, OSError) else described(error), 200)
