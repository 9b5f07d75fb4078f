"""Repair of segmentations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from maskloss.data.coco import read_coco
from tests.data.coco_files import HEIGHT, RECTANGLE_COUNTS, WIDTH, compressed, in_annotation, write_coco
from tests.data.repair.repaired_files import ids, repaired


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ([2, 1, 4, 1, 4, 3, 2, 3], [[2, 1, 4, 1, 4, 3, 2, 3]]),
        ([[2, 1], [4, 1], [4, 3], [2, 3]], [[2, 1, 4, 1, 4, 3, 2, 3]]),
        (
            [{"size": [HEIGHT, WIDTH], "counts": RECTANGLE_COUNTS}],
            {"size": [HEIGHT, WIDTH], "counts": compressed(RECTANGLE_COUNTS)},
        ),
        ([[[2, 1, 4, 1, 4, 3, 2, 3]]], [[2, 1, 4, 1, 4, 3, 2, 3]]),
        (
            {"size": [HEIGHT, WIDTH], "counts": repr(compressed(RECTANGLE_COUNTS).encode())},
            {"size": [HEIGHT, WIDTH], "counts": compressed(RECTANGLE_COUNTS)},
        ),
    ],
    ids=str,
)
def test_other_forms_are_rewritten_in_cocos(tmp_path: Path, given: Any, written: Any) -> None:
    document, listing = repaired(tmp_path, in_annotation(segmentation=given))
    assert document["annotations"][0]["segmentation"] == written
    assert [r["change"] for r in listing["repairs"]] == ["segmentation rewritten in COCO's form"]


@pytest.mark.parametrize(
    "other", [["x", 1, 2, 3, 4, 5], [2, 1, 4, 1, 4, 3, 2], [float("nan"), 1, 2, 1, 4, 3]], ids=str
)
def test_polygons_beside_one_that_cannot_be_read_are_kept(tmp_path: Path, other: Any) -> None:
    polygon = [2, 1, 4, 1, 4, 3, 2, 3]
    document, _ = repaired(tmp_path, in_annotation(segmentation=[polygon, other]))
    assert document["annotations"][0]["segmentation"] == [polygon]


@pytest.mark.parametrize(("box", "kept"), [([2, 1, 2, 2], True), ("2 1 2 2", True), (None, False)])
def test_a_corrupt_rle_leaves_the_box_if_there_is_one(tmp_path: Path, box: Any, kept: bool) -> None:
    rle = {"size": [HEIGHT, WIDTH], "counts": [39]}  # of 40 pixels
    document, _ = repaired(tmp_path, in_annotation(segmentation=rle, bbox=box))
    assert ids(document) == ([101, 102, 103] if kept else [102, 103])
    if kept:
        assert document["annotations"][0]["segmentation"] == []
        assert document["annotations"][0]["bbox"] == [2, 1, 2, 2]


def test_a_transposed_rle_is_corrected_and_one_that_fits_neither_way_loses_its_mask(tmp_path: Path) -> None:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[0:2, 3:8] = 1
    turned = coco_mask.encode(np.asfortranarray(mask.T))

    def change(document: dict[str, Any]) -> None:
        rle = {"size": [WIDTH, HEIGHT], "counts": turned["counts"].decode()}
        document["annotations"][0].update(segmentation=rle, bbox=[3, 0, 5, 2])
        document["annotations"][1].update(segmentation=rle, bbox=[0, 3, 1, 1])

    document, _ = repaired(tmp_path, change)
    data = read_coco(tmp_path / "images", tmp_path / "fixed.json")
    assert np.array_equal(data.images[0].object_masks().bitmaps()[0].numpy(), mask)
    assert [annotation.has_mask for annotation in data.images[0].objects] == [True, False]
    assert document["annotations"][1]["segmentation"] == []


def test_an_rle_of_which_only_the_size_is_swapped_gets_the_images_size(tmp_path: Path) -> None:
    rle = {"size": [WIDTH, HEIGHT], "counts": RECTANGLE_COUNTS}
    document, _ = repaired(tmp_path, lambda d: d["annotations"][1].update(segmentation=rle))
    assert document["annotations"][1]["segmentation"] == {"size": [HEIGHT, WIDTH], "counts": RECTANGLE_COUNTS}


def test_an_rle_that_fits_its_box_both_ways_loses_its_mask(tmp_path: Path) -> None:
    # From the corner, it covers 2 x 2 px if transposed, and 2 x 5 px if only its size is swapped; 2 px are tolerated.
    rle = {"size": [WIDTH, HEIGHT], "counts": [0, 2, 6, 2, 30]}
    document, _ = repaired(tmp_path, in_annotation(segmentation=rle, bbox=[0, 0, 2, 3]))
    assert document["annotations"][0]["segmentation"] == []


@pytest.mark.parametrize(
    "segmentation",
    [
        ["2", "1", "4", "1", "4", "3"],
        [["2", "1", "4", "1", "4", "3"]],
        [["2", "1"], ["4", "1"], ["4", "3"]],
        [[["2", "1"], ["4", "1"], ["4", 3]]],
        ["2,1,4,1,4,3"],
        ["2 1 4 1 4 3.0"],
        ["[2, 1, 4, 1, 4, 3]"],
        "[[2, 1, 4, 1, 4, 3]]",
        "2 1 4 1 4 3",
        [[{"x": "2", "y": "1"}, {"x": "4", "y": "1"}, {"x": "4", "y": "3"}]],
    ],
    ids=str,
)
def test_polygons_written_as_text_are_kept(tmp_path: Path, segmentation: Any) -> None:
    document, _ = repaired(tmp_path, lambda d: d["annotations"][0].update(segmentation=segmentation))
    assert document["annotations"][0]["segmentation"] == [[2, 1, 4, 1, 4, 3]]


@pytest.mark.parametrize(
    "rle",
    [
        {"size": [str(HEIGHT), str(WIDTH)], "counts": RECTANGLE_COUNTS},
        {"size": [HEIGHT, WIDTH], "counts": [str(run) for run in RECTANGLE_COUNTS]},
        json.dumps({"size": [HEIGHT, WIDTH], "counts": RECTANGLE_COUNTS}),
        [json.dumps({"size": [HEIGHT, WIDTH], "counts": RECTANGLE_COUNTS})],
    ],
    ids=str,
)
def test_an_rle_written_as_text_is_kept(tmp_path: Path, rle: Any) -> None:
    good = write_coco(tmp_path)
    mask = read_coco(*good).images[0].object_masks().bitmaps()[1]
    repaired(tmp_path, lambda d: d["annotations"][1].update(segmentation=rle))
    data = read_coco(tmp_path / "images", tmp_path / "fixed.json")
    assert data.images[0].object_masks().bitmaps()[1].equal(mask)


@pytest.mark.parametrize(
    "segmentation",
    [["123456", "234561", "345612"], ["8,5", "9,5", "7,5"], "abcdef", ["2,1 4,1 4,3"]],
    ids=str,
)
def test_no_polygon_is_invented_from_text(tmp_path: Path, segmentation: Any) -> None:
    document, _ = repaired(tmp_path, lambda d: d["annotations"][0].update(segmentation=segmentation))
    assert document["annotations"][0]["segmentation"] == []


def test_the_runs_of_kaggle_are_no_polygon(tmp_path: Path) -> None:
    """Starts and lengths, down the columns, from 1: columns 2 and 3, rows 1 and 2."""
    document, _ = repaired(tmp_path, in_annotation(segmentation="12 2 17 2 30 1"))
    assert document["annotations"][0]["segmentation"] == []
    assert document["annotations"][0]["bbox"] == [2, 1, 2, 2]
