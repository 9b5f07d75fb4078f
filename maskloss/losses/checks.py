"""Checks that every loss makes of its arguments. Each `check_*` raises, and names the argument."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

Reduction = Literal["none", "sum", "mean"]


def check_same_shape(**tensors: Tensor) -> None:
    """Raise ValueError, naming every argument with its shape, unless all shapes are equal.

    Broadcasting would answer silently with a loss of something else.
    """
    first, *others = tensors.values()
    # Not by a set of the shapes: to hash them, torch.compile would compile anew for every number of RoIs.
    if any(other.shape != first.shape for other in others):
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"shapes differ: {shapes}")


def check_in_range(low: float, high: float = math.inf, /, **knobs: float) -> None:
    """Raise ValueError, naming the knob, unless each is finite and lies in [low, high]."""
    for name, value in knobs.items():
        if not (low <= value <= high and value < math.inf):
            expected = f">= {low:g} and finite" if high == math.inf else f"in [{low:g}, {high:g}]"
            raise ValueError(f"{name} must be {expected}, got {value}")


def check_positive(**knobs: float) -> None:
    """Raise ValueError, naming the knob, unless each is finite and above 0."""
    for name, value in knobs.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be > 0 and finite, got {value}")


def check_reduction(reduction: Reduction) -> Reduction:
    """Return the reduction; raise ValueError if it is none of the three."""
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f'reduction must be "none", "sum" or "mean", not {reduction!r}')
    return reduction
