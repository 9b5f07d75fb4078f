"""Images per second of `maskloss train` beside a plain training loop with torchvision, loader included.

    python benchmarks/loop.py --images DIR --annotations FILE [--batch-sizes 2 4] [--threads 1 2] [--rounds 3]
                              [--num-images 24] [--min-sizes 320] [--device cpu|cuda] [--options JSON]

Both sides fine-tune Mask R-CNN R50-FPN with frozen norms and three trainable stages, by SGD, on the same images of a
COCO-format file, flipped with probability 0.5, in batches of images with the same orientation. The plain loop is what
torchvision's reference script does: masks as pixels, made by pycocotools, and in each step the losses are read to stop
if they are not finite. Each measurement is a process of its own: it takes one epoch, and counts from the end of its
first step. The sides alternate. `--options '{"sync_free": true, "cuda_graphs": true}'` changes settings of `maskloss
train`. Prints medians, ratios, peak memory and the seconds from the start of a process to the end of its first step,
and writes results/loop.json. With the default options, a quarter of an hour on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import torch
from measuring import Spread, speedup, write_results
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional

from maskloss.detection.builders import ModelSettings, build_model
from maskloss.training import loop
from maskloss.training.config import TrainConfig
from maskloss.training.trainer import Trainer

SIDES = ("plain loop", "maskloss train")


class PlainDataset(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Images and targets as torchvision's reference script makes them: float pixels, and a bitmap for each object.

    Args:
        images: folder of the images.
        annotations: COCO-format file, with polygons.
        flip: probability of flipping an image.
    """

    def __init__(self, images: Path, annotations: Path, *, flip: float = 0.5) -> None:
        document = json.loads(annotations.read_text())
        self.folder, self.images, self.flip = images, document["images"], flip
        self.labels = {category["id"]: place + 1 for place, category in enumerate(document["categories"])}
        self.objects: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in self.images}
        for annotation in document["annotations"]:
            self.objects[annotation["image_id"]].append(annotation)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        record = self.images[index]
        height, width = record["height"], record["width"]
        pixels = functional.pil_to_tensor(Image.open(self.folder / record["file_name"]).convert("RGB"))
        objects = self.objects[record["id"]]
        corners = torch.tensor([one["bbox"] for one in objects], dtype=torch.float32)
        corners[:, 2:] += corners[:, :2]
        masks = np.stack(
            [
                coco_mask.decode(coco_mask.frPyObjects(one["segmentation"], height, width)).any(axis=2)
                for one in objects
            ]
        )
        bitmaps = torch.from_numpy(masks.astype(np.uint8))
        if torch.rand(()) < self.flip:
            pixels, bitmaps = pixels.flip(-1), bitmaps.flip(-1)
            corners[:, [0, 2]] = width - corners[:, [2, 0]]
        labels = torch.tensor([self.labels[one["category_id"]] for one in objects])
        return pixels.float() / 255, {"boxes": corners, "labels": labels, "masks": bitmaps}

    def batches(self, size: int) -> list[list[int]]:
        """Return the indices of batches of images with the same orientation."""
        portrait = [index for index, image in enumerate(self.images) if image["height"] > image["width"]]
        landscape = [index for index in range(len(self)) if index not in set(portrait)]
        return [group[i : i + size] for group in (portrait, landscape) for i in range(0, len(group), size)]


def plain_loop(arguments: argparse.Namespace, weights: Path, annotations: Path) -> Iterator[float]:
    """Train with torchvision for one epoch, and yield the time after each step."""
    device = torch.device(arguments.device)
    model = model_of(arguments, annotations)
    model.load_state_dict(torch.load(weights))
    model.to(device).train()
    dataset = PlainDataset(arguments.images, annotations)
    loader: DataLoader[Any] = DataLoader(
        dataset, batch_sampler=dataset.batches(arguments.batch), num_workers=0, collate_fn=list
    )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, weight_decay=1e-4)
    for samples in loader:
        images = [image.to(device) for image, _ in samples]
        targets = [{key: value.to(device) for key, value in target.items()} for _, target in samples]
        losses = model(images, targets)
        total = sum(losses.values())
        if not math.isfinite(total.item()):
            raise SystemExit(f"the losses are not finite: {losses}")
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        arguments.first_step = arguments.first_step or time.time()
        yield time.perf_counter()


