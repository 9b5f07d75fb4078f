"""Box checks that mask targets and pasting share."""

from __future__ import annotations

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
