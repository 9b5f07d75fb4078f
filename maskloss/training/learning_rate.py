"""A search for the learning rate: the losses of a short run whose rate rises from very small to too large."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from maskloss.errors import InputError, RunError
from maskloss.training.config import TrainConfig
from maskloss.training.evaluation import dead_workers_named
from maskloss.training.setup import device_of, guest, set_up
from maskloss.training.trainer import Trainer

#: Decay of the moving average of the losses, and the multiple of its minimum at which the search ends.
_SMOOTHING, _TOO_HIGH = 0.9, 3.0


@dataclass(frozen=True)
class LearningRateSearch:
    """The result of a search.

    Attributes:
        rates: learning rate of each step.
        losses: total loss of each step.
        smoothed: moving average of the losses, without its bias at the start.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]

    @property
    def suggestion(self) -> float:
        """A tenth of the rate with the lowest average loss: beyond that rate, steps are too large."""
        return self.rates[self.smoothed.index(min(self.smoothed))] / 10


def find_learning_rate(
    config: TrainConfig, *, steps: int = 100, lowest: float = 1e-6, highest: float = 1.0
) -> LearningRateSearch:
    """Train for some steps with a rising learning rate. The model is thrown away, and nothing is written.

    Args:
        config: settings of the run that needs a learning rate; its own rate, length and warmup are not used.
        steps: number of steps, at least 10.
        lowest: learning rate of the first step, above 0.
        highest: learning rate of the last step. The search ends earlier if the loss rises to three times its minimum.

    Raises:
        InputError: the config or the data are wrong, `steps` or the rates are out of range, or there are several
            processes.
        RunError: a data-loader worker died.

    Source: Smith, Cyclical learning rates, 2015, arXiv:1506.01186, section 3.3.
    """
    if steps < 10 or not 0 < lowest < highest < math.inf:
        raise InputError(
            f"--steps must be at least 10, and --lowest above 0 and below --highest, got {steps}, {lowest:g} and "
            f"{highest:g}"
        )
    config = replace(
        config,
        max_steps=steps,
        epochs=None,
        warmup_steps=0,
        ema=None,
        evaluate_every=0,
        trackers="none",
        resume=False,
    )
    device = device_of(config)
    rates: list[float] = []
    losses: list[float] = []
    smoothed: list[float] = []
    average = 0.0
    with guest(device), dead_workers_named():
        run = set_up(config, device)
        if run.accelerator.num_processes > 1:
            raise InputError("find-lr runs in one process; start it without torchrun or accelerate launch")
        trainer = Trainer(run)
        for step in range(1, steps + 1):
            rate = lowest * (highest / lowest) ** ((step - 1) / (steps - 1))
            try:
                values = trainer.take_step(rate)
                trainer.check_losses()
            except RunError:  # the loss is not finite: the rate is too high
                break
            loss = sum(float(value) for value in values.values())
            average = _SMOOTHING * average + (1 - _SMOOTHING) * loss
            rates.append(rate)
            losses.append(loss)
            smoothed.append(average / (1 - _SMOOTHING**step))
            if smoothed[-1] > _TOO_HIGH * min(smoothed):
                break
    if not rates:
        raise InputError("the loss is not finite at the lowest learning rate; give a smaller --lowest")
    return LearningRateSearch(rates, losses, smoothed)
