"""Match boxes to objects in chunks: torchvision's matches, without the full matrix of objects and anchors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from maskloss.masks.transfer import send

#: Chunk size: pairs of an object and a box. Small enough for a CPU's cache; on a GPU large enough that only crowded
#: images need more than one chunk.
_PAIRS_AT_ONCE = {"cpu": 2**18, "cuda": 2**24}
#: Up to this many chunks, computing the whole matrix costs less than chunking.
_CHUNKS_NOT_WORTH_IT = 2
#: Minimum number of boxes per chunk on a CPU. Consecutive anchors are neighbors, so that a small chunk overlaps few
#: objects, but each chunk has a fixed cost.
_LEAST_BOXES = 2048
#: Up to this many pairs, a GPU remembers with one byte per pair which boxes may be an object's best, 256 MiB.
_PAIRS_REMEMBERED = 2**28

#: Methods that users may replace, as they were at first.
_MATCHER_CODE = (Matcher.__call__, Matcher.set_low_quality_matches_)

Similarity = Callable[[Tensor, Tensor], Tensor]


def match(gt_boxes: Tensor, boxes: Tensor, matcher: Matcher, similarity: Similarity) -> Tensor:
    """Compute `matcher(similarity(gt_boxes, boxes))` with less memory and time; the result is equal.

    This does not synchronize with the device. A large similarity matrix (G, A) is computed in chunks of boxes. The box
    with an object's best IoU may match below the threshold, and the best is known only after all chunks. On a GPU, the
    best boxes of each chunk are remembered. On a CPU, the chunks that contain a best box are computed again, for its
    object only; and IoUs are computed only with objects that overlap the chunk.

    Args:
        gt_boxes: (G, 4) xyxy, G >= 1.
        boxes: (A, 4) xyxy, anchors or proposals.
        matcher: torchvision's `Matcher`; matchers with other code are called with the whole matrix.
        similarity: computes a similarity >= 0 for each object and box, (G, A); torchvision's is the IoU.

    Returns:
        (A,) int64: index of the matched object, or `BELOW_LOW_THRESHOLD` or `BETWEEN_THRESHOLDS`.

    Example:
        >>> from torchvision.ops import box_iou
        >>> boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [8.0, 8.0, 9.0, 9.0]])
        >>> match(torch.tensor([[0.0, 0.0, 4.0, 5.0]]), boxes, Matcher(0.7, 0.3), box_iou)
        tensor([ 0, -1])
    """
    pairs = _PAIRS_AT_ONCE.get(boxes.device.type, 2**24)
    if not _is_torchvisions(matcher) or len(boxes) == 0:
        matches: Tensor = matcher(similarity(gt_boxes, boxes))
        return matches
    low_quality = matcher.allow_low_quality_matches
    if len(gt_boxes) * len(boxes) <= _CHUNKS_NOT_WORTH_IT * pairs:
        quality = similarity(gt_boxes, boxes)
        best = quality.max(dim=0)
        is_best = None
        if low_quality:
            is_best = (quality == quality.amax(dim=1, keepdim=True)).any(dim=0)
        return _apply_thresholds(best.values, best.indices, is_best, matcher)
    find = _best_on_cpu if boxes.device.type == "cpu" else _best_on_gpu
    return _apply_thresholds(*find(gt_boxes, boxes, similarity, pairs, low_quality), matcher)


def _is_torchvisions(matcher: Matcher) -> bool:
    """Return whether a matcher's code is torchvision's: its class, and no replaced method."""
    return (
        type(matcher) is Matcher
        and (Matcher.__call__, Matcher.set_low_quality_matches_) == _MATCHER_CODE
        and "set_low_quality_matches_" not in vars(matcher)
    )


def _best_on_cpu(
    gt_boxes: Tensor, boxes: Tensor, similarity: Similarity, pairs: int, low_quality: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the arguments of `_apply_thresholds`."""
    # Fill preallocated tensors: small results allocated between large temporaries would fragment the memory.
    dtype = similarity(gt_boxes[:1], boxes[:1]).dtype
    values, objects = (boxes.new_zeros(len(boxes), dtype=kind) for kind in (dtype, torch.int64))
    highest = values.new_zeros(len(gt_boxes))
    parts = []  # slice of the boxes, the objects near them, and the best similarity of each of these
    for first, last, near in _neighborhoods(
        gt_boxes, boxes, similarity, max(pairs // len(gt_boxes), _LEAST_BOXES)
    ):
        count = max(pairs // len(near), 1)
        for start in range(first, last, count):
            chunk = slice(start, min(start + count, last))
            quality = similarity(gt_boxes[near], boxes[chunk])  # (g, a)
            best = quality.max(dim=0)
            values[chunk] = best.values
            # If all similarities are 0, torchvision takes the first object.
            objects[chunk] = near[best.indices].masked_fill_(best.values == 0, 0)
            bests = quality.amax(dim=1)
            highest[near] = torch.maximum(highest[near], bests)
            parts.append((chunk, near, bests))
    if not low_quality:
        return values, objects, None
    is_best = torch.zeros_like(objects, dtype=torch.bool)
    # If an object overlaps no box, its best IoU is 0, so every box is a best box.
    is_best |= (highest == 0).any()
    for chunk, near, bests in parts:
        held = near[(bests == highest[near]) & (bests > 0)]
        if len(held):
            quality = similarity(gt_boxes[held], boxes[chunk])
            is_best[chunk] |= (quality == highest[held, None]).any(dim=0)
    return values, objects, is_best


def _neighborhoods(
    gt_boxes: Tensor, boxes: Tensor, similarity: Similarity, count: int
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield groups of consecutive boxes, and the indices of the objects that may overlap a box of the group.

    Groups that no object overlaps are left out. For a similarity other than the IoU, all objects are near.
    """
    if similarity is not box_iou:
        yield 0, len(boxes), torch.arange(len(gt_boxes), device=boxes.device)
        return
    columns = boxes.T.contiguous()  # (4, A), because extremes of strided columns take ten times as long
    for first in range(0, len(boxes), count):
        group = columns[:, first : first + count]
        low, high = group[:2].amin(dim=1), group[2:].amax(dim=1)
        near = torch.where(((gt_boxes[:, :2] < high) & (gt_boxes[:, 2:] > low)).all(dim=1))[0]
        if len(near):
            yield first, first + group.shape[1], near


def _best_on_gpu(
    gt_boxes: Tensor, boxes: Tensor, similarity: Similarity, pairs: int, low_quality: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the arguments of `_apply_thresholds` without synchronizing."""
    count = max(pairs // len(gt_boxes), 1)
    chunks = boxes.split(count)
    remembers = low_quality and len(gt_boxes) * len(boxes) <= _PAIRS_REMEMBERED
    values, objects, by_chunk, best_of_chunk = [], [], [], []
    for chunk in chunks:
        quality = similarity(gt_boxes, chunk)  # (G, a)
        best = quality.max(dim=0)
        values.append(best.values)
        objects.append(best.indices)
        by_chunk.append(quality.amax(dim=1))
        if remembers:
            best_of_chunk.append(quality == by_chunk[-1][:, None])
    all_values, all_objects = torch.cat(values), torch.cat(objects)
    if not low_quality:
        return all_values, all_objects, None
    bests = torch.stack(by_chunk)  # (chunks, G)
    highest = bests.amax(dim=0)
    if remembers:
        is_best = [
            (best & held[:, None]).any(dim=0)
            for best, held in zip(best_of_chunk, bests == highest, strict=True)
        ]
    else:
        is_best = [(similarity(gt_boxes, chunk) == highest[:, None]).any(dim=0) for chunk in chunks]
    return all_values, all_objects, torch.cat(is_best)


def object_weights(targets: Sequence[dict[str, Any]], device: torch.device) -> list[Tensor] | None:
    """Return, per image, the objects' weights (G,) float32 on a device; None if no target has any.

    Example:
        >>> boxes = torch.zeros(2, 4)
        >>> object_weights([{"boxes": boxes}, {"boxes": boxes, "weights": torch.tensor([0.5, 2.0])}], boxes.device)
        [tensor([1., 1.]), tensor([0.5000, 2.0000])]
    """
    if not any("weights" in target for target in targets):
        return None
    ones = partial(torch.ones, dtype=torch.float32, device="cpu")  # not the default dtype and device
    weights = [target.get("weights", ones(len(target["boxes"]))) for target in targets]
    return [send(of_image.float(), device) for of_image in weights]


def mostly_inside(boxes: Tensor, regions: Tensor) -> Tensor:
    """Return whether more than half of each box's area lies inside one of the regions, without synchronizing.

    Args:
        boxes: (B, 4) xyxy.
        regions: (I, 4) xyxy.

    Returns:
        (B,) bool.

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [4.0, 0.0, 8.0, 4.0]])
        >>> mostly_inside(boxes, torch.tensor([[0.0, 0.0, 5.0, 9.0]]))
        tensor([ True, False])
    """
    area = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1)
    inside = torch.zeros_like(area, dtype=torch.bool)
    # One by one: there are few regions, and a matrix of all anchors and all regions would be large.
    for region in regions.to(boxes.dtype):
        sides = torch.minimum(boxes[:, 2:], region[2:]) - torch.maximum(boxes[:, :2], region[:2])
        inside |= sides.clamp(min=0).prod(dim=1) > 0.5 * area
    return inside


def _apply_thresholds(values: Tensor, objects: Tensor, is_best: Tensor | None, matcher: Matcher) -> Tensor:
    """Apply the thresholds of `Matcher` to each box's best object, without synchronizing.

    Args:
        values: (A,) similarity of each box to its most similar object.
        objects: (A,) int64 index of that object.
        is_best: (A,) bool, boxes that match regardless of the thresholds; None for no boxes.
        matcher: thresholds and result codes.
    """
    matches = objects.masked_fill(values < matcher.low_threshold, matcher.BELOW_LOW_THRESHOLD)
    between = (values >= matcher.low_threshold) & (values < matcher.high_threshold)
    matches.masked_fill_(between, matcher.BETWEEN_THRESHOLDS)
    return matches if is_best is None else torch.where(is_best, objects, matches)
