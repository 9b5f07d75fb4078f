"""How a module of the model holds the loss without the loss becoming a part of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from maskloss.losses.criterion import MaskRCNNLoss


class LossHolder:
    """Mixin of an `nn.Module` that holds a `MaskRCNNLoss` beside the module's own state.

    The loss is no submodule, so none of its buffers enter `state_dict` and checkpoints stay torchvision's. It
    still follows the module to another device, and is copied and pickled with it.

    Attributes:
        losses_in_eval: compute losses in evaluation mode too; set by `losses_and_detections` alone.
    """

    training: bool
    losses_in_eval: bool = False

    @property
    def loss(self) -> MaskRCNNLoss:
        """The criterion."""
        loss: MaskRCNNLoss = self.__dict__["_loss"]
        return loss

    def hold(self, loss: MaskRCNNLoss) -> None:
        """Take this loss from now on."""
        # Past nn.Module.__setattr__, which would register it as a submodule.
        self.__dict__["_loss"] = loss

    @property
    def wants_losses(self) -> bool:
        """Whether this pass computes losses."""
        return self.training or self.losses_in_eval

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        module = super()._apply(fn, recurse)  # type: ignore[misc]
        self.loss._apply(lambda tensor: _moved(tensor, fn))
        return module


def move_to(loss: MaskRCNNLoss, parameter: Tensor) -> None:
    """Move a loss to a parameter's device, and to its dtype where that is no less than float32; in place."""

    def to_parameter(tensor: Tensor) -> Tensor:
        return tensor.to(parameter.device, parameter.dtype if tensor.is_floating_point() else None)

    loss._apply(lambda tensor: _moved(tensor, to_parameter))


def _moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """Move a tensor of the loss as the model's, but never below float32, which the losses compute in."""
    moved = fn(tensor)
    if tensor.is_meta or not tensor.is_floating_point():
        return moved
    return tensor.to(moved.device, torch.promote_types(moved.dtype, torch.float32))
