"""What the loss Modules share: each is a loss function with its knobs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class LossModule(nn.Module):
    """A loss function with its knobs.

    A subclass repeats the function's knobs in its `__init__`, so that an editor shows them. Only the function checks
    them: the constructor calls it once with no RoIs.

    Args:
        function: the loss.
        no_rois: positional arguments for the function that hold no RoIs.
        knobs: keyword arguments of the function; they become attributes.

    Raises:
        ValueError: a knob is out of range.
    """

    def __init__(self, function: Callable[..., Any], *no_rois: Any, **knobs: Any) -> None:
        super().__init__()
        self.function = function
        self._knob_names = tuple(knobs)
        for name, value in knobs.items():
            setattr(self, name, value)
        function(*no_rois, **knobs)

    @property
    def knobs(self) -> dict[str, Any]:
        """The keyword arguments of the function, as the attributes are now."""
        return {name: getattr(self, name) for name in self._knob_names}

    def extra_repr(self) -> str:
        """Show the knobs."""
        return ", ".join(
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value!r}"
            for name, value in self.knobs.items()
            if (name, value) != ("reduction", "none")
        )


class MaskLoss(LossModule):
    """A mask loss of the RoI's own class: a term for `MaskRCNNLoss(mask=)`."""

    def __init__(self, function: Callable[..., Tensor], **knobs: Any) -> None:
        super().__init__(function, torch.zeros(0, 1, 1), torch.zeros(0, 1, 1), **knobs)

    def forward(self, mask_logits: Tensor, mask_targets: Tensor) -> Tensor:
        """Compute the loss of mask_logits (P, M, M) and mask_targets (P, M, M)."""
        loss: Tensor = self.function(mask_logits, mask_targets, **self.knobs)
        return loss
