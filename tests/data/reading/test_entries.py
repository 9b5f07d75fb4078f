"""maskloss/data/reading/entries.py: the forms of a single field that are read, and the errors of the others."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from maskloss.data.coco import read_coco
from maskloss.data.dataset import CocoDataset
from maskloss.data.findings import Kind
from maskloss.data.reading.entries import (
    CORRUPT_RLE,
    FLAT_POLYGON,
    NESTED_POLYGONS,
    POINT_PAIRS,
    RLE_COUNTS,
    RLE_IN_LIST,
    RLE_SIZE,
    BadEntry,
    box_of_mask,
    is_absent,
    is_number,
    read_box,
    read_crowd,
    read_points,
    read_segmentation,
    read_weight,
    whole_number,
)
from tests.data.coco_files import (
    HEIGHT,
    RECTANGLE_COUNTS,
    WIDTH,
    compressed,
    in_annotation,
    refusal,
    write_coco,
)


def test_uncompressed_rle_equals_the_compressed_one(tmp_path: Path) -> None:
    rectangle = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    rectangle[1:3, 2:4] = 1
    encoded = coco_mask.encode(np.asfortranarray(rectangle))
    compressed = {"size": [HEIGHT, WIDTH], "counts": encoded["counts"].decode()}
    images, first = write_coco(tmp_path)
    _, second = write_coco(
        tmp_path, lambda document: document["annotations"][1].update(segmentation=compressed), "second.json"
    )
    masks = [CocoDataset(read_coco(images, path))[0][1]["masks"].bitmaps() for path in (first, second)]
    assert np.array_equal(masks[0][1].numpy(), rectangle)
    assert np.array_equal(masks[1][1].numpy(), rectangle)


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([[2, 1, 4, 1, 4, 3, 2]], "a polygon has an odd number of coordinates (7)"),
        ([[2, 1, 4]], "a polygon has an odd number of coordinates (3)"),
        ([[2, 1, 4, 1, 4, float("nan")]], "a polygon has a coordinate that is not finite"),
        ([[2, 1, 4, 1, 4, float("-inf")]], "a polygon has a coordinate that is not finite"),
        ([[2, 1, 4, 1, 4, "3"]], "a polygon is a flat list of numbers"),
        ([[2, 1, 4, 1, 4, None]], "a polygon is a flat list of numbers"),
        ([[2, 1, 4, 1, 4, 10**400]], "a polygon"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_bad_polygon_is_named(tmp_path: Path, segmentation: Any, reason: str) -> None:
    text = refusal(tmp_path, in_annotation(segmentation=segmentation))
    assert "annotation 101: segmentation" in text
    assert reason in text
    assert "(image 10, a.png)" in text


@pytest.mark.parametrize("segmentation", ["polygon", 3])
def test_a_segmentation_of_another_type_is_named(tmp_path: Path, segmentation: Any) -> None:
    text = refusal(tmp_path, in_annotation(segmentation=segmentation))
    assert f"annotation 101: segmentation must be a list of polygons or an RLE, not {segmentation!r}" in text


@pytest.mark.parametrize("segmentation", [[], None, [[]], {}, "", "missing"])
def test_an_empty_segmentation_with_a_box_is_an_object_without_a_mask(
    tmp_path: Path, segmentation: Any
) -> None:
    def change(document: dict[str, Any]) -> None:
        document["annotations"][0]["segmentation"] = segmentation
        if segmentation == "missing":
            del document["annotations"][0]["segmentation"]

    data = read_coco(*write_coco(tmp_path, change))
    annotation = data.images[0].annotations[0]
    assert not annotation.has_mask
    assert annotation.segmentation is None
    assert annotation.box == (2, 1, 4, 3)
    assert any("annotation 101: has a box and no mask" in warning for warning in data.warnings)


POINTS = [[2, 1], [4, 1], [4, 3], [2, 3]]


@pytest.mark.parametrize(
    "segmentation",
    [
        [2, 1, 4, 1, 4, 3, 2, 3],
        POINTS,
        [POINTS],
        [[point] for point in POINTS],
        [[[point] for point in POINTS]],
        [[[2, 1, 4, 1, 4, 3, 2, 3]]],
        [{"x": x, "y": y} for x, y in POINTS],
        [{"size": [HEIGHT, WIDTH], "counts": RECTANGLE_COUNTS}],
        [{"size": [HEIGHT, WIDTH], "counts": [11, 2, 27]}, {"size": [HEIGHT, WIDTH], "counts": [16, 2, 22]}],
        {"size": [5.0, 8.0], "counts": [float(run) for run in RECTANGLE_COUNTS]},
        {"size": [HEIGHT, WIDTH], "counts": "11 2 3 2 22"},
        {"size": [HEIGHT, WIDTH], "counts": "[11, 2, 3, 2, 22]"},
        {"size": [HEIGHT, WIDTH], "counts": repr(compressed(RECTANGLE_COUNTS).encode())},
        {"size": [HEIGHT, WIDTH], "counts": base64.b64encode(compressed(RECTANGLE_COUNTS).encode()).decode()},
        [{"size": [HEIGHT, WIDTH], "counts": "11 2 27"}, {"size": [HEIGHT, WIDTH], "counts": "16 2 22"}],
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_segmentation_in_an_unambiguous_form_is_read(tmp_path: Path, segmentation: Any) -> None:
    data = read_coco(*write_coco(tmp_path, in_annotation(segmentation=segmentation)))
    # Columns 2 and 3 of rows 1 and 2.
    expected = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    expected[1:3, 2:4] = 1
    assert np.array_equal(data.images[0].object_masks().bitmaps()[0].numpy(), expected)
    # One warning is about the crowd.
    assert len(data.warnings) == 1 + len(read_segmentation(segmentation).spellings)


@pytest.mark.parametrize(
    "counts",
    [
        [11, 2, 3, 2, 21],
        [11, 2, 3, 2, 23],
        [11, 2, 3, -2, 26],
        [11, 2, 3, 2.5, 21.5],
        [11, 2, 3, 2, float("nan")],
        [11, 2, 3, 2, "22"],
        [40, 10**30],
        [],
        None,
        7,
        {"11": 2},
        "",
        compressed(RECTANGLE_COUNTS)[:-1],
        compressed(RECTANGLE_COUNTS) + "1",
        compressed([11, 2, 3, 2, 23], (1, 41)),
        "\x01\x02",
        "é",
        "oooooo",
        "z" * 1000,
    ],
    ids=repr,
)
def test_a_corrupt_rle_is_named(tmp_path: Path, counts: Any) -> None:
    text = refusal(tmp_path, in_annotation(segmentation={"size": [HEIGHT, WIDTH], "counts": counts}))
    assert "annotation 101: segmentation: the RLE's counts are corrupt" in text


@pytest.mark.parametrize("key", ["size", "counts"])
def test_an_rle_without_a_key_is_named(tmp_path: Path, key: str) -> None:
    rle = {"size": [HEIGHT, WIDTH], "counts": RECTANGLE_COUNTS}
    del rle[key]
    text = refusal(tmp_path, in_annotation(segmentation=rle))
    assert "annotation 101: segmentation: an RLE needs the keys size and counts" in text


# Single values.


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, True),
        (-1.5, True),
        (np.float32(2.5), True),
        (True, False),
        ("1", False),
        (None, False),
        (float("nan"), False),
        (float("-inf"), False),
        (10**400, False),
    ],
    ids=lambda value: str(value)[:10],
)
def test_a_number_is_finite_and_neither_text_nor_a_boolean(value: Any, expected: bool) -> None:
    assert is_number(value) is expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, 3),
        (-3.0, -3),
        (2**128 - 1, 2**128 - 1),
        (2**128, None),
        (-(2**128), None),
        (3.5, None),
        (float("inf"), None),
        (float("nan"), None),
        (True, None),
        ("3", None),
        (None, None),
    ],
)
def test_whole_numbers_of_up_to_128_bits_are_read(value: Any, expected: int | None) -> None:
    found = whole_number(value)
    assert found == expected
    assert found is None or type(found) is int


def test_null_and_nan_are_absent() -> None:
    assert is_absent(None)
    assert is_absent(float("nan"))
    assert not any(is_absent(value) for value in (0, "", [], float("inf")))


@pytest.mark.parametrize(
    ("value", "expected"), [("", 0), (float("nan"), 0), ("True", 1), ("FALSE", 0), (2, None), ("yes", None)]
)
def test_crowd_values_of_tools_are_0_or_1(value: Any, expected: int | None) -> None:
    assert read_crowd(value) == expected


def test_a_box_is_read_as_floats() -> None:
    box = read_box([2, 1, 3, 4.5])
    assert box == (2.0, 1.0, 3.0, 4.5)
    assert all(type(value) is float for value in box)
    assert read_box((2, 1, 3, 4)) is None


def test_weights_and_points_are_read_as_floats() -> None:
    assert (read_weight(2), type(read_weight(2))) == (2.0, float)
    assert read_points([[1, 2], [3.5, 4]], [1.0, -1]) == [(1.0, 2.0, 1), (3.5, 4.0, -1)]
    assert read_points([], []) == []


# Segmentations.


@pytest.mark.parametrize(
    ("value", "spellings"),
    [
        ([[2, 1, 4, 1, 4, 3]], []),
        ([2, 1, 4, 1, 4, 3], [FLAT_POLYGON]),
        ([POINTS, POINTS], [POINT_PAIRS]),
        ([[[2, 1, 4, 1, 4, 3], [2, 1, 4, 1, 4, 3]]], [NESTED_POLYGONS]),
        ([[[[2, 1], [3, 1], [4, 1], [4, 2], [4, 3], [2, 3]]]], [NESTED_POLYGONS, POINT_PAIRS]),
        ([{"size": [HEIGHT, WIDTH], "counts": "11 2 27"}] * 2, [RLE_IN_LIST, RLE_COUNTS]),
        ([{"size": [HEIGHT, WIDTH], "counts": RECTANGLE_COUNTS}], [RLE_IN_LIST]),
        ({"size": [HEIGHT, WIDTH], "counts": RECTANGLE_COUNTS}, []),
    ],
)
def test_an_unusual_form_is_listed_once(value: Any, spellings: list[Kind]) -> None:
    assert read_segmentation(value).spellings == spellings


def test_polygons_of_fewer_than_three_points_are_counted_and_left_out() -> None:
    found = read_segmentation([[2, 1, 4, 1], [], [2, 1, 4, 1, 4, 3], [1, 1]])
    assert found.polygons == [[2, 1, 4, 1, 4, 3]]
    assert found.degenerate == 2
    assert not found.empty
    assert not read_segmentation([[2, 1, 4, 1]]).empty
    assert read_segmentation([[]]).empty


def test_rles_of_different_sizes_in_a_list_are_refused_as_such() -> None:
    rles = [{"size": [5, 8], "counts": [40]}, {"size": [8, 5], "counts": [40]}]
    with pytest.raises(BadEntry, match="the RLEs in the list have different sizes") as caught:
        read_segmentation(rles)
    assert caught.value.kind is RLE_SIZE


def test_the_box_of_a_mask_is_its_extent() -> None:
    # The union of two triangles reaches from x = 1 to 6.5 and from y = 0 to 4.
    polygons = read_segmentation([[1, 1, 3, 1, 3, 4], [5, 0, 6.5, 0, 6.5, 2]])
    assert box_of_mask(polygons) == [1, 0, 5.5, 4]
    # Columns 2 and 3 of rows 1 and 2.
    rle = read_segmentation({"size": [HEIGHT, WIDTH], "counts": RECTANGLE_COUNTS})
    assert box_of_mask(rle) == [2, 1, 2, 2]


@pytest.mark.parametrize("counts", [[True, 39], [11, False, 29], [0, True, 39]])
def test_counts_that_are_booleans_are_corrupt(counts: list[Any]) -> None:
    with pytest.raises(BadEntry, match="the RLE's counts hold booleans") as caught:
        read_segmentation({"size": [5, 8], "counts": counts})
    assert caught.value.kind is CORRUPT_RLE
