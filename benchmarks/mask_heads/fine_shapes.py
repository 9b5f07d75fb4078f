"""Shapes whose masks need fine detail: stars, thin arcs and rings, besides circles, rectangles and triangles.

    python -m benchmarks.mask_heads.fine_shapes --output runs/mask_heads/data

Writes COCO-format `train/` and `val/` with images of 256 x 256 px. Every mask is an RLE of the visible pixels.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

SIZE, SUPERSAMPLING = 256, 4
CLASSES = ("circle", "rectangle", "triangle", "star", "arc", "ring")
#: Number of images and seed by set.
SETS = {"train": (400, 1), "val": (200, 2)}

Array = npt.NDArray[np.float64]


def outlines(rng: np.random.Generator, kind: str) -> tuple[Array, Array | None]:
    """Return a shape's outline (V, 2), about of radius 1, and that of its hole, if it has one."""
    circle = np.arange(60) * 2 * math.pi / 60
    if kind == "rectangle":
        half = rng.uniform(0.4, 0.9)
        return np.array([[-1, -half], [1, -half], [1, half], [-1, half]]), None
    if kind == "arc":
        angles, thickness = np.linspace(0, rng.uniform(3.0, 4.5), 40), rng.uniform(0.12, 0.25)
        return np.concatenate([_polar(angles, 1.0), _polar(angles[::-1], 1.0 - thickness)]), None
    if kind == "ring":
        return _polar(circle, 1.0), _polar(circle, rng.uniform(0.4, 0.75))
    if kind == "star":
        radii = np.ones(10)
        radii[1::2] = rng.uniform(0.35, 0.5)
        return _polar(np.arange(10) * 2 * math.pi / 10, radii), None
    return _polar(circle if kind == "circle" else circle[::20], 1.0), None


def _polar(angles: Array, radii: float | Array) -> Array:
    return np.stack([np.cos(angles) * radii, np.sin(angles) * radii], axis=1)


def coverage(outline: Array, hole: Array | None) -> Array:
    """Return the fraction of each pixel that a shape covers, (S, S) in [0, 1]."""
    large = Image.new("L", (SIZE * SUPERSAMPLING,) * 2)
    for points, fill in ((outline, 255), (hole, 0)):
        if points is not None:
            ImageDraw.Draw(large).polygon([tuple(point) for point in points * SUPERSAMPLING], fill=fill)
    return np.asarray(large.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float64) / 255


def picture(rng: np.random.Generator) -> tuple[Image.Image, list[dict[str, Any]]]:
    """Draw an image of one to four shapes, and return it with its annotations, which have no ids yet."""
    coarse = rng.uniform(60, 190, size=(6, 6, 3)).astype(np.uint8)
    ground = np.asarray(Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.float64)
    pixels = ground + rng.normal(0, 8, size=(SIZE, SIZE, 1))
    shapes: list[tuple[int, npt.NDArray[np.bool_], int]] = []
    for _ in range(int(rng.integers(1, 5))):
        kind = int(rng.integers(len(CLASSES)))
        radius, turn = rng.uniform(SIZE / 10, SIZE / 3.5), rng.uniform(0, 2 * math.pi)
        rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        outline, hole = (
            None if points is None else points @ rotation.T * radius
            for points in outlines(rng, CLASSES[kind])
        )
        assert outline is not None
        place = rng.uniform(1 - outline.min(axis=0), SIZE - 1 - outline.max(axis=0))
        alpha = coverage(outline + place, None if hole is None else hole + place)
        visible = alpha >= 0.5
        if any((other & ~visible).sum() < 0.6 * whole for _, other, whole in shapes):
            continue
        shapes = [(k, other & ~visible, whole) for k, other, whole in shapes]
        shapes.append((kind, visible, int(visible.sum())))
        below = (pixels * alpha[..., None]).sum(axis=(0, 1)) / alpha.sum()
        color = rng.uniform(0, 255, size=3)
        while np.abs(color - below).max() < 60:
            color = rng.uniform(0, 255, size=3)
        painted = color + rng.normal(0, 8, size=(SIZE, SIZE, 1))
        pixels = pixels * (1 - alpha[..., None]) + painted * alpha[..., None]
    annotations = []
    for kind, visible, _ in shapes:
        rle = coco_mask.encode(np.asfortranarray(visible.astype(np.uint8)))
        annotations.append(
            {
                "category_id": kind + 1,
                "bbox": [float(value) for value in coco_mask.toBbox(rle)],
                "area": float(visible.sum()),
                "iscrowd": 0,
                "segmentation": {"size": [SIZE, SIZE], "counts": rle["counts"].decode("ascii")},
            }
        )
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), annotations


def write_set(folder: Path, count: int, seed: int) -> None:
    """Write `images/`, then `annotations.json`, so that the set is complete if that file exists."""
    if (folder / "annotations.json").exists():
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for index in range(1, count + 1):
        image, objects = picture(np.random.default_rng([seed, index]))
        image.save(folder / "images" / f"{index:05d}.png")
        images.append({"id": index, "file_name": f"{index:05d}.png", "width": SIZE, "height": SIZE})
        for one in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": index, **one})
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(document))


def main() -> None:
    """Write both sets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    folder = parser.parse_args().output
    for name, (count, seed) in SETS.items():
        write_set(folder / name, count, seed)


if __name__ == "__main__":
    main()
