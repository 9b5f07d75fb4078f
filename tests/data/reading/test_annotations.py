"""maskloss/data/reading/annotations.py: which annotations are kept, with which boxes, areas and ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskloss.data.check import check_data
from maskloss.data.coco import read_coco
from maskloss.data.repair import repair
from maskloss.errors import InputError
from tests.data.coco_files import (
    in_annotation,
    refusal,
    write_coco,
)


def test_a_missing_area_is_that_of_the_mask(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        for annotation in document["annotations"]:
            del annotation["area"]

    data = read_coco(*write_coco(tmp_path, change))
    assert [annotation.area for annotation in data.images[0].annotations] == [4, 4, 40]


def test_annotations_without_an_id_or_with_a_duplicate_one_get_new_ids(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["annotations"][0].pop("id")
        document["annotations"][2]["id"] = 102

    data = read_coco(*write_coco(tmp_path, change))
    assert [annotation.id for annotation in data.images[0].annotations] == [103, 102, 104]
    assert any("annotation number 0: missing id" in warning for warning in data.warnings)
    assert any("annotation 102: the id is used twice" in warning for warning in data.warnings)


@pytest.mark.parametrize("identity", [99, True, "10", None, [10]])
def test_an_annotation_of_an_unknown_image_is_named(tmp_path: Path, identity: Any) -> None:
    text = refusal(tmp_path, in_annotation(image_id=identity))
    assert f"annotation 101: image_id {identity!r} is not in the file" in text


@pytest.mark.parametrize("identity", [99, True, "7", None, [7]])
def test_an_annotation_of_an_unknown_category_is_named(tmp_path: Path, identity: Any) -> None:
    text = refusal(tmp_path, in_annotation(category_id=identity))
    assert f"annotation 101: category_id {identity!r} is not in the file" in text


def test_annotations_of_an_image_with_an_error_have_no_error_of_their_own(tmp_path: Path) -> None:
    images, annotations = write_coco(tmp_path)
    (images / "a.png").unlink()
    _, problems = check_data(images, annotations)
    assert [problem.text for problem in problems] == [
        f"{annotations}: image 10: the file {images / 'a.png'} does not exist; `maskloss repair` leaves them out"
    ]


@pytest.mark.parametrize(
    "area", [-4, 0, float("nan"), 1e11, "400", [4], 10**400, True], ids=lambda a: str(a)[:10]
)
def test_an_unusable_area_is_replaced_by_the_masks(tmp_path: Path, area: Any) -> None:
    data = read_coco(*write_coco(tmp_path, in_annotation(area=area)))
    assert data.images[0].annotations[0].area == pytest.approx(4)
    assert any("annotation 101: area" in w and "is replaced by the mask's" in w for w in data.warnings)


def test_the_area_of_an_object_without_a_mask_is_that_of_its_box(tmp_path: Path) -> None:
    data = read_coco(*write_coco(tmp_path, in_annotation(area=0, segmentation=[], bbox=[2, 1, 3, 2.5])))
    assert data.images[0].annotations[0].area == 7.5
    assert not any("area 0" in warning for warning in data.warnings)


def test_areas_that_are_those_of_the_boxes_are_reported(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        for annotation in document["annotations"]:
            annotation.update(segmentation=[[2, 1, 4, 1, 4, 3]], area=4, iscrowd=0, bbox=[2, 1, 2, 2])

    _, problems = check_data(*write_coco(tmp_path, change))
    assert any("area is that of the box, not of the mask, in 3 of 3 annotations" in p.text for p in problems)


def test_a_data_set_without_masks_is_read_with_a_warning(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        for annotation in document["annotations"]:
            annotation.update(segmentation=[], iscrowd=0)

    data = read_coco(*write_coco(tmp_path, change))
    assert data.num_objects == 3
    assert data.num_masks == 0
    assert "none of the 3 objects has a mask: only the boxes are trained" in data.warnings[0]


@pytest.mark.parametrize("field", ["image_id", "category_id"])
def test_true_is_not_the_id_1(tmp_path: Path, field: str) -> None:
    def change(document: dict[str, Any]) -> None:
        for entry in (document["images"][0], document["categories"][0]):
            entry["id"] = 1
        for annotation in document["annotations"]:
            annotation.update(image_id=1, category_id=1)
        document["annotations"][0][field] = True

    assert f"annotation 101: {field} True is n" in refusal(tmp_path, change)


def test_tables_of_pixels_are_no_polygons(tmp_path: Path) -> None:
    Image.new("RGB", (16, 12)).save(tmp_path / "a.png")
    mask = np.zeros((12, 16), dtype=int)
    mask[3:9, 4:11] = 1
    mask[5, 6] = 0
    document = {
        "images": [{"id": 1, "file_name": "a.png", "width": 16, "height": 12}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 3, 7, 6], "segmentation": mask.tolist()}
        ],
        "categories": [{"id": 1, "name": "nut"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(document))
    for read in (read_coco, lambda *paths: repair(*paths, tmp_path / "fixed.json")):
        with pytest.raises(InputError, match=r"are tables of pixels, 0 and 1, .*; write them as RLEs"):
            read(tmp_path, tmp_path / "a.json")
    # The corners of an image are fractions.
    document["annotations"][0].update(segmentation=[[0, 0, 1, 0, 1, 1, 0, 1, 0, 0]], bbox=[0, 0, 1, 1])
    (tmp_path / "b.json").write_text(json.dumps(document))
    data, _ = repair(tmp_path, tmp_path / "b.json", tmp_path / "fixed.json")
    assert data.images[0].annotations[0].box == (0, 0, 16, 12)


def test_the_new_ids_follow_the_highest_one(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["annotations"][0]["id"] = 500
        del document["annotations"][1]["id"], document["annotations"][2]["id"]

    data = read_coco(*write_coco(tmp_path, change))
    assert [annotation.id for annotation in data.images[0].annotations] == [500, 501, 502]


def test_boxes_of_zeros_without_masks_are_no_fractions(tmp_path: Path) -> None:
    # Keypoint sets have such boxes. They have no area, whatever the unit.
    def change(document: dict[str, Any]) -> None:
        document["annotations"] = document["annotations"][:2]
        document["annotations"][0].update(bbox=[0, 0, 0, 0], segmentation=[])
        del document["annotations"][1]["segmentation"]

    data = read_coco(*write_coco(tmp_path, change))
    assert data.num_objects == 1
    assert not any("fractions" in warning for warning in data.warnings)
    document, _ = repair(*write_coco(tmp_path, change), tmp_path / "fixed.json")
    assert document.num_objects == 1
