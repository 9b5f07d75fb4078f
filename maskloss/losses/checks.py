"""Argument checks shared by the losses. Each `check_*` raises ValueError and names the argument."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["none", "sum", "mean"]


def check_same_shape(**tensors: Tensor) -> None:
    """Raise ValueError unless all shapes are equal; the message has every name and shape.

    Without this check, broadcasting would silently compute a wrong loss.

    Example:
        >>> import torch
        >>> check_same_shape(logits=torch.zeros(2), labels=torch.zeros(1))
        Traceback (most recent call last):
        ValueError: shapes differ: logits (2,), labels (1,)
    """
    first, *others = tensors.values()
    # A set would hash the shapes, for which torch.compile recompiles for every number of RoIs.
    if any(other.shape != first.shape for other in others):
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"shapes differ: {shapes}")


def check_labels(labels: Tensor, num_rois: int) -> None:
    """Raise ValueError unless labels are (num_rois,) int64; reading their values would synchronize with a GPU.

    Example:
        >>> import torch
        >>> check_labels(torch.tensor([1]), 2)
        Traceback (most recent call last):
        ValueError: labels must have shape (2,) and dtype int64, got (1,) and torch.int64
    """
    if labels.shape != (num_rois,) or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must have shape ({num_rois},) and dtype int64, got {tuple(labels.shape)} and {labels.dtype}"
        )


def check_in_range(low: float, high: float = math.inf, /, **knobs: float) -> None:
    """Raise ValueError unless each knob is finite and in [low, high]; the message names the knob.

    Example:
        >>> check_in_range(0, 1, alpha=1.5)
        Traceback (most recent call last):
        ValueError: alpha must be in [0, 1], got 1.5
    """
    for name, value in knobs.items():
        if not (low <= value <= high and value < math.inf):
            expected = f">= {low:g} and finite" if high == math.inf else f"in [{low:g}, {high:g}]"
            raise ValueError(f"{name} must be {expected}, got {value}")


def check_positive(**knobs: float) -> None:
    """Raise ValueError unless each knob is finite and > 0; the message names the knob.

    Example:
        >>> check_positive(smooth=0.0)
        Traceback (most recent call last):
        ValueError: smooth must be > 0 and finite, got 0.0
    """
    for name, value in knobs.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be > 0 and finite, got {value}")


def check_reduction(reduction: Reduction) -> Reduction:
    """Return the reduction, or raise ValueError if it is not one of the three.

    Example:
        >>> check_reduction("sum")
        'sum'
    """
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f'reduction must be "none", "sum" or "mean", not {reduction!r}')
    return reduction
