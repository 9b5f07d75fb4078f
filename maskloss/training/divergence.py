"""Checks that a run has not diverged, made when they cost no waiting for the device."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from maskloss.detection.transfer import AsyncHostCopy
from maskloss.errors import RunError

_WAY_OUT = (
    "the last checkpoint is from before. A lower --learning-rate or a longer --warmup-steps often helps"
)


@dataclass(frozen=True)
class _Losses:
    """The losses of one forward pass, on their way to the host."""

    step: int
    image_ids: list[Any]
    keys: list[str]
    values: AsyncHostCopy


class LossCheck:
    """Check that losses are finite, some time after they were computed.

    Asking at once would make the host wait between forward and backward pass. Before the next forward pass they have
    long arrived.
    """

    def __init__(self) -> None:
        self._pending: deque[_Losses] = deque()

    def add(self, step: int, targets: list[dict[str, Any]], keys: list[str], values: Tensor) -> None:
        """Take the losses of one forward pass.

        Args:
            step: optimizer step, from 1.
            targets: of the batch, for the images' ids.
            keys: of the losses.
            values: (number of keys,).
        """
        image_ids = [target["image_id"] for target in targets]
        self._pending.append(_Losses(step, image_ids, keys, AsyncHostCopy(values.detach())))

    def check(self) -> None:
        """Check what has been added since the last time.

        Raises:
            RunError: a loss is not finite; the message names step, terms and images.
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
            named, images = ", ".join(terms) or "their sum", ", ".join(map(str, losses.image_ids))
            raise RunError(f"step {losses.step}: {named} is not finite, on images {images}; {_WAY_OUT}")


def check_weights(model: nn.Module, loss: nn.Module, step: int) -> None:
    """Check that no gradient has spoiled the weights, although the loss was still finite.

    Raises:
        RunError: a parameter of the model or the loss is not finite; the message names it.
    """
    of_loss = ((f"the loss's {name}", p) for name, p in loss.named_parameters())
    for name, parameter in (*model.named_parameters(), *of_loss):
        if not torch.isfinite(parameter).all():
            raise RunError(f"step {step}: the weights of {name} are not finite; {_WAY_OUT}")
