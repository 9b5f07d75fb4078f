"""Comparison of maskloss and torchvision on real COCO images: loss curve, learning, half precision, speed, memory.

    python benchmarks/gpu_validation.py --images DIR --train-annotations FILE --val-annotations FILE --output DIR
                                        [--device cuda|cpu] [--parts tests curve speed precision learning]
                                        [--steps N] [--min-size PX] [--weights FILE] [--learning-steps N]

The images may be any subset of COCO, such as one made by `maskloss subset`. `--steps` is the number of steps of the
curve (default 200) and of the comparison of precisions (at most 50). With `--device cpu --steps 2 --min-size 96
--learning-steps 2` every part can be tried without a GPU. Prints a table for each part, and writes
results/gpu_validation-cuda.json (without -cuda on a CPU) after each part, so that an interruption loses only one
part.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from measuring import Spread, alternating, count_waits, peak_bytes, speedup, without_tf32, write_results
from torch import Tensor, nn
from torchvision.models.detection import maskrcnn_resnet50_fpn

from maskloss import convert
from maskloss.data.coco import CocoData, read_coco
from maskloss.data.dataset import CocoDataset, collate
from maskloss.training.config import TrainConfig
from maskloss.training.loop import train

Batch = tuple[list[Tensor], list[dict[str, Any]]]
PRESETS = ("torchvision", "detectron2", "matterport", "aligned")
SEEDS = (0, 1, 2)
#: Number of images to overfit on, and the mask AP to reach.
OVERFITTED, GOAL = 64, 0.60


# Shared by all parts


def batches(data: CocoData, size: int, device: torch.device) -> Iterator[Batch]:
    """Yield endless batches of images with objects, in file order, with masks as pixels, which both sides accept."""
    dataset = CocoDataset(data)
    indices = [index for index, record in enumerate(data.images) if record.objects]
    position = 0
    while True:
        chosen = [indices[(position + offset) % len(indices)] for offset in range(size)]
        position += size
        batch = collate([dataset[index] for index in chosen])
        assert isinstance(batch, tuple)
        targets = [
            {
                "boxes": target["boxes"].to(device),
                "labels": target["labels"].to(device),
                "masks": target["masks"].bitmaps().to(device),
            }
            for target in batch[1]
        ]
        yield [image.to(device) for image in batch[0]], targets


def stock_model(num_classes: int, min_size: int, device: torch.device) -> nn.Module:
    """Build torchvision's Mask R-CNN R50-FPN, with the same random weights each time."""
    torch.manual_seed(0)
    model: nn.Module = maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=num_classes, min_size=min_size
    )
    return model.to(device)


