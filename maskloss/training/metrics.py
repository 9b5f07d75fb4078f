"""The metrics of an evaluation: AP of boxes, masks and boundaries, and `metrics.json`."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from faster_coco_eval import COCO, COCOeval_faster

from maskloss.data.coco import Annotation, CocoData
from maskloss.files import write_text

Results = list[dict[str, Any]]
Metrics = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """One kind of AP: what it compares between detections and ground truth.

    Attributes:
        label: name in tables, before "AP".
        iou_type: `iouType` of faster-coco-eval.
        field: field of a COCO result that is compared. Results without it are not counted.
    """

    label: str
    iou_type: Literal["bbox", "segm", "boundary"]
    field: Literal["bbox", "segmentation"]

    @property
    def of_masks(self) -> bool:
        """Whether masks are compared instead of boxes."""
        return self.field == "segmentation"


#: The metrics by their key in metrics.json. Tables and logs loop over this dict.
#:
#: "boundary" is Boundary IoU, Cheng et al., 2021, arXiv:2103.16562: the smaller of two values, the masks' IoU and the
#: IoU of their parts that lie within 2 % of the image's diagonal from the boundary.
METRICS: dict[str, Metric] = {
    "bbox": Metric("box", "bbox", "bbox"),
    "segm": Metric("mask", "segm", "segmentation"),
    "boundary": Metric("boundary", "boundary", "segmentation"),
}

#: The labels of the metrics, for tables.
LABELS = {kind: metric.label for kind, metric in METRICS.items()}

#: Index of each statistic in faster-coco-eval's summary. AR is the one at the largest number of detections.
STATISTICS = {"AP": 0, "AP50": 1, "AP75": 2, "APs": 3, "APm": 4, "APl": 5, "AR": 8}


def average_precision(data: CocoData, results: Results, *, max_detections: int = 100) -> Metrics:
    """Return AP and AR of COCO results for each of `METRICS`, as pycocotools computes them.

    All ids are allowed. They are replaced by numbers from 1 on, because pycocotools and faster-coco-eval read an
    annotation id of 0 as "not matched", so that its object never counts as found, and cannot hold ids beyond 2^53.

    Args:
        data: the ground truth.
        results: COCO results. A result without a box counts for masks only, one without a mask for boxes only.
        max_detections: maximum number of detections per image and category; those with the best scores are counted.

    Returns:
        For each key of `METRICS`, its `STATISTICS` in [0, 1], or None without ground truth, as in empty size classes.
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
    truths = {
        masks: COCO(_ground_truth(data, image_ids, category_ids, masks=masks)) for masks in (False, True)
    }
    for kind, metric in METRICS.items():
        truth = truths[metric.of_masks]
        found = truth.loadRes(_results_of(metric, results))
        # An evaluation has too few boundaries for more threads to pay off. The results do not depend on it.
        evaluation = COCOeval_faster(
            truth, found, metric.iou_type, print_function=lambda *_: None, boundary_cpu_count=1
        )
        evaluation.params.maxDets = [1, min(10, max_detections), max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.summarize()
        values = {name: float(evaluation.stats[place]) for name, place in STATISTICS.items()}
        # COCO reports -1 if there is no ground truth.
        metrics[kind] = {name: None if value < 0 else value for name, value in values.items()}
    return metrics


def _results_of(metric: Metric, results: Results) -> Results:
    """Return copies of the results with only the field that a metric compares, because `loadRes` modifies its input.

    Boxes are removed for mask metrics, because faster-coco-eval would take the size class from the box. Masks are
    ranked by `mask_score`, where the mask branch predicts one, instead of the score of the class.
    """
    other = "bbox" if metric.of_masks else "segmentation"
    chosen = [
        {key: value for key, value in result.items() if key != other}
        for result in results
        if metric.field in result
    ]
    if metric.of_masks:
        for result in chosen:
            result["score"] = result.get("mask_score", result["score"])
    return chosen


def write_metrics(path: Path, metrics: Metrics) -> None:
    """Write `metrics.json`.

    Raises:
        RunError: the disk is full, or the folder is not writable.
    """
    write_text(path, json.dumps(metrics, indent=2, allow_nan=False) + "\n")


def _ground_truth(
    data: CocoData, image_ids: dict[int, int], category_ids: dict[int, int], *, masks: bool
) -> dict[str, Any]:
    """Return the data set in COCO's JSON format, with the given ids, and annotation ids from 1 on.

    For mask metrics, the box of an object without a mask is ignored, as a crowd is: the object does not count as
    missed, and detections mostly inside its box count neither as true nor as false positives.
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
