"""Argument checks shared by the losses. Each `check_*` raises ValueError or TypeError and names the argument."""

from __future__ import annotations

import math
from typing import Any, Literal

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
    """Raise ValueError unless each knob is finite and in [low, high], TypeError if it is no number; both name the knob.

    Example:
        >>> check_in_range(0, 1, alpha=1.5)
        Traceback (most recent call last):
        ValueError: alpha must be in [0, 1], got 1.5
    """
    for name, value in knobs.items():
        _check_number(name, value)
        if not (low <= value <= high and value < math.inf):
            expected = f">= {low:g} and finite" if high == math.inf else f"in [{low:g}, {high:g}]"
            raise ValueError(f"{name} must be {expected}, got {value}")


def check_positive(**knobs: float) -> None:
    """Raise ValueError unless each knob is finite and > 0, TypeError if it is no number; both name the knob.

    Example:
        >>> check_positive(smooth=0.0)
        Traceback (most recent call last):
        ValueError: smooth must be > 0 and finite, got 0.0
    """
    for name, value in knobs.items():
        _check_number(name, value)
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be > 0 and finite, got {value}")


def check_integer(**knobs: Any) -> None:
    """Raise TypeError unless each knob is an integer; the message names the knob.

    Example:
        >>> check_integer(num_classes=4.0)
        Traceback (most recent call last):
        TypeError: num_classes must be an integer, not float 4.0
    """
    for name, value in knobs.items():
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{name} must be an integer, not {type(value).__name__} {value!r}")


def check_class_values(values: Any, name: str) -> Tensor:
    """Return one number per class as a float32 tensor (C,).

    Args:
        values: a tensor, an array or a list.
        name: name of the argument, for the message.

    Raises:
        TypeError: the values are not numbers.
        ValueError: they are not one finite number >= 0 per class.

    Example:
        >>> check_class_values([1, 2], "class_weights")
        tensor([1., 2.])
    """
    try:
        numbers = torch.as_tensor(values, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{name} must be one number per class, got {type(values).__name__} {values!r}"
        ) from None
    if numbers.dim() != 1 or not (numbers.isfinite() & (numbers >= 0)).all():
        raise ValueError(f"{name} must be one finite number >= 0 per class, got {values}")
    return numbers


def _check_number(name: str, value: Any) -> None:
    # YAML reads 1e-4 as a string. Tensors and numbers of numpy pass.
    if value is None or isinstance(value, str | bytes | list | tuple | dict | set):
        raise TypeError(f"{name} must be a number, not {type(value).__name__} {value!r}")


def check_reduction(reduction: Reduction) -> Reduction:
    """Return the reduction, or raise ValueError if it is not one of the three.

    Example:
        >>> check_reduction("sum")
        'sum'
    """
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f'reduction must be "none", "sum" or "mean", not {reduction!r}')
    return reduction
