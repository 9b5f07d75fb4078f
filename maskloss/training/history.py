"""The history of a run: the values of its steps and evaluations, in files, in trackers and on the screen."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import yaml
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from maskloss.files import append_line, read_bytes, write_bytes, write_text
from maskloss.training.config import TrainConfig
from maskloss.training.evaluation import Evaluation
from maskloss.training.metrics import METRICS
from maskloss.training.trackers import Trackers

logger = logging.getLogger(__name__)


class History:
    """Log of a run: `history.jsonl`, `evaluations.jsonl`, the trackers, and a progress bar or log lines.

    Only the main process writes. It first writes `config.yaml`, and drops the lines that an interrupted run logged
    after its checkpoint.

    Args:
        config: the run's config.
        start: step of the checkpoint that the run resumes from, 0 for a new run.
        accelerator: the run's accelerator, with its trackers.
        finished: whether all steps are done, so that only the last evaluation is repeated.

    Raises:
        InputError: a tracker cannot be started.
    """

    def __init__(
        self, config: TrainConfig, start: int, accelerator: Accelerator, *, finished: bool = False
    ) -> None:
        self.folder = config.output_folder
        self.enabled = enabled = accelerator.is_main_process
        self.max_steps = config.max_steps
        if not enabled:
            return
        saved = {key: value for key, value in asdict(config).items() if key != "resume"}
        write_text(self.folder / "config.yaml", yaml.safe_dump(saved, sort_keys=False))
        _keep_lines_up_to(self.folder / "history.jsonl", start)
        # The last evaluation of a finished run comes after its checkpoint, so a resumed run repeats it.
        _keep_lines_up_to(
            self.folder / "evaluations.jsonl", start - 1 if finished or start == config.max_steps else start
        )
        self.trackers = Trackers(accelerator, self.folder, start)
        self.bar = tqdm(initial=start, total=config.max_steps, desc="training", unit="step", disable=None)

    def __enter__(self) -> History:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.enabled:
            return
        self.bar.close()
        self.trackers.close()

    def advance(self) -> None:
        """Advance the progress bar by one step."""
        if self.enabled:
            self.bar.update()

    def step(self, step: int, losses: dict[str, Tensor], learning_rate: float, seconds: float) -> None:
        """Log the losses of a step, which synchronizes with the device."""
        if not self.enabled:
            return
        values = {key: float(value) for key, value in losses.items()}
        total = sum(values.values())
        line = {"step": step, "loss": total, **values, "learning_rate": learning_rate, "seconds": seconds}
        append_line(self.folder / "history.jsonl", json.dumps(line))
        self.trackers.log({f"train/{key}": line[key] for key in ("loss", *values, "learning_rate")}, step)
        short = {key.removeprefix("loss_"): f"{value:.3f}" for key, value in values.items()}
        self.bar.set_postfix({"loss": f"{total:.3f}", **short})
        if self.bar.disable:
            terms = "  ".join(f"{key} {value}" for key, value in short.items())
            logger.info("step %d/%d  loss %.3f  %s  %.0f s", step, self.max_steps, total, terms, seconds)

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Log the metrics of an evaluation."""
        if not self.enabled:
            return
        append_line(
            self.folder / "evaluations.jsonl",
            json.dumps({"step": step, **evaluation.metrics}, allow_nan=False),
        )
        self.trackers.log(
            {
                f"validation/{group}/{key}": value
                for group in (*METRICS, "loss")
                for key, value in (evaluation.metrics[group] or {}).items()
                if value is not None
            },
            step,
        )
        precisions = ", ".join(
            f"{metric.label} AP {_format(evaluation.metrics[kind]['AP'])}" for kind, metric in METRICS.items()
        )
        losses = evaluation.metrics["loss"]
        shown = "" if losses is None else f", validation loss {_format(losses['loss'])}"
        logger.info("step %d: %s%s", step, precisions, shown)

    def pictures(self, step: int, pictures: Mapping[str, npt.NDArray[np.uint8]]) -> None:
        """Log pictures (N, H, W, 3) of an evaluation."""
        if self.enabled:
            self.trackers.log_pictures(
                {f"validation/{name}": value for name, value in pictures.items()}, step
            )


def _keep_lines_up_to(path: Path, step: int) -> None:
    """Drop the lines of later steps and incomplete lines; create an empty file if there is none."""
    kept = []
    for line in (read_bytes(path) if path.exists() else b"").decode(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    write_bytes(path, "".join(f"{line}\n" for line in kept).encode())


def _format(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
