"""Matching in pieces: torchvision's matches, without the matrix of every object with every anchor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher

#: Pairs of an object and a box whose IoU is held at once. Few enough for a CPU's cache, and on a GPU enough that
#: all but crowded images go in one piece.
_PAIRS_AT_ONCE = {"cpu": 2**18, "cuda": 2**25}


def match(
    gt_boxes: Tensor, boxes: Tensor, matcher: Matcher, similarity: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Match boxes to objects as `matcher(similarity(gt_boxes, boxes))` does, index by index.

    The matrix of similarities, (G, A), is made in pieces of some boxes each. Whether a box is an object's best,
    which lets it match below the threshold, shows only when all have been seen, so each piece hands on its own
    bests.

    Args:
        gt_boxes: (G, 4) xyxy, G >= 1.
        boxes: (A, 4) xyxy, anchors or proposals.
        matcher: torchvision's; another's is called with the whole matrix.
        similarity: of each object with each box, (G, A), at least 0; torchvision's is the IoU.

    Returns:
        (A,) int64: the object's index, or `BELOW_LOW_THRESHOLD` or `BETWEEN_THRESHOLDS`.
    """
    count = max(_PAIRS_AT_ONCE.get(boxes.device.type, 2**25) // max(len(gt_boxes), 1), 1)
    if len(boxes) <= count or type(matcher) is not Matcher:
        matches: Tensor = matcher(similarity(gt_boxes, boxes))
        return matches
    best_values, best_objects, bests_of_objects, rivals = [], [], [], []
    for first in range(0, len(boxes), count):
        quality = similarity(gt_boxes, boxes[first : first + count])  # (G, a)
        values, objects = quality.max(dim=0)
        best_values.append(values)
        best_objects.append(objects)
        if matcher.allow_low_quality_matches:
            bests = quality.amax(dim=1)  # (G,)
            bests_of_objects.append(bests)
            # Where an object meets no box of the piece, all of its zeros are ties; they are dealt with below.
            holder, box = torch.where((quality == bests[:, None]) & (bests > 0)[:, None])
            rivals.append((bests[holder], holder, box + first))
    values, objects = torch.cat(best_values), torch.cat(best_objects)
    matches = objects.clone()
    matches[values < matcher.low_threshold] = matcher.BELOW_LOW_THRESHOLD
    between = (values >= matcher.low_threshold) & (values < matcher.high_threshold)
    matches[between] = matcher.BETWEEN_THRESHOLDS
    if matcher.allow_low_quality_matches:
        highest = torch.stack(bests_of_objects).amax(dim=0)  # (G,)
        value, holder, box = (torch.cat(parts) for parts in zip(*rivals, strict=True))
        winners = box[value == highest[holder]]
        matches[winners] = objects[winners]
        # Of an object that meets no box at all, every box is a best one.
        matches = torch.where((highest == 0).any(), objects, matches)
    return matches
