"""COCO evaluation: the losses on the validation set, and box, mask and boundary AP."""

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
from torchvision.transforms.v2.functional import to_dtype
from tqdm import tqdm

from maskloss.data.coco import CocoData
from maskloss.data.dataset import CocoDataset, Crowds, collate
from maskloss.data.sampler import mixed_seed
from maskloss.detection.conversion import evaluation_mode, losses_and_detections
from maskloss.detection.results import coco_results
from maskloss.detection.transform import is_resized_to_nothing
from maskloss.errors import InputError, RunError
from maskloss.masks.transfer import send
from maskloss.training.interruption import ignore_interrupts
from maskloss.training.metrics import Metrics, Results, average_precision

logger = logging.getLogger(__name__)

#: Seed of the anchors and RoIs sampled for the losses. It does not depend on the run's seed, so that `maskloss
#: evaluate`, which has no seed, returns the same losses as training, and runs with different seeds can be compared.
_SEED = 0


@dataclass(frozen=True)
class Evaluation:
    """The metrics and detections of an evaluation.

    Attributes:
        metrics: for each of `METRICS`, its AP, AP50, AP75, APs, APm, APl and AR in [0, 1], or None for a size class
            without ground truth. "loss" holds the mean of each loss term over the images and their sum, or is None if
            no losses were computed.
        results: COCO results of all images, with boxes and RLE masks.
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

    AP counts at most as many detections per image and category as the model returns per image
    (`roi_heads.detections_per_img`).

    The results do not depend on the batch size or the number of processes: the network gets one image at a time, always
    in float32, and each image has its own seed for the sampling of anchors and RoIs.

    Args:
        model: the model, on `device`.
        data: the validation set, with its categories in the model's order.
        batch_size: number of images that are loaded together.
        device: where to run.
        workers: number of processes that load data.
        rank: index of this process. Each process evaluates every `world_size`-th image.
        world_size: number of processes.
        losses: whether to compute losses besides AP.
        crowds: how the losses treat crowds, as in `TrainConfig`. AP always ignores detections in crowds.

    Raises:
        InputError: an image cannot be read, or its shorter side would be resized to 0 px.
        RunError: a loss is not finite, or a worker process died.
    """
    check_sizes(data, model)
    indices = range(rank, len(data.images), world_size)
    loader = DataLoader(
        Subset(CocoDataset(data, crowds=crowds, scaled=False), indices),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=ignore_interrupts,
        pin_memory=device.type == "cuda",
    )
    category_ids = [category.id for category in data.categories]
    results: Results = []
    values: list[tuple[int, dict[str, float]]] = []
    bar = tqdm(loader, desc="evaluating", disable=None if rank == 0 else True, leave=False)
    remaining = iter(indices)
    with evaluation_mode(model), _in_float32(model), torch.no_grad(), dead_workers_named():
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
    if world_size > 1:
        results, values = gather_object(results), gather_object(values)
    places = {image.id: place for place, image in enumerate(data.images)}
    results.sort(key=lambda result: places[result["image_id"]])
    means = _means(values) if losses else None
    heads: Any = model.roi_heads
    metrics = average_precision(data, results, max_detections=heads.detections_per_img)
    return Evaluation({**metrics, "loss": means}, results)


def warn_of_crowded_images(data: CocoData, max_detections: int) -> None:
    """Warn if images have more objects than the model detects per image, and name the option to raise."""
    counts = [len(image.object_rows) for image in data.images]
    crowded = sum(count > max_detections for count in counts)
    if not crowded:
        return
    most = max(counts)
    name = data.images[counts.index(most)].file_name
    logger.warning(
        "%d images of %s have more objects than the %d detections per image, up to %d (%s): --max-detections %d "
        "allows for all of them",
        crowded,
        data.annotation_file,
        max_detections,
        most,
        name,
        most,
    )


def _means(values: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """Return the mean of each loss term over the images, and the sum of these means as "loss"."""
    losses_by_image = [losses for _, losses in sorted(values, key=lambda value: value[0])]
    totals = {key: math.fsum(losses[key] for losses in losses_by_image) for key in losses_by_image[0]}
    for key, total in totals.items():
        if not math.isfinite(total):
            raise RunError(f"evaluation: {key} is {total}, not finite; the model has diverged")
    means = {key: total / len(losses_by_image) for key, total in totals.items()}
    means["loss"] = math.fsum(totals.values()) / len(losses_by_image)
    return means


def check_sizes(data: CocoData, model: nn.Module) -> None:
    """Check that the model's transform resizes no image's shorter side to 0 px, as it does for extreme aspect ratios.

    Raises:
        InputError: a side would be 0 px; the message names the image.
    """
    for image in data.images:
        if (fault := resized_to_nothing(model, image.width, image.height)) is not None:
            raise InputError(
                f"{data.image_path(image)}: {fault} (image {image.id} of {data.annotation_file})"
            )


def resized_to_nothing(model: nn.Module, width: int, height: int) -> str | None:
    """Return an error message if the model's transform would resize the image's shorter side to 0 px, else None."""
    transform: Any = model.transform
    if not is_resized_to_nothing(height, width, min(transform.min_size), transform.max_size):
        return None
    return (
        f"{width} x {height} px are resized to at most {transform.max_size} px, which leaves nothing of the "
        "shorter side; cut the image into parts or raise --max-size"
    )


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Disable accelerate's autocast, which replaces `forward` of the model instance."""
    patched = model.__dict__.pop("forward", None)
    try:
        yield
    finally:
        if patched is not None:
            model.__dict__["forward"] = patched


@contextmanager
def dead_workers_named() -> Iterator[None]:
    """Raise RunError if a data-loader worker dies in this context.

    The system kills workers mostly because memory runs out. torch raises its error wherever the main process is then.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RunError(f"a data-loader worker died: {error}; use fewer --workers to save memory") from error


def batches_on(loader: Any, device: torch.device) -> Iterator[tuple[list[Tensor], list[dict[str, Any]]]]:
    """Yield the loader's batches on a device, with pixels as float32 in [0, 1].

    The transfers do not synchronize. `EncodedMasks` remain on the host.

    Raises:
        InputError: an image cannot be read. The loader returns this error in place of the batch.
    """
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        images, targets = batch
        moved = [
            {
                key: send(value, device) if isinstance(value, Tensor) else value
                for key, value in target.items()
            }
            for target in targets
        ]
        # Scaled there, because uint8 pixels are a quarter of the bytes.
        yield [to_dtype(send(image, device), torch.float32, scale=True) for image in images], moved
