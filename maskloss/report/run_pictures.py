"""Pictures of a run: what it trains on, before the first step, and its worst images, after each evaluation."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, uint8
from torchvision.transforms.v2.functional import to_dtype, to_pil_image

from maskloss.data.coco import CocoData
from maskloss.data.dataset import CocoDataset
from maskloss.data.images import read_image
from maskloss.errors import InputError
from maskloss.files import write_bytes
from maskloss.report.curves import literal, without_glyph_warnings
from maskloss.report.errors import image_errors
from maskloss.report.pictures import (
    DrawnObject,
    category_color,
    cut_outs,
    draw_objects,
    draw_results,
    draw_truth,
    jpeg,
    names_for,
    shortened,
    spread,
)

Images = npt.NDArray[np.uint8]

#: Names of the files in a run's folder, in the order of the report.
TRAINING_IMAGES, TRAINING_DATA = "training_images.jpg", "training_data.png"
_COLUMNS, _ROWS, _SIDE = 4, 3, 320
_MOST_BARS = 30
_WORST, _MOST_COMPARED = 4, 100
_GRAY = (60, 60, 60)


class RunPictures:
    """Draws the pictures of a run, for `train(config, pictures=...)`.

    Args:
        score_threshold: minimum score of the predictions to draw and to count as errors.
    """

    def __init__(self, score_threshold: float = 0.5) -> None:
        self.score_threshold = score_threshold

    def before_training(self, folder: Path, dataset: CocoDataset, samples: Sequence[tuple[int, int]]) -> None:
        """Write `training_images.jpg`, the first samples with their targets, and `training_data.png`.

        Args:
            folder: the run's folder.
            dataset: the training set.
            samples: indices and augmentation seeds of the first samples.
        """
        drawn = []
        for sample in samples[: _COLUMNS * _ROWS]:
            found = dataset[sample]
            # A file that cannot be read stops the run at its own step.
            if not isinstance(found, InputError):
                drawn.append(draw_sample(*found, dataset.data))
        if drawn:
            write_bytes(folder / TRAINING_IMAGES, jpeg(_sheet(drawn), _COLUMNS * _SIDE))
        write_bytes(folder / TRAINING_DATA, draw_distributions(dataset.data))

    def after_evaluation(self, validation: CocoData, results: Sequence[dict[str, Any]]) -> dict[str, Images]:
        """Draw the images with most errors, ground truth on the left and predictions on the right.

        In a large set, only some images are compared, so that this takes no time beside the evaluation.

        Returns:
            Pictures (N, H, W, 3) by their name.
        """
        shown: dict[int, list[dict[str, Any]]] = {image.id: [] for image in validation.images}
        for result in results:
            if result["score"] >= self.score_threshold:
                shown[result["image_id"]].append(result)
        compared = spread(validation.images, _MOST_COMPARED)
        errors = {image.id: image_errors(image, shown[image.id]).count for image in compared}
        worst = sorted(compared, key=lambda image: -errors[image.id])[:_WORST]
        names = {category.id: category.name for category in validation.categories}
        pictures = []
        for record in worst:
            try:
                image = read_image(validation.image_path(record), (record.width, record.height))
            except InputError:
                continue
            named = names_for(names, max(len(shown[record.id]), len(record.object_rows)))
            enlarge = _enlargement(image)
            truth = draw_truth(image, record, named, enlarge=enlarge)
            found = draw_results(image, shown[record.id], named, enlarge=enlarge)
            pictures.append(_sheet([truth, found], columns=2))
        return {"worst images": np.stack([np.asarray(picture) for picture in pictures])} if pictures else {}


def draw_sample(image: Tensor, target: Mapping[str, Any], data: CocoData) -> Image.Image:
    """Draw a training sample with its target: masks, boxes, labeled points, and ignored regions in gray."""
    masks, boxes = target["masks"], target["boxes"].tolist()
    names = names_for({category.id: category.name for category in data.categories}, len(boxes))
    points = target["points"].tolist() if "points" in target else [[]] * len(boxes)
    nothing = np.zeros((0, 0), dtype=np.uint8)
    drawn = [
        DrawnObject(nothing, (0, 0), (box[0], box[1], box[2], box[3]), "ignored", _GRAY)
        for box in (target["ignore_boxes"].tolist() if "ignore_boxes" in target else [])
    ]
    for box, label, cut, own in zip(boxes, target["labels"].tolist(), cut_outs(masks), points, strict=True):
        category = data.categories[label - 1].id
        labeled = tuple((x, y, mark) for x, y, mark in own if mark >= 0)
        drawn.append(
            DrawnObject(
                *cut,
                (box[0], box[1], box[2], box[3]),
                shortened(names[category]),
                category_color(category),
                labeled,
            )
        )
    picture = to_pil_image(to_dtype(image, uint8, scale=True))
    return draw_objects(picture, drawn, enlarge=_enlargement(picture))


def draw_distributions(data: CocoData) -> bytes:
    """Draw how many objects each category has, how large they are, and how many an image has, as a PNG."""
    records = data.records
    objects = ~records.crowds
    counts = [
        (category.name, int((objects & (records.category_ids == category.id)).sum()))
        for category in data.categories
    ]
    counts.sort(key=lambda pair: -pair[1])
    sides = np.sqrt((records.boxes[objects, 2] - records.boxes[objects, 0]).clip(min=0))
    sides = sides * np.sqrt((records.boxes[objects, 3] - records.boxes[objects, 1]).clip(min=0))
    per_image = np.array([len(image.object_rows) for image in data.images])
    figure = Figure(figsize=(12, 3.6), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    classes, sizes, numbers = figure.subplots(1, 3)
    named = counts[:_MOST_BARS]
    classes.bar(range(len(named)), [count for _, count in named], color="#2563eb")
    classes.set_xticks(
        range(len(named)), [literal(shortened(name)) for name, _ in named], rotation=90, fontsize=7
    )
    classes.set_title(
        "objects of each category" + (", the most frequent" if len(counts) > _MOST_BARS else "")
    )
    sizes.hist(sides, bins=30, color="#2563eb")
    sizes.set_title("size of the objects: square root of the box's area, px")
    numbers.hist(per_image, bins=np.arange(per_image.max(initial=0) + 2) - 0.5, color="#2563eb")
    numbers.set_title("objects of each image")
    buffer = io.BytesIO()
    with without_glyph_warnings():
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _enlargement(image: Image.Image) -> int:
    """Return the factor to enlarge a small image by before drawing, so that texts are not enlarged."""
    return max(1, _SIDE // max(image.size))


def _sheet(pictures: Sequence[Image.Image], columns: int = _COLUMNS) -> Image.Image:
    """Place pictures in rows, each shrunk or enlarged to fit a square."""
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (min(columns, len(pictures)) * _SIDE, rows * _SIDE), "white")
    for picture, (row, column) in zip(pictures, itertools.product(range(rows), range(columns)), strict=False):
        scale = _SIDE / max(picture.size)
        size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
        sheet.paste(picture.resize(size), (column * _SIDE, row * _SIDE))
    return sheet
