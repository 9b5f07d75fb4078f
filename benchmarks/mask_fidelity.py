"""How well masks survive targets and paste: oracles on shapes and on real polygons, and trained networks.

    python benchmarks/mask_fidelity.py [--coco FOLDER] [--train DIR [--seeds 0 1 2] [--steps 300]]

(a) Upper limits on shapes: the IoU of a mask with the pasted mask of a network that outputs exactly its target, for
smooth blobs, rings and thin arcs of 6 to 110 px in radius, with tight boxes and with boxes jittered by 15 % of the
radius. Takes half a minute. (b) With --coco, a folder with images/ and annotations.json: the mask AP of a detector
that returns every object's own target and box, with images resized to 800 px for the targets as in training. Takes
four minutes for 270 images. (c) With --train: small networks trained on torchvision's and on aligned targets, from
the same seeds, each pasted in three ways. Takes about eight minutes per network on one core, and then five minutes. The
networks are stored in DIR. Writes results/mask_fidelity.json.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import write_results
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.models.detection.roi_heads import paste_masks_in_image, project_masks_on_boxes
from torchvision.ops import masks_to_boxes
from tqdm import tqdm
from trained_masks import ap_of, quietly, trained_networks

from maskloss import EncodedMasks, mask_targets, paste_masks
from maskloss.masks.paste import unaligned_offset

RADII = (6, 8, 16, 32, 64, 110)
SHAPES_PER_RADIUS = 40
JITTER = 0.15
SIDES = (14, 28, 56)
MIN_SIZE, MAX_SIZE = 800, 1333


# (a) Shapes


def blobs(radius: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw smooth blobs, (count, H, W) bool, at random sub-pixel positions."""
    return _inside(radius, count, generator, lambda relative, _: relative < 1)