def maskloss_train(arguments: argparse.Namespace, weights: Path, annotations: Path) -> Iterator[float]:
    """Run `maskloss train` for one epoch, and yield the time after each step."""
    validation = annotations.with_name("validation.json")
    output = Path(tempfile.mkdtemp(dir=annotations.parent))
    settings: dict[str, Any] = {
        "train_images": str(arguments.images),
        "train_annotations": str(annotations),
        "val_images": str(arguments.images),
        "val_annotations": str(validation),
        "output": str(output),
        "weights": str(weights),
        "frozen_normalization": True,
        "trainable_layers": 3,
        "max_steps": len(PlainDataset(arguments.images, annotations).batches(arguments.batch)),
        "batch_size": arguments.batch,
        "learning_rate": 1e-4,
        "min_size": arguments.min_size,
        "max_size": 2 * arguments.min_size,
        "log_every": 1,
        "evaluate_every": 0,
        "val_losses": False,
        "workers": 0,
        "device": arguments.device,
        "trackers": "",
    }
    config = TrainConfig(**{**settings, **arguments.options})
    # Memory counts up to the evaluation after the last step, which the plain loop lacks; the checkpoint is included.
    evaluate, take_step = loop.evaluate, Trainer.take_step

    def after_training(*given: Any, **options: Any) -> Any:
        arguments.peak = peak(arguments.device)
        return evaluate(*given, **options)

    def timed_step(*given: Any, **options: Any) -> Any:
        losses = take_step(*given, **options)
        arguments.first_step = arguments.first_step or time.time()
        return losses

    with (
        patch.object(loop, "evaluate", after_training),
        patch.object(Trainer, "take_step", timed_step),
    ):
        loop.train(config)
    for line in (output / "history.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "learning_rate" in entry:
            yield entry["seconds"]


def model_of(arguments: argparse.Namespace, annotations: Path) -> torch.nn.Module:
    """Build the model that both sides train."""
    categories = len(json.loads(annotations.read_text())["categories"])
    return build_model(
        ModelSettings(
            "maskrcnn_resnet50_fpn",
            categories + 1,
            min_size=(arguments.min_size,),
            max_size=2 * arguments.min_size,
            frozen_normalization=True,
            trainable_layers=3,
        )
    )


def write_inputs(arguments: argparse.Namespace, folder: Path) -> None:
    """Write the annotations of the first images with polygons, of one validation image, and random weights."""
    document = json.loads(arguments.annotations.read_text())
    objects = [
        one
        for one in document["annotations"]
        if not one.get("iscrowd") and isinstance(one["segmentation"], list) and min(one["bbox"][2:]) > 1
    ]
    with_objects = {one["image_id"] for one in objects}
    usable = [image for image in document["images"] if image["id"] in with_objects]
    portrait = [image for image in usable if image["height"] > image["width"]]
    landscape = [image for image in usable if image["height"] <= image["width"]]
    # Whole batches of one orientation, a quarter of them portraits, so that both sides take the same number of steps.
    whole = max(arguments.batch_sizes)
    count = arguments.num_images // (4 * whole) * whole
    images = portrait[:count] + landscape[: arguments.num_images // whole * whole - count]
    for name, chosen in (("train.json", images), ("validation.json", images[:1])):
        ids = {image["id"] for image in chosen}
        part = {
            "images": chosen,
            "annotations": [one for one in objects if one["image_id"] in ids],
            "categories": document["categories"],
        }
        (folder / name).write_text(json.dumps(part))
    torch.manual_seed(0)
    model = model_of(arguments, folder / "train.json")
    for name, buffer in model.named_buffers():
        # Frozen norms of random networks would let the activations grow from block to block.
        if name.endswith("running_var"):
            buffer.uniform_(3.0, 5.0)
    torch.save(model.state_dict(), folder / "weights.pth")


def measure(arguments: argparse.Namespace) -> None:
    """Run one side, and print its images per second and its peak memory as JSON."""
    folder: Path = arguments.inputs
    torch.set_num_threads(arguments.threads[0])
    side = plain_loop if arguments.side == SIDES[0] else maskloss_train
    times = list(side(arguments, folder / "weights.pth", folder / "train.json"))
    dataset = PlainDataset(arguments.images, folder / "train.json")
    images = len(dataset) - len(dataset.batches(arguments.batch)[0])
    most = getattr(arguments, "peak", None) or peak(arguments.device)
    until_first_step = arguments.first_step - psutil.Process().create_time()
    speed = images / (times[-1] - times[0])
    print(json.dumps({"images_per_second": speed, "bytes": most, "until_first_step": until_first_step}))


def peak(device: str) -> int:
    """Return the peak memory of this process in bytes, on a GPU that of its tensors."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM:"))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--annotations", type=Path, required=True)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-images", type=int, default=24)
    parser.add_argument("--min-sizes", type=int, nargs="+", default=[320], help="shorter sides, in px")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--options", type=json.loads, default={}, help="settings of maskloss train, as JSON")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--min-size", type=int, default=320, help=argparse.SUPPRESS)
    parser.add_argument("--inputs", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.first_step = None
    if arguments.side:
        measure(arguments)
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        write_inputs(arguments, Path(name))
        print(
            f"{'px':>4} {'batch':>5} {'threads':>7}  {'images/s: plain loop':>20} {'maskloss train':>15}  times as fast"
        )
        for side_px, batch, threads in product(arguments.min_sizes, arguments.batch_sizes, arguments.threads):
            found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
            for _ in range(arguments.rounds):
                for side in SIDES:
                    command = [sys.executable, __file__, *sys.argv[1:], "--threads", str(threads)]
                    command += ["--side", side, "--batch", str(batch), "--min-size", str(side_px)]
                    output = subprocess.check_output(
                        [*command, "--inputs", name],
                        text=True,
                        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                    )
                    found[side].append(json.loads(output.splitlines()[-1]))
            results[f"{side_px} px, batch {batch}, {threads} threads"] = row = summary(found)
            speeds, ratio = row["images_per_second"], row["times_as_fast"]
            until = row["seconds_until_first_step"]
            print(
                f"{side_px:>4} {batch:>5} {threads:>7}  {speeds[SIDES[0]]:>20.3f} {speeds[SIDES[1]]:>15.3f}  "
                f"{ratio.median:.2f}x ({ratio.low:.2f} to {ratio.high:.2f}), memory {row['memory']:.2f}x, "
                f"first step after {until[SIDES[0]]:.1f} and {until[SIDES[1]]:.1f} s",
                flush=True,
            )
    write_results("loop", arguments.device, results)


def summary(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Return the medians of both sides, and ratios of neighboring measurements."""
    speeds = {side: [one["images_per_second"] for one in measured] for side, measured in found.items()}
    until = {side: [one["until_first_step"] for one in measured] for side, measured in found.items()}
    peaks = {side: Spread.of([one["bytes"] for one in measured]).median for side, measured in found.items()}
    return {
        "images_per_second": {side: Spread.of(values).median for side, values in speeds.items()},
        "times_as_fast": speedup(speeds[SIDES[1]], speeds[SIDES[0]]),
        "bytes": peaks,
        "memory": peaks[SIDES[1]] / peaks[SIDES[0]],
        "seconds_until_first_step": {side: Spread.of(values).median for side, values in until.items()},
    }


if __name__ == "__main__":
    main()
