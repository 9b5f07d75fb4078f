"""maskloss/data/reading/columns.py: annotations and images of a file in columns."""

from __future__ import annotations

import math
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskloss.data.coco import read_coco
from maskloss.data.dataset import CocoDataset
from maskloss.data.reading.columns import (
    ABSENT,
    AREA_GIVEN,
    AREA_MISSING,
    AREA_ODD,
    BAD_CROWD,
    NO_OBJECT,
    Columns,
    ImageColumns,
    integers,
)
from maskloss.data.records import NO_MASK, POLYGONS, RLE
from tests.data.coco_files import (
    HEIGHT,
    RECTANGLE_COUNTS,
    WIDTH,
    compressed,
    in_annotation,
    refusal,
    write_coco,
)


def test_a_missing_iscrowd_means_no_crowd(tmp_path: Path) -> None:
    data = read_coco(*write_coco(tmp_path, lambda document: document["annotations"][2].pop("iscrowd")))
    assert data.num_objects == 3


def test_an_entry_that_is_not_an_object_is_named_by_its_position(tmp_path: Path) -> None:
    text = refusal(tmp_path, lambda document: document["annotations"].append([1, 2]))
    assert "annotation number 3: expected an object, got list" in text


@pytest.mark.parametrize(("crowd", "read"), [(None, 0), (True, 1), ("0", 0), ("1", 1), (1.0, 1), (False, 0)])
def test_an_unambiguous_iscrowd_is_read(tmp_path: Path, crowd: Any, read: int) -> None:
    data = read_coco(*write_coco(tmp_path, in_annotation(iscrowd=crowd)))
    assert data.images[0].annotations[0].crowd == read
    assert any(f"annotation 101: iscrowd {crowd!r} is read as {read}" in warning for warning in data.warnings)


@pytest.mark.parametrize("crowd", [2, -1, "yes", 0.5, []])
def test_an_iscrowd_that_is_neither_0_nor_1_is_named(tmp_path: Path, crowd: Any) -> None:
    text = refusal(tmp_path, in_annotation(iscrowd=crowd))
    assert f"annotation 101: iscrowd must be 0 or 1, not {crowd!r}" in text


def test_ids_of_more_than_64_bits_are_read(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["images"][0]["id"] = 2**100
        for annotation in document["annotations"]:
            annotation["image_id"] = 2**100
        document["annotations"][0].update(id=2**70)

    data = read_coco(*write_coco(tmp_path, change))
    assert [image.id for image in data.images] == [2**100, 20]
    assert [annotation.id for annotation in data.images[0].annotations] == [2**70, 102, 103]
    assert CocoDataset(data)[0][1]["labels"].tolist() == [2, 1]


# Rows.


def regular(**fields: Any) -> dict[str, Any]:
    """Make an annotation of COCO's usual form."""
    annotation = {"id": 5, "image_id": 1, "category_id": 2, "iscrowd": 0, "area": 4.5, "bbox": [1, 2, 3, 4]}
    return {**annotation, "segmentation": [[1, 2, 4, 2, 4, 6], [0, 0, 1, 0, 1, 1, 0, 1]], **fields}


def content(columns: Columns) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, array) else value for name, value in vars(columns).items()}


def test_a_regular_annotation_is_a_row_of_every_column() -> None:
    columns = Columns()
    columns.take(regular())
    assert len(columns) == 1
    assert list(columns.ids) == [5]
    assert list(columns.image_ids) == [1]
    assert list(columns.category_ids) == [2]
    assert list(columns.boxes) == [1, 2, 3, 4]
    assert list(columns.areas) == [4.5]
    assert list(columns.forms) == [POLYGONS]
    assert list(columns.part_counts) == [2]
    assert list(columns.point_counts) == [6, 8]
    assert list(columns.coordinates) == [1, 2, 4, 2, 4, 6, 0, 0, 1, 0, 1, 1, 0, 1]
    assert list(columns.area_states) == [AREA_GIVEN]
    assert columns.faults == []


def test_the_fast_path_and_the_general_one_give_the_same_rows() -> None:
    fast, general = Columns(), Columns()
    for number in range(3):
        item = regular(id=number)
        assert fast._take_regular(number, item)
        general._take_any(number, item)
    assert content(fast) == content(general)


