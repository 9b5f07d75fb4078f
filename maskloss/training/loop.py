"""The training loop: train from a config, and write the model, its metrics and its history to a folder."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from maskloss.data.coco import CocoData
from maskloss.files import locked, make_folder, remove_leftovers, write_text
from maskloss.training.best import Best
from maskloss.training.checkpoints import save_checkpoint
from maskloss.training.config import TrainConfig
from maskloss.training.evaluation import Evaluation, dead_workers_named, evaluate, warn_of_crowded_images
from maskloss.training.history import History
from maskloss.training.interruption import Interruption
from maskloss.training.metrics import score_thresholds, write_metrics
from maskloss.training.model_file import ModelDescription, mask_probs_of, save_model
from maskloss.training.resuming import starting_point
from maskloss.training.setup import Pictures, Run, device_of, guest, set_up
from maskloss.training.trainer import Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingResult:
    """The result of a finished run, besides its files.

    Attributes:
        evaluation: the evaluation after the last step.
        validation: the validation set.
        main_process: whether this process writes the files; False on the other ranks.
    """

    evaluation: Evaluation
    validation: CocoData
    main_process: bool


def train(config: TrainConfig, *, pictures: Pictures | None = None) -> TrainingResult:
    """Train a model, or continue an interrupted run.

    Args:
        config: the run's settings.
        pictures: draws what the run trains on and its evaluations, such as
            `maskloss.report.run_pictures.RunPictures()`; None for no pictures.

    Raises:
        InputError: the config or the data are wrong. Files of an earlier run are unchanged.
        RunError: a loss or a weight is not finite, a term or a worker fails, or the disk is full. The last checkpoint
            is kept.
    """
    device = device_of(config)
    with guest(device), dead_workers_named(), contextlib.ExitStack() as stack:
        run = replace(set_up(config, device), pictures=pictures)
        # Write to the output folder only after all checks that need no training step have passed.
        if run.accelerator.is_main_process:
            make_folder(config.output_folder)
            stack.enter_context(locked(config.output_folder))
            remove_leftovers(config.output_folder / "checkpoints")
        run.accelerator.wait_for_everyone()
        return _train_in_locked_folder(run)


def _train_in_locked_folder(run: Run) -> TrainingResult:
    config, accelerator = run.config, run.accelerator
    checkpoint = starting_point(config, run.identity)
    trainer = Trainer(run, checkpoint)
    best = Best.from_checkpoint(checkpoint)
    has_ended = _has_ended(config, trainer.step, best)
    # Lines of the earlier run are dropped from the history only now, after its checkpoint was read.
    with (
        History(config, trainer.step, accelerator, finished=has_ended) as history,
        Interruption(enabled=accelerator.num_processes == 1) as interruption,
    ):
        if accelerator.is_main_process:
            _warn(run)
            if run.pictures is not None and trainer.step == 0:
                _draw_first_batches(run, run.pictures, trainer)
        training = _Training(run, trainer, history, interruption, best)
        if checkpoint is not None:
            training.began -= checkpoint["seconds"]
            if not has_ended and checkpoint.get("evaluated", trainer.step) < trainer.step:
                training.evaluate()  # the run was interrupted in the evaluation of this step
        while not _has_ended(config, trainer.step, training.best):
            training.advance()
        evaluation = training.evaluation or training.evaluate()
        if trainer.step < config.max_steps:
            logger.info(
                "step %d: stopped, because %d evaluations did not improve the AP",
                trainer.step,
                training.best.since,
            )
        if accelerator.is_main_process:
            training.save_model("model.safetensors")
            write_metrics(config.output_folder / "metrics.json", evaluation.metrics)
            write_text(config.output_folder / "results.json", json.dumps(evaluation.results))
    accelerator.wait_for_everyone()
    return TrainingResult(evaluation, run.validation, accelerator.is_main_process)


def _has_ended(config: TrainConfig, step: int, best: Best) -> bool:
    """Return whether a run has taken all steps, or stopped because its last evaluations did not improve the AP."""
    return step >= config.max_steps or _is_stalled(config, best)


def _is_stalled(config: TrainConfig, best: Best) -> bool:
    return config.stop_after is not None and best.since >= config.stop_after


@dataclass
class _Training:
    """A run under way: takes its steps, and logs, evaluates and saves what is due.

    Attributes:
        best: the best evaluation so far.
        evaluation: the evaluation after the trainer's last step, or None if there was none.
        began: when the run would have begun without interruptions, on the clock of `time.perf_counter`.
    """

    run: Run
    trainer: Trainer
    history: History
    interruption: Interruption
    best: Best
    evaluation: Evaluation | None = None
    began: float = field(default_factory=time.perf_counter)

    def advance(self) -> None:
        """Take a step, then log, evaluate and save if due.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed; the step is saved.
        """
        config, trainer = self.run.config, self.trainer
        learning_rate = config.learning_rate_at(trainer.step + 1)
        losses = trainer.take_step(learning_rate)
        self.evaluation = None
        step, seconds = trainer.step, time.perf_counter() - self.began
        is_last = step == config.max_steps
        log_due = step % config.log_every == 0 or step == 1 or is_last
        interval = config.evaluate_every or 0
        evaluation_due = interval > 0 and step % interval == 0 and not is_last
        checkpoint_due = step % config.checkpoint_every == 0 or is_last or self.interruption.requested
        if log_due or evaluation_due or checkpoint_due:
            trainer.check_losses()
        if log_due:
            self.history.step(
                step, _mean_over_processes(self.run.accelerator, losses), learning_rate, seconds
            )
        self.history.advance()
        if evaluation_due or checkpoint_due:
            trainer.check_weights()
        # Evaluate before saving: a checkpoint implies that everything up to its step is on the disk.
        if evaluation_due and not self.interruption.requested:
            try:
                evaluation = self._compute_evaluation()
            except KeyboardInterrupt:
                self.interruption.requested = True
            else:
                self._record(evaluation)
        if checkpoint_due or self.interruption.requested or _is_stalled(config, self.best):
            is_evaluated = self.evaluation is not None or not evaluation_due
            self._save(seconds, evaluated=step if is_evaluated else step - 1)
        if self.interruption.requested:
            logger.warning(
                "interrupted after step %d: %s holds the model of this step, and the same command with --resume "
                "continues the run",
                step,
                config.output_folder / "model.safetensors",
            )
            self.interruption.raise_now()

    def evaluate(self) -> Evaluation:
        """Evaluate the model, log the evaluation, and write the model if it is the best so far."""
        evaluation = self._compute_evaluation()
        self._record(evaluation)
        return evaluation

    def _compute_evaluation(self) -> Evaluation:
        run = self.run
        if run.accelerator.num_processes > 1:
            # Running statistics differ between processes. All processes use those of the main process, which are saved.
            for buffer in (*run.model.buffers(), *run.loss.buffers()):
                torch.distributed.broadcast(buffer, src=0)
        # Ctrl-C must not come while the weights are swapped with their average.
        with self.trainer.averaged(), self.interruption.at_once():
            return evaluate(
                run.model,
                run.validation,
                batch_size=run.config.batch_size,
                device=run.accelerator.device,
                workers=run.config.workers,
                rank=run.accelerator.process_index,
                world_size=run.accelerator.num_processes,
                losses=run.config.val_losses,
                crowds=run.config.crowds,
            )

    def _record(self, evaluation: Evaluation) -> None:
        run, step = self.run, self.trainer.step
        self.history.evaluation(step, evaluation)
        if run.pictures is not None and run.config.tracker_names and run.accelerator.is_main_process:
            self.history.pictures(step, run.pictures.after_evaluation(run.validation, evaluation.results))
        self.evaluation = evaluation
        self.best = self.best.after(evaluation.metrics)
        if self.best.since == 0 and run.accelerator.is_main_process:
            self.save_model("best.safetensors")

    def _save(self, seconds: float, *, evaluated: int) -> None:
        """Write a checkpoint, whose due evaluations up to step `evaluated` are done, and the model."""
        run = self.run
        if not run.accelerator.is_main_process:
            return
        state = {
            "config": json.dumps(asdict(run.config)),
            "seconds": seconds,
            "best": self.best.to_state(),
            "evaluated": evaluated,
            **run.identity,
            **self.trainer.state(),
        }
        save_checkpoint(run.config.output_folder / "checkpoints", self.trainer.step, state)
        self.save_model("model.safetensors")

    def save_model(self, name: str) -> None:
        """Write the model, with the score thresholds of the last step's evaluation, if there was one."""
        description = _description(self.run)
        if self.evaluation is not None:
            thresholds = score_thresholds(self.evaluation.metrics, self.evaluation.results)
            description = replace(description, score_thresholds=thresholds)
        with self.trainer.averaged():
            save_model(self.run.config.output_folder / name, self.run.model, description)


