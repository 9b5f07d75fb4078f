"""Attach a loss to a module without registering it as a submodule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor

from maskloss.losses.criterion import MaskRCNNLoss


class LossHolder:
    """Mixin for an `nn.Module` that holds a `MaskRCNNLoss` outside the module's state.

    The loss is not a submodule, so its buffers do not enter `state_dict`, and checkpoints keep torchvision's keys. The
    loss still moves to another device with the module, and is copied and pickled with it. It does not move to the meta
    device, which has no values: `to_empty` and loading a checkpoint restore those of the module, but not of the loss.

    Attributes:
        eval_states: random states for computing losses in evaluation mode, image by image; only
            `losses_and_detections` sets them, and only while it runs.
        used_loss: whether anything has asked for `loss` since the model's last forward pass began.

    Example:
        >>> class Head(LossHolder, torch.nn.Linear): ...
        >>> head = Head(1, 1)
        >>> head.hold(MaskRCNNLoss.preset("torchvision"))
        >>> list(head.state_dict())
        ['weight', 'bias']
    """

    training: bool
    eval_states: ImageRandomStates | None = None
    used_loss: bool = False

    @property
    def loss(self) -> MaskRCNNLoss:
        """The model's loss.

        Raises:
            RuntimeError: the model has no loss because it has not been converted.
        """
        loss: MaskRCNNLoss | None = self.__dict__.get("_loss")
        if loss is None:
            raise RuntimeError(
                f"this {type(self).__name__} has no loss yet: call maskloss.convert(model) first"
            )
        self.used_loss = True
        return loss

    def hold(self, loss: MaskRCNNLoss) -> None:
        """Set the loss."""
        # nn.Module.__setattr__ would register it as a submodule.
        self.__dict__["_loss"] = loss

    @property
    def wants_losses(self) -> bool:
        """Whether the forward pass computes losses."""
        return self.training or self.eval_states is not None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        module = super()._apply(fn, recurse)  # type: ignore[misc]
        if "_loss" in self.__dict__:
            self.loss._apply(lambda tensor: _moved(tensor, fn))
        return module

    def __prepare_scriptable__(self) -> NoReturn:
        """Raise a clear error if `torch.jit.script`, which calls this, is applied.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "torch.jit.script does not support a model from maskloss.convert; load its state_dict, whose keys are "
            "torchvision's, into a stock torchvision model and script that"
        )


class ImageRandomStates:
    """Separate states of torch's random generators for each image, independent of the other images in the batch.

    Each image starts with the state that the generators had when this object was created, and continues with its own.

    Args:
        devices: indices of the CUDA devices whose generators are included, in addition to the CPU's.

    Example:
        >>> states = ImageRandomStates([])
        >>> with states.of_image(0): first = torch.rand(1)
        >>> with states.of_image(1): second = torch.rand(1)
        >>> bool(first == second)
        True
    """

    def __init__(self, devices: Sequence[int]) -> None:
        self._devices = list(devices)
        self._first = self._now()
        self._by_image: dict[int, list[Tensor]] = {}

    def fresh_copy(self) -> ImageRandomStates:
        """Return a new object for other images, with the same initial state."""
        other = ImageRandomStates(self._devices)
        other._first = self._first
        return other

    def _now(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices)]

    @contextmanager
    def of_image(self, image: int) -> Iterator[None]:
        """Use an image's random state inside the context, and save the state at its end."""
        on_cpu, *on_devices = self._by_image.get(image, self._first)
        torch.set_rng_state(on_cpu)
        for device, state in zip(self._devices, on_devices, strict=True):
            torch.cuda.set_rng_state(state, device)
        yield
        self._by_image[image] = self._now()


def mean_losses(by_image: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of each loss over images; all images must have the same keys.

    Example:
        >>> mean_losses([{"loss_mask": torch.tensor(1.0)}, {"loss_mask": torch.tensor(2.0)}])
        {'loss_mask': tensor(1.5000)}
    """
    return {key: torch.stack([losses[key] for losses in by_image]).mean() for key in by_image[0]}


def move_to(loss: MaskRCNNLoss, parameter: Tensor) -> None:
    """Move a loss, in place, to a parameter's device (but not to meta) and dtype, but keep at least float32.

    Example:
        >>> move_to(MaskRCNNLoss.preset("torchvision"), torch.zeros(1, dtype=torch.float64))
    """

    def to_parameter(tensor: Tensor) -> Tensor:
        return tensor.to(parameter.device, parameter.dtype if tensor.is_floating_point() else None)

    loss._apply(lambda tensor: _moved(tensor, to_parameter))


def _moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `fn` to a tensor of the loss, but keep its values, and at least float32, in which losses are computed."""
    moved = fn(tensor)
    if tensor.is_meta:
        return moved
    # `to_empty` calls a function whose result has the right device, but no values.
    device = tensor.device if moved.is_meta else moved.device
    if not tensor.is_floating_point():
        return tensor.to(device, moved.dtype)
    return tensor.to(device, torch.promote_types(moved.dtype, torch.float32))