def train_steps(
    model: nn.Module,
    stream: Iterator[Batch],
    steps: int,
    *,
    dtype: torch.dtype | None = None,
    learning_rate: float = 0.0025,
) -> list[dict[str, float]]:
    """Train by SGD, seeded at each step and in autocast to `dtype` if given; return the losses by step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
    device = next(model.parameters()).device
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16 and device.type == "cuda")
    history = []
    model.train()
    for step, (images, targets) in enumerate(islice(stream, steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 50)
        torch.manual_seed(step)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            losses = model(images, targets)
        optimizer.zero_grad()
        scaler.scale(torch.stack(list(losses.values())).sum()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        scaler.step(optimizer)
        scaler.update()
        history.append({key: float(value.detach()) for key, value in losses.items()})
    return history


# 1. The same curve


def curve(data: CocoData, steps: int, min_size: int, device: torch.device) -> dict[str, Any]:
    """Record the five terms per step of stock, the converted model, and stock again as the noise floor."""
    num_classes = len(data.categories) + 1
    histories = {}
    with without_tf32():
        for side in ("torchvision", "ours", "torchvision again"):
            model = stock_model(num_classes, min_size, device)
            if side == "ours":
                convert(model)
            histories[side] = train_steps(model, batches(data, 2, device), steps)
    found: dict[str, Any] = {"histories": histories}
    print(f"\ncurve of {steps} steps: largest relative difference of a term to torchvision's")
    for side in ("ours", "torchvision again"):
        apart = [
            max(abs(one[key] - other[key]) / max(abs(other[key]), 1e-12) for key in other)
            for one, other in zip(histories[side], histories["torchvision"], strict=True)
        ]
        parted = next((step for step, value in enumerate(apart, start=1) if value > 0.01), None)
        found[side] = {"at step 1": apart[0], "first step above 1 %": parted, "largest": max(apart)}
        print(
            f"{side:<20} step 1: {apart[0]:.2e}   above 1 % first at step {parted}   largest {max(apart):.2e}"
        )
    return found


# 2. Learning on real images


def learning(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Overfit some images, and train on all and evaluate on others, with all categories merged into one."""
    folder: Path = arguments.output
    annotations = {
        "some": merged(arguments.train_annotations, folder / "some.json", OVERFITTED),
        "all": merged(arguments.train_annotations, folder / "all.json", None),
        "val": merged(arguments.val_annotations, folder / "val.json", None),
    }
    overfitted = {
        preset: trained(arguments, annotations["some"], annotations["some"], preset, 0, f"overfit-{preset}")
        for preset in ("torchvision", "aligned")
    }
    print(f"\noverfitted on {OVERFITTED} images: mask AP on them, to reach {GOAL}")
    for preset, metrics in overfitted.items():
        print(
            f"{preset:<14} box AP {percent(metrics['bbox']['AP'])}   mask AP {percent(metrics['segm']['AP'])}"
        )
    generalised = {
        preset: [
            trained(arguments, annotations["all"], annotations["val"], preset, seed, f"{preset}-{seed}")
            for seed in SEEDS
        ]
        for preset in PRESETS
    }
    print(f"\ntrained on all training images, categories merged; on the others, {len(SEEDS)} seeds")
    for preset, runs in generalised.items():
        cells = []
        for kind, name in (("bbox", "box AP"), ("segm", "mask AP")):
            values = [100 * (run[kind]["AP"] or 0.0) for run in runs]
            cells.append(f"{name} {statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}")
        print(f"{preset:<14} " + "   ".join(cells))
    return {"overfitted": overfitted, "generalised": generalised}


def merged(annotations: Path, output: Path, images: int | None) -> Path:
    """Write annotations with all categories merged, for the first `images` images with objects, or for all."""
    document = json.loads(annotations.read_text())
    objects = [{**a, "category_id": 1} for a in document["annotations"]]
    shown = {a["image_id"] for a in objects if not a.get("iscrowd")}
    chosen = [image for image in document["images"] if image["id"] in shown][:images]
    ids = {image["id"] for image in chosen}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(
        json.dumps(
            {
                "images": chosen,
                "annotations": [a for a in objects if a["image_id"] in ids],
                "categories": [{"id": 1, "name": "object"}],
            }
        )
    )
    return output