@pytest.mark.parametrize(
    "fields",
    [
        {"segmentation": [[1, 2, 4, 2, 4, 6], [0, 0, 1, 0, 1, "1"]]},
        {"segmentation": [[1, 2, 4, 2, 4, 6], [0, 0, 1]]},
        {"segmentation": [[1, 2, 4, 2, 4, 6], 7]},
        {"bbox": [1, 2, 3]},
        {"bbox": [1, 2, 3, "4"]},
        {"id": 2**63},
        {"category_id": 2**63},
        {"area": 10**400},
    ],
    ids=str,
)
def test_an_annotation_that_the_fast_path_refuses_leaves_no_trace(fields: dict[str, Any]) -> None:
    columns = Columns()
    columns.take(regular())
    before = content(columns)
    assert not columns._take_regular(1, regular(**fields))
    assert content(columns) == before


def test_each_annotation_keeps_its_position_in_the_file() -> None:
    columns = Columns()
    for item in (regular(), 7, regular(iscrowd=5), regular(segmentation=[])):
        columns.take(item)
    assert list(columns.positions) == [0, 3]
    assert [(fault.kind, fault.position) for fault in columns.faults] == [(NO_OBJECT, 1), (BAD_CROWD, 2)]
    assert list(columns.forms) == [POLYGONS, NO_MASK]


@pytest.mark.parametrize(
    ("area", "state", "value"),
    [
        (4, AREA_GIVEN, 4.0),
        (float("nan"), AREA_GIVEN, None),
        (None, AREA_MISSING, None),
        ("4", AREA_ODD, None),
        (10**400, AREA_ODD, None),
    ],
    ids=lambda value: str(value)[:10],
)
def test_the_state_of_an_area_tells_missing_from_odd(area: Any, state: int, value: float | None) -> None:
    columns = Columns()
    columns.take(regular(area=area))
    assert list(columns.area_states) == [state]
    assert columns.areas[0] == value if value is not None else math.isnan(columns.areas[0])
    assert columns.odd_areas == ({0: area} if state == AREA_ODD else {})


def test_odd_values_are_kept_by_row() -> None:
    columns = Columns()
    columns.take(regular())
    columns.take(regular(id=2**63, image_id="a", bbox=[1, 2]))
    item = regular(category_id=2**64)
    del item["image_id"]
    columns.take(item)
    assert columns.odd_ids == {1: 2**63}
    assert columns.odd_image_ids == {1: "a", 2: ABSENT}
    assert columns.odd_category_ids == {2: 2**64}
    assert columns.odd_boxes == {1: [1, 2]}
    assert all(math.isnan(value) for value in columns.boxes[4:8])


def test_an_rle_is_a_row_with_its_counts_and_size() -> None:
    columns = Columns()
    columns.take(regular(segmentation={"size": [HEIGHT, WIDTH], "counts": RECTANGLE_COUNTS}))
    assert list(columns.forms) == [RLE]
    assert columns.rles == [compressed(RECTANGLE_COUNTS).encode()]
    assert list(columns.rle_sizes) == [HEIGHT, WIDTH]
    assert list(columns.part_counts) == [1]
    assert len(columns.coordinates) == 0


# Images.


def test_removed_images_are_faulty_and_leave_every_column() -> None:
    images = ImageColumns([3, 1, 2], ["c", "a", "b"], [30, 10, 20], [31, 11, 21], [0, 1, 2], {"text"})
    images.remove({0, 2})
    assert images == ImageColumns([1], ["a"], [10], [11], [1], {"text", 3, 2})


def test_arrays_of_images_are_the_fields_of_records() -> None:
    images = ImageColumns([3, 1], ["ä.png", "\udce9"], [30, 10], [31, 11], [0, 1])
    arrays = images.arrays()
    assert arrays["image_ids"].tolist() == [3, 1]
    assert arrays["widths"].tolist() == [30, 10]
    assert arrays["heights"].tolist() == [31, 11]
    names = [arrays["file_names"][index].decode("utf-8", "surrogatepass") for index in range(2)]
    assert names == ["ä.png", "\udce9"]


def test_integers_of_more_than_64_bits_stay_exact() -> None:
    assert integers([1, 2**63 - 1, -(2**63)]).dtype == np.int64
    large = integers([1, 2**63])
    assert large.dtype == object
    assert large.tolist() == [1, 2**63]
    assert integers([]).dtype == np.int64


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("change", [{}, {"area": None}, {"id": None}, {"bbox": None}], ids=str)
def test_a_boolean_coordinate_is_refused_whatever_the_other_fields_are(
    tmp_path: Path, value: bool, change: dict[str, Any]
) -> None:
    text = refusal(tmp_path, in_annotation(segmentation=[[2, 1, 4, 1, 4, value]], **change))
    assert f"a polygon is a flat list of numbers x0, y0, x1, y1, ..., but this one holds {value}" in text
