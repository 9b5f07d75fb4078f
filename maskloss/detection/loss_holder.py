"""How a module of the model holds the loss without the loss becoming a part of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor

from maskloss.losses.criterion import MaskRCNNLoss


class LossHolder:
    """Mixin of an `nn.Module` that holds a `MaskRCNNLoss` beside the module's own state.

    The loss is no submodule, so none of its buffers enter `state_dict` and checkpoints stay torchvision's. It
    still follows the module to another device, and is copied and pickled with it.

    Attributes:
        eval_states: set by `losses_and_detections` alone: losses are computed in evaluation mode too, image by image,
            with these random states.
    """

    training: bool
    eval_states: ImageRandomStates | None = None

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
        return self.training or self.eval_states is not None

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


class ImageRandomStates:
    """The state of torch's random generators at each image, whatever images stand beside it.

    Each image begins with the state that the generators had when this object was made, and goes on with its own.

    Args:
        devices: indices of the CUDA devices whose generators count beside the CPU's.
    """

    def __init__(self, devices: Sequence[int]) -> None:
        self._devices = list(devices)
        self._first = self._now()
        self._by_image: dict[int, list[Tensor]] = {}

    def anew(self) -> ImageRandomStates:
        """Return states for other images, which begin as these did."""
        other = ImageRandomStates(self._devices)
        other._first = self._first
        return other

    def _now(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices)]

    @contextmanager
    def of_image(self, image: int) -> Iterator[None]:
        """Draw from an image's own state, and keep where it got to."""
        on_cpu, *on_devices = self._by_image.get(image, self._first)
        torch.set_rng_state(on_cpu)
        for device, state in zip(self._devices, on_devices, strict=True):
            torch.cuda.set_rng_state(state, device)
        yield
        self._by_image[image] = self._now()


def mean_losses(by_image: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of each term over images, each of which has all of them."""
    return {key: torch.stack([losses[key] for losses in by_image]).mean() for key in by_image[0]}


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