def trained(
    arguments: argparse.Namespace, annotations: Path, validation: Path, preset: str, seed: int, name: str
) -> dict[str, Any]:
    """Run `maskloss train` once, and return its metrics."""
    steps: int = arguments.learning_steps
    config = TrainConfig(
        train_images=str(arguments.images),
        train_annotations=str(annotations),
        val_images=str(arguments.images),
        val_annotations=str(validation),
        output=str(arguments.output / name),
        model="mobilenet_v2" if arguments.weights else "resnet18",
        weights=str(arguments.weights) if arguments.weights else "none",
        frozen_normalization=False,
        loss=preset,
        max_steps=steps,
        batch_size=8,
        optimizer="adamw",
        learning_rate=5e-4,
        weight_decay=1e-3,
        warmup_steps=min(50, steps),
        schedule="cosine",
        min_size=arguments.min_size if arguments.device == "cpu" else 320,
        max_size=512,
        horizontal_flip=0.0 if name.startswith("overfit") else 0.5,
        seed=seed,
        log_every=max(steps // 20, 1),
        checkpoint_every=steps,
        workers=0 if arguments.device == "cpu" else 8,
        device=arguments.device,
        resume=True,
    )
    return dict(train(config).evaluation.metrics)


# 3. Half precision, channels_last, torch.compile


def precision(data: CocoData, steps: int, min_size: int, device: torch.device) -> dict[str, Any]:
    """Compare the mean total loss of some steps in each mode with that in float32."""
    num_classes = len(data.categories) + 1
    modes: dict[str, dict[str, Any]] = {"float32": {}, "bfloat16": {"dtype": torch.bfloat16}}
    if device.type == "cuda":
        modes["float16"] = {"dtype": torch.float16}
    modes["channels_last"] = {"channels_last": True}
    modes["bfloat16, channels_last"] = {"dtype": torch.bfloat16, "channels_last": True}
    modes["compiled backbone"] = {"compiled": True}
    modes["sync_free"] = {"sync_free": True}
    found: dict[str, Any] = {}
    print(f"\nmean loss of {steps} steps")
    for name, mode in modes.items():
        model = prepared(stock_model(num_classes, min_size, device), "ours", **{**mode, "dtype": None})
        history = train_steps(model, batches(data, 2, device), steps, dtype=mode.get("dtype"))
        totals = [sum(line.values()) for line in history]
        mean = statistics.fmean(totals)
        reference = found["float32"]["mean"] if found else mean
        found[name] = {"mean": mean, "relative": mean / reference - 1, "totals": totals}
        print(f"{name:<28} {mean:.4f}   {100 * (mean / reference - 1):+.2f} %")
    found["bfloat16 boxes"] = bfloat16_boxes(data, num_classes, min_size, device)
    print(f"boxes in bfloat16: the largest difference of a loss is {100 * found['bfloat16 boxes']:.2f} %")
    return found


def bfloat16_boxes(data: CocoData, num_classes: int, min_size: int, device: torch.device) -> float:
    """Return the largest relative difference of a term if the boxes of the targets are in bfloat16."""
    model = convert(stock_model(num_classes, min_size, device)).train()
    images, targets = next(batches(data, 2, device))
    rounded = []
    for image, target in zip(images, targets, strict=True):
        # If bfloat16 cannot represent the image size, boxes at the border would be rounded beyond it.
        height, width = image.shape[1:]
        inside = torch.tensor([width, height, width, height], device=device) * (1 - 2**-8)
        boxes = torch.minimum(target["boxes"], inside).bfloat16()
        rounded.append({**target, "boxes": boxes})
    exact = [{**t, "boxes": r["boxes"].float()} for t, r in zip(targets, rounded, strict=True)]
    losses = []
    for these_targets in (exact, rounded):
        torch.manual_seed(0)
        losses.append(
            {key: float(value.detach()) for key, value in copy.deepcopy(model)(images, these_targets).items()}
        )
    return max(abs(losses[1][key] - value) / max(abs(value), 1e-12) for key, value in losses[0].items())


def prepared(
    model: nn.Module,
    side: str,
    *,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    compiled: bool = False,
    sync_free: bool = False,
) -> nn.Module:
    """Return the model of one side in a mode."""
    if side == "ours":
        convert(model, sync_free=sync_free)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    if compiled:
        model.backbone.compile(dynamic=True)
    return model


# 4. Speed and memory


def speed(data: CocoData, min_size: int, device: torch.device, repeats: int) -> dict[str, Any]:
    """Measure images per second and peak memory of training steps, in alternating calls of stock and ours."""
    found: dict[str, Any] = {}
    modes: dict[str, dict[str, Any]] = {
        "fp32": {},
        "bf16, channels_last": {"dtype": torch.bfloat16, "channels_last": True},
        "bf16, channels_last, compiled": {
            "dtype": torch.bfloat16,
            "channels_last": True,
            "compiled": True,
        },
    }
    sizes: tuple[int, ...] = (2, 8)
    if device.type == "cpu":
        modes, sizes = {"fp32": {}}, (2,)
    sides: dict[str, dict[str, Any]] = {
        "torchvision": {"side": "torchvision"},
        "ours": {"side": "ours"},
        "sync_free": {"side": "ours", "sync_free": True},
    }
    print(f"\n{'training step':<58}{'images/s':>10}{'times faster':>15}{'peak MiB':>10}")
    for num_classes in (91, 1204):
        for size in sizes:
            for mode_name, mode in modes.items():
                batch = next(batches(data, size, device))
                labels = [t["labels"].clamp(max=num_classes - 1) for t in batch[1]]
                targets = [{**t, "labels": own} for t, own in zip(batch[1], labels, strict=True)]
                works: dict[str, Callable[[], None]] = {}
                for side, how in sides.items():
                    model = prepared(stock_model(num_classes, min_size, device), **how, **mode).train()
                    works[side] = partial(one_step, model, batch[0], targets, mode.get("dtype"))
                times = alternating(works, repeats, device)
                memory = {side: peak_bytes(work, device) for side, work in works.items()}
                key = f"batch {size}, {num_classes} classes, {mode_name}"
                found[key] = {"bytes": memory, "times_faster": {}, "images_per_second": {}}
                for side in sides:
                    ratio = speedup(times["torchvision"], times[side])
                    rate = size / Spread.of(times[side]).median
                    found[key]["times_faster"][side] = ratio
                    found[key]["images_per_second"][side] = rate
                    text = f"{ratio.median:.2f}x ({ratio.low:.2f}-{ratio.high:.2f})"
                    print(f"{key + ', ' + side:<58}{rate:>10.2f} {text:>18}{memory[side] / 2**20:>9.0f}")
                found[key]["waits"] = waits_of(works) if device.type == "cuda" else {}
                del works
    return found


def one_step(
    model: nn.Module, images: list[Tensor], targets: list[dict[str, Any]], dtype: torch.dtype | None
) -> None:
    """Run a training step, forward and backward, with the same random samples each time."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    with torch.autocast(images[0].device.type, dtype=dtype, enabled=dtype is not None):
        losses = model(images, targets)
    torch.stack(list(losses.values())).sum().backward()


def waits_of(works: dict[str, Callable[[], None]]) -> dict[str, int]:
    """Count the synchronizations of one step, as reported by torch."""
    found = {side: count_waits(work) for side, work in works.items()}
    print("synchronizations: " + ", ".join(f"{side} {count}" for side, count in found.items()))
    return found


# 5. The tests that need a GPU


def tests() -> dict[str, Any]:
    """Run `pytest -m cuda`, and return its exit code and its last line."""
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", "tests"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    lines = run.stdout.strip().splitlines()
    print("\n" + "\n".join(lines[-8:]))
    return {"exit_code": run.returncode, "summary": lines[-1] if lines else ""}


def percent(value: float | None) -> str:
    """Format an AP in percent."""
    return "none" if value is None else f"{100 * value:.1f}"


def main() -> None:
    """Run the requested parts in order, and write the results after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--train-annotations", type=Path, required=True)
    parser.add_argument("--val-annotations", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs of the learning part")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    names = ("tests", "curve", "speed", "precision", "learning")
    parser.add_argument("--parts", nargs="+", choices=names, default=list(names))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--min-size", type=int, default=800, help="shorter side, in px")
    parser.add_argument(
        "--weights",
        type=Path,
        help="weights of a MobileNetV2 backbone for the learning part; by default a ResNet-18 from scratch",
    )
    parser.add_argument("--learning-steps", type=int, default=1500)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    data = read_coco(arguments.images, arguments.train_annotations)
    steps, min_size = arguments.steps, arguments.min_size
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "tests": tests,
        "curve": lambda: curve(data, steps, min_size, device),
        "speed": lambda: speed(data, min_size, device, max(min(arguments.repeats, steps), 2)),
        "precision": lambda: precision(data, min(steps, 50), min_size, device),
        "learning": lambda: learning(arguments, device),
    }
    results: dict[str, Any] = {}
    for name in (name for name in parts if name in arguments.parts):
        results[name] = parts[name]()
        write_results("gpu_validation", device, results)


if __name__ == "__main__":
    main()
