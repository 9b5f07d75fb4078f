"""Images that are hard enough for losses to matter: similar classes, touching and occluded, small and rare objects.

    python benchmarks/ablations/hard_shapes.py --output runs/ablations/data

Writes COCO-format sets of 96 x 96 px images in a minute: `even/` with eight equally frequent classes and `long_tail/`
with the first class a hundred times as probable as the last, each with `train/` and `val/`, and `warm_up/` to train the
weights that the sweeps start from.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

SIZE, SUPERSAMPLING = 96, 4
#: Shapes with corners on a circle of radius 1; in stars and crosses every second corner is at radius 0.5.
CLASSES = ("triangle", "square", "pentagon", "hexagon", "circle", "star", "cross", "slab")
#: Number of images by set.
SETS = {"warm_up": 1200, "train": 400, "val": 150}
LONG_TAIL = 100.0


def outline(kind: str) -> np.ndarray:
    """Return the corners (V, 2) of a shape of radius 1."""
    corners = {"triangle": 3, "square": 4, "pentagon": 5, "hexagon": 6, "circle": 24, "star": 10, "cross": 8}
    if kind == "slab":
        return np.array([[-1, -0.35], [1, -0.35], [1, 0.35], [-1, 0.35]])
    angles = np.arange(corners[kind]) * 2 * math.pi / corners[kind]
    radii = np.ones(corners[kind])
    if kind in ("star", "cross"):
        radii[1::2] = 0.5
    return np.stack([np.cos(angles) * radii, np.sin(angles) * radii], axis=1)


def place_shape(rng: np.random.Generator, kinds: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
    """Place a shape at random; after the first shape, two of three touch an existing one."""
    radius = 5.0 * (24.0 / 5.0) ** rng.random()
    turn = rng.random() * 2 * math.pi
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    points = outline(CLASSES[int(kinds)]) @ rotation.T * radius
    if others and rng.random() < 2 / 3:
        neighbor = others[int(rng.integers(len(others)))]
        angle = rng.random() * 2 * math.pi
        distance = radius + np.linalg.norm(neighbor - neighbor.mean(0), axis=1).max()
        center = neighbor.mean(0) + 0.85 * distance * np.array([math.cos(angle), math.sin(angle)])
    else:
        center = rng.uniform(radius, SIZE - radius, size=2)
    low, high = -points.min(0) + 1, SIZE - 1 - points.max(0)
    return (points + np.clip(center, low, high)).round(2)


def coverage(points: np.ndarray) -> np.ndarray:
    """Return the fraction of each pixel that a polygon covers, (S, S) in [0, 1]."""
    large = Image.new("L", (SIZE * SUPERSAMPLING,) * 2)
    ImageDraw.Draw(large).polygon([tuple(p) for p in points * SUPERSAMPLING], fill=255)
    return np.asarray(large.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float64) / 255


def rasterize(points: np.ndarray) -> np.ndarray:
    """Return the mask (S, S) of a polygon as pycocotools fills it."""
    mask: np.ndarray = coco_mask.decode(coco_mask.frPyObjects([points.reshape(-1).tolist()], SIZE, SIZE))
    return mask[..., 0].astype(bool)


def picture(rng: np.random.Generator, shares: np.ndarray) -> tuple[Image.Image, list[dict[str, Any]]]:
    """Draw an image of two to six shapes, and return it with its annotations."""
    coarse = rng.uniform(60, 190, size=(6, 6, 3)).astype(np.uint8)
    ground = np.asarray(Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.float64)
    pixels = ground + rng.normal(0, 8, size=(SIZE, SIZE, 1))
    shapes: list[tuple[int, np.ndarray, np.ndarray]] = []
    color = rng.uniform(0, 255, size=3)
    for _ in range(int(rng.integers(2, 7))):
        kind = int(rng.choice(len(CLASSES), p=shares))
        points = place_shape(rng, np.int64(kind), [outline_ for _, outline_, _ in shapes])
        mask = rasterize(points)
        if any((visible & ~mask).sum() < 0.5 * rasterize(other).sum() for _, other, visible in shapes):
            continue
        shapes = [(k, other, visible & ~mask) for k, other, visible in shapes]
        shapes.append((kind, points, mask))
        # Half of the shapes have the color of the one before, and differ only in their shading.
        color = color if rng.random() < 0.5 else rng.uniform(0, 255, size=3)
        direction = rng.normal(size=2)
        rows, columns = np.mgrid[:SIZE, :SIZE] / SIZE
        shade = 1 + 0.5 * (
            direction[0] * (rows - rows[mask].mean()) + direction[1] * (columns - columns[mask].mean())
        )
        painted = (color * rng.uniform(0.8, 1.2)) * shade[..., None] + rng.normal(0, 8, (SIZE, SIZE, 1))
        alpha = coverage(points)[..., None]
        pixels = pixels * (1 - alpha) + painted * alpha
    annotations = []
    for kind, _, visible in shapes:
        rle = coco_mask.encode(np.asfortranarray(visible.astype(np.uint8)))
        annotations.append(
            {
                "category_id": kind + 1,
                "bbox": [round(float(v), 2) for v in coco_mask.toBbox(rle)],
                "area": float(visible.sum()),
                "iscrowd": 0,
                "segmentation": {"size": [SIZE, SIZE], "counts": rle["counts"].decode("ascii")},
            }
        )
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), annotations


def write_set(folder: Path, count: int, shares: np.ndarray, seed: int) -> None:
    """Write `images/`, then `annotations.json`, so that the set is complete if that file exists."""
    if (folder / "annotations.json").exists():
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for index in range(1, count + 1):
        image, objects = picture(np.random.default_rng([seed, index]), shares)
        image.save(folder / "images" / f"{index:05d}.png")
        images.append({"id": index, "file_name": f"{index:05d}.png", "width": SIZE, "height": SIZE})
        annotations += [
            {"id": len(annotations) + i, "image_id": index, **o} for i, o in enumerate(objects, start=1)
        ]
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(document))


def main() -> None:
    """Write all sets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    folder = parser.parse_args().output
    even = np.full(len(CLASSES), 1 / len(CLASSES))
    tail = LONG_TAIL ** -(np.arange(len(CLASSES)) / (len(CLASSES) - 1))
    write_set(folder / "warm_up", SETS["warm_up"], even, seed=1)
    for name, shares in (("even", even), ("long_tail", tail / tail.sum())):
        for part, seed in (("train", 2), ("val", 3)):
            # Validation sets have equally frequent classes, so that AP measures rare classes too.
            write_set(folder / name / part, SETS[part], even if part == "val" else shares, seed=seed)


if __name__ == "__main__":
    main()
