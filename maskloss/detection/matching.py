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

    The matrix of similarities, (G, A), is made in pieces of some boxes each. Whether a box is an object's best,
    which lets it match below the threshold, shows only when all have been seen: then the few pieces that hold
    bests are made again, for their objects alone.

    Args:
        gt_boxes: (G, 4) xyxy, G >= 1.
        boxes: (A, 4) xyxy, anchors or proposals.
        matcher: torchvision's; another's is called with the whole matrix.
        similarity: of each object with each box, (G, A), at least 0; torchvision's is the IoU.

    Returns:
        (A,) int64: the object's index, or `BELOW_LOW_THRESHOLD` or `BETWEEN_THRESHOLDS`.
    """
    pairs = _PAIRS_AT_ONCE.get(boxes.device.type, 2**24)
    if len(gt_boxes) * len(boxes) <= _PIECES_NOT_WORTH_IT * pairs or type(matcher) is not Matcher:
        matches: Tensor = matcher(similarity(gt_boxes, boxes))
        return matches
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
    matches = objects.clone()
    matches[values < matcher.low_threshold] = matcher.BELOW_LOW_THRESHOLD
    between = (values >= matcher.low_threshold) & (values < matcher.high_threshold)
    matches[between] = matcher.BETWEEN_THRESHOLDS
    if not matcher.allow_low_quality_matches:
        return matches
    highest = by_piece.amax(dim=0)
    is_best = torch.zeros_like(matches, dtype=torch.bool)
    # Of an object that meets no box at all, every box is a best one.
    is_best |= (highest == 0).any()
    holders = ((by_piece == highest) & (highest > 0)).cpu()
    for piece, piece_is_best, holder in zip(pieces, is_best.split(count), holders, strict=True):
        held = torch.where(holder)[0].to(boxes.device)
        if len(held):
            piece_is_best |= (similarity(gt_boxes[held], piece) == highest[held, None]).any(dim=0)
    return torch.where(is_best, objects, matches)
