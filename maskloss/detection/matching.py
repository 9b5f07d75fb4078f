"""Matching in pieces: torchvision's matches, without the matrix of every object with every anchor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher

#: Pairs of an object and a box whose IoU is held at once. Few enough for a CPU's cache, and on a GPU enough that
#: all but crowded images go in one piece.
_PAIRS_AT_ONCE = {"cpu": 2**18, "cuda": 2**24}
#: Of a matrix of no more such pieces, the pieces would cost more than they save.
_PIECES_NOT_WORTH_IT = 2


def match(
    gt_boxes: Tensor, boxes: Tensor, matcher: Matcher, similarity: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Match boxes to objects as `matcher(similarity(gt_boxes, boxes))` does, index by index.

    A device is not waited for. A large matrix of similarities, (G, A), is made in pieces of some boxes each.
    Whether a box is an object's best, which lets it match below the threshold, shows only when all have been seen:
    then the pieces are made again; on a CPU only those few that hold bests, for their objects alone.

    Args:
        gt_boxes: (G, 4) xyxy, G >= 1.
        boxes: (A, 4) xyxy, anchors or proposals.
        matcher: torchvision's; another's is called with the whole matrix.
        similarity: of each object with each box, (G, A), at least 0; torchvision's is the IoU.

    Returns:
        (A,) int64: the object's index, or `BELOW_LOW_THRESHOLD` or `BETWEEN_THRESHOLDS`.
    """
    pairs = _PAIRS_AT_ONCE.get(boxes.device.type, 2**24)
    if type(matcher) is not Matcher or len(boxes) == 0:
        matches: Tensor = matcher(similarity(gt_boxes, boxes))
        return matches
    if len(gt_boxes) * len(boxes) <= _PIECES_NOT_WORTH_IT * pairs:
        quality = similarity(gt_boxes, boxes)
        best = quality.max(dim=0)
        is_best = None
        if matcher.allow_low_quality_matches:
            is_best = (quality == quality.amax(dim=1, keepdim=True)).any(dim=0)
        return _decided(best.values, best.indices, is_best, matcher)
    count = max(pairs // len(gt_boxes), 1)
    pieces = boxes.split(count)
    # Filled in place: small tensors that are kept between large ones that are not would scatter the memory.
    dtype = similarity(gt_boxes[:1], boxes[:1]).dtype
    values, objects = (boxes.new_empty(len(boxes), dtype=kind) for kind in (dtype, torch.int64))
    by_piece = boxes.new_empty((len(pieces), len(gt_boxes)), dtype=dtype)
    parts = zip(pieces, values.split(count), objects.split(count), by_piece, strict=True)
    for piece, piece_values, piece_objects, bests in parts:
        quality = similarity(gt_boxes, piece)  # (G, a)
        best = quality.max(dim=0)
        piece_values.copy_(best.values)
        piece_objects.copy_(best.indices)
        bests.copy_(quality.amax(dim=1))
    if not matcher.allow_low_quality_matches:
        return _decided(values, objects, None, matcher)
    highest = by_piece.amax(dim=0)
    is_best = torch.zeros_like(objects, dtype=torch.bool)
    # Of an object that meets no box at all, every box is a best one.
    is_best |= (highest == 0).any()
    if boxes.device.type == "cpu":
        holders = (by_piece == highest) & (highest > 0)
        held_by_piece = [torch.where(holder)[0] for holder in holders]
    else:
        # To know which objects a piece holds the best of, the host would have to wait.
        held_by_piece = [torch.arange(len(gt_boxes), device=boxes.device)] * len(pieces)
    for piece, piece_is_best, held in zip(pieces, is_best.split(count), held_by_piece, strict=True):
        if len(held):
            piece_is_best |= (similarity(gt_boxes[held], piece) == highest[held, None]).any(dim=0)
    return _decided(values, objects, is_best, matcher)


def mostly_inside(boxes: Tensor, regions: Tensor) -> Tensor:
    """Say which boxes have more than half of their area inside one of the regions, without synchronizing.

    Args:
        boxes: (B, 4) xyxy.
        regions: (I, 4) xyxy.

    Returns:
        (B,) bool.
    """
    area = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1)
    inside = torch.zeros_like(area, dtype=torch.bool)
    # One by one: regions are few, and a matrix of all anchors with all of them would be large.
    for region in regions.to(boxes.dtype):
        sides = torch.minimum(boxes[:, 2:], region[2:]) - torch.maximum(boxes[:, :2], region[:2])
        inside |= sides.clamp(min=0).prod(dim=1) > 0.5 * area
    return inside


def _decided(values: Tensor, objects: Tensor, is_best: Tensor | None, matcher: Matcher) -> Tensor:
    """Give each box (A,) its most similar object, or, by that similarity, none: `Matcher`, without waiting."""
    matches = objects.masked_fill(values < matcher.low_threshold, matcher.BELOW_LOW_THRESHOLD)
    between = (values >= matcher.low_threshold) & (values < matcher.high_threshold)
    matches.masked_fill_(between, matcher.BETWEEN_THRESHOLDS)
    return matches if is_best is None else torch.where(is_best, objects, matches)
