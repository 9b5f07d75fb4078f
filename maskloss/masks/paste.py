"""Pasting: resample each detection's M x M mask probabilities to the image's pixels.

Each pixel's probability is sampled bilinearly from the grid at the pixel's center. Bilinear sampling is separable, so
it takes two small matrix products per detection. On a CPU only the pixels inside the box are computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, Literal, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maskloss.masks.checks import check_finite, check_image_size, check_tensors
from maskloss.masks.encoded import IntArray, encode_counts

RLE = dict[str, Any]
Output = Literal["bool", "float", "rle"]

#: Weight of the first row and column of cells beyond the top and left edges of the box, where unaligned targets have
#: no cells. Of 0, 0.1, 0.25 and 1, the value with the best oracle IoU on smooth blobs of 6 to 110 px radius.
_EDGE_SHARE = 0.1

#: How far probabilities may be outside [0, 1]: resizing them in bfloat16 rounds to 1/256.
_ROUNDING = 0.01

#: Chunk sizes: detections, and fewer if their interpolation weights would have more elements than this.
_DETECTIONS_AT_ONCE = 8
_WEIGHTS_AT_ONCE = 2**19
#: Chunk size: pixels inside boxes.
_PIXELS_AT_ONCE = 2**21


@overload
def paste_masks(
    mask_probs: Tensor,
    boxes: Tensor,
    image_size: tuple[int, int],
    *,
    offset: tuple[float, float] = ...,
    threshold: float = ...,
    output: Literal["bool", "float"] = ...,
) -> Tensor: ...
@overload
def paste_masks(
    mask_probs: Tensor,
    boxes: Tensor,
    image_size: tuple[int, int],
    *,
    offset: tuple[float, float] = ...,
    threshold: float = ...,
    output: Literal["rle"],
) -> list[RLE]: ...
def paste_masks(
    mask_probs: Tensor,
    boxes: Tensor,
    image_size: tuple[int, int],
    *,
    offset: tuple[float, float] = (0.0, 0.0),
    threshold: float = 0.5,
    output: Output = "bool",
) -> Tensor | list[RLE]:
    """Paste each detection's mask into its box, by bilinear sampling at the centers of the image's pixels.

    Args:
        mask_probs: (D, M, M) probabilities in [0, 1].
        boxes: (D, 4), xyxy in px of the image; parts outside the image are cut off.
        image_size: (H, W) in px.
        offset: (dy, dx): how far, in image pixels, the predicted masks are shifted up and left; pasting undoes it.
            `maskloss.mask_offset(model, image_size)` returns it for a network trained with a converted model's loss.
            Use (0, 0) for networks trained on aligned targets: the preset "aligned", Detectron2, mmdetection.
        threshold: in [0, 1]; a pixel inside the box is set if p >= threshold. Unused for "float".
        output: "bool" or "float" for (D, H, W) masks, "rle" for COCO RLEs, made without full-image masks.

    Returns:
        "bool" and "float": (D, H, W) bool, or float32 probabilities, on the boxes' device; False or 0 outside the
        boxes. "rle": a list of D dicts `{"size": [H, W], "counts": str}`, which pycocotools and JSON accept. RLEs are
        computed on the host and equal the encoded "bool" output of the host bit for bit.

    Raises:
        TypeError: masks or boxes are not tensors.
        ValueError: a shape differs from the above, a box is not finite, or an argument is out of range; or, unless the
            output is "float", masks on the host are not probabilities.

    Example:
        >>> box = torch.tensor([[0.0, 0.0, 4.0, 2.0]])
        >>> paste_masks(torch.tensor([[[0.9, 0.1], [0.9, 0.1]]]), box, (2, 5)).int()
        tensor([[[1, 1, 0, 0, 0],
                 [1, 1, 0, 0, 0]]], dtype=torch.int32)

    Source: Detectron2 02b5c4e, `paste_masks_in_image`, samples at pixel centers with zeros around the grid;
    the offset and the weight of its edge cells are maskloss's own.
    """
    check_tensors(mask_probs=mask_probs, boxes=boxes)
    if mask_probs.dim() != 3 or mask_probs.shape[1] != mask_probs.shape[2]:
        raise ValueError(f"mask_probs must have shape (D, M, M), not {tuple(mask_probs.shape)}")
    if boxes.shape != (mask_probs.shape[0], 4):
        raise ValueError(
            f"boxes must have shape ({mask_probs.shape[0]}, 4) for as many masks, not {tuple(boxes.shape)}"
        )
    if output not in ("bool", "float", "rle"):
        raise ValueError(f'output must be "bool", "float" or "rle", not {output!r}')
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    check_image_size(image_size)
    parts = tuple(offset) if isinstance(offset, Iterable) else ()
    if len(parts) != 2 or not all(math.isfinite(part) for part in parts):
        raise ValueError(f"offset must be two finite numbers of pixels, y and x, got {offset}")
    device = boxes.device
    grids, boxes = mask_probs.detach().float(), boxes.detach()
    if output == "rle":
        grids, boxes = grids.cpu(), boxes.cpu()
    # MPS has no float64, so its boxes move to the host before the conversion.
    boxes = boxes.cpu().double() if boxes.device.type in ("cpu", "mps") else boxes.double()
    check_finite(boxes)
    if output != "float":
        _check_probabilities(grids)
    # Autocast would round the matrix products to half precision.
    with torch.autocast(grids.device.type, enabled=False):
        if output == "rle":
            return _rles(_windows(grids, boxes, image_size, offset), len(boxes), threshold, image_size)
        dtype = torch.bool if output == "bool" else torch.float32
        masks = torch.zeros((len(boxes), *image_size), dtype=dtype, device=device)
        pasted = (_windows if device.type == "cpu" else _whole_images)(grids, boxes, image_size, offset)
        for detection, probs, inside, top, left in pasted:
            # COCO's RLE is column-major, so windows are (w, h).
            window = masks[detection, top : top + probs.shape[1], left : left + probs.shape[0]].T
            if output == "float":
                window.copy_(probs)
            else:
                window.copy_(probs >= threshold if inside is None else (probs >= threshold) & inside)
    return masks


def _check_probabilities(grids: Tensor) -> None:
    """Raise ValueError if grids on the host are logits, for which the threshold would mean something else.

    NaN passes: a network that has diverged predicts it.
    """
    if grids.device.type != "cpu" or grids.numel() == 0:
        return
    low, high = grids.aminmax()
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        raise ValueError(
            f"mask_probs must be probabilities in [0, 1], but they are in [{float(low):g}, {float(high):g}]; if they "
            "are logits, pass logits.sigmoid()"
        )


def unaligned_offset(image_size: tuple[int, int], network_size: tuple[int, int]) -> tuple[float, float]:
    """Return the sub-pixel offset of masks predicted by a network that was trained on unaligned targets.

    torchvision's targets have two offsets. RoIAlign samples them half a pixel of the resized image too far right and
    down, so predicted masks are too far left and up. Before that, `interpolate(mode="nearest")` resizes masks from
    n to n' pixels and copies pixel floor(j n / n') to pixel j: an edge at e moves to ceil(e n' / n). That is too far
    right, by (1 - gcd(n, n') / n) / 2 on average over all edges, and reduces the first offset by as much. The rest,
    in the image's own pixels, is gcd(n, n') / n' / 2: half a pixel without resizing, and almost zero for most sizes.

    Args:
        image_size: (H, W) of the image, in px.
        network_size: (H', W') of the resized image, in px.

    Returns:
        (dy, dx) in px of the image, for `paste_masks`.

    Example:
        >>> unaligned_offset((480, 640), (480, 640)), unaligned_offset((480, 640), (960, 1280))
        ((0.5, 0.5), (0.25, 0.25))
    """
    y, x = (
        0.5 * math.gcd(own, resized) / resized for own, resized in zip(image_size, network_size, strict=True)
    )
    return y, x


#: A part of a detection's mask: index of the detection, probabilities (w, h), whether each pixel lies in the box (None:
#: all do), and the image row and column of the first pixel.
_Window = tuple[int, Tensor, Tensor | None, int, int]


def _windows(
    grids: Tensor, boxes: Tensor, image_size: tuple[int, int], offset: tuple[float, float]
) -> Iterator[_Window]:
    """Yield the pixels inside each detection's box; large boxes in chunks of columns."""
    size = grids.shape[1]
    padded = _padded(grids, offset)
    for chunk in _chunks(len(boxes), image_size, size):
        x1, y1, x2, y2 = boxes[chunk].unbind(1)
        (top, bottom), (left, right) = _pixels(y1, y2, image_size[0]), _pixels(x1, x2, image_size[1])
        rows = _interpolation(y1, y2, top, int((bottom - top).max()), size, offset[0])
        columns = _interpolation(x1, x2, left, int((right - left).max()), size, offset[1])
        windows = torch.stack([top, bottom - top, left, right - left], dim=1).tolist()
        for index, (y, h, x, w) in enumerate(windows):
            detection = chunk.start + index
            across = columns[index, :w] @ padded[detection].T  # (w, M + 2)
            stripe = max(_PIXELS_AT_ONCE // max(h, 1), 1)
            for first in range(0, w, stripe):
                yield detection, across[first : first + stripe] @ rows[index, :h].T, None, y, x + first


def _whole_images(
    grids: Tensor, boxes: Tensor, image_size: tuple[int, int], offset: tuple[float, float]
) -> Iterator[_Window]:
    """Yield all pixels of the image for each detection.

    Takes more arithmetic than `_windows`, but few kernels, and no synchronization to read the sizes of the boxes.
    """
    height, width = image_size
    padded = _padded(grids, offset)
    for chunk in _chunks(len(boxes), image_size, grids.shape[1]):
        x1, y1, x2, y2 = boxes[chunk].unbind(1)
        weights, inside = [], []
        for low, high, length, off in ((x1, x2, width, offset[1]), (y1, y2, height, offset[0])):
            start, stop = _pixels(low, high, length)
            pixel = torch.arange(length, device=boxes.device)
            inside.append((pixel >= start[:, None]) & (pixel < stop[:, None]))
            zero = torch.zeros_like(start)
            interpolation = _interpolation(low, high, zero, length, grids.shape[1], off)
            weights.append((interpolation * inside[-1][..., None]).to(grids.device))
        in_box = (inside[0][:, :, None] & inside[1][:, None, :]).to(grids.device)  # (D, W, H)
        images = weights[0] @ padded[chunk].transpose(1, 2) @ weights[1].transpose(1, 2)
        for index, (probs, inside_box) in enumerate(zip(images, in_box, strict=True)):
            yield chunk.start + index, probs, inside_box, 0, 0


def _chunks(count: int, image_size: tuple[int, int], size: int) -> Iterator[slice]:
    """Yield slices of detections whose interpolation weights fit in one chunk."""
    at_once = _WEIGHTS_AT_ONCE // (max(*image_size, 1) * (size + 2))
    at_once = min(max(at_once, 1), _DETECTIONS_AT_ONCE)
    for first in range(0, count, at_once):
        yield slice(first, first + at_once)


def _padded(grids: Tensor, offset: tuple[float, float]) -> Tensor:
    """Pad each grid to (D, M + 2, M + 2), with zeros, or with `_EDGE_SHARE` of the edge where the offset needs it."""
    padded = F.pad(grids, (1, 1, 1, 1))
    if offset[0]:
        padded[:, 0, :] = _EDGE_SHARE * padded[:, 1, :]
    if offset[1]:
        padded[:, :, 0] = _EDGE_SHARE * padded[:, :, 1]
    return padded


def _pixels(low: Tensor, high: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return the first pixel with its center in [low, high), and the last plus 1, both (D,) int64."""
    start = (low - 0.5).ceil().clamp(0, length).long()
    stop = (high - 0.5).ceil().clamp(0, length).long()
    return start, torch.maximum(start, stop)


def _interpolation(low: Tensor, high: Tensor, start: Tensor, count: int, size: int, offset: float) -> Tensor:
    """Return the bilinear weights (D, count, M + 2) float32 of the padded grid's cells in `count` pixels.

    Args:
        low: (D,) low edge of each box, in px.
        high: (D,) high edge of each box.
        start: (D,) first pixel of each detection.
        count: number of pixels from `start` on.
        size: M.
        offset: shift of the predicted masks along this axis, in px.
    """
    # In the boxes' dtype: integers and a fraction would give the default dtype, which may be bfloat16.
    pixel = start[:, None] + torch.arange(count, device=low.device, dtype=low.dtype) + (0.5 - offset)
    # Cell m of the grid has its center at m + 0.5; the padding shifts its index by one.
    scale = size / (high - low).clamp(min=1e-6)
    position = ((pixel - low[:, None]) * scale[:, None] + 0.5).clamp(0, size + 1)
    cells = torch.arange(size + 2, device=low.device)
    return (1 - (position[:, :, None] - cells).abs()).clamp(min=0).float()


def _rles(windows: Iterator[_Window], count: int, threshold: float, image_size: tuple[int, int]) -> list[RLE]:
    """Encode the masks of `count` detections, whose windows are sorted by detection and column."""
    height, width = image_size
    ends: list[list[IntArray]] = [[] for _ in range(count)]
    gathered: list[tuple[int, Tensor, int, int]] = []
    pixels = 0

    def encode() -> None:
        for (detection, *_), positions in zip(gathered, _run_ends(gathered, height), strict=True):
            ends[detection].append(positions)
        gathered.clear()

    for detection, probs, _, top, left in windows:
        gathered.append((detection, probs >= threshold, top, left))
        pixels += probs.numel()
        if pixels > _PIXELS_AT_ONCE:
            encode()
            pixels = 0
    encode()
    return [_rle(np.concatenate([np.empty(0, np.int64), *parts]), height, width) for parts in ends]


def _run_ends(windows: list[tuple[int, Tensor, int, int]], height: int) -> list[IntArray]:
    """Return, per (w, h) bool window, the starts and stops of its runs in turn, as column-major pixel indices.

    The columns of all windows are concatenated, each after a zero, so that every run starts and stops within its
    column.
    """
    sizes = [(window.shape[0], window.shape[1] + 1) for _, window, _, _ in windows]
    offsets = np.cumsum([0] + [w * h for w, h in sizes])
    framed = np.zeros(offsets[-1] + 1, dtype=np.int8)
    for (_, window, _, _), (w, h), offset in zip(windows, sizes, offsets[:-1], strict=True):
        framed[offset : offset + w * h].reshape(w, h)[:, 1:] = window.numpy()
    # An edge's index is one less than its pixel's; the zero before each column adds one, so the two cancel.
    edges = np.flatnonzero(framed[1:] != framed[:-1])
    counts = np.diff(np.searchsorted(edges, offsets))
    column_height = np.repeat([h for _, h in sizes], counts)
    column, row = np.divmod(edges - np.repeat(offsets[:-1], counts), column_height)
    top = np.repeat([top for _, _, top, _ in windows], counts)
    left = np.repeat([left for _, _, _, left in windows], counts)
    position = (column + left) * height + row + top
    return [position[first:last] for first, last in pairwise(np.cumsum([0, *counts]))]


def _rle(ends: IntArray, height: int, width: int) -> RLE:
    """Encode a mask given the starts and stops of its runs."""
    # Join runs that reach the last row with those that continue at the top of the next column.
    joined = np.flatnonzero(ends[1:-1:2] == ends[2::2])
    ends = np.delete(ends, np.concatenate([2 * joined + 1, 2 * joined + 2]))
    runs = np.diff(ends, prepend=0, append=height * width)
    if runs[-1] == 0:
        runs = runs[:-1]
    return {"size": [height, width], "counts": encode_counts(runs).decode("ascii")}
