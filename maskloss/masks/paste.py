"""Pasting: from the M x M probabilities of each detection back to the image's pixels.

A pixel's probability is read by bilinear sampling of the grid at the pixel's centre, which is separable: two
small matrix products per detection. On a CPU only the pixels inside the box are ever computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal, overload

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor

from maskloss.masks.boxes import expect_finite

RLE = dict[str, Any]
Output = Literal["bool", "float", "rle"]

#: How much of the edge cell counts beyond the low edges of the box, where unaligned targets have no cell.
#: Of 0, 0.1, 0.25 and 1, the value with the best oracle IoU on smooth blobs of 6 to 110 px radius.
_EDGE_SHARE = 0.1

#: Detections whose interpolation weights are held at once.
_DETECTIONS_AT_ONCE = 8
#: Pixels of the boxes whose runs are found at once.
_PIXELS_AT_ONCE = 2**21


@overload
def paste_masks(
    mask_probs: Tensor,
    boxes: Tensor,
    image_size: tuple[int, int],
    *,
    aligned: bool = ...,
    threshold: float = ...,
    output: Literal["bool", "float"] = ...,
) -> Tensor: ...
@overload
def paste_masks(
    mask_probs: Tensor,
    boxes: Tensor,
    image_size: tuple[int, int],
    *,
    aligned: bool = ...,
    threshold: float = ...,
    output: Literal["rle"],
) -> list[RLE]: ...
def paste_masks(
    mask_probs: Tensor,
    boxes: Tensor,
    image_size: tuple[int, int],
    *,
    aligned: bool = True,
    threshold: float = 0.5,
    output: Output = "bool",
) -> Tensor | list[RLE]:
    """Paste each detection's mask into its box.

    Args:
        mask_probs: (D, M, M) probabilities in [0, 1].
        boxes: (D, 4), xyxy in px of the image; parts outside the image are cut off.
        image_size: (H, W) in px.
        aligned: the targets that the network learned, `MaskTargets.aligned`. False undoes torchvision's half
            pixel: the probability of pixel k is read at k instead of at its centre k + 0.5. That is right for
            images that the network sees in their own size. Where images are resized for it, unaligned masks
            are off by less; see `unaligned_offset` and `paste_masks_at_offset`.
        threshold: a pixel is set where p >= threshold; not used by "float".
        output: "bool" and "float" give (D, H, W), "rle" COCO RLEs without ever making an image.

    Returns:
        (D, H, W) bool, or float32 probabilities that are 0 outside the boxes, on the boxes' device; or a list
        of D dicts `{"size": [H, W], "counts": str}`, which pycocotools loads and JSON writes. RLEs are made on
        the host, where they are the encoded "bool" output bit for bit.

    Raises:
        ValueError: shapes differ from the above, a box is not finite, or another output is asked for.

    Source: Detectron2 02b5c4e, `paste_masks_in_image`, samples at pixel centres with zeros around the grid;
    the unaligned shift and its edge are this library's.
    """
    offset = (0.0, 0.0) if aligned else (0.5, 0.5)
    masks: Tensor | list[RLE] = paste_masks_at_offset(
        mask_probs, boxes, image_size, offset=offset, threshold=threshold, output=output
    )
    return masks


def paste_masks_at_offset(
    mask_probs: Tensor,
    boxes: Tensor,
    image_size: tuple[int, int],
    *,
    offset: tuple[float, float],
    threshold: float = 0.5,
    output: Output = "bool",
) -> Any:
    """Paste as `paste_masks` does, with masks that are off by any part of a pixel.

    Args:
        mask_probs: (D, M, M) probabilities in [0, 1].
        boxes: (D, 4), xyxy in px of the image.
        image_size: (H, W) in px.
        offset: (y, x) in px of the image that the network's masks are too far up and to the left.
        threshold: a pixel is set where p >= threshold; not used by "float".
        output: "bool", "float" or "rle".

    Returns:
        As `paste_masks`.

    Raises:
        ValueError: as `paste_masks`.
    """
    if mask_probs.dim() != 3 or mask_probs.shape[1] != mask_probs.shape[2]:
        raise ValueError(f"mask_probs must have shape (D, M, M), not {tuple(mask_probs.shape)}")
    if boxes.shape != (mask_probs.shape[0], 4):
        raise ValueError(
            f"boxes must have shape ({mask_probs.shape[0]}, 4) for as many masks, not {tuple(boxes.shape)}"
        )
    if output not in ("bool", "float", "rle"):
        raise ValueError(f'output must be "bool", "float" or "rle", not {output!r}')
    device = boxes.device
    grids, boxes = mask_probs.detach().float(), boxes.detach().double()
    if output == "rle":
        grids, boxes = grids.cpu(), boxes.cpu()
    expect_finite(boxes)
    # Autocast would round the matrix products to half precision.
    with torch.autocast(grids.device.type, enabled=False):
        if output == "rle":
            return _rles(_windows(grids, boxes, image_size, offset), threshold, image_size)
        dtype = torch.bool if output == "bool" else torch.float32
        masks = torch.zeros((len(boxes), *image_size), dtype=dtype, device=device)
        pasted = (_windows if device.type == "cpu" else _whole_images)(grids, boxes, image_size, offset)
        for detection, (probs, top, left) in enumerate(pasted):
            # The encoding goes down the columns, so windows do.
            window = masks[detection, top : top + probs.shape[1], left : left + probs.shape[0]].T
            window.copy_(probs >= threshold if output == "bool" else probs)
    return masks


def unaligned_offset(image_size: tuple[int, int], network_size: tuple[int, int]) -> tuple[float, float]:
    """What unaligned masks are off by in an image that is resized for the network.

    torchvision is off twice. Its targets are sampled half a pixel of the resized image too far to the right and
    down, so that masks come out too far to the left and up. But before that, `interpolate(mode="nearest")`
    resizes masks of n pixels to n' by giving pixel j the value of pixel floor(j n / n'): an edge at e goes to
    ceil(e n' / n). That is to the right of where it belongs, over all edges by (1 - gcd(n, n') / n) / 2 on
    average, and takes as much back. What remains, in the image's own pixels, is gcd(n, n') / n' / 2: half a
    pixel without resizing, and next to nothing for most sizes.

    Args:
        image_size: (H, W) of the image, in px.
        network_size: (H', W') that it is resized to.

    Returns:
        (y, x) in px of the image.
    """
    y, x = (
        0.5 * math.gcd(own, resized) / resized for own, resized in zip(image_size, network_size, strict=True)
    )
    return y, x


def _windows(
    grids: Tensor, boxes: Tensor, image_size: tuple[int, int], offset: tuple[float, float]
) -> Iterator[tuple[Tensor, int, int]]:
    """Yield per detection the (w, h) probabilities of the pixels in its box, and their top and left."""
    height, width = image_size
    size = grids.shape[1]
    padded = _padded(grids, offset)
    for first in range(0, len(boxes), _DETECTIONS_AT_ONCE):
        x1, y1, x2, y2 = boxes[first : first + _DETECTIONS_AT_ONCE].unbind(1)
        (top, bottom), (left, right) = _pixels(y1, y2, height), _pixels(x1, x2, width)
        rows = _interpolation(y1, y2, top, int((bottom - top).max()), size, offset[0])
        columns = _interpolation(x1, x2, left, int((right - left).max()), size, offset[1])
        windows = torch.stack([top, bottom - top, left, right - left], dim=1).tolist()
        for index, (y, h, x, w) in enumerate(windows):
            yield columns[index, :w] @ padded[first + index].T @ rows[index, :h].T, y, x


def _whole_images(
    grids: Tensor, boxes: Tensor, image_size: tuple[int, int], offset: tuple[float, float]
) -> Iterator[tuple[Tensor, int, int]]:
    """Yield per detection the (W, H) probabilities of all pixels, 0 outside its box, as 0, 0 the rest.

    More arithmetic than the windows, in a few kernels and without asking the device for their sizes.
    """
    height, width = image_size
    padded = _padded(grids, offset)
    for first in range(0, len(boxes), _DETECTIONS_AT_ONCE):
        chunk = slice(first, first + _DETECTIONS_AT_ONCE)
        x1, y1, x2, y2 = boxes[chunk].unbind(1)
        weights = []
        for low, high, length, off in ((x1, x2, width, offset[1]), (y1, y2, height, offset[0])):
            start, stop = _pixels(low, high, length)
            pixel = torch.arange(length, device=boxes.device)
            inside = (pixel >= start[:, None]) & (pixel < stop[:, None])
            zero = torch.zeros_like(start)
            weights.append(_interpolation(low, high, zero, length, grids.shape[1], off) * inside[..., None])
        for probs in weights[0] @ padded[chunk].transpose(1, 2) @ weights[1].transpose(1, 2):
            yield probs, 0, 0


def _padded(grids: Tensor, offset: tuple[float, float]) -> Tensor:
    """Put a frame around each grid, (D, M + 2, M + 2): zeros, or a share of the edge where a shift needs it."""
    padded = F.pad(grids, (1, 1, 1, 1))
    if offset[0]:
        padded[:, 0, :] = _EDGE_SHARE * padded[:, 1, :]
    if offset[1]:
        padded[:, :, 0] = _EDGE_SHARE * padded[:, :, 1]
    return padded


def _pixels(low: Tensor, high: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """First and last + 1 of the pixels with centres in [low, high), (D,) int64."""
    start = (low - 0.5).ceil().clamp(0, length).long()
    stop = (high - 0.5).ceil().clamp(0, length).long()
    return start, torch.maximum(start, stop)


def _interpolation(low: Tensor, high: Tensor, start: Tensor, count: int, size: int, offset: float) -> Tensor:
    """Bilinear weights (D, count, M + 2) float32 of the framed grid's cells in the pixels from `start` on."""
    pixel = start[:, None] + torch.arange(count, device=low.device) + (0.5 - offset)
    # Cell m of the grid has its centre at m + 0.5, and the frame moves it up by one.
    scale = size / (high - low).clamp(min=1e-6)
    position = ((pixel - low[:, None]) * scale[:, None] + 0.5).clamp(0, size + 1)
    cells = torch.arange(size + 2, device=low.device)
    return (1 - (position[:, :, None] - cells).abs()).clamp(min=0).float()


