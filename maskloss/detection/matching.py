"""Match boxes to objects in chunks: torchvision's matches, without the full matrix of objects and anchors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher

from maskloss.detection.transfer import send

#: Chunk size: pairs of an object and a box. Small enough for a CPU's cache; on a GPU large enough that only crowded
#: images need more than one chunk.
_PAIRS_AT_ONCE = {"cpu": 2**18, "cuda": 2**24}
#: Up to this many chunks, computing the whole matrix costs less than chunking.
_CHUNKS_NOT_WORTH_IT = 2


def match(
    gt_boxes: Tensor, boxes: Tensor, matcher: Matcher, similarity: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Compute `matcher(similarity(gt_boxes, boxes))` with less memory; the result is equal.

    This does not synchronize with the device. A large similarity matrix (G, A) is computed in chunks of boxes. The box
    with an object's best IoU may match below the threshold, and the best is known only after all chunks. Therefore
    the chunks are computed a second time: on a CPU only the chunks that contain a best box, and only for its object.

    Args:
        gt_boxes: (G, 4) xyxy, G >= 1.
        boxes: (A, 4) xyxy, anchors or proposals.
        matcher: torchvision's `Matcher`; matchers of other types are called with the whole matrix.
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
    if type(matcher) is not Matcher or len(boxes) == 0:
        matches: Tensor = matcher(similarity(gt_boxes, boxes))
        return matches
    if len(gt_boxes) * len(boxes) <= _CHUNKS_NOT_WORTH_IT * pairs:
        quality = similarity(gt_boxes, boxes)
        best = quality.max(dim=0)
        is_best = None
        if matcher.allow_low_quality_matches:
            is_best = (quality == quality.amax(dim=1, keepdim=True)).any(dim=0)
        return _apply_thresholds(best.values, best.indices, is_best, matcher)
    count = max(pairs // len(gt_boxes), 1)
    chunks = boxes.split(count)
    # Fill preallocated tensors: small results allocated between large temporaries would fragment the memory.
    dtype = similarity(gt_boxes[:1], boxes[:1]).dtype
    values, objects = (boxes.new_empty(len(boxes), dtype=kind) for kind in (dtype, torch.int64))
    by_chunk = boxes.new_empty((len(chunks), len(gt_boxes)), dtype=dtype)
    parts = zip(chunks, values.split(count), objects.split(count), by_chunk, strict=True)
    for chunk, chunk_values, chunk_objects, bests in parts:
        quality = similarity(gt_boxes, chunk)  # (G, a)
        best = quality.max(dim=0)
        chunk_values.copy_(best.values)
        chunk_objects.copy_(best.indices)
        bests.copy_(quality.amax(dim=1))
    if not matcher.allow_low_quality_matches:
        return _apply_thresholds(values, objects, None, matcher)
    highest = by_chunk.amax(dim=0)
    is_best = torch.zeros_like(objects, dtype=torch.bool)
    # If an object overlaps no box, its best IoU is 0, so every box is a best box.
    is_best |= (highest == 0).any()
    if boxes.device.type == "cpu":
        holders = (by_chunk == highest) & (highest > 0)
        held_by_chunk = [torch.where(holder)[0] for holder in holders]
    else:
        # Finding out which chunks contain a best box would synchronize.
        held_by_chunk = [torch.arange(len(gt_boxes), device=boxes.device)] * len(chunks)
    for chunk, chunk_is_best, held in zip(chunks, is_best.split(count), held_by_chunk, strict=True):
        if len(held):
            chunk_is_best |= (similarity(gt_boxes[held], chunk) == highest[held, None]).any(dim=0)
    return _apply_thresholds(values, objects, is_best, matcher)


def object_weights(targets: Sequence[dict[str, Any]], device: torch.device) -> list[Tensor] | None:
    """Return, per image, the objects' weights (G,) float32 on a device; None if no target has any.

    Example:
        >>> boxes = torch.zeros(2, 4)
        >>> object_weights([{"boxes": boxes}, {"boxes": boxes, "weights": torch.tensor([0.5, 2.0])}], boxes.device)
        [tensor([1., 1.]), tensor([0.5000, 2.0000])]
    """
    if not any("weights" in target for target in targets):
        return None
    weights = [target.get("weights", torch.ones(len(target["boxes"]))) for target in targets]
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
