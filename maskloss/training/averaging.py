"""Exponential moving average of a model's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from maskloss.errors import InputError


class WeightAverage:
    """Moving average of a model's parameters, which `applied` puts into the model for evaluation and saving.

    After step n, average = d average + (1 - d) weights, where d = min(decay, (1 + n) / (10 + n)), so that the first
    weights of a short run are soon forgotten. Buffers, such as running statistics, are not averaged.

    Args:
        model: the model.
        decay: limit of d, in [0, 1).

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> nn.init.constant_(layer.weight, 0.0)
        Parameter containing:
        tensor([[0.]], requires_grad=True)
        >>> average = WeightAverage(layer, decay=0.5)
        >>> nn.init.constant_(layer.weight, 1.0)
        Parameter containing:
        tensor([[1.]], requires_grad=True)
        >>> average.update(step=10)
        >>> with average.applied():
        ...     print(layer.weight.item())
        0.5

    Source: Polyak and Juditsky, Acceleration of stochastic approximation by averaging, 1992; torch's
    `get_ema_multi_avg_fn`.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._weights = {
            name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        self._average = {name: weight.detach().clone() for name, weight in self._weights.items()}

    def update(self, step: int) -> None:
        """Include the weights after an optimizer step, counted from 1."""
        decay = min(self._decay, (1 + step) / (10 + step))
        with torch.no_grad():
            get_ema_multi_avg_fn(decay)(
                list(self._average.values()), [weight.detach() for weight in self._weights.values()], step
            )

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the model, and restore its weights afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        with torch.no_grad():
            for name, weight in self._weights.items():
                average = self._average[name].clone()
                self._average[name].copy_(weight)
                weight.copy_(average)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average, for a checkpoint."""
        return self._average

    def load_state_dict(self, state: Mapping[str, Tensor], where: str) -> None:
        """Load the average from a checkpoint.

        Args:
            state: from `state_dict`.
            where: the checkpoint, for error messages.

        Raises:
            InputError: the checkpoint belongs to another model, or was written without an average.
        """
        shapes = {name: tensor.shape for name, tensor in self._average.items()}
        if {name: tensor.shape for name, tensor in state.items()} != shapes:
            raise InputError(f"{where}: the averaged weights are missing, or are those of another model")
        for name, tensor in state.items():
            self._average[name].copy_(tensor)
