"""Evaluation: a model's losses and detections on a validation set."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from maskloss.data.coco import CocoData
from maskloss.data.dataset import CocoDataset, collate
from maskloss.detection.conversion import losses_and_detections
from maskloss.detection.results import coco_results
from maskloss.errors import InputError, RunError
from maskloss.training.metrics import Metrics, Results, average_precision

#: Of the samples that losses are computed on: the same in every evaluation, so that runs of other seeds compare, and
#: the losses of a model are the same number whoever asks.
_SEED = 0


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        metrics: "bbox" and "segm" with AP, AP50, AP75, APs, APm and APl as fractions of 1, None for a size
            class without ground truth; "loss" with the mean of each term over the images, and their sum, or None where
            they were not asked for.
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
    losses: bool = True,
    rank: int = 0,
    world_size: int = 1,
) -> Evaluation:
    """Evaluate a converted model that leaves mask probabilities unpasted (`paste=None`).

    The numbers do not depend on `batch_size` nor on `world_size`, beyond rounding: each loss is the mean over the
    images of what an image gives by itself, with random draws of its own (`losses_and_detections`), and only images of
    one size share a batch, so none is padded for another's sake. A model computes in its parameters' precision,
    float32, unless the caller has autocast on.

    Args:
        model: on `device`.
        data: the validation set, its categories in the model's order.
        batch_size: images per pass, at most.
        device: where to run.
        workers: processes that load data.
        losses: compute them, not detections alone.
        rank: of this process; each takes every `world_size`-th image.
        world_size: number of processes.

    Raises:
        InputError: an image cannot be read.
        RunError: a loss is not finite, or a worker process died.
    """
    indices = range(rank, len(data.images), world_size)
    batches = batches_of_one_size(
        [(data.images[i].height, data.images[i].width) for i in indices], batch_size
    )
    loader = DataLoader(
        Subset(CocoDataset(data), indices), batch_sampler=batches, num_workers=workers, collate_fn=collate
    )
    results: Results = []
    sums: dict[str, float] = {}
    bar = tqdm(loader, desc="evaluating", disable=None if rank == 0 else True, leave=False)
    for images, targets in batches_on(bar, device):
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(_SEED)
            if losses:
                terms, detections = losses_and_detections(model, images, targets)
            else:
                terms, detections = {}, model(images)
        for key, value in terms.items():
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
    places = {image.id: place for place, image in enumerate(data.images)}
    results.sort(key=lambda result: places[result["image_id"]])
    for key, total in sums.items():
        if not math.isfinite(total):
            raise RunError(f"evaluation: {key} is {total}, not finite; the model has diverged")
    means: dict[str, float | None] | None = None
    if losses:
        means = {key: total / len(data.images) for key, total in sums.items()}
        means["loss"] = math.fsum(sums.values()) / len(data.images)
    return Evaluation({**average_precision(data, results), "loss": means}, results)


def batches_of_one_size(sizes: Sequence[tuple[int, int]], batch_size: int) -> list[list[int]]:
    """Group images into batches in which all have one size.

    Args:
        sizes: (H, W) of each image.
        batch_size: images in a batch, at most.

    Returns:
        Indices of images, each once; batches are in the order of their first image.
    """
    batches: list[list[int]] = []
    open_batches: dict[tuple[int, int], list[int]] = {}
    for index, size in enumerate(sizes):
        batch = open_batches.get(size)
        if batch is None or len(batch) == batch_size:
            batch = open_batches[size] = []
            batches.append(batch)
        batch.append(index)
    return batches


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


def _summed(parts: list[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for key, value in part.items():
            total[key] = total.get(key, 0.0) + value
    return total
