"""The metrics of an evaluation: AP of boxes, masks and boundaries, and `metrics.json`."""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from faster_coco_eval import COCO, COCOeval_faster

from maskloss.data.coco import Annotation, CocoData
from maskloss.files import write_text

Results = list[dict[str, Any]]
Metrics = dict[str, Any]


class Values(dict[str, float | None]):
    """Values of a metric by name, "AP" among them, None for a value that the data cannot give.

    Attributes:
        classes: the values of each category, in the order of the data set's categories; empty if the metric has none.
    """

    def __init__(
        self, values: Mapping[str, float | None], classes: Sequence[Mapping[str, float | None]] = ()
    ) -> None:
        super().__init__(values)
        self.classes = tuple(classes)


@dataclass(frozen=True)
class Metric:
    """One kind of AP: what it compares between detections and ground truth.

    Attributes:
        label: name in tables, before "AP".
        field: field of COCO results that is compared; a result without it does not count.
        evaluate: function (ground truth, results, max_detections) -> values by name, "AP" among them, None for a value
            that the data cannot give; `Values` if it has values for each category, too.
    """

    label: str
    field: Literal["bbox", "segmentation"]
    evaluate: Callable[[COCO, COCO, int], Mapping[str, float | None]]


#: The index of each statistic in the summary of faster-coco-eval. AR is that with the largest number of detections.
STATISTICS = {"AP": 0, "AP50": 1, "AP75": 2, "APs": 3, "APm": 4, "APl": 5, "AR": 8}
#: For each AP of a category, its IoU thresholds among COCO's ten, and its size class among COCO's four.
_CLASS_PRECISIONS = {
    "AP": (slice(None), 0),
    "AP50": (slice(0, 1), 0),
    "AP75": (slice(5, 6), 0),
    "APs": (slice(None), 1),
    "APm": (slice(None), 2),
    "APl": (slice(None), 3),
}


def coco_summary(
    iou_type: Literal["bbox", "segm", "boundary"], *, use_categories: bool = True
) -> Callable[[COCO, COCO, int], Values]:
    """Return a function for `Metric.evaluate` that computes COCO's summary, over all categories and for each.

    Args:
        iou_type: which IoU decides whether a detection matches an object.
        use_categories: whether a detection must also have the object's category.
    """

    def evaluate(truth: COCO, results: COCO, max_detections: int) -> Values:
        evaluation = COCOeval_faster(
            truth,
            results,
            iou_type,
            print_function=lambda *_: None,
            boundary_cpu_count=torch.get_num_threads(),  # changes no number
        )
        evaluation.params.maxDets = [1, min(10, max_detections), max_detections]
        evaluation.params.useCats = int(use_categories)
        evaluation.evaluate()
        evaluation.accumulate()
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.summarize()
        values = {name: float(evaluation.stats[index]) for name, index in STATISTICS.items()}
        # COCO has -1 where there is nothing to find.
        summary = {name: None if value < 0 else value for name, value in values.items()}
        return Values(summary, _class_values(evaluation.eval) if use_categories else ())

    return evaluate


def _class_values(accumulated: Mapping[str, Any]) -> list[dict[str, float | None]]:
    """Return the values of each category: COCO's summary, and precision, recall and score threshold of the best F1.

    F1 is that of detections with an IoU of at least 0.5. COCO's curve has the precision at 101 values of the recall, so
    the recall here is up to 0.01 too low. Where no detection is right, no threshold is the best.

    Args:
        accumulated: precision and scores (IoU thresholds, recalls, categories, size classes, numbers of detections),
            and recall, the same without recalls; -1 where there is no object.
    """
    precision, recall, scores = (accumulated[name][..., -1] for name in ("precision", "recall", "scores"))
    recalls = np.linspace(0, 1, precision.shape[1])
    classes = []
    for category in range(precision.shape[2]):
        values = {
            name: _mean(precision[thresholds, :, category, size])
            for name, (thresholds, size) in _CLASS_PRECISIONS.items()
        }
        values["AR"] = _mean(recall[:, category, 0])
        curve = precision[0, :, category, 0]
        f1 = 2 * curve * recalls / np.maximum(curve + recalls, 1e-9)
        # At equal precision, F1 rises with the recall, so the maximum is a point of the curve, not its interpolation.
        best = int(f1.argmax())
        found = values["AP"] is not None and f1[best] > 0
        nothing = None if values["AP"] is None else 0.0
        values["precision"] = float(curve[best]) if found else nothing
        values["recall"] = float(recalls[best]) if found else nothing
        values["score_threshold"] = float(scores[0, best, category, 0]) if found else None
        classes.append(values)
    return classes


def _mean(values: npt.NDArray[np.float64]) -> float | None:
    """Return the mean of the values that are not -1, or None if there are none."""
    known = values[values > -1]
    return float(known.mean()) if known.size else None


