"""Repair of the annotations' ids, references, iscrowd, weight and points."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.coco_files import in_annotation
from tests.data.repair.repaired_files import ids, repaired


@pytest.mark.parametrize("given", ["x", None, 102])
def test_a_missing_id_and_that_of_another_annotation_are_replaced(tmp_path: Path, given: Any) -> None:
    document, _ = repaired(tmp_path, lambda d: d["annotations"][2].update(id=given))
    assert ids(document) == [101, 102, 103]


@pytest.mark.parametrize("number", ["10", " 10 ", "10.0"])
def test_text_that_spells_an_image_id_is_converted(tmp_path: Path, number: str) -> None:
    document, _ = repaired(tmp_path, lambda d: d["annotations"][0].update(image_id=number))
    assert document["annotations"][0]["image_id"] == 10


def test_a_category_name_instead_of_an_id_is_replaced_by_the_id(tmp_path: Path) -> None:
    document, _ = repaired(tmp_path, lambda d: d["annotations"][0].update(category_id="cat"))
    assert document["annotations"][0]["category_id"] == 3


def test_a_file_name_instead_of_an_image_id_is_replaced_by_the_id(tmp_path: Path) -> None:
    document, _ = repaired(tmp_path, lambda d: d["annotations"][0].update(image_id="nested/b.png"))
    assert document["annotations"][0]["image_id"] == 20


@pytest.mark.parametrize("key", ["image_id", "category_id"])
@pytest.mark.parametrize("reference", [99, "99", "bird", None, [10]], ids=str)
def test_an_annotation_of_an_unknown_image_or_category_is_left_out(
    tmp_path: Path, key: str, reference: Any
) -> None:
    document, _ = repaired(tmp_path, in_annotation(**{key: reference}))
    assert ids(document) == [102, 103]


@pytest.mark.parametrize(("given", "written"), [("1", 1), ("true", 1), (None, 0), (2, 0), ("x", 0), ([], 0)])
def test_iscrowd_becomes_0_or_1(tmp_path: Path, given: Any, written: int) -> None:
    document, _ = repaired(tmp_path, in_annotation(iscrowd=given))
    assert document["annotations"][0]["iscrowd"] == written


def test_a_weight_written_as_text_is_kept(tmp_path: Path) -> None:
    document, _ = repaired(tmp_path, lambda d: d["annotations"][0].update(weight="0.5"))
    assert document["annotations"][0]["weight"] == 0.5


def test_a_weight_that_is_not_a_number_is_removed(tmp_path: Path) -> None:
    document, _ = repaired(tmp_path, in_annotation(weight=-1))
    assert "weight" not in document["annotations"][0]


@pytest.mark.parametrize(
    ("coordinates", "labels", "kept"),
    [
        ([[2, 1], ["x", 1], [3, 2]], [1, 1, 0], ([[2, 1], [3, 2]], [1, 0])),
        ([[2, 1], [9, 1], [9, 1]], [1, 1, -1], ([[2, 1], [9, 1]], [1, -1])),  # the image is 8 px wide
        ([[2, 1]], [1, 0], None),
        ("2 1", [1], None),
    ],
    ids=str,
)
def test_points_that_cannot_be_read_or_are_outside_are_removed(
    tmp_path: Path, coordinates: Any, labels: Any, kept: Any
) -> None:
    document, _ = repaired(tmp_path, in_annotation(point_coords=coordinates, point_labels=labels))
    annotation = document["annotations"][0]
    assert (annotation.get("point_coords"), annotation.get("point_labels")) == (kept or (None, None))
