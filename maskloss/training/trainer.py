"""The optimizer steps of a run, which the training loop and the search for a learning rate take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from maskloss.data.sampler import mixed_seed
from maskloss.detection.conversion import loss_parameters
from maskloss.detection.cuda_graphs import graph_convolutions
from maskloss.detection.sampling import SeededSampler
from maskloss.training.averaging import WeightAverage
from maskloss.training.checkpoints import restore
from maskloss.training.divergence import LossCheck, check_weights
from maskloss.training.evaluation import batches_on
from maskloss.training.setup import Run, make_loader, make_optimizer
from maskloss.training.term_errors import terms_named

_AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """Takes the optimizer steps of a run, with its optimizer and its batches.

    Args:
        run: the run, as it is set up.
        checkpoint: the checkpoint to continue from; None to begin at step 1.

    Attributes:
        step: number of steps taken, those before the checkpoint included.
        loader: the loader of the batches after the checkpoint.

    Raises:
        InputError: the checkpoint belongs to another model.
    """

    def __init__(self, run: Run, checkpoint: dict[str, Any] | None = None) -> None:
        config, accelerator, model = run.config, run.accelerator, run.model
        self._run = run
        self.step = 0 if checkpoint is None else checkpoint["step"]
        self._samplers = _seed_samples(model)
        optimizer = make_optimizer(config, model)
        if checkpoint is not None:
            restore(config.output_folder, checkpoint, model, run.loss, optimizer)
        self._average = None if config.ema is None else WeightAverage(model, config.ema)
        if self._average is not None and checkpoint is not None:
            folder = config.output_folder / "checkpoints"
            self._average.load_state_dict(checkpoint.get("average", {}), str(folder))
        model.train()
        for module in run.frozen:
            module.eval()
        if config.cuda_graphs:
            graph_convolutions(model, config.batch_size, autocast=_AUTOCAST[config.mixed_precision])
        self._model: nn.Module
        self._optimizer: Any
        self._model, self._optimizer = accelerator.prepare(model, optimizer)
        if checkpoint is not None and accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(checkpoint["scaler"])
        self._loss_parameters = list(loss_parameters(model))
        self.loader = make_loader(config, run.training, accelerator, self.step)
        # Each batch with the index and the seed of its images. The workers start when the first batch is read.
        keys: Any = self.loader.batch_sampler
        self._batches = zip(keys, batches_on(self.loader, accelerator.device), strict=False)
        self._loss_check = LossCheck()

    def take_step(self, learning_rate: float) -> dict[str, Tensor]:
        """Take one optimizer step.

        Each image is sampled from its own seed, so that the losses do not depend on how images are distributed over
        processes, apart from the padding of images of different sizes.

        The host does not synchronize with the device between the forward and the backward pass: losses are checked
        before the next forward pass, when their values have been copied to the host.

        Returns:
            Each term's mean over the step's forward passes, as tensors on the device.

        Raises:
            RunError: a loss of the pass before is not finite, or a term fails.
        """
        self.step += 1
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        passes = self._run.config.accumulation_steps
        totals: dict[str, Tensor] = {}
        for part in range(passes):
            for key, value in self._pass(part).items():
                totals[key] = totals.get(key, 0) + value.detach() / passes
        if self._average is not None:
            self._average.update(self.step)
        return totals

    def _pass(self, part: int) -> dict[str, Tensor]:
        """Compute the losses of one batch and their gradients, and update the weights after a step's last batch."""
        run, accelerator = self._run, self._run.accelerator
        keys, (images, targets) = next(self._batches)
        anchors, rois = (
            sampler.seeded([mixed_seed(seed, 4 + place) for _, seed in keys])
            for place, sampler in enumerate(self._samplers)
        )
        self._loss_check.check()
        # Each pass has its own seed, for dropout and a mask branch's own sampling, so that a resumed run is the same as
        # an uninterrupted one.
        torch.manual_seed(mixed_seed(run.config.seed, self.step, part, accelerator.process_index))
        with accelerator.accumulate(self._model):
            with terms_named(run.loss, self.step), anchors, rois:
                losses: dict[str, Tensor] = self._model(images, targets)
                values = torch.stack(list(losses.values()))
                self._loss_check.add(self.step, targets, list(losses), values)
                accelerator.backward(values.sum())
            if accelerator.sync_gradients:
                _average_over_processes(accelerator, self._loss_parameters)
                if run.config.gradient_clip:
                    parameters = [*self._model.parameters(), *self._loss_parameters]
                    accelerator.clip_grad_norm_(parameters, run.config.gradient_clip)
            self._optimizer.step()
            self._optimizer.zero_grad()
        return losses

    def check_losses(self) -> None:
        """Check the losses of the last step.

        Raises:
            RunError: one is not finite.
        """
        self._loss_check.check()

    def check_weights(self) -> None:
        """Check the weights of the model and of the loss.

        Raises:
            RunError: one is not finite.
        """
        check_weights(self._run.model, self._run.loss, self.step)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the moving average of the weights, if there is one, into the model; restore its weights afterwards."""
        with contextlib.nullcontext() if self._average is None else self._average.applied():
            yield

    def state(self) -> dict[str, Any]:
        """Return the state of the steps taken, for a checkpoint."""
        scaler = self._run.accelerator.scaler
        return {
            "model": self._run.model.state_dict(),
            "loss": self._run.loss.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            **({} if self._average is None else {"average": self._average.state_dict()}),
        }


def _seed_samples(model: Any) -> tuple[SeededSampler, SeededSampler]:
    """Make the model sample each image from its own seed, and return the samplers of anchors and of RoIs."""
    samplers = []
    for part in (model.rpn, model.roi_heads):
        part.fg_bg_sampler = SeededSampler.like(part.fg_bg_sampler)
        samplers.append(part.fg_bg_sampler)
    return samplers[0], samplers[1]


def _average_over_processes(accelerator: Accelerator, parameters: list[nn.Parameter]) -> None:
    """Average the gradients of the loss's own parameters over the processes, as DDP does for the model's."""
    if accelerator.num_processes == 1:
        return
    for parameter in parameters:
        # A term of weight 0 has no gradient, but every process must take part in the reduction.
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad = accelerator.reduce(parameter.grad, "mean")
