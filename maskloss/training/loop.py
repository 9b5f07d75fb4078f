"""The training run, from a config to a folder with a model, its metrics and its history."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from maskloss.data.coco import CocoData
from maskloss.data.sampler import mixed_seed
from maskloss.detection.builders import ModelSettings
from maskloss.detection.conversion import convert, loss_parameters
from maskloss.detection.mask_branch import MaskBranch
from maskloss.files import locked, make_folder, remove_leftovers
from maskloss.losses.criterion import MaskRCNNLoss
from maskloss.training.checkpoints import restore, save_checkpoint
from maskloss.training.config import TrainConfig
from maskloss.training.divergence import LossCheck, check_weights
from maskloss.training.evaluation import Evaluation, batches_on, check_sizes, evaluate, warn_of_crowded_images
from maskloss.training.history import History
from maskloss.training.loss_probe import probe_copy
from maskloss.training.metrics import write_metrics
from maskloss.training.model_file import ModelDescription, mask_probs_of, save_model
from maskloss.training.models import make_mask_branch
from maskloss.training.resuming import check_output, fingerprint, starting_point
from maskloss.training.setup import (
    device_of,
    guest,
    initial_model,
    make_accelerator,
    make_loader,
    make_optimizer,
    read_data,
)
from maskloss.training.term_errors import terms_named
from maskloss.training.trackers import make_trackers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run gives beside its files.

    Attributes:
        evaluation: of the last step.
        validation: the validation set.
        main_process: whether this process writes; False on the other ranks.
    """

    evaluation: Evaluation
    validation: CocoData
    main_process: bool


def train(config: TrainConfig) -> TrainingResult:
    """Run, or go on with, a training run.

    Raises:
        InputError: something given is wrong; nothing was written, or what was there is as it was.
        RunError: a loss is not finite, or the disk is full; the last checkpoint is there.
    """
    device = device_of(config)
    with guest(device):
        # What a loss begins with is the same in every process, and in every resumption.
        torch.manual_seed(config.seed)
        loss = config.make_loss()
        training, validation = read_data(config)
        check_output(config)
        accelerator = make_accelerator(
            config, device, make_trackers(config.tracker_names, config.output_folder)
        )
        torch.manual_seed(config.seed)
        model, settings, loaded = initial_model(config, len(training.categories) + 1)
        if loaded is not None and accelerator.is_main_process:
            logger.info("%s: %s", config.weights, loaded)
        for data in (training, validation):
            check_sizes(data, model)
        branch = None if config.mask_branch is None else make_mask_branch(config.mask_branch, model)
        model.to(accelerator.device)
        if branch is not None:
            branch.to(accelerator.device)
        # A step that is not finite says on which images, so that is left to the first one.
        probe_copy(loss, len(training.categories) + 1, model, accelerator.device, require_finite=False)
        # Everything that can fail without a step has succeeded: from here on, the folder is written to.
        with contextlib.ExitStack() as stack:
            if accelerator.is_main_process:
                make_folder(config.output_folder)
                stack.enter_context(locked(config.output_folder))
                remove_leftovers(config.output_folder / "checkpoints")
            accelerator.wait_for_everyone()
            return _trained(config, accelerator, loss, model, settings, branch, training, validation)