#: The metrics by their keys in metrics.json. Evaluation, history, report and tables loop over this table.
#:
#: "boundary" is Boundary IoU, Cheng et al., 2021, arXiv:2103.16562: the smaller of two values, the masks' IoU and the
#: IoU of their parts that lie within 2 % of the image's diagonal from the boundary.
METRICS: dict[str, Metric] = {
    "bbox": Metric("box", "bbox", coco_summary("bbox")),
    "segm": Metric("mask", "segmentation", coco_summary("segm")),
    "boundary": Metric("boundary", "segmentation", coco_summary("boundary")),
}


def labels() -> dict[str, str]:
    """Return the label of each metric, for tables."""
    return {kind: metric.label for kind, metric in METRICS.items()}


@dataclass(frozen=True)
class Curves:
    """Precision over recall at an IoU of .5, and the score at which each recall is reached.

    Attributes:
        names: the categories that have objects.
        recall: (101,) from 0 to 1.
        precision: (K, 101) of each category, 0 beyond its largest recall.
        scores: (K, 101), the smallest score of the detections that reach the recall; 0 where none do.
    """

    names: tuple[str, ...]
    recall: npt.NDArray[np.float64]
    precision: npt.NDArray[np.float64]
    scores: npt.NDArray[np.float64]


def precision_recall_curves(data: CocoData, results: Results, *, max_detections: int = 100) -> Curves:
    """Return the curves of masks, or of boxes if no result has a mask, for each category.

    Args:
        data: the ground truth.
        results: COCO results.
        max_detections: see `average_precision`.
    """
    kind: Literal["bbox", "segm"] = "segm" if any("segmentation" in result for result in results) else "bbox"
    metric = METRICS[kind]
    truth, numbered = _numbered(data, results, metric.field)
    evaluation = COCOeval_faster(
        truth, truth.loadRes(_results_of(metric, numbered)), kind, print_function=lambda *_: None
    )
    evaluation.params.maxDets = [max_detections]
    evaluation.params.iouThrs = np.array([0.5])
    evaluation.evaluate()
    evaluation.accumulate()
    precision, scores = (evaluation.eval[name][0, :, :, 0, -1].T for name in ("precision", "scores"))
    known = (precision > -1).any(axis=1)
    return Curves(
        tuple(category.name for category, found in zip(data.categories, known, strict=True) if found),
        np.linspace(0, 1, precision.shape[1]),
        precision[known],
        scores[known],
    )


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
        "classes" is a list with, for each category, its id, name and number of objects, and under the key of each
        metric the same statistics with the precision, recall and score_threshold of the best F1.
    """
    numbered = {field: _numbered(data, results, field) for field in ("bbox", "segmentation")}
    counts = Counter(annotation.category_id for image in data.images for annotation in image.objects)
    classes: list[dict[str, Any]] = [
        {"id": category.id, "name": category.name, "objects": counts[category.id]}
        for category in data.categories
    ]
    metrics: Metrics = {}
    for kind, metric in METRICS.items():
        truth, own = numbered[metric.field]
        values = metric.evaluate(truth, truth.loadRes(_results_of(metric, own)), max_detections)
        metrics[kind] = dict(values)
        if isinstance(values, Values) and values.classes:
            for category, statistics in zip(classes, values.classes, strict=True):
                category[kind] = dict(statistics)
    return {**metrics, "classes": classes}


def _numbered(
    data: CocoData, results: Results, field: Literal["bbox", "segmentation"]
) -> tuple[COCO, Results]:
    """Return the ground truth for a field, and the results, with ids from 1 on."""
    image_ids = {image.id: number for number, image in enumerate(data.images, start=1)}
    category_ids = {category.id: number for number, category in enumerate(data.categories, start=1)}
    numbered = [
        {
            **result,
            "image_id": image_ids[result["image_id"]],
            "category_id": category_ids[result["category_id"]],
        }
        for result in results
    ]
    return COCO(_ground_truth(data, image_ids, category_ids, masks=field == "segmentation")), numbered


def _results_of(metric: Metric, results: Results) -> Results:
    """Return copies of the results with only the field that a metric compares, because `loadRes` modifies its input.

    Boxes are removed for mask metrics, because faster-coco-eval would take the size class from the box. Masks are
    ranked by `mask_score`, where the mask branch predicts one, instead of the score of the class.
    """
    of_masks = metric.field == "segmentation"
    other = "bbox" if of_masks else "segmentation"
    chosen = [
        {key: value for key, value in result.items() if key != other}
        for result in results
        if metric.field in result
    ]
    if of_masks:
        for result in chosen:
            result["score"] = result.get("mask_score", result["score"])
    return chosen


def score_thresholds(metrics: Metrics, results: Results) -> tuple[float | None, ...]:
    """Return the score with the best F1 for each category, None for a category that is never found.

    Args:
        metrics: from `average_precision`.
        results: the results that it was computed from.
    """
    # Masks with scores of their own are ranked by these, but detections are kept by the score of their class.
    has_masks = any("segmentation" in result for result in results)
    kind = "segm" if has_masks and not any("mask_score" in result for result in results) else "bbox"
    return tuple(category.get(kind, {}).get("score_threshold") for category in metrics["classes"])


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
