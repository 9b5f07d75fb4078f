"""A record of the copies between devices for which the host would wait."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class BlockingCopies(TorchDispatchMode):
    """Records copies between devices for which the host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        copied = func is torch.ops.aten._to_copy.default and args[0].device != result.device
        if copied and not (kwargs or {}).get("non_blocking"):
            self.found.append(f"{args[0].device} to {result.device}, shape {tuple(args[0].shape)}")
        return result
