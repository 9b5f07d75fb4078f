"""Asynchronous transfers between the host and a device."""

from __future__ import annotations

import torch
from torch import Tensor


class AsyncHostCopy:
    """An asynchronous copy of tensors from a device to the host.

    Args:
        tensors: tensors of one device; work queued later does not delay the copy.

    Example:
        >>> AsyncHostCopy(torch.tensor([1, 2])).result()
        [tensor([1, 2])]
    """

    def __init__(self, *tensors: Tensor) -> None:
        device = tensors[0].device
        # `non_blocking` copies to pinned memory, so the host does not wait for the copy.
        self._on_host = [tensor.to("cpu", non_blocking=device.type == "cuda") for tensor in tensors]
        self._arrived: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._arrived = torch.cuda.Event()
            # The tensors' device need not be the current device.
            self._arrived.record(torch.cuda.current_stream(device))

    def result(self) -> list[Tensor]:
        """Wait for the copy, but not for work queued after it, and return the tensors on the host."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._on_host


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device without waiting for the device.

    Example:
        >>> send(torch.tensor([1, 2]), torch.device("cpu"))
        tensor([1, 2])
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