def _description(run: Run) -> ModelDescription:
    return ModelDescription(
        run.settings,
        run.training.categories,
        run.loss.mask_targets.aligned,
        mask_probs_of(run.loss),
        run.config.loss,
        run.config.crowds,
        run.config.mask_branch,
    )


def _warn(run: Run) -> None:
    """Warn about unusual data and settings that can still be trained."""
    config = run.config
    for line in [*run.training.warnings, *run.validation.warnings]:
        logger.warning("%s", line)
    warn_of_crowded_images(run.validation, config.max_detections)
    if config.warmup_steps > config.max_steps:
        logger.warning(
            "--warmup-steps %d exceeds the run's %d steps: the learning rate never reaches --learning-rate; "
            "--warmup-steps %d is a tenth of them",
            config.warmup_steps,
            config.max_steps,
            config.max_steps // 10,
        )


def _draw_first_batches(run: Run, pictures: Pictures, trainer: Trainer) -> None:
    loader: Any = trainer.loader
    batches = itertools.islice(iter(loader.batch_sampler), 12)
    pictures.before_training(
        run.config.output_folder, loader.dataset, [key for batch in batches for key in batch]
    )


def _mean_over_processes(accelerator: Accelerator, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the mean of each loss over the processes."""
    if accelerator.num_processes == 1:
        return losses
    mean = accelerator.reduce(torch.stack(list(losses.values())), "mean")
    return dict(zip(losses, mean, strict=True))
