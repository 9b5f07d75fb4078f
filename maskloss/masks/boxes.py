"""What targets and paste both ask of boxes."""

from __future__ import annotations

from torch import Tensor


def check_finite(boxes: Tensor) -> None:
    """Raise ValueError, naming the first box (B, 4) that has a coordinate which is not finite."""
    finite = boxes.isfinite().all(dim=1)
    if not finite.all():
        box = int(finite.long().argmin())
        raise ValueError(f"boxes must be finite, box {box} is {boxes[box].tolist()}")
