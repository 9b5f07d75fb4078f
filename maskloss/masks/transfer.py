"""Transfers between the host and a device that do not synchronize, or only once for many tensors."""

from __future__ import annotations

from collections.abc import Sequence

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
    """Copy a tensor to a device without synchronizing with it.

    Example:
        >>> send(torch.tensor([1, 2]), torch.device("cpu"))
        tensor([1, 2])
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors to the host; those of one device together, with one synchronization.

    Returns:
        The tensors with equal values, dtypes and shapes; those that are on the host already, unchanged.

    Example:
        >>> to_host([torch.tensor([1, 2]), torch.tensor(0.5)])
        [tensor([1, 2]), tensor(0.5000)]
    """
    by_device: dict[torch.device, list[int]] = {}
    for place, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append(place)
    # `cpu` returns a tensor on the host unchanged, unless its class simulates another device.
    on_host = [tensor.cpu() if tensor.device.type == "cpu" else tensor for tensor in tensors]
    for device, places in by_device.items():
        if device.type == "cpu":
            continue
        # As bytes, so that tensors of all dtypes fit in one.
        as_bytes = [tensors[place].detach().contiguous().reshape(-1).view(torch.uint8) for place in places]
        copied = torch.cat(as_bytes).cpu().split([len(of_tensor) for of_tensor in as_bytes])
        for place, of_tensor in zip(places, copied, strict=True):
            tensor = tensors[place]
            # A clone begins at an address that is aligned for the dtype.
            on_host[place] = of_tensor.clone().view(tensor.dtype).view(tensor.shape)
    return on_host