def _rles(
    windows: Iterator[tuple[Tensor, int, int]], threshold: float, image_size: tuple[int, int]
) -> list[RLE]:
    """Encode windows of otherwise empty images, many at once."""
    rles: list[RLE] = []
    gathered: list[tuple[Tensor, int, int]] = []
    pixels = 0
    for probs, top, left in windows:
        gathered.append((probs >= threshold, top, left))
        pixels += probs.numel()
        if pixels > _PIXELS_AT_ONCE:
            rles += _encoded(gathered, image_size)
            gathered, pixels = [], 0
    return rles + _encoded(gathered, image_size)


def _encoded(windows: list[tuple[Tensor, int, int]], image_size: tuple[int, int]) -> list[RLE]:
    """Encode (w, h) bool windows column by column, as COCO does.

    All windows' columns stand in one row of bytes, each behind a zero, so that every run starts and stops
    within its column.
    """
    height, width = image_size
    sizes = [(window.shape[0], window.shape[1] + 1) for window, _, _ in windows]
    offsets = np.cumsum([0] + [w * h for w, h in sizes])
    framed = np.zeros(offsets[-1] + 1, dtype=np.int8)
    for (window, _, _), (w, h), offset in zip(windows, sizes, offsets[:-1], strict=True):
        framed[offset : offset + w * h].reshape(w, h)[:, 1:] = window.numpy()
    # By turns where a run starts and, exclusive, where it stops. That there is a zero before each column makes up
    # for an edge being one place before the pixel that it belongs to.
    edges = np.flatnonzero(framed[1:] != framed[:-1])
    counts = np.diff(np.searchsorted(edges, offsets))
    column_height = np.repeat([h for _, h in sizes], counts)
    column, row = np.divmod(edges - np.repeat(offsets[:-1], counts), column_height)
    top = np.repeat([top for _, top, _ in windows], counts)
    left = np.repeat([left for _, _, left in windows], counts)
    position = (column + left) * height + row + top
    rles = []
    for first, last in pairwise(np.cumsum([0, *counts])):
        ends = position[first:last]
        # A run down to the last row that goes on at the top of the next column is one run.
        joined = np.flatnonzero(ends[1:-1:2] == ends[2::2])
        ends = np.delete(ends, np.concatenate([2 * joined + 1, 2 * joined + 2]))
        runs = np.diff(ends, prepend=0, append=height * width).tolist()
        if runs[-1] == 0:
            runs.pop()
        encoded: RLE = coco_mask.frPyObjects({"size": [height, width], "counts": runs}, height, width)
        rles.append({"size": [height, width], "counts": encoded["counts"].decode("ascii")})
    return rles
