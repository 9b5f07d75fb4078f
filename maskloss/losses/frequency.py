"""Class weights from class frequencies. Shapes: see `maskloss.losses`."""

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
    r"""Return the inverse of each class's mean pixel count per image, from a random sample of the images.

    Args:
        masks: class maps (H, W) of integers in [0, num_classes), as tensors, arrays or images. Or a data set of
            (image, target) pairs, where target has labels (G,) and masks (G, H, W) as tensors, arrays or encoded;
            pixels outside all masks are class 0.
        num_samples: number of images, sampled without replacement; all, if there are fewer. 50 to 100 are enough to
            estimate a mean area.
        num_classes: C, including the background.
        generator: random generator of the sample; default: torch's global one.

    Returns:
        (C,) float32, in 1/px. For a loss that does not divide by the weights, scale them:
        `weights * C / weights.sum()`.

    Raises:
        TypeError: a class map does not hold integers, or masks or labels are not numbers.
        ValueError: `masks` is empty, `num_samples` < 1, a class is outside [0, num_classes), or a class has no pixel
            in the sample.

    Example:
        >>> import torch
        >>> inverse_frequency_weights([torch.tensor([[0, 0, 0, 1]])], num_classes=2)  # 1 / 3 px and 1 / 1 px
        tensor([0.3333, 1.0000])

    Source: inverse class frequencies, as in Sudre et al., 2017, arXiv:1707.03237, section 2, but of a sample.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if len(masks) == 0:
        raise ValueError("there are no masks to count pixels in")
    sample = torch.randperm(len(masks), generator=generator)[:num_samples].tolist()
    pixels = torch.zeros(num_classes, dtype=torch.float64)
    for index in sample:
        pixels += _count_pixels(masks[index], index, num_classes)
    unseen = torch.where(pixels == 0)[0].tolist()
    if unseen:
        raise ValueError(
            f"class {unseen[0]} has no pixel in the {len(sample)} masks sampled from {len(masks)}; "
            "raise num_samples or leave the class out"
        )
    return (len(sample) / pixels).float()


def _count_pixels(item: Any, index: int, num_classes: int) -> Tensor:
    """Return the number of pixels of each class (C,) float64, of a class map or an (image, target) pair."""
    if not isinstance(item, tuple | list):
        class_map = _as_tensor(item)
        if class_map.is_floating_point():
            raise TypeError(f"mask {index}: a class map must hold integers, not {class_map.dtype}")
        classes = class_map.reshape(-1).long()
        if len(classes) and not (classes.min() >= 0 and classes.max() < num_classes):
            raise ValueError(
                f"mask {index}: classes {int(classes.min())} to {int(classes.max())} are not in [0, {num_classes})"
            )
        return torch.bincount(classes, minlength=num_classes).cpu().double()  # MPS has no float64
    _, target = item
    masks = target["masks"]
    labels = _as_tensor(target["labels"]).long()
    if len(labels) and not (labels.min() >= 0 and labels.max() < num_classes):
        raise ValueError(
            f"item {index}: labels {int(labels.min())} to {int(labels.max())} are not in [0, {num_classes})"
        )
    pixels = torch.zeros(num_classes, dtype=torch.float64)
    if not hasattr(masks, "bitmaps"):
        masks = _as_tensor(masks) != 0
        pixels.index_add_(0, labels.cpu(), masks.flatten(1).sum(dim=1).cpu().double())
        pixels[0] += int((~masks.any(dim=0)).sum())
        return pixels
    # Encoded masks are decoded one by one: thousands of bitmaps do not fit into memory.
    covered = torch.zeros(masks.shape[1:], dtype=torch.bool)
    for number, label in zip(range(len(masks)), labels.tolist(), strict=True):
        mask = masks[[number]].bitmaps()[0] != 0
        pixels[label] += int(mask.sum())
        covered |= mask
    pixels[0] += int((~covered).sum())
    return pixels


def _as_tensor(values: Any) -> Tensor:
    """Return a tensor of anything that numpy reads: images, lists, and flipped, read-only or big-endian arrays."""
    if isinstance(values, Tensor):
        return values.detach()
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise TypeError(
            f"masks and labels must be arrays of numbers, not {type(values).__name__} of {array.dtype}"
        )
    array = array.astype(array.dtype.newbyteorder("="))
    # torch has few operations for uint16, uint32 and uint64.
    if array.dtype.kind == "u":
        array = array.astype(np.int64)
    return torch.from_numpy(np.array(array))
