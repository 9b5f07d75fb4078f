"""maskloss/data/reading/boxes.py: which boxes are read, taken from masks, clipped, dropped or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from maskloss.data.coco import read_coco
from maskloss.data.repair import repair
from maskloss.errors import InputError
from tests.data.coco_files import (
    HEIGHT,
    WIDTH,
    in_annotation,
    left_out,
    refusal,
    write_coco,
)


def test_boxes_are_xyxy(tmp_path: Path) -> None:
    data = read_coco(*write_coco(tmp_path, in_annotation(bbox=[2, 1, 3, 4])))
    assert data.images[0].annotations[0].box == (2, 1, 5, 5)


def test_a_box_up_to_a_pixel_outside_is_clipped(tmp_path: Path) -> None:
    data = read_coco(*write_coco(tmp_path, in_annotation(bbox=[-1, -0.5, 10, 6.5])))
    assert data.images[0].annotations[0].box == (0, 0, WIDTH, HEIGHT)


@pytest.mark.parametrize("box", [[2.1, 1, 2.8e-14, 2], [2, 1.1, 2, 1e-8]])
def test_an_object_with_a_side_that_is_0_in_float32_is_left_out(tmp_path: Path, box: list[float]) -> None:
    text = left_out(tmp_path, in_annotation(bbox=box))
    assert f"annotation 101: bbox {box} has a side that is 0 in float32" in text


@pytest.mark.parametrize("box", [[2, 1, 0, 2], [2, 1, 2, 0], [2, 1, -2, 2], [2, 1, 2, -1e-9]])
def test_a_box_with_a_zero_or_negative_side_is_left_out(tmp_path: Path, box: list[float]) -> None:
    text = left_out(tmp_path, in_annotation(bbox=box))
    assert f"annotation 101: bbox has a side that is zero or negative: {box}" in text
    assert "(image 10, a.png)" in text


@pytest.mark.parametrize(
    "box",
    [
        None,
        [2, 1, 2],
        [2, 1, 2, 2, 2],
        [2, 1, 2, "2"],
        [2, 1, 2, True],
        [2, 1, float("nan"), 2],
        [2, 1, 2, float("inf")],
        {"x": 2},
        [2, 1, 2, 10**400],
    ],
    ids=lambda box: str(box)[:30],
)
def test_a_box_that_is_not_four_finite_numbers_is_taken_from_the_mask(tmp_path: Path, box: Any) -> None:
    data = read_coco(*write_coco(tmp_path, in_annotation(bbox=box)))
    assert data.images[0].annotations[0].box == (2, 1, 4, 3)
    assert any(
        "annotation 101: bbox" in warning and "is taken from the mask" in warning for warning in data.warnings
    )


def test_an_annotation_with_neither_box_nor_mask_is_refused(tmp_path: Path) -> None:
    text = refusal(tmp_path, in_annotation(bbox=[2, 1, 2, "2"], segmentation=[]))
    assert "annotation 101: bbox must be four finite numbers x, y, width, height, not [2, 1, 2, '2']" in text


@pytest.mark.parametrize(
    ("box", "clipped"),
    [
        ([-1.5, 1, 4, 2], (0, 1, 2.5, 3)),
        ([2, -1.5, 2, 4], (2, 0, 4, 2.5)),
        ([7, 1, 2.5, 2], (7, 1, 8, 3)),
        ([2, 4, 2, 2.5], (2, 4, 4, 5)),
    ],
)
def test_a_box_that_reaches_beyond_the_border_is_clipped(
    tmp_path: Path, box: list[float], clipped: Any
) -> None:
    data = read_coco(*write_coco(tmp_path, in_annotation(bbox=box)))
    assert data.images[0].annotations[0].box == clipped
    text = f"annotation 101: bbox {box} reaches 1.5 px beyond the border"
    assert any(text in warning for warning in data.warnings)


def test_a_box_entirely_beyond_the_border_is_refused(tmp_path: Path) -> None:
    # Within the tolerance of 1 px, but nothing is left after clipping.
    text = refusal(tmp_path, in_annotation(bbox=[8.2, 1, 0.5, 2]))
    assert "annotation 101: bbox [8.2, 1, 0.5, 2] lies outside the image" in text


def test_loose_boxes_are_not_mistaken_for_another_convention(tmp_path: Path) -> None:
    # Boxes of whole objects whose masks cover only their visible parts.
    def change(document: dict[str, Any]) -> None:
        document["images"][0].update(width=80, height=50)
        document["annotations"] = [
            {**document["annotations"][0], "id": i, "bbox": [x - 8, y - 4, 30, 20],
             "segmentation": [[x, y, x + 9, y, x + 9, y + 5, x, y + 5]]}
            for i, (x, y) in enumerate([(10, 5), (40, 10), (50, 30), (25, 20)])
        ]  # fmt: skip

    images, annotations = write_coco(tmp_path, change)
    Image.new("RGB", (80, 50)).save(images / "a.png")
    assert read_coco(images, annotations).num_objects == 4


def test_annotations_without_masks_whose_boxes_are_corners_are_refused(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        for annotation, box in zip(
            document["annotations"], ([4, 1, 7, 4], [3, 2, 8, 5], [1, 1, 3, 2]), strict=True
        ):
            annotation.update(segmentation=[], bbox=box, iscrowd=0)

    text = refusal(tmp_path, change)
    assert (
        "the boxes look like x1, y1, x2, y2 instead of x, y, width, height: otherwise most reach beyond"
        in text
    )


def test_boxes_that_are_nowhere_near_their_masks_are_refused(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        del document["annotations"][2]
        for annotation in document["annotations"]:
            annotation["bbox"] = [6, 3, 2, 2]

    text = refusal(tmp_path, change)
    assert "2 of 2 boxes are nowhere near their masks; `maskloss repair --boxes from-masks`" in text


@pytest.mark.parametrize(("others", "refused"), [(0, True), (1, False)])
def test_boxes_that_nearly_all_have_no_area_are_refused(tmp_path: Path, others: int, refused: bool) -> None:
    def change(document: dict[str, Any]) -> None:
        boxes = [[0, 0, 0, 0]] * 2 + [[2, 1, 2, 2]] * others
        document["annotations"] = [
            {**document["annotations"][0], "id": number, "bbox": box} for number, box in enumerate(boxes)
        ]

    images, annotations = write_coco(tmp_path, change)
    if not refused:
        assert read_coco(images, annotations).num_objects == 1
        return
    with pytest.raises(
        InputError, match=r"2 of 2 boxes have no area, but their masks do; .*--boxes from-masks"
    ):
        read_coco(images, annotations)
    with pytest.raises(InputError, match="--boxes from-masks"):
        repair(images, annotations, tmp_path / "fixed.json")
    data, _ = repair(images, annotations, tmp_path / "fixed.json", boxes="from-masks")
    assert [item.box for item in data.images[0].annotations] == [(2, 1, 4, 3)] * 2
