"""COCO evaluation: losses on the validation set, and box and mask AP."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from faster_coco_eval import COCO, COCOeval_faster
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from maskloss.data.batches import mixed_seed
from maskloss.data.coco import Annotation, CocoData
from maskloss.data.dataset import CocoDataset, collate
from maskloss.detection.conversion import losses_and_detections
from maskloss.detection.results import coco_results
from maskloss.errors import InputError, RunError
from maskloss.files import write_text

Results = list[dict[str, Any]]
Metrics = dict[str, dict[str, float | None]]

_STATISTICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        metrics: "bbox" and "segm" with AP, AP50, AP75, APs, APm and APl as fractions of 1, None for a size
            class without ground truth; "loss" with the mean of each term over the images, and their sum.
        results: COCO results with boxes and RLE masks, of every image.
    """

    metrics: Metrics
    results: Results


def evaluate(
    model: nn.Module,
    data: CocoData,
    *,
    batch_size: int,
    device: torch.device,
    workers: int = 0,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Evaluation:
    """Evaluate a converted model that leaves mask probabilities unpasted (`paste=None`).

    Args:
        model: on `device`.
        data: the validation set, its categories in the model's order.
        batch_size: images per pass.
        device: where to run.
        workers: processes that load data.
        seed: of the samples that the losses are computed on.
        rank: of this process; each takes every `world_size`-th image.
        world_size: number of processes.

    Raises:
        InputError: an image cannot be read.
        RunError: a loss is not finite, or a worker process died.
    """
    indices = range(rank, len(data.images), world_size)
    loader = DataLoader(
        Subset(CocoDataset(data), indices), batch_size=batch_size, num_workers=workers, collate_fn=collate
    )
    results: Results = []
    sums: dict[str, float] = {}
    bar = tqdm(loader, desc="evaluating", disable=None if rank == 0 else True, leave=False)
    for number, (images, targets) in enumerate(batches_on(bar, device)):
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(mixed_seed(seed, rank, number))
            losses, detections = losses_and_detections(model, images, targets)
        for key, value in losses.items():
            sums[key] = sums.get(key, 0.0) + float(value) * len(images)
        results += coco_results(
            model,
            detections,
            [(image.shape[-2], image.shape[-1]) for image in images],
            [target["image_id"] for target in targets],
            [category.id for category in data.categories],
        )
    if world_size > 1:
        results = gather_object(results)
        sums = _summed(gather_object([sums]))
    for key, total in sums.items():
        if not math.isfinite(total):
            raise RunError(f"evaluation: {key} is {total}, not finite; the model has diverged")
    means: dict[str, float | None] = {key: total / len(data.images) for key, total in sums.items()}
    means["loss"] = math.fsum(sums.values()) / len(data.images)
    return Evaluation({**average_precision(data, results), "loss": means}, results)


def average_precision(data: CocoData, results: Results) -> Metrics:
    """Box and mask AP of COCO results, as pycocotools computes them, whatever the ids in the file.

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
    for kind, left_out in (("bbox", "segmentation"), ("segm", "bbox")):
        truth = COCO(_ground_truth(data, image_ids, category_ids, masks=kind == "segm"))
        of_kind = [{k: v for k, v in result.items() if k != left_out} for result in results]
        if kind == "segm":
            # How good a mask is, where the mask branch says so, and not how sure its class is.
            for result in of_kind:
                result["score"] = result.get("mask_score", result["score"])
        found = truth.loadRes(of_kind)
        evaluation = COCOeval_faster(truth, found, kind, print_function=lambda *_: None)
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


def batches_on(loader: Any, device: torch.device) -> Iterator[tuple[list[Tensor], list[dict[str, Any]]]]:
    """Yield the loader's batches on a device; raise the InputError that stands in the place of one.

    Raises:
        InputError: an image cannot be read.
        RunError: a worker process died.
    """
    remaining = iter(loader)
    while True:
        try:
            batch = next(remaining)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            # torch's way of saying that the system killed one, mostly for its memory.
            raise RunError(f"a data-loader worker died: {error}; fewer --workers need less memory") from error
        if isinstance(batch, InputError):
            raise batch
        images, targets = batch
        moved = [
            {key: value.to(device) if hasattr(value, "to") else value for key, value in target.items()}
            for target in targets
        ]
        yield [image.to(device, non_blocking=True) for image in images], moved


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


def _summed(parts: list[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for key, value in part.items():
            total[key] = total.get(key, 0.0) + value
    return total
