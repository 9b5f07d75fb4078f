"""What an evaluation measures: box and mask AP as COCO has them, and metrics.json."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from faster_coco_eval import COCO, COCOeval_faster

from maskloss.data.coco import Annotation, CocoData
from maskloss.files import write_text

Results = list[dict[str, Any]]
Metrics = dict[str, Any]

_STATISTICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def average_precision(data: CocoData, results: Results, *, max_detections: int = 100) -> Metrics:
    """Return box and mask AP of COCO results, as pycocotools computes them, whatever the ids in the file.

    Args:
        data: the ground truth.
        results: COCO results; a result without a box, or without a mask, counts for the other only.
        max_detections: of one category in one image, the best are counted, COCO's 100 or another number.

    Ids are counted anew from 1: pycocotools, and what is faster, take an annotation's id of 0 for "not matched", so
    its object never counts as found, and cannot hold ids beyond 2^53.
    """
    image_ids = {image.id: number for number, image in enumerate(data.images, start=1)}
    category_ids = {category.id: number for number, category in enumerate(data.categories, start=1)}
    results = [
        {
            **result,
            "image_id": image_ids[result["image_id"]],
            "category_id": category_ids[result["category_id"]],
        }
        for result in results
    ]
    metrics: Metrics = {}
    # A detection's size class is that of its box where it has one, so masks are evaluated without. loadRes
    # writes into the results, so it gets copies.
    for kind, needed, left_out in (("bbox", "bbox", "segmentation"), ("segm", "segmentation", "bbox")):
        truth = COCO(_ground_truth(data, image_ids, category_ids, masks=kind == "segm"))
        of_kind = [
            {key: value for key, value in result.items() if key != left_out}
            for result in results
            if needed in result
        ]
        if kind == "segm":
            # How good a mask is, where the mask branch says so, and not how sure its class is.
            for result in of_kind:
                result["score"] = result.get("mask_score", result["score"])
        found = truth.loadRes(of_kind)
        evaluation = COCOeval_faster(truth, found, kind, print_function=lambda *_: None)
        evaluation.params.maxDets = [1, min(10, max_detections), max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.summarize()
        values = [float(value) for value in evaluation.stats[: len(_STATISTICS)]]
        # COCO's -1 says that there was nothing to find.
        metrics[kind] = {
            name: None if value < 0 else value for name, value in zip(_STATISTICS, values, strict=True)
        }
    return metrics


def write_metrics(path: Path, metrics: Metrics) -> None:
    """Write `metrics.json`.

    Raises:
        RunError: the disk is full, or the folder does not allow it.
    """
    write_text(path, json.dumps(metrics, indent=2, allow_nan=False) + "\n")


def _ground_truth(
    data: CocoData, image_ids: dict[int, int], category_ids: dict[int, int], *, masks: bool
) -> dict[str, Any]:
    """Return the data set as COCO's JSON has it, with these ids, and annotations counted from 1.

    For masks, an object that has none is a region to ignore, as crowds are: it is not missed, and detections that lie
    mostly inside its box are neither right nor wrong.
    """
    annotations = [
        {
            "id": number,
            "image_id": image_ids[image.id],
            "category_id": category_ids[annotation.category_id],
            "bbox": [
                *annotation.box[:2],
                annotation.box[2] - annotation.box[0],
                annotation.box[3] - annotation.box[1],
            ],
            "area": annotation.area,
            "iscrowd": int(annotation.crowd or (masks and not annotation.has_mask)),
            "segmentation": _json_segmentation(annotation),
        }
        for number, (image, annotation) in enumerate(
            ((image, annotation) for image in data.images for annotation in image.annotations), start=1
        )
    ]
    images = [
        {"id": image_ids[i.id], "width": i.width, "height": i.height, "file_name": i.file_name}
        for i in data.images
    ]
    categories = [{"id": category_ids[c.id], "name": c.name} for c in data.categories]
    return {"images": images, "annotations": annotations, "categories": categories}


def _json_segmentation(annotation: Annotation) -> Any:
    segmentation = annotation.segmentation
    if segmentation is None:
        x1, y1, x2, y2 = annotation.box
        return [[x1, y1, x2, y1, x2, y2, x1, y2]]
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], bytes):
        return {**segmentation, "counts": segmentation["counts"].decode("ascii")}
    return segmentation
