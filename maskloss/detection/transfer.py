"""Transfers between a device and its host during which neither waits for the other."""

from __future__ import annotations

import torch
from torch import Tensor


class AsyncHostCopy:
    """Tensors on their way from a device to the host.

    Args:
        tensors: of one device, with what it has been given so far.
    """

    def __init__(self, *tensors: Tensor) -> None:
        device = tensors[0].device
        # Into pinned memory, which `non_blocking` makes of it, so that the host goes on meanwhile.
        self._on_host = [tensor.to("cpu", non_blocking=device.type == "cuda") for tensor in tensors]
        self._arrived: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._arrived = torch.cuda.Event()
            # Of the tensors' device, which need not be the current one.
            self._arrived.record(torch.cuda.current_stream(device))

    def result(self) -> list[Tensor]:
        """Wait until they have arrived, but not for what the device was given since."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._on_host


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Send a tensor of the host to a device, without waiting for what the device is doing."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
