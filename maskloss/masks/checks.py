"""Argument checks that mask targets and pasting share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def check_finite(boxes: Tensor) -> None:
    """Raise ValueError, naming the first of the boxes (B, 4) with a non-finite coordinate.

    Example:
        >>> import torch
        >>> check_finite(torch.tensor([[0.0, 0.0, torch.inf, 1.0]]))
        Traceback (most recent call last):
        ValueError: boxes must be finite, but box 0 is [0.0, 0.0, inf, 1.0]
    """
    finite = boxes.isfinite().all(dim=1)
    if not finite.all():
        box = int(finite.long().argmin())
        raise ValueError(f"boxes must be finite, but box {box} is {boxes[box].tolist()}")


def check_tensors(**tensors: Any) -> None:
    """Raise TypeError unless all arguments are tensors; the message names the argument.

    Example:
        >>> check_tensors(boxes=[[0, 0, 4, 4]])
        Traceback (most recent call last):
        TypeError: boxes must be a tensor, not list
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")


def check_image_size(size: Any) -> None:
    """Raise ValueError unless a size is two numbers of pixels (H, W); a shape (3, H, W) would be read wrongly.

    Example:
        >>> check_image_size((3, 480, 640))
        Traceback (most recent call last):
        ValueError: an image size is (H, W), two positive integers, not (3, 480, 640)
    """
    sides = tuple(size) if isinstance(size, Iterable) else ()
    integers = (int, np.integer, Tensor, torch.SymInt)
    if len(sides) != 2 or not all(isinstance(side, integers) for side in sides) or min(sides) <= 0:
        raise ValueError(f"an image size is (H, W), two positive integers, not {size!r}")