def rings(radius: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw blobs with a hole of half their radius, (count, H, W) bool."""
    return _inside(radius, count, generator, lambda relative, _: (relative < 1) & (relative > 0.5))


def arcs(radius: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw bent strokes of a tenth of their extent in width, at least 2 px, (count, H, W) bool."""
    width = max(0.2, 2 / radius)
    return _inside(
        radius,
        count,
        generator,
        lambda relative, angle: (relative < 1) & (relative > 1 - width) & (angle.abs() < 2.2),
    )


def _inside(
    radius: int,
    count: int,
    generator: torch.Generator,
    rule: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    side = 3 * radius + 4
    y, x = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
    masks = []
    for _ in range(count):
        center = side / 2 + 2 * torch.rand(2, generator=generator) - 1
        angle = torch.atan2(y - center[0], x - center[1])
        phase, wobble, turn = 2 * math.pi * torch.rand(3, generator=generator)
        outline = radius * (1 + 0.15 * torch.cos(2 * angle + phase) + 0.08 * torch.cos(3 * angle + wobble))
        turned = torch.remainder(angle - turn + math.pi, 2 * math.pi) - math.pi
        masks.append(rule(torch.hypot(y - center[0], x - center[1]) / outline, turned))
    return torch.stack(masks)


FAMILIES = {"blobs": blobs, "rings": rings, "arcs": arcs}

#: Function from (masks, boxes) to the masks after targets and paste, with a grid of 28 x 28.
RoundTrip = Callable[[Tensor, Tensor], Tensor]


def _torchvision_targets(masks: Tensor, boxes: Tensor) -> Tensor:
    return project_masks_on_boxes(masks.to(torch.uint8), boxes, torch.arange(len(masks)), 28)


def _round_trip(aligned: bool, binary: bool) -> RoundTrip:
    def come_back(masks: Tensor, boxes: Tensor) -> Tensor:
        idxs = torch.arange(len(masks))
        targets = mask_targets(masks, boxes, idxs, 28, aligned=aligned, binary=binary)
        offset = (0.0, 0.0) if aligned else (0.5, 0.5)
        return paste_masks(targets, boxes, (masks.shape[1], masks.shape[2]), offset=offset)

    return come_back


ROUND_TRIPS: dict[str, RoundTrip] = {
    "torchvision": lambda masks, boxes: (
        paste_masks_in_image(_torchvision_targets(masks, boxes)[:, None], boxes, masks.shape[1:])[:, 0] > 0.5
    ),
    "Detectron2: aligned binary targets, grid paste": _round_trip(aligned=True, binary=True),
    "ours: aligned soft targets, grid paste": _round_trip(aligned=True, binary=False),
    "torchvision's targets, matched paste": lambda masks, boxes: paste_masks(
        _torchvision_targets(masks, boxes), boxes, (masks.shape[1], masks.shape[2]), offset=(0.5, 0.5)
    ),
}


def oracle_shapes() -> dict[str, Any]:
    """Compute the mean IoU by family of shapes, kind of boxes and radius."""
    found: dict[str, Any] = {}
    for family, make in FAMILIES.items():
        for boxes_are in ("tight", "jittered"):
            rows: dict[str, dict[int, float]] = {name: {} for name in ROUND_TRIPS}
            for radius in RADII:
                generator = torch.Generator().manual_seed(radius)
                masks = make(radius, SHAPES_PER_RADIUS, generator)
                # masks_to_boxes returns the last pixels; a box ends at their far edges.
                boxes = masks_to_boxes(masks) + torch.tensor([0.0, 0.0, 1.0, 1.0])
                if boxes_are == "jittered":
                    boxes += JITTER * radius * (2 * torch.rand(boxes.shape, generator=generator) - 1)
                for name, come_back in ROUND_TRIPS.items():
                    back = come_back(masks, boxes)
                    iou = (masks & back).sum(dim=(1, 2)) / (masks | back).sum(dim=(1, 2))
                    rows[name][radius] = float(iou.mean())
            print(
                f"\noracle IoU, {family}, {boxes_are} boxes" + " " * 24 + "  ".join(f"{r:>4}" for r in RADII)
            )
            for name, by_radius in rows.items():
                print(f"{name:<48} {'  '.join(f'{value:.3f}' for value in by_radius.values())}")
            found[f"{family}, {boxes_are} boxes"] = rows
    return found


# (b) Real polygons


@dataclass(frozen=True)
class Scene:
    """Objects of one image, as annotated and as resized for a network of 800 px.

    Attributes:
        size: (H, W) of the image.
        boxes: (G, 4), as annotated.
        resized_boxes: (G, 4), in px of the resized image.
        bitmaps: (G, H', W') uint8, resized as torchvision does.
        centered_bitmaps: (G, H', W') uint8, resized by the pixel at each center, as `RCNNTransform` does.
        encoded: polygons and RLEs, resized.
    """

    size: tuple[int, int]
    boxes: Tensor
    resized_boxes: Tensor
    bitmaps: Tensor
    centered_bitmaps: Tensor
    encoded: EncodedMasks

    @classmethod
    def of(cls, image: dict[str, Any], objects: list[dict[str, Any]]) -> Scene:
        """Make the scene from the annotations of an image."""
        height, width = image["height"], image["width"]
        scale = min(MIN_SIZE / min(height, width), MAX_SIZE / max(height, width))
        new_height, new_width = int(height * scale), int(width * scale)
        x, y = new_width / width, new_height / height
        boxes = torch.tensor([annotation["bbox"] for annotation in objects])
        boxes[:, 2:] += boxes[:, :2]
        masks = EncodedMasks([annotation["segmentation"] for annotation in objects], height, width)
        bitmaps = masks.bitmaps()[:, None]
        size = (new_height, new_width)
        return cls(
            (height, width),
            boxes,
            boxes * torch.tensor([x, y, x, y]),
            interpolate(bitmaps, size=size, mode="nearest")[:, 0],
            interpolate(bitmaps, size=size, mode="nearest-exact")[:, 0],
            masks.resize(*size),
        )


RLEs = list[dict[str, Any]]


def _stock(scene: Scene, side: int) -> RLEs:
    idxs = torch.arange(len(scene.boxes))
    targets = project_masks_on_boxes(scene.bitmaps, scene.resized_boxes, idxs, side)
    pasted = paste_masks_in_image(targets[:, None], scene.boxes, scene.size)[:, 0] > 0.5
    encoded: RLEs = coco_mask.encode(np.asfortranarray(pasted.permute(1, 2, 0).byte().numpy()))
    return encoded


def _gridded(offset_of: Callable[[Scene], tuple[float, float]]) -> Callable[[Scene, int], RLEs]:
    def give(scene: Scene, side: int) -> RLEs:
        idxs = torch.arange(len(scene.boxes))
        targets = project_masks_on_boxes(scene.bitmaps, scene.resized_boxes, idxs, side)
        offset = offset_of(scene)
        rles: RLEs = paste_masks(targets, scene.boxes, scene.size, offset=offset, output="rle")
        return rles

    return give


def _aligned(source: str, binary: bool) -> Callable[[Scene, int], RLEs]:
    def give(scene: Scene, side: int) -> RLEs:
        idxs = torch.arange(len(scene.boxes))
        targets = mask_targets(getattr(scene, source), scene.resized_boxes, idxs, side, binary=binary)
        return paste_masks(targets, scene.boxes, scene.size, output="rle")

    return give


DETECTORS: dict[str, Callable[[Scene, int], RLEs]] = {
    "torchvision": _stock,
    "torchvision's targets, grid paste": _gridded(lambda scene: (0.0, 0.0)),
    "torchvision's targets, half a pixel off": _gridded(lambda scene: (0.5, 0.5)),
    "torchvision's targets, matched paste": _gridded(
        lambda scene: unaligned_offset(scene.size, (scene.encoded.height, scene.encoded.width))
    ),
    "Detectron2: polygons, aligned binary": _aligned("encoded", binary=True),
    "ours: bitmaps, aligned soft": _aligned("centered_bitmaps", binary=False),
    "ours: polygons, exact coverage": _aligned("encoded", binary=False),
}


def oracle_coco(folder: Path) -> dict[str, Any]:
    """Compute the mask AP of oracle detectors on real annotations, by grid size."""
    truth = quietly(lambda: COCO(folder / "annotations.json"))
    objects = {
        image: [a for a in annotations if not a["iscrowd"]] for image, annotations in truth.imgToAnns.items()
    }
    results: dict[tuple[int, str], list[dict[str, Any]]] = {
        (side, name): [] for side in SIDES for name in DETECTORS
    }
    for image, in_image in tqdm(objects.items(), desc="oracles", mininterval=5, leave=False):
        if not in_image:
            continue
        scene = Scene.of(truth.imgs[image], in_image)
        for (side, name), found in results.items():
            for annotation, rle in zip(in_image, DETECTORS[name](scene, side), strict=True):
                category = annotation["category_id"]
                found.append({"image_id": image, "category_id": category, "segmentation": rle, "score": 1.0})
    rows: dict[str, Any] = {}
    columns = ("AP", "AP75", "AP90", "APs", "APm", "APl")
    print(f"\nmask AP of oracles, {len(objects)} images" + " " * 12 + "  ".join(f"{c:>5}" for c in columns))
    for (side, name), found in results.items():
        evaluation = COCOeval(truth, quietly(lambda found=found: truth.loadRes(found)), "segm")
        quietly(evaluation.evaluate)
        quietly(evaluation.accumulate)
        ap = ap_of(evaluation)
        for index, size in enumerate("sml", start=1):
            ap[f"AP{size}"] = ap_of(evaluation, area=index)["AP"]
        rows[f"{side} x {side}, {name}"] = ap
        print(f"{side} x {side}  {name:<36} {'  '.join(f'{ap[column]:5.1f}' for column in columns)}")
    return rows


def main() -> None:
    """Print the requested tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--coco", type=Path, help="folder with annotations.json")
    parser.add_argument("--train", type=Path, help="folder for the networks of part (c)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    results = {"shapes": oracle_shapes()}
    if arguments.coco:
        results["coco"] = oracle_coco(arguments.coco)
    if arguments.train:
        results["trained"] = trained_networks(arguments.train, arguments.seeds, arguments.steps)
    write_results("mask_fidelity", "cpu", results)


if __name__ == "__main__":
    main()
