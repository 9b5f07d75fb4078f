"""The training loop: train from a config, and write the model, its metrics and its history to a folder."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from maskloss.data.coco import CocoData
from maskloss.data.sampler import mixed_seed
from maskloss.detection.conversion import convert, loss_parameters
from maskloss.detection.cuda_graphs import graph_convolutions
from maskloss.detection.sampling import SeededSampler
from maskloss.files import locked, make_folder, remove_leftovers, write_text
from maskloss.training.averaging import WeightAverage
from maskloss.training.best import Best
from maskloss.training.checkpoints import restore, save_checkpoint
from maskloss.training.config import TrainConfig
from maskloss.training.divergence import LossCheck, check_weights
from maskloss.training.evaluation import Evaluation, batches_on, evaluate, warn_of_crowded_images
from maskloss.training.freezing import freeze
from maskloss.training.history import History
from maskloss.training.interruption import Interruption
from maskloss.training.metrics import score_thresholds, write_metrics
from maskloss.training.model_file import ModelDescription, mask_probs_of, save_model
from maskloss.training.resuming import starting_point
from maskloss.training.setup import Pictures, Run, device_of, guest, make_loader, make_optimizer, set_up
from maskloss.training.term_errors import terms_named

logger = logging.getLogger(__name__)

_AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


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
    with guest(device), contextlib.ExitStack() as stack:
        run = replace(set_up(config, device), pictures=pictures)
        # Write to the output folder only after all checks that need no training step have passed.
        if run.accelerator.is_main_process:
            make_folder(config.output_folder)
            stack.enter_context(locked(config.output_folder))
            remove_leftovers(config.output_folder / "checkpoints")
        run.accelerator.wait_for_everyone()
        return _train_in_locked_folder(run)


def _train_in_locked_folder(run: Run) -> TrainingResult:
    config, accelerator, loss, model = run.config, run.accelerator, run.loss, run.model
    identity = run.identity
    checkpoint = starting_point(config, identity)
    convert(model, loss, paste=None, sync_free=config.sync_free, mask_branch=run.branch)
    frozen = freeze(model, config.frozen_parts)
    samplers = seed_samples(model)
    optimizer = make_optimizer(config, model)
    start, elapsed = 0, 0.0
    if checkpoint is not None:
        start, elapsed = checkpoint["step"], checkpoint["seconds"]
        restore(config.output_folder, checkpoint, model, loss, optimizer)
    average = None if config.ema is None else WeightAverage(model, config.ema)
    if average is not None and checkpoint is not None:
        average.load_state_dict(checkpoint.get("average", {}), str(config.output_folder / "checkpoints"))
    model.train()
    for module in frozen:
        module.eval()
    if config.cuda_graphs:
        graph_convolutions(model, config.batch_size, autocast=_AUTOCAST[config.mixed_precision])
    prepared, optimizer = accelerator.prepare(model, optimizer)
    if checkpoint is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(checkpoint["scaler"])

    loader = make_loader(config, run.training, accelerator, start)

    best = Best.from_checkpoint(checkpoint)
    finished = start == config.max_steps or is_stalled(best, config.stop_after)
    evaluation: Evaluation | None = None
    interval = config.evaluate_every or 0
    with (
        History(config, start, accelerator, finished=finished) as history,
        Interruption(enabled=accelerator.num_processes == 1) as interruption,
    ):
        if accelerator.is_main_process:
            _warn(run)
            if run.pictures is not None and start == 0:
                _draw_first_batches(run, run.pictures, loader)
        incoming = keyed_batches(loader, accelerator.device)
        checked = LossCheck()
        began = time.perf_counter() - elapsed
        step = start
        if checkpoint is not None and not finished and checkpoint.get("evaluated", start) < start:
            # The run was interrupted in the evaluation of this step.
            evaluation = _evaluate(run, average, interruption)
            best = _record(run, history, step, evaluation, best, average)
        while step < config.max_steps and not is_stalled(best, config.stop_after):
            step += 1
            evaluation = None
            learning_rate = config.learning_rate_at(step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            losses = take_step(run, prepared, optimizer, incoming, step, checked, samplers)
            if average is not None:
                average.update(step)
            seconds = time.perf_counter() - began
            log_due = step % config.log_every == 0 or step in (1, config.max_steps)
            last = step == config.max_steps
            evaluation_due = interval > 0 and step % interval == 0 and not last
            checkpoint_due = step % config.checkpoint_every == 0 or last or interruption.requested
            if log_due or evaluation_due or checkpoint_due:
                checked.check()
            if log_due:
                history.step(step, _mean_over_processes(accelerator, losses), learning_rate, seconds)
            history.advance()
            if evaluation_due or checkpoint_due:
                check_weights(model, loss, step)
            # Evaluate before saving: a checkpoint implies that everything up to its step is on the disk.
            if evaluation_due and not interruption.requested:
                try:
                    evaluation = _evaluate(run, average, interruption)
                except KeyboardInterrupt:
                    interruption.requested = True
                else:
                    best = _record(run, history, step, evaluation, best, average)
            checkpoint_due = checkpoint_due or interruption.requested or is_stalled(best, config.stop_after)
            if checkpoint_due and accelerator.is_main_process:
                evaluated = step if evaluation is not None or not evaluation_due else step - 1
                state = {"seconds": seconds, "best": best.to_state(), "evaluated": evaluated, **identity}
                if average is not None:
                    state["average"] = average.state_dict()
                _save(run, optimizer, step, state)
                _save_model(run, "model.safetensors", evaluation, average)
            if interruption.requested:
                logger.warning(
                    "interrupted after step %d: %s holds the model of this step, and the same command with --resume "
                    "continues the run",
                    step,
                    config.output_folder / "model.safetensors",
                )
                interruption.raise_now()
        if evaluation is None:
            evaluation = _evaluate(run, average, interruption)
            best = _record(run, history, step, evaluation, best, average)
        if step < config.max_steps:
            logger.info("step %d: stopped, because %d evaluations did not improve the AP", step, best.since)
        if accelerator.is_main_process:
            _save_model(run, "model.safetensors", evaluation, average)
            write_metrics(config.output_folder / "metrics.json", evaluation.metrics)
            write_text(config.output_folder / "results.json", json.dumps(evaluation.results))
    accelerator.wait_for_everyone()
    return TrainingResult(evaluation, run.validation, accelerator.is_main_process)


def is_stalled(best: Best, stop_after: int | None) -> bool:
    """Return whether a run ends because its last evaluations did not improve the AP."""
    return stop_after is not None and best.since >= stop_after


def _record(
    run: Run,
    history: History,
    step: int,
    evaluation: Evaluation,
    best: Best,
    average: WeightAverage | None,
) -> Best:
    """Log an evaluation, write the model if it is the best so far, and return the best evaluation."""
    history.evaluation(step, evaluation)
    if run.pictures is not None and run.config.tracker_names and run.accelerator.is_main_process:
        history.pictures(step, run.pictures.after_evaluation(run.validation, evaluation.results))
    best = best.after(evaluation.metrics)
    if best.since == 0 and run.accelerator.is_main_process:
        _save_model(run, "best.safetensors", evaluation, average)
    return best


def _draw_first_batches(run: Run, pictures: Pictures, loader: Any) -> None:
    batches = itertools.islice(iter(loader.batch_sampler), 12)
    pictures.before_training(
        run.config.output_folder, loader.dataset, [key for batch in batches for key in batch]
    )


def _save_model(run: Run, name: str, evaluation: Evaluation | None, average: WeightAverage | None) -> None:
    """Write the model, with the score thresholds of its evaluation, if it was evaluated."""
    description = _description(run)
    if evaluation is not None:
        thresholds = score_thresholds(evaluation.metrics, evaluation.results)
        description = replace(description, score_thresholds=thresholds)
    with contextlib.nullcontext() if average is None else average.applied():
        save_model(run.config.output_folder / name, run.model, description)


def _evaluate(run: Run, average: WeightAverage | None, interruption: Interruption) -> Evaluation:
    if run.accelerator.num_processes > 1:
        # Running statistics differ between processes. All processes use those of the main process, which are saved.
        for buffer in (*run.model.buffers(), *run.loss.buffers()):
            torch.distributed.broadcast(buffer, src=0)
    # Ctrl-C must not come while the weights and their average change places.
    with contextlib.nullcontext() if average is None else average.applied(), interruption.at_once():
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


def seed_samples(model: Any) -> tuple[SeededSampler, SeededSampler]:
    """Make the model sample each image from its own seed, and return the samplers of anchors and of RoIs."""
    samplers = []
    for part in (model.rpn, model.roi_heads):
        part.fg_bg_sampler = SeededSampler.like(part.fg_bg_sampler)
        samplers.append(part.fg_bg_sampler)
    return samplers[0], samplers[1]


def keyed_batches(
    loader: Any, device: torch.device
) -> Iterator[tuple[list[tuple[int, int]], tuple[list[Tensor], list[dict[str, Any]]]]]:
    """Yield the training batches on a device, each with the index and the seed of its images."""
    return zip(loader.batch_sampler, batches_on(loader, device), strict=False)


def take_step(
    run: Run,
    model: nn.Module,
    optimizer: Any,
    incoming: Iterator[tuple[list[tuple[int, int]], tuple[list[Tensor], list[dict[str, Any]]]]],
    step: int,
    checked: LossCheck,
    samplers: tuple[SeededSampler, SeededSampler],
) -> dict[str, Tensor]:
    """Take one optimizer step with the optimizer's learning rate.

    Each image is sampled from its own seed, so that the losses do not depend on how images are distributed over
    processes, apart from the padding of images of different sizes.

    The host does not synchronize with the device between the forward and the backward pass: losses are checked before
    the next forward pass, when their values have been copied to the host.

    Returns:
        Each term's mean over the step's forward passes, as tensors on the device.
    """
    config, accelerator = run.config, run.accelerator
    totals: dict[str, Tensor] = {}
    own = list(loss_parameters(run.model))
    for part in range(config.accumulation_steps):
        keys, (images, targets) = next(incoming)
        anchors, rois = (
            sampler.seeded([mixed_seed(seed, 4 + place) for _, seed in keys])
            for place, sampler in enumerate(samplers)
        )
        checked.check()
        # Each pass has its own seed, for dropout and a mask branch's own sampling, so that a resumed run is the same as
        # an uninterrupted one.
        torch.manual_seed(mixed_seed(config.seed, step, part, accelerator.process_index))
        with accelerator.accumulate(model):
            with terms_named(run.loss, step), anchors, rois:
                losses: dict[str, Tensor] = model(images, targets)
                values = torch.stack(list(losses.values()))
                checked.add(step, targets, list(losses), values)
                accelerator.backward(values.sum())
            if accelerator.sync_gradients:
                _average_over_processes(accelerator, own)
                if config.gradient_clip:
                    accelerator.clip_grad_norm_([*model.parameters(), *own], config.gradient_clip)
            optimizer.step()
            optimizer.zero_grad()
        for key, value in losses.items():
            totals[key] = totals.get(key, 0) + value.detach() / config.accumulation_steps
    return totals


def _mean_over_processes(accelerator: Accelerator, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the mean of each loss over the processes."""
    if accelerator.num_processes == 1:
        return losses
    mean = accelerator.reduce(torch.stack(list(losses.values())), "mean")
    return dict(zip(losses, mean, strict=True))


def _average_over_processes(accelerator: Accelerator, parameters: list[nn.Parameter]) -> None:
    """Average the gradients of the loss's own parameters over the processes, as DDP does for the model's."""
    if accelerator.num_processes == 1:
        return
    for parameter in parameters:
        # A term of weight 0 has no gradient, but every process must take part in the reduction.
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad = accelerator.reduce(parameter.grad, "mean")


def _save(run: Run, optimizer: Any, step: int, also: dict[str, Any]) -> None:
    scaler = run.accelerator.scaler
    state = {
        "config": json.dumps(asdict(run.config)),
        **also,
        "model": run.model.state_dict(),
        "loss": run.loss.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
    }
    save_checkpoint(run.config.output_folder / "checkpoints", step, state)
