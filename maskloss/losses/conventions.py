"""What every loss here shares: equal shapes, float32 arithmetic, the three reductions."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["none", "sum", "mean"]


def same_shape(**tensors: Tensor) -> None:
    """Raise ValueError, naming every argument with its shape, unless all shapes are equal.

    Broadcasting would answer silently with a loss of something else.
    """
    first, *others = tensors.values()
    # Not by a set of the shapes: to hash them, torch.compile would compile anew for every number of RoIs.
    if any(other.shape != first.shape for other in others):
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"shapes differ: {shapes}")


def in_range(low: float, high: float = math.inf, /, **knobs: float) -> None:
    """Raise ValueError, naming the knob, unless each lies in [low, high]; NaN lies nowhere."""
    for name, value in knobs.items():
        if not low <= value <= high:
            expected = f">= {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
            raise ValueError(f"{name} must be {expected}, got {value}")


def positive(**knobs: float) -> None:
    """Raise ValueError, naming the knob, unless each is above 0."""
    for name, value in knobs.items():
        if not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}")


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision and bool become float32; float32 and float64 pass unchanged."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def reduced(values: Tensor, reduction: Reduction) -> Tensor:
    """Apply `reduction` to one value per RoI.

    The mean of nothing is 0 and still backpropagates, where torch's own mean gives NaN.

    Raises:
        ValueError: the reduction is none of "none", "sum" and "mean".
    """
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    if reduction == "mean":
        return values.sum() / max(values.numel(), 1)
    raise ValueError(f'reduction must be "none", "sum" or "mean", not {reduction!r}')
