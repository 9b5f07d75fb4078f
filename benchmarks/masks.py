"""Time and memory of mask targets, paste and the loader's masks, compared with torchvision.

    python benchmarks/masks.py [--device cpu|cuda] [--coco FOLDER] [--repeats 9]

Takes about two minutes on two CPU cores. The input is one image of 800 x 1333 px with 100 elliptic objects of 12 to
600 px, and 128 RoIs of 28 x 28 from jittered boxes. Both sides alternate in one process. With --coco, a folder with
images/ and annotations.json, the data loader is measured too, with masks as pixels and as polygons. Checks that both
sides compute the same targets and masks, and writes results/masks.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import Spread, alternating, peak_bytes, speedup, write_results
from pycocotools import mask as coco_mask
from scenes import HEIGHT, WIDTH, proposals, scene, scene_boxes
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.models.detection.roi_heads import paste_masks_in_image, project_masks_on_boxes

from maskloss import EncodedMasks, mask_targets, paste_masks
from maskloss.data.augmentation import augmentation, augmented
from maskloss.data.coco import CocoData, read_coco
from maskloss.data.dataset import CocoDataset, collate

SIDE = 28
OBJECTS, ROIS, DETECTIONS = 100, 128, 100
OBJECT_COUNTS = (10, 100, 500)


def targets(repeats: int, device: torch.device) -> dict[str, Any]:
    """Measure time and memory of the targets of one image, from bitmaps, RLEs and polygons."""
    masks, polygons, gt_boxes = scene(OBJECTS)
    boxes, matched = proposals(gt_boxes, ROIS)
    rles = [coco_mask.encode(np.asfortranarray(mask.numpy())) for mask in masks]
    encoded = {"polygons": polygons, "RLEs": rles}
    masks, boxes, matched = masks.to(device), boxes.to(device), matched.to(device)
    functions: dict[str, Callable[[], Tensor]] = {
        "torchvision": lambda: project_masks_on_boxes(masks, boxes, matched, SIDE),
        "bitmaps": lambda: mask_targets(masks, boxes, matched, SIDE, aligned=False),
    }
    for name, segmentations in encoded.items():
        kept = EncodedMasks(segmentations, HEIGHT, WIDTH)
        functions[name] = partial(mask_targets, kept, boxes, matched, SIDE)
        functions[f"{name}, binary"] = partial(mask_targets, kept, boxes, matched, SIDE, binary=True)
    # On a GPU, fused multiply-adds move the samples of torchvision's kernel: 1.1e-4 on an H200.
    tolerance = 1e-5 if device.type == "cpu" else 5e-4
    torch.testing.assert_close(functions["bitmaps"](), functions["torchvision"](), rtol=0, atol=tolerance)
    torch.testing.assert_close(
        functions["RLEs"](), mask_targets(masks, boxes, matched, SIDE), rtol=0, atol=1e-5
    )
    return _compared("mask targets of 128 RoIs on 100 objects", functions, repeats, device)


def growth(repeats: int, device: torch.device) -> dict[str, Any]:
    """Measure the time per RoI with an increasing number of objects, on each side."""
    found: dict[str, dict[int, float]] = {"torchvision": {}, "bitmaps": {}, "polygons": {}}
    # The RoIs stay the same; only the number of objects that they are matched to grows.
    boxes, first_matched = (part.to(device) for part in proposals(scene_boxes(OBJECT_COUNTS[0]), ROIS))
    for count in OBJECT_COUNTS:
        masks, polygons, _ = scene(OBJECT_COUNTS[0])
        copies = count // OBJECT_COUNTS[0]
        masks = masks.to(device).repeat(copies, 1, 1)
        kept = EncodedMasks(polygons * copies, HEIGHT, WIDTH)
        matched = first_matched + OBJECT_COUNTS[0] * (torch.arange(ROIS, device=device) % copies)
        functions: dict[str, Callable[[], Tensor]] = {
            "torchvision": partial(project_masks_on_boxes, masks, boxes, matched, SIDE),
            "bitmaps": partial(mask_targets, masks, boxes, matched, SIDE),
            "polygons": partial(mask_targets, kept, boxes, matched, SIDE),
        }
        for name, times in alternating(functions, repeats, device).items():
            found[name][count] = 1e6 * Spread.of(times).median / ROIS
    print(f"\ntime per RoI in µs, {ROIS} RoIs, with {', '.join(map(str, OBJECT_COUNTS))} objects")
    for name, per_roi in found.items():
        most_to_least = max(per_roi.values()) / min(per_roi.values())
        print(
            f"{name:<22} {'  '.join(f'{value:8.1f}' for value in per_roi.values())}   most / least {most_to_least:.2f}"
        )
    return found


def paste(repeats: int, device: torch.device) -> dict[str, Any]:
    """Measure time and memory from mask probabilities to COCO RLEs, for the detections of one image."""
    boxes = scene_boxes(DETECTIONS)
    generator = torch.Generator().manual_seed(0)
    center = (torch.arange(SIDE) + 0.5 - SIDE / 2) / (SIDE / 2)
    distance = torch.hypot(center[:, None], center)
    bumps = torch.nn.functional.interpolate(
        torch.randn(DETECTIONS, 1, 7, 7, generator=generator), size=SIDE, mode="bilinear"
    )[:, 0]
    probs = torch.sigmoid(6 * (0.9 - distance) + bumps).to(device)
    boxes = boxes.to(device)

    def torchvision_rles() -> list[dict[str, Any]]:
        pasted = paste_masks_in_image(probs[:, None], boxes, (HEIGHT, WIDTH))[:, 0] > 0.5
        encoded: list[dict[str, Any]] = coco_mask.encode(
            np.asfortranarray(pasted.permute(1, 2, 0).cpu().numpy().view(np.uint8))
        )
        return encoded

    functions: dict[str, Callable[[], Any]] = {
        "torchvision": torchvision_rles,
        "matched, to RLE": lambda: paste_masks(
            probs, boxes, (HEIGHT, WIDTH), offset=(0.5, 0.5), output="rle"
        ),
        "aligned, to RLE": lambda: paste_masks(probs, boxes, (HEIGHT, WIDTH), output="rle"),
        "aligned, to bool": lambda: paste_masks(probs, boxes, (HEIGHT, WIDTH)),
    }
    decoded = coco_mask.decode(functions["aligned, to RLE"]()).transpose(2, 0, 1).astype(bool)
    # On a GPU, rounding may move a pixel across the threshold.
    different = int((decoded != functions["aligned, to bool"]().cpu().numpy()).sum())
    assert different <= (0 if device.type == "cpu" else 10), different
    return _compared("paste of 100 detections to RLE", functions, repeats, device)


class PixelDataset(Dataset[Any]):
    """Data set with the samples of `CocoDataset`, but with rasterized masks, as in torchvision's references."""

    def __init__(self, data: CocoData) -> None:
        self.encoded = CocoDataset(data)
        self.transforms = augmentation(horizontal_flip=0.5, photometric_distortion=0.0)

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> Any:
        image, target = self.encoded[index]
        size = image.shape[-2:]
        boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)
        masks = tv_tensors.Mask(target["masks"].bitmaps())
        torch.manual_seed(index)
        return self.transforms(tv_tensors.Image(image), {**target, "boxes": boxes, "masks": masks})


