"""Count a model's errors by kind, as TIDE does: wrong class or place, duplicates, false detections, missed objects.

Source: Bolya et al., TIDE, 2020, arXiv:2008.08115, with its IoU thresholds of 0.5 and 0.1. TIDE also computes what AP
each kind costs; here the errors are counted at fixed scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from maskloss.data.coco import Annotation, ImageRecord

_FOUND_IOU, _NEAR_IOU = 0.5, 0.1

#: The kinds of detections and missed objects, with their explanations.
KINDS = {
    "correct": "finds an object of its class",
    "wrong class": "lies on an object of another class",
    "wrong place": "lies near an object of its class, but its IoU is below .5",
    "wrong class and place": "lies near an object of another class",
    "duplicate": "lies on an object that a detection with a higher score has found",
    "background": "lies on no object",
    "missed": "an object on or near which there is no detection",
}


@dataclass(frozen=True)
class ImageErrors:
    """The errors in one image.

    Attributes:
        kinds: number of each of `KINDS`.
        confusions: numbers of pairs (category of the object, category of the detection), with None for no object or no
            detection.
    """

    kinds: Counter[str]
    confusions: Counter[tuple[int | None, int | None]]

    @property
    def count(self) -> int:
        """Number of all errors."""
        return sum(count for kind, count in self.kinds.items() if kind != "correct")


def image_errors(record: ImageRecord, results: Sequence[Mapping[str, Any]]) -> ImageErrors:
    """Count the errors in one image.

    Detections are compared by the IoU of masks, or of boxes if the detection or the object has no mask. Detections
    mostly inside a crowd do not count.

    Args:
        record: the image with its objects.
        results: COCO results of the image, only those with sufficient scores.
    """
    results = sorted(results, key=lambda result: -float(result["score"]))
    objects, crowds = list(record.objects), [a for a in record.annotations if a.crowd]
    in_crowd = _ious(record, results, crowds).max(axis=1, initial=0) >= _FOUND_IOU
    ious = _ious(record, results, objects)
    same = np.array([[a.category_id == r["category_id"] for a in objects] for r in results], dtype=bool)
    same = same.reshape(ious.shape)
    kinds: Counter[str] = Counter()
    taken = np.zeros(len(objects), dtype=bool)
    near = np.zeros(len(objects), dtype=bool)
    for index in range(len(results)):
        own, other = np.where(same[index], ious[index], 0), np.where(same[index], 0, ious[index])
        free = np.where(taken, 0, own)
        if free.max(initial=0) >= _FOUND_IOU:
            taken[free.argmax()] = True
            kinds["correct"] += 1
        elif in_crowd[index]:
            continue
        elif own.max(initial=0) >= _FOUND_IOU:
            kinds["duplicate"] += 1
        elif other.max(initial=0) >= _FOUND_IOU:
            kinds["wrong class"] += 1
        elif own.max(initial=0) >= _NEAR_IOU:
            kinds["wrong place"] += 1
        elif other.max(initial=0) >= _NEAR_IOU:
            kinds["wrong class and place"] += 1
        else:
            kinds["background"] += 1
        near |= (other >= _FOUND_IOU) | (own >= _NEAR_IOU)
    kinds["missed"] = int((~taken & ~near).sum())
    return ImageErrors(kinds, _confusions(ious, in_crowd, results, objects))


def _confusions(
    ious: npt.NDArray[np.float64],
    in_crowd: npt.NDArray[np.bool_],
    results: Sequence[Mapping[str, Any]],
    objects: Sequence[Annotation],
) -> Counter[tuple[int | None, int | None]]:
    """Match detections by descending score to the best free object of any class, and count the pairs of categories."""
    pairs: Counter[tuple[int | None, int | None]] = Counter()
    taken = np.zeros(len(objects), dtype=bool)
    for index, result in enumerate(results):
        free = np.where(taken, 0, ious[index])
        if free.max(initial=0) >= _FOUND_IOU:
            taken[free.argmax()] = True
            pairs[objects[int(free.argmax())].category_id, result["category_id"]] += 1
        elif not in_crowd[index]:
            pairs[None, result["category_id"]] += 1
    pairs.update((a.category_id, None) for a, found in zip(objects, taken, strict=True) if not found)
    return pairs


def _ious(
    record: ImageRecord, results: Sequence[Mapping[str, Any]], annotations: Sequence[Annotation]
) -> npt.NDArray[np.float64]:
    """Return the IoU of each detection with each annotation, (D, G); with a crowd, the share of the detection in it."""
    if not results or not annotations:
        return np.zeros((len(results), len(annotations)))
    crowds = [int(a.crowd) for a in annotations]
    boxes = [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in (a.box for a in annotations)]
    ious: npt.NDArray[np.float64] = np.array(
        coco_mask.iou(np.array([r["bbox"] for r in results], float), np.array(boxes, float), crowds)
    )
    masked = [index for index, result in enumerate(results) if "segmentation" in result]
    with_mask = [index for index, annotation in enumerate(annotations) if annotation.has_mask]
    if masked and with_mask:
        truth = [_rle(annotations[index], record) for index in with_mask]
        found = [results[index]["segmentation"] for index in masked]
        ious[np.ix_(masked, with_mask)] = coco_mask.iou(found, truth, [crowds[index] for index in with_mask])
    return ious


def _rle(annotation: Annotation, record: ImageRecord) -> Any:
    segmentation = annotation.segmentation
    if isinstance(segmentation, dict):
        return segmentation
    return coco_mask.merge(coco_mask.frPyObjects(segmentation, record.height, record.width))
