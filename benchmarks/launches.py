"""Launches and synchronizations of a training step and of inference on a GPU, counted without one.

    python benchmarks/launches.py [--batch-sizes 1 2 8] [--objects 20] [--min-size 320]

Runs Mask R-CNN R50-FPN with random weights on a pretended device (pretended_device.py), which computes on the CPU and
counts the operations that a GPU would launch, and how often the host would wait for it. Compares torchvision, the
converted model, the converted model with `sync_free=True`, and this with its frozen norms folded into the
convolutions, as in `maskloss train --sync-free true`. The backbone's norms are frozen, as in fine-tuning, and all
layers are trained, on random images with bitmap masks. Counts depend on the number of images, of detections and of
feature levels, hardly on the size of the images. Takes five minutes on two CPU cores. Writes results/launches.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measuring import write_results
from pretended_device import Counts, counted, moved, pretended_device, sent
from torch import Tensor, nn

from maskloss import convert
from maskloss.detection.builders import ModelSettings, build_model
from maskloss.detection.convolutions import fold_frozen_norms

#: Detections in each image.
DETECTIONS = 20

SIDES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torchvision": lambda model: model,
    "ours": convert,
    "sync_free": partial(convert, sync_free=True),
    "folded": lambda model: convert(fold_frozen_norms(model), sync_free=True),
}


def random_batch(size: int, objects: int, side: int) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Make landscape and portrait images with random objects, on the pretended device."""
    generator = torch.Generator().manual_seed(0)
    images, targets = [], []
    for index in range(size):
        height, width = (side, side * 4 // 3) if index % 2 else (side * 4 // 3, side)
        low = torch.rand(objects, 2, generator=generator) * torch.tensor([width * 0.6, height * 0.6])
        boxes = torch.cat(
            [low, low + side * (0.1 + 0.25 * torch.rand(objects, 2, generator=generator))], dim=1
        )
        masks = torch.zeros(objects, height, width, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.round().int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        target = {"boxes": boxes, "labels": torch.arange(1, objects + 1), "masks": masks}
        images.append(sent(torch.rand(3, height, width, generator=generator)))
        targets.append({key: sent(value) for key, value in target.items()})
    return images, targets


def step(model: nn.Module, images: list[Tensor], targets: list[dict[str, Any]]) -> Counts:
    """Count one training step, forward and backward."""
    model.zero_grad()
    torch.manual_seed(0)
    with counted() as counts:
        losses = model(images, targets)
        sum(losses.values()).backward()
    return counts


def inference(model: nn.Module, images: list[Tensor]) -> Counts:
    """Count the inference of images, with masks pasted as torchvision does."""
    model.eval()
    with torch.no_grad(), counted() as counts:
        model(images)
    return counts


def model_of(side: str, min_size: int, num_classes: int = 91) -> nn.Module:
    """Build the model of a side; all have the same random weights, and find `DETECTIONS` objects in an image."""
    torch.manual_seed(0)
    settings = ModelSettings(
        "maskrcnn_resnet50_fpn",
        num_classes,
        min_size=(min_size,),
        max_detections=DETECTIONS,
        frozen_normalization=True,
    )
    model = build_model(settings)
    model.roi_heads.score_thresh = 0.0
    for name, buffer in model.named_buffers():
        # Without statistics of features, the activations of a random network would grow from block to block.
        if name.endswith("running_var"):
            buffer.fill_(4.0)
    model = SIDES[side](model)
    if side != "torchvision":
        # The first ten batches are also checked for boxes in another format.
        model.conversion.box_format_checks = 0
    return model


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--objects", type=int, default=20, help="objects in each image")
    parser.add_argument("--min-size", type=int, default=320, help="shorter side, in px")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    print(f"{'':<24} {'':<12} {'launches':>9} {'waits':>6}")
    for size in arguments.batch_sizes:
        for side in SIDES:
            with pretended_device():
                images, targets = random_batch(size, arguments.objects, arguments.min_size)
                model = moved(model_of(side, arguments.min_size)).train()
                step(model, images, targets)  # copies constants
                rows = {f"training step, batch {size}": step(model, images, targets)}
                if size == arguments.batch_sizes[0]:
                    # With few classes: of 91, every random score would pass the threshold, far more than in practice.
                    model = moved(model_of(side, arguments.min_size, num_classes=3))
                    inference(model, images)
                    rows[f"inference, batch {size}"] = inference(model, images)
            for row, counts in rows.items():
                launches, waits = counts.launches.total(), counts.waits.total()
                print(f"{row:<24} {side:<12} {launches:>9} {waits:>6}", flush=True)
                results.setdefault(row, {})[side] = {
                    "launches": launches,
                    "waits": waits,
                    "waits_by_operation": dict(counts.waits),
                }
    write_results("launches", "cpu", results)


if __name__ == "__main__":
    main()