def loader(folder: Path, repeats: int) -> dict[str, Any]:
    """Measure images per second with masks as pixels and as polygons, flipping images with probability 1/2."""
    data = read_coco(folder / "images", folder / "annotations.json")
    flip = augmentation(horizontal_flip=0.5, photometric_distortion=0.0)
    pixels, polygons = PixelDataset(data), CocoDataset(data, flip)
    records = data.images
    blank = [torch.zeros(3, record.height, record.width, dtype=torch.uint8) for record in records]
    plain = [polygons._target(record) for record in records]

    def masks_as_pixels() -> None:
        for index, (record, image, target) in enumerate(zip(records, blank, plain, strict=True)):
            torch.manual_seed(index)
            masks = tv_tensors.Mask(record.object_masks().bitmaps())
            boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=image.shape[-2:])
            pixels.transforms({"boxes": boxes, "masks": masks})

    def masks_as_polygons() -> None:
        for index, (record, image, target) in enumerate(zip(records, blank, plain, strict=True)):
            augmented(flip, image[:, :1, :1], {**target, "masks": record.object_masks()}, index)

    def all_of(dataset: Dataset[Any], workers: int) -> Callable[[], None]:
        batches = DataLoader(dataset, batch_size=2, num_workers=workers, collate_fn=collate)

        def run() -> None:
            for _ in batches:
                pass

        return run

    found = {}
    print(f"\nloader on {len(records)} images, images/s, masks as pixels and as polygons")
    for name, functions in (
        ("masks alone", (masks_as_pixels, masks_as_polygons)),
        ("whole samples", (all_of(pixels, 0), all_of(polygons, 0))),
        ("two workers", (all_of(pixels, 2), all_of(polygons, 2))),
    ):
        times = alternating(dict(zip(("pixels", "polygons"), functions, strict=True)), repeats)
        ratio = speedup(times["pixels"], times["polygons"])
        rates = [len(records) / Spread.of(times[side]).median for side in ("pixels", "polygons")]
        print(f"{name:<22} {rates[0]:8.1f} {rates[1]:8.1f}   {_shown(ratio)}")
        found[name] = {"pixels": rates[0], "polygons": rates[1], "ratio": ratio}
    return found


def _compared(
    title: str, functions: dict[str, Callable[[], Any]], repeats: int, device: torch.device
) -> dict[str, Any]:
    times = alternating(functions, repeats, device)
    memory = {name: peak_bytes(function, device) for name, function in functions.items()}
    print(f"\n{title:<42} time     times faster        extra memory   times less")
    found = {}
    for name in functions:
        ratio, less = speedup(times["torchvision"], times[name]), memory["torchvision"] / max(memory[name], 1)
        milliseconds = 1e3 * Spread.of(times[name]).median
        print(
            f"{name:<34} {milliseconds:9.1f} ms   {_shown(ratio):<20} {memory[name] / 2**20:8.1f} MiB   {less:6.1f}x"
        )
        found[name] = {
            "milliseconds": milliseconds,
            "times_faster": ratio,
            "bytes": memory[name],
            "times_less": less,
        }
    return found


def _shown(ratio: Spread) -> str:
    return f"{ratio.median:.1f}x ({ratio.low:.1f}-{ratio.high:.1f})"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--coco", type=Path, help="folder with images/ and annotations.json")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    print(
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, "
        f"{arguments.repeats} repeats, medians"
    )
    results = {
        "targets": targets(arguments.repeats, device),
        "growth": growth(arguments.repeats, device),
        "paste": paste(arguments.repeats, device),
    }
    if arguments.coco:
        results["loader"] = loader(arguments.coco, max(arguments.repeats // 2, 2))
    write_results("masks", device, results)


if __name__ == "__main__":
    main()
