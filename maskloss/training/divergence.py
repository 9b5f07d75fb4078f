"""Checks that a run has not diverged: its losses, without stalling the device, and its weights."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from maskloss.errors import RunError
from maskloss.masks.transfer import AsyncHostCopy

_WAY_OUT = "the last checkpoint predates this. A lower --learning-rate or more --warmup-steps often help"


@dataclass(frozen=True)
class _Losses:
    """The losses of one forward pass, while they are copied to the host."""

    step: int
    image_ids: list[Any]
    keys: list[str]
    values: AsyncHostCopy


class LossCheck:
    """A deferred check that losses are finite.

    An immediate check would synchronize the host with the device between the forward and the backward pass. By the
    next forward pass, the values have been copied to the host.
    """

    def __init__(self) -> None:
        self._pending: deque[_Losses] = deque()

    def add(self, step: int, targets: list[dict[str, Any]], keys: list[str], values: Tensor) -> None:
        """Queue the losses of one forward pass.

        Args:
            step: optimizer step, counted from 1.
            targets: the batch's targets, for their image ids.
            keys: names of the losses.
            values: the losses, (number of keys,).
        """
        image_ids = [target["image_id"] for target in targets]
        self._pending.append(_Losses(step, image_ids, keys, AsyncHostCopy(values.detach())))

    def check(self) -> None:
        """Check the losses that were queued since the last call.

        Raises:
            RunError: a loss or their sum is not finite; the message names the step, the terms and the images.
        """
        while self._pending:
            losses = self._pending.popleft()
            [values] = losses.values.result()
            if torch.isfinite(values.sum()):
                continue
            finite = values.isfinite().tolist()
            terms = [
                f"{key} = {value}"
                for key, value, is_finite in zip(losses.keys, values.tolist(), finite, strict=True)
                if not is_finite
            ]
            named = ", ".join(terms) or "the sum of the losses"
            images = ", ".join(map(str, losses.image_ids))
            raise RunError(f"step {losses.step}: {named} is not finite, on images {images}; {_WAY_OUT}")


def check_weights(model: nn.Module, loss: nn.Module, step: int) -> None:
    """Check that all weights are finite, because a gradient may overflow where the loss is finite.

    Raises:
        RunError: a parameter of the model or the loss is not finite; the message names it.
    """
    of_loss = ((f"the loss's {name}", p) for name, p in loss.named_parameters())
    for name, parameter in (*model.named_parameters(), *of_loss):
        if not torch.isfinite(parameter).all():
            raise RunError(f"step {step}: the weights of {name} are not finite; {_WAY_OUT}")
