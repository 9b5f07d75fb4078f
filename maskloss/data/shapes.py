"""Synthetic COCO-format data of simple shapes, on which results are easy to judge by eye.

Circles, rectangles and triangles of many sizes, tilted and shaded, on a smooth textured background. Shapes may partly
hide each other. A fully visible shape is annotated by its polygon, and a partly hidden one by the RLE of its visible
part, so that the data contain both encodings.
"""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from maskloss.errors import InputError
from maskloss.files import check_unused, make_folder, write_bytes, write_text
from maskloss.masks.coco_format import rasterize_polygons

CATEGORIES = ("circle", "rectangle", "triangle")

_SUPERSAMPLING = 4
_MAX_SHAPES = 4
_MAX_TILT = math.radians(20)
#: Smallest visible share of each shape; a new shape that hides more of another one is skipped.
_MIN_VISIBLE = 0.5


def write_shapes(output: str | Path, num_images: int, *, size: int = 128, seed: int = 0) -> None:
    """Write a COCO-format data set of shapes as `images/` and `annotations.json`.

    Args:
        output: a new or empty folder.
        num_images: number of images.
        size: width and height of each image in px.
        seed: the same seed gives the same images.

    Raises:
        InputError: a number is out of range, or `output` is not empty.
    """
    if num_images < 1:
        raise InputError(f"--images must be at least 1, got {num_images}")
    if size < 32:
        raise InputError(f"--size must be at least 32 px, got {size}")
    folder = Path(output)
    check_unused(folder)
    make_folder(folder / "images")
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(1, num_images + 1):
        picture, objects = draw_shapes(np.random.default_rng([seed, index]), size)
        file_name = f"{index:06d}.png"
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        write_bytes(folder / "images" / file_name, buffer.getvalue())
        images.append({"id": index, "file_name": file_name, "width": size, "height": size})
        for annotation in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": index, **annotation})
    document = {
        "info": {"description": f"{num_images} images of shapes, seed {seed}"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(CATEGORIES, start=1)],
    }
    write_text(folder / "annotations.json", json.dumps(document))


def draw_shapes(generator: np.random.Generator, size: int) -> tuple[Image.Image, list[dict[str, Any]]]:
    """Draw one picture, and return it with its annotations, which have no ids yet."""
    picture = _make_background(generator, size)
    placed: list[tuple[int, npt.NDArray[np.float64], npt.NDArray[np.uint8]]] = []
    for _ in range(int(generator.integers(1, _MAX_SHAPES + 1))):
        category = int(generator.integers(len(CATEGORIES)))
        points = _make_outline(generator, CATEGORIES[category], size)
        mask = _rasterize(points, size)
        hides_too_much = any(
            (visible & ~mask.astype(bool)).sum() < _MIN_VISIBLE * _rasterize(outline, size).sum()
            for _, outline, visible in placed
        )
        if hides_too_much:
            continue
        placed = [(c, outline, visible & (1 - mask)) for c, outline, visible in placed]
        placed.append((category, points, mask))
        picture = _paint(generator, picture, points)
    objects = []
    for category, points, visible in placed:
        whole = np.array_equal(visible, _rasterize(points, size))
        rle = coco_mask.encode(np.asfortranarray(visible))
        segmentation: Any = (
            [points.reshape(-1).tolist()]
            if whole
            else {"size": [size, size], "counts": rle["counts"].decode("ascii")}
        )
        box = _box_of_points(points) if whole else [round(float(v), 2) for v in coco_mask.toBbox(rle)]
        objects.append(
            {
                "category_id": category + 1,
                "bbox": box,
                "area": float(visible.sum()),
                "iscrowd": 0,
                "segmentation": segmentation,
            }
        )
    return Image.fromarray(picture.round().clip(0, 255).astype(np.uint8)), objects


def _make_background(generator: np.random.Generator, size: int) -> npt.NDArray[np.float64]:
    """Make a smooth, mostly gray texture with some noise, (S, S, 3) in [0, 255]."""
    coarse = generator.uniform(70, 186, size=(5, 5, 1)) + generator.uniform(-30, 30, size=(5, 5, 3))
    smooth = Image.fromarray(coarse.astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(smooth, dtype=np.float64) + generator.normal(0, 5, size=(size, size, 1))


def _make_outline(generator: np.random.Generator, shape: str, size: int) -> npt.NDArray[np.float64]:
    """Make the polygon (V, 2) of a shape, in px, entirely inside the image."""
    radius = float(generator.uniform(size / 8, size / 3.5))
    # Upright except for the tilt, with the tip of triangles on top.
    turn = float(generator.uniform(-_MAX_TILT, _MAX_TILT)) - math.pi / 2 * (shape != "rectangle")
    if shape == "circle":
        angles, radii = np.arange(40) * (2 * math.pi / 40), np.full(40, radius)
    elif shape == "rectangle":
        corner = float(generator.uniform(0.4, 0.65))
        angles = np.array([corner, math.pi - corner, math.pi + corner, -corner])
        radii = np.full(4, radius)
    else:
        angles, radii = np.arange(3) * (2 * math.pi / 3), np.full(3, radius)
    points = np.stack([np.cos(angles + turn) * radii, np.sin(angles + turn) * radii], axis=1)
    low, high = 1 - points.min(axis=0), size - 1 - points.max(axis=0)
    # Round to two decimals, as in COCO, before drawing, so that the drawn shape equals the annotated one.
    return (points + generator.uniform(low, high)).round(2)


def _paint(
    generator: np.random.Generator, picture: npt.NDArray[np.float64], points: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return the picture with a shape painted on it, shaded, in a color that differs from the background's."""
    size = len(picture)
    large = Image.new("L", (size * _SUPERSAMPLING, size * _SUPERSAMPLING))
    ImageDraw.Draw(large).polygon([tuple(point) for point in points * _SUPERSAMPLING], fill=255)
    alpha = np.asarray(large.resize((size, size), Image.Resampling.BOX), dtype=np.float64)[..., None] / 255
    below = (picture * alpha).sum(axis=(0, 1)) / alpha.sum()
    color = generator.uniform(0, 255, size=3)
    while np.abs(color - below).max() < 80:
        color = generator.uniform(0, 255, size=3)
    direction = generator.normal(size=2)
    rows, columns = np.mgrid[:size, :size] / size
    shade = 1 + 0.35 * (direction[0] * (rows - 0.5) + direction[1] * (columns - 0.5))
    painted = color * shade[..., None] + generator.normal(0, 6, size=(size, size, 1))
    return picture * (1 - alpha) + painted * alpha


def _rasterize(points: npt.NDArray[np.float64], size: int) -> npt.NDArray[np.uint8]:
    return rasterize_polygons([points.reshape(-1, 2)], size, size)


def _box_of_points(points: npt.NDArray[np.float64]) -> list[float]:
    low, high = points.min(axis=0), points.max(axis=0)
    return [round(float(value), 2) for value in (*low, *(high - low))]
