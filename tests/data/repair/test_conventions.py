"""Repair of conventions that a whole file follows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskloss.data.coco import read_coco
from maskloss.data.repair import repair
from maskloss.errors import InputError
from tests.data.coco_files import write_coco
from tests.data.repair.repaired_files import repaired


@pytest.mark.parametrize(
    ("convention", "box"),
    [
        ("x1, y1, x2, y2", lambda x, y, w, h: [x, y, x + w, y + h]),
        ("center x, center y, width, height", lambda x, y, w, h: [x + w / 2, y + h / 2, w, h]),
        ("y1, x1, y2, x2", lambda x, y, w, h: [y, x, y + h, x + w]),
        ("fractions x1, y1, x2, y2", lambda x, y, w, h: [x / 80, y / 50, (x + w) / 80, (y + h) / 50]),
        (
            "fractions of center x, center y, width, height",
            lambda x, y, w, h: [(x + w / 2) / 80, (y + h / 2) / 50, w / 80, h / 50],
        ),
    ],
)
def test_boxes_of_another_convention_are_reported_and_taken_from_the_masks(
    tmp_path: Path, convention: str, box: Any
) -> None:
    sides = [(10, 5, 20, 30), (40, 10, 30, 12), (50, 30, 25, 15), (5, 20, 12, 25)]

    def change(document: dict[str, Any]) -> None:
        document["images"][0].update(width=80, height=50)
        document["annotations"] = [
            {"id": i, "image_id": 10, "category_id": 7, "bbox": box(x, y, w, h), "iscrowd": 0,
             "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}
            for i, (x, y, w, h) in enumerate(sides)
        ]  # fmt: skip
        # A box without a mask follows the convention of the others.
        document["annotations"].append({**document["annotations"][0], "id": 9, "segmentation": []})

    images, annotations = write_coco(tmp_path, change)
    Image.new("RGB", (80, 50)).save(images / "a.png")
    with pytest.raises(InputError, match=f"the boxes look like {convention} instead of x, y, width, height"):
        repair(images, annotations, tmp_path / "fixed.json")
    repair(images, annotations, tmp_path / "fixed.json", boxes="from-masks")
    data = read_coco(images, tmp_path / "fixed.json")
    boxes = [annotation.box for annotation in data.images[0].annotations]
    expected = [(x, y, x + w, y + h) for x, y, w, h in [*sides, sides[0]]]
    assert np.allclose(boxes, expected)


def test_coordinates_that_are_fractions_are_reported_and_multiplied(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        for annotation in document["annotations"]:
            annotation.update(
                bbox=[0.25, 0.2, 0.25, 0.4], segmentation=[[0.25, 0.2, 0.5, 0.2, 0.5, 0.6]], iscrowd=0
            )

    images, annotations = write_coco(
        tmp_path, lambda d: (d["images"][0].update(width=16, height=10), change(d))
    )
    Image.new("RGB", (16, 10)).save(images / "a.png")
    with pytest.raises(InputError, match="the polygons look like fractions of the image instead of px"):
        read_coco(images, annotations)
    repair(images, annotations, tmp_path / "fixed.json")
    data = read_coco(images, tmp_path / "fixed.json")
    assert data.images[0].annotations[0].segmentation == [[4, 2, 8, 2, 8, 6]]
    assert data.images[0].annotations[0].box == (4, 2, 8, 6)


def percentages(folder: Path, *, images: int, boxes_only: bool = False) -> tuple[Path, Path]:
    """Write a file of images of 250 x 200 px with an object each, in percent of the width and height."""
    annotation: dict[str, Any] = {"category_id": 1, "iscrowd": 0, "bbox": [25, 20, 70, 75]}
    if not boxes_only:
        annotation["segmentation"] = [[25, 20, 95, 20, 95, 95]]
    document = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 250, "height": 200} for i in range(images)],
        "annotations": [{"id": i, "image_id": i, **annotation} for i in range(images)],
        "categories": [{"id": 1, "name": "nut"}],
    }
    for i in range(images):
        Image.new("RGB", (250, 200)).save(folder / f"{i}.png")
    (folder / "percent.json").write_text(json.dumps(document))
    return folder, folder / "percent.json"


# The chance that 13 objects lie in a part of 100 / 250 x 100 / 200 of their images is (1 / 5) ** 13 = 8e-10.
@pytest.mark.parametrize("boxes_only", [False, True])
def test_coordinates_that_are_percentages_are_reported_and_converted(
    tmp_path: Path, boxes_only: bool
) -> None:
    images, annotations = percentages(tmp_path, images=13, boxes_only=boxes_only)
    what = "boxes" if boxes_only else "polygons"
    text = f"the {what} look like percentages of the image instead of px: all 13 lie between 0 and 100"
    with pytest.raises(InputError, match=text):
        read_coco(images, annotations)
    repair(images, annotations, tmp_path / "fixed.json")
    [annotation] = read_coco(images, tmp_path / "fixed.json").images[7].annotations
    assert annotation.box == (62.5, 40, 237.5, 190)
    if not boxes_only:
        assert annotation.segmentation == [[62.5, 40, 237.5, 40, 237.5, 190]]


def test_few_objects_in_the_top_left_corner_are_no_percentages(tmp_path: Path) -> None:
    data = read_coco(*percentages(tmp_path, images=12))
    assert data.images[0].annotations[0].box == (25, 20, 95, 95)


def test_one_object_beyond_100_px_shows_that_the_others_are_in_px_too(tmp_path: Path) -> None:
    images, annotations = percentages(tmp_path, images=13)
    document = json.loads(annotations.read_text())
    document["annotations"][3].update(bbox=[80, 20, 25, 40], segmentation=[[80, 20, 105, 20, 105, 60]])
    annotations.write_text(json.dumps(document))
    assert read_coco(images, annotations).num_objects == 13


def test_areas_of_boxes_become_those_of_the_masks(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        triangle = {"segmentation": [[0, 0, 4, 0, 4, 4]], "bbox": [0, 0, 4, 4], "area": 16}
        document["annotations"] = [{**document["annotations"][0], **triangle, "id": i} for i in range(2)]
        document["annotations"].append({**document["annotations"][0], "id": 2, "segmentation": []})

    document, _ = repaired(tmp_path, change)
    assert [annotation["area"] for annotation in document["annotations"]] == [8, 8, 16]


def test_crowds_become_objects_with_the_option(tmp_path: Path) -> None:
    document, _ = repaired(tmp_path, None, crowds="objects")
    assert [annotation["iscrowd"] for annotation in document["annotations"]] == [0, 0, 0]
