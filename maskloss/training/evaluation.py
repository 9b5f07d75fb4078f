"""COCO evaluation: losses on the validation set, and box and mask AP."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from maskloss.data.coco import CocoData
from maskloss.data.dataset import CocoDataset, Crowds, collate
from maskloss.data.sampler import mixed_seed
from maskloss.detection.conversion import losses_and_detections
from maskloss.detection.results import coco_results
from maskloss.detection.target_checks import is_resized_to_nothing
from maskloss.errors import InputError, RunError
from maskloss.training.metrics import Metrics, Results, average_precision

logger = logging.getLogger(__name__)

#: Of the samples that losses are computed on, whatever the run's: `maskloss evaluate` knows no seed and gives the same
#: numbers, and runs of several seeds compare.
_SEED = 0


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        metrics: for each of `METRICS` AP, AP50, AP75, APs, APm, APl and AR as fractions of 1, None for a size class
            without ground truth; "loss" with the mean of each term over the images, and their sum, or None where
            no losses were asked for.
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
    rank: int = 0,
    world_size: int = 1,
    losses: bool = True,
    crowds: Crowds = "leave_out",
) -> Evaluation:
    """Evaluate a converted model that leaves mask probabilities unpasted (`paste=None`).

    AP counts as many detections as the model makes (`roi_heads.detections_per_img`).

    The network sees one image at a time, in float32 whatever precision it is trained in, and what is sampled for an
    image's losses is drawn from a seed of its own: so no number depends on the size of the batches or on how many
    processes there are.

    Args:
        model: on `device`.
        data: the validation set, its categories in the model's order.
        batch_size: images that are loaded together.
        device: where to run.
        workers: processes that load data.
        rank: of this process; each takes every `world_size`-th image.
        world_size: number of processes.
        losses: whether to compute losses, or AP alone.
        crowds: what crowds are to the losses, as in the training; AP always ignores what lies in them.

    Raises:
        InputError: an image cannot be read, or is resized to nothing.
        RunError: a loss is not finite, or a worker process died.
    """
    check_sizes(data, model)
    indices = range(rank, len(data.images), world_size)
    loader = DataLoader(
        Subset(CocoDataset(data, crowds=crowds), indices),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate,
    )
    category_ids = [category.id for category in data.categories]
    results: Results = []
    values: list[tuple[int, dict[str, float]]] = []
    bar = tqdm(loader, desc="evaluating", disable=None if rank == 0 else True, leave=False)
    remaining = iter(indices)
    was_training = model.training
    model.eval()
    with _in_float32(model), torch.no_grad():
        for images, targets in batches_on(bar, device):
            for image, target in zip(images, targets, strict=True):
                index = next(remaining)
                if losses:
                    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                        torch.manual_seed(mixed_seed(_SEED, index))
                        found, detections = losses_and_detections(model, [image], [target])
                    values.append((index, {key: float(value) for key, value in found.items()}))
                else:
                    detections = model([image])
                size = (image.shape[-2], image.shape[-1])
                results += coco_results(model, detections, [size], [target["image_id"]], category_ids)
    model.train(was_training)
    if world_size > 1:
        results, values = gather_object(results), gather_object(values)
    places = {image.id: place for place, image in enumerate(data.images)}
    results.sort(key=lambda result: places[result["image_id"]])
    means = _means(values) if losses else None
    heads: Any = model.roi_heads
    metrics = average_precision(data, results, max_detections=heads.detections_per_img)
    return Evaluation({**metrics, "loss": means}, results)


def warn_of_crowded_images(data: CocoData, max_detections: int) -> None:
    """Warn of images that have more objects than are detected in one, and name the option that finds them."""
    counts = [len(image.object_rows) for image in data.images]
    crowded = sum(count > max_detections for count in counts)
    if not crowded:
        return
    most = max(counts)
    name = data.images[counts.index(most)].file_name
    logger.warning(
        "%d images of %s have more than the %d objects that are detected in one, up to %d (%s): --max-detections %d "
        "would find them",
        crowded,
        data.annotation_file,
        max_detections,
        most,
        name,
        most,
    )


def _means(values: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """Return the mean of each term over the images, added up in the images' order, and the sum of these."""
    of_images = [losses for _, losses in sorted(values, key=lambda value: value[0])]
    totals = {key: math.fsum(losses[key] for losses in of_images) for key in of_images[0]}
    for key, total in totals.items():
        if not math.isfinite(total):
            raise RunError(f"evaluation: {key} is {total}, not finite; the model has diverged")
    means = {key: total / len(of_images) for key, total in totals.items()}
    means["loss"] = math.fsum(totals.values()) / len(of_images)
    return means


def check_sizes(data: CocoData, model: nn.Module) -> None:
    """Check that of no image a side is resized to nothing, as of one that is a thousand times as long as high.

    Raises:
        InputError: one is; the message names it.
    """
    for image in data.images:
        if (fault := resized_to_nothing(model, image.width, image.height)) is not None:
            raise InputError(
                f"{data.image_path(image)}: {fault} (image {image.id} of {data.annotation_file})"
            )


def resized_to_nothing(model: nn.Module, width: int, height: int) -> str | None:
    """Say what is wrong with an image of which the model's transform leaves nothing, None if it leaves something."""
    transform: Any = model.transform
    if not is_resized_to_nothing(height, width, min(transform.min_size), transform.max_size):
        return None
    return (
        f"{width} x {height} px are resized to at most {transform.max_size} px, which leaves nothing of the "
        "shorter side; cut the image into parts or raise --max-size"
    )


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Take the autocast from a model that accelerate has put it on: it replaces `forward` of the instance."""
    patched = model.__dict__.pop("forward", None)
    try:
        yield
    finally:
        if patched is not None:
            model.__dict__["forward"] = patched


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
