"""Repair of masks, boxes and areas that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.coco_files import in_annotation
from tests.data.repair.repaired_files import ids, repaired

POLYGON = [2, 1, 4, 1, 4, 3, 2, 3]


def test_polygons_without_area_are_left_out(tmp_path: Path) -> None:
    document, _ = repaired(
        tmp_path, in_annotation(segmentation=[POLYGON, [1, 1, 1, 1, 1, 1], [0, 0, 5, 5, 0, 0]])
    )
    assert document["annotations"][0]["segmentation"] == [POLYGON]


@pytest.mark.parametrize(
    "fields",
    [
        {"segmentation": [[1, 1, 3, 3, 1, 1]]},  # no area
        {"segmentation": [[200, 1, 220, 1, 220, 9]]},  # far outside
        {"segmentation": [], "bbox": None},
        {"segmentation": [], "bbox": [1, 1, 0, 3]},
        {"segmentation": [], "bbox": [50, 50, 2, 2]},
    ],
    ids=str,
)
def test_annotations_without_a_usable_mask_or_box_are_left_out(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    document, _ = repaired(tmp_path, in_annotation(**fields))
    assert ids(document) == [102, 103]


@pytest.mark.parametrize(
    "box", [["2", "1", "2", "2"], [2, 1, "2.0", 2], "2 1 2 2", "[2, 1, 2, 2]", "2,1,2,2"]
)
@pytest.mark.parametrize("segmentation", [[], "unreadable", [[2, 1, 4, 1, 4, 3]]], ids=str)
def test_a_box_written_as_text_is_kept(tmp_path: Path, box: Any, segmentation: Any) -> None:
    document, _ = repaired(
        tmp_path, lambda d: d["annotations"][0].update(bbox=box, segmentation=segmentation)
    )
    assert document["annotations"][0]["bbox"] == [2, 1, 2, 2]


@pytest.mark.parametrize("box", [[2, 1, 0, 2], [50, 50, 2, 2]])
def test_a_box_of_no_area_or_outside_is_taken_from_the_mask_with_the_option(tmp_path: Path, box: Any) -> None:
    assert ids(repaired(tmp_path / "keep", in_annotation(bbox=box))[0]) == [102, 103]
    document, _ = repaired(tmp_path / "take", in_annotation(bbox=box), boxes="from-masks")
    assert document["annotations"][0]["bbox"] == [2, 1, 2, 2]


@pytest.mark.parametrize(
    ("box", "segmentation", "written"),
    [
        (None, [POLYGON], [2, 1, 2, 2]),
        ([1, 2, 3], [POLYGON], [2, 1, 2, 2]),
        ([-3, 1, 7, 2], [], [0, 1, 4, 2]),
        ([6, 3, 9, 9], [], [6, 3, 2, 2]),  # the image is 8 x 5 px
    ],
    ids=str,
)
def test_a_missing_box_is_that_of_the_mask_and_others_are_clipped(
    tmp_path: Path, box: Any, segmentation: Any, written: list[float]
) -> None:
    document, _ = repaired(tmp_path, in_annotation(bbox=box, segmentation=segmentation))
    assert document["annotations"][0]["bbox"] == written


@pytest.mark.parametrize(("segmentation", "area"), [([[2, 1, 4, 1, 4, 3]], 2), ([], 4)], ids=str)
def test_an_area_that_is_no_area_becomes_that_of_the_mask_or_the_box(
    tmp_path: Path, segmentation: Any, area: float
) -> None:
    document, _ = repaired(tmp_path, in_annotation(area=-1, segmentation=segmentation))
    assert document["annotations"][0]["area"] == area