def _trained(
    config: TrainConfig,
    accelerator: Accelerator,
    loss: MaskRCNNLoss,
    model: nn.Module,
    settings: ModelSettings,
    branch: MaskBranch | None,
    training: CocoData,
    validation: CocoData,
) -> TrainingResult:
    """Train in a folder that is locked."""
    identity = {
        "categories": [[category.id, category.name] for category in training.categories],
        "data": {"training": fingerprint(training), "validation": fingerprint(validation)},
        "world_size": accelerator.num_processes,
    }
    checkpoint = starting_point(config, identity)
    convert(model, loss, paste=None, mask_branch=branch)
    description = ModelDescription(
        settings,
        training.categories,
        loss.mask_targets.aligned,
        mask_probs_of(loss),
        config.loss,
        config.crowds,
        config.mask_branch,
    )
    optimizer = make_optimizer(config, model)
    start, elapsed = 0, 0.0
    if checkpoint is not None:
        start, elapsed = checkpoint["step"], checkpoint["seconds"]
        restore(config.output_folder, checkpoint, model, loss, optimizer)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    if checkpoint is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(checkpoint["scaler"])

    loader = make_loader(config, training, accelerator, start)

    def evaluated() -> Evaluation:
        if accelerator.num_processes > 1:
            # Running statistics of a process's own last batch: all evaluate the model that the first one writes.
            for buffer in (*model.buffers(), *loss.buffers()):
                torch.distributed.broadcast(buffer, src=0)
        return evaluate(
            model,
            validation,
            batch_size=config.batch_size,
            device=accelerator.device,
            workers=config.workers,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            crowds=config.crowds,
        )

    # What follows is the first thing that is written.
    with History(config, start, accelerator) as history:
        if accelerator.is_main_process:
            _warn(config, training, validation)
        model.train()
        incoming = batches_on(loader, accelerator.device)
        checked = LossCheck()
        began = time.perf_counter() - elapsed
        for step in range(start + 1, config.max_steps + 1):
            learning_rate = config.learning_rate_at(step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            losses = _step(config, accelerator, prepared, optimizer, incoming, step, loss, checked)
            seconds = time.perf_counter() - began
            log_due = step % config.log_every == 0 or step in (1, config.max_steps)
            last = step == config.max_steps
            evaluation_due = config.evaluate_every and step % config.evaluate_every == 0 and not last
            checkpoint_due = step % config.checkpoint_every == 0 or last
            if log_due or evaluation_due or checkpoint_due:
                checked.check()
            if log_due:
                history.step(step, losses, learning_rate, seconds)
            history.advance()
            if evaluation_due or checkpoint_due:
                check_weights(model, loss, step)
            # Evaluation comes first: a checkpoint says that everything up to its step is on the disk.
            if evaluation_due:
                history.evaluation(step, evaluated())
            if checkpoint_due and accelerator.is_main_process:
                _save(config, step, seconds, model, loss, optimizer, accelerator, identity)
        evaluation = evaluated()
        history.evaluation(config.max_steps, evaluation)
        if accelerator.is_main_process:
            save_model(config.output_folder / "model.safetensors", model, description)
            write_metrics(config.output_folder / "metrics.json", evaluation.metrics)
    accelerator.wait_for_everyone()
    return TrainingResult(evaluation, validation, accelerator.is_main_process)


def _warn(config: TrainConfig, training: CocoData, validation: CocoData) -> None:
    """Warn of what is odd about the data and the config, and yet can be trained."""
    for line in [*training.warnings, *validation.warnings]:
        logger.warning("%s", line)
    warn_of_crowded_images(validation, config.max_detections)
    if config.warmup_steps > config.max_steps:
        logger.warning(
            "--warmup-steps %d are more than --max-steps %d: the learning rate never gets to what was asked for",
            config.warmup_steps,
            config.max_steps,
        )


def _step(
    config: TrainConfig,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    incoming: Iterator[tuple[list[Tensor], list[dict[str, Any]]]],
    step: int,
    loss: MaskRCNNLoss,
    checked: LossCheck,
) -> dict[str, Tensor]:
    """Take one optimizer step.

    The host never waits between forward and backward pass: whether losses are finite is checked before the next forward
    pass, when they have long arrived.

    Returns:
        Each term's mean over the step's forward passes, as tensors on the device.
    """
    totals: dict[str, Tensor] = {}
    own = list(loss_parameters(accelerator.unwrap_model(model)))
    for part in range(config.accumulation_steps):
        images, targets = next(incoming)
        checked.check()
        # Every pass has a seed of its own, so a resumed run draws what the uninterrupted one would.
        torch.manual_seed(mixed_seed(config.seed, step, part, accelerator.process_index))
        with accelerator.accumulate(model):
            with terms_named(loss, step):
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


def _average_over_processes(accelerator: Accelerator, parameters: list[nn.Parameter]) -> None:
    """Average gradients over the processes, as DistributedDataParallel does for those of the model."""
    if accelerator.num_processes == 1:
        return
    for parameter in parameters:
        # A term of weight 0 gives none; all processes wait for one.
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad = accelerator.reduce(parameter.grad, "mean")


def _save(
    config: TrainConfig,
    step: int,
    seconds: float,
    model: nn.Module,
    loss: nn.Module,
    optimizer: Any,
    accelerator: Accelerator,
    identity: dict[str, Any],
) -> None:
    state = {
        "seconds": seconds,
        "config": json.dumps(asdict(config)),
        **identity,
        "model": model.state_dict(),
        "loss": loss.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
    }
    save_checkpoint(config.output_folder / "checkpoints", step, state)
