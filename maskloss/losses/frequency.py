"""Class weights from how often a class is seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def inverse_frequency_weights(
    masks: Sequence[Any],
    num_samples: int = 100,
    *,
    num_classes: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""One over each class's mean pixel count, over some of the masks, drawn without replacement.

    Args:
        masks: class maps, (H, W) of integers in [0, num_classes), as tensors or arrays; or a data set of
            (image, target), where target has labels (G,) and masks (G, H, W), as tensors or encoded, and what no mask
            covers is class 0.
        num_samples: how many to look at; all, if there are fewer. 50 to 100 tell a mean area well enough.
        num_classes: C, background included.
        generator: of the draw; torch's own where not given.

    Returns:
        (C,) float32, in one over px. Weights of a loss that does not divide by them are better scaled:
        `weights * C / weights.sum()`.

    Raises:
        TypeError: a class map is not of integers.
        ValueError: there are no masks, a class is outside [0, num_classes), or one has no pixel in those that were
            looked at; the message names it.

    Example:
        >>> inverse_frequency_weights([torch.tensor([[0, 0, 0, 1]])], num_classes=2)
        tensor([0.3333, 1.0000])

    Source: inverse class frequencies, as in Sudre et al., 2017, arXiv:1707.03237, section 2, over a sample of the set.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if len(masks) == 0:
        raise ValueError("there are no masks to count pixels in")
    chosen = torch.randperm(len(masks), generator=generator)[:num_samples].tolist()
    pixels = torch.zeros(num_classes, dtype=torch.float64)
    for index in chosen:
        pixels += _pixels_by_class(masks[index], index, num_classes)
    unseen = torch.where(pixels == 0)[0].tolist()
    if unseen:
        raise ValueError(
            f"class {unseen[0]} has no pixel in the {len(chosen)} masks that were looked at, of {len(masks)}: "
            "look at more, or leave the class out"
        )
    return (len(chosen) / pixels).float()


def _pixels_by_class(item: Any, index: int, num_classes: int) -> Tensor:
    if not isinstance(item, tuple | list):
        class_map = _tensor_of(item)
        if class_map.is_floating_point():
            raise TypeError(f"mask {index}: a class map is of integers, this is of {class_map.dtype}")
        classes = class_map.reshape(-1).long()
        if len(classes) and not (classes.min() >= 0 and classes.max() < num_classes):
            raise ValueError(
                f"mask {index}: classes {int(classes.min())} to {int(classes.max())} are not in [0, {num_classes})"
            )
        return torch.bincount(classes, minlength=num_classes).double().cpu()
    _, target = item
    masks = target["masks"]
    masks = (masks.bitmaps() if hasattr(masks, "bitmaps") else _tensor_of(masks)) != 0
    labels = _tensor_of(target["labels"]).long()
    if len(labels) and not (labels.min() >= 0 and labels.max() < num_classes):
        raise ValueError(
            f"item {index}: labels {int(labels.min())} to {int(labels.max())} are not in [0, {num_classes})"
        )
    pixels = torch.zeros(num_classes, dtype=torch.float64)
    pixels.index_add_(0, labels.cpu(), masks.flatten(1).sum(dim=1).double().cpu())
    pixels[0] += int((~masks.any(dim=0)).sum())
    return pixels


def _tensor_of(values: Any) -> Tensor:
    """Return a tensor of what numpy reads: images, lists, arrays that are flipped, read-only or big-endian."""
    if isinstance(values, Tensor):
        return values.detach()
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise TypeError(
            f"masks and labels are arrays of integers, not {type(values).__name__} of {array.dtype}"
        )
    array = array.astype(array.dtype.newbyteorder("="))
    # torch has no uint16 to uint64 that it computes with.
    if array.dtype.kind == "u":
        array = array.astype(np.int64)
    return torch.from_numpy(np.array(array))
