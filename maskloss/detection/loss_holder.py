"""How a module of the model holds the loss without the loss becoming a part of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

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
        """The criterion.

        Raises:
            RuntimeError: the model has not been converted, so there is none.
        """
        loss: MaskRCNNLoss | None = self.__dict__.get("_loss")
        if loss is None:
            raise RuntimeError(
                f"this {type(self).__name__} has no loss yet: call maskloss.convert(model) first"
            )
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
        if "_loss" in self.__dict__:
            self.loss._apply(lambda tensor: _moved(tensor, fn))
        return module

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse `torch.jit.script`, which calls this, in a sentence instead of by a type it does not know.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "torch.jit.script does not take a model from maskloss.convert; load its state_dict, whose keys are "
            "torchvision's, into a stock torchvision model and script that"
        )


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
