"""The history of a run: what each step and each evaluation gave, in files, in TensorBoard and on the screen."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import yaml
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from maskloss.errors import RunError
from maskloss.files import append_line, read_bytes, reason_of, write_bytes, write_text
from maskloss.training.config import TrainConfig
from maskloss.training.evaluation import Evaluation
from maskloss.training.metrics import METRICS

logger = logging.getLogger(__name__)


class History:
    """The run's history: `history.jsonl`, `evaluations.jsonl`, TensorBoard, and a bar or lines on the screen.

    Writes the config first, and drops what an interrupted run logged past its checkpoint.
    """

    def __init__(self, config: TrainConfig, start: int, *, enabled: bool) -> None:
        self.folder = config.output_folder
        self.enabled = enabled
        self.max_steps = config.max_steps
        if not enabled:
            return
        saved = {key: value for key, value in asdict(config).items() if key != "resume"}
        write_text(self.folder / "config.yaml", yaml.safe_dump(saved, sort_keys=False))
        _keep_lines_up_to(self.folder / "history.jsonl", start)
        # The evaluation of the last step comes after its checkpoint, so it is done again.
        _keep_lines_up_to(self.folder / "evaluations.jsonl", min(start, config.max_steps - 1))
        with self._events_written():
            self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=start + 1)
        self.bar = tqdm(initial=start, total=config.max_steps, desc="training", unit="step", disable=None)

    def __enter__(self) -> History:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if not self.enabled:
            return
        self.bar.close()
        try:
            with self._events_written():
                self.board.flush()
                self.board.close()
        except RunError:
            # What ended the run comes first.
            if kind is None:
                raise

    @contextlib.contextmanager
    def _events_written(self) -> Iterator[None]:
        """Name the folder of the events where TensorBoard, whose own thread writes, could not write them."""
        try:
            yield
        except (OSError, ValueError) as error:
            raise RunError(f"{self.folder / 'tensorboard'}: cannot be written: {reason_of(error)}") from error

    def advance(self) -> None:
        """Count a step."""
        if self.enabled:
            self.bar.update()

    def step(self, step: int, losses: dict[str, Tensor], learning_rate: float, seconds: float) -> None:
        """Log a step; the only place where loss values leave the device."""
        if not self.enabled:
            return
        values = {key: float(value) for key, value in losses.items()}
        total = sum(values.values())
        line = {"step": step, "loss": total, **values, "learning_rate": learning_rate, "seconds": seconds}
        append_line(self.folder / "history.jsonl", json.dumps(line))
        with self._events_written():
            for key in ("loss", *values, "learning_rate"):
                self.board.add_scalar(f"train/{key}", line[key], step)
        short = {key.removeprefix("loss_"): f"{value:.3f}" for key, value in values.items()}
        self.bar.set_postfix({"loss": f"{total:.3f}", **short})
        if self.bar.disable:
            terms = "  ".join(f"{key} {value}" for key, value in short.items())
            logger.info("step %d/%d  loss %.3f  %s  %.0f s", step, self.max_steps, total, terms, seconds)

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Log an evaluation."""
        if not self.enabled:
            return
        append_line(
            self.folder / "evaluations.jsonl",
            json.dumps({"step": step, **evaluation.metrics}, allow_nan=False),
        )
        with self._events_written():
            for group, values in evaluation.metrics.items():
                for key, value in values.items():
                    if value is not None:
                        self.board.add_scalar(f"validation/{group}/{key}", value, step)
        precisions = ", ".join(
            f"{metric.label} AP {_shown(evaluation.metrics[kind]['AP'])}" for kind, metric in METRICS.items()
        )
        loss = evaluation.metrics["loss"]["loss"]
        logger.info("step %d: %s, validation loss %s", step, precisions, _shown(loss))


def _keep_lines_up_to(path: Path, step: int) -> None:
    """Drop the lines of later steps, and one that was cut short."""
    if not path.exists():
        return
    kept = []
    for line in read_bytes(path).decode(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    write_bytes(path, "".join(f"{line}\n" for line in kept).encode())


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
