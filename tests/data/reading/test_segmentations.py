"""maskloss/data/reading/segmentations.py: which polygons and RLEs are read, clipped, dropped or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from maskloss.data.coco import read_coco
from tests.data.coco_files import (
    HEIGHT,
    RECTANGLE_COUNTS,
    WIDTH,
    compressed,
    in_annotation,
    left_out,
    refusal,
    write_coco,
)


def test_an_rle_without_a_pixel_is_left_out(tmp_path: Path) -> None:
    text = left_out(tmp_path, in_annotation(segmentation={"size": [5, 8], "counts": [40]}))
    assert "annotation 101: segmentation: the RLE has no pixel" in text


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([[2, 1, 4, 1]], "a polygon has fewer than 3 points"),
        ([[2, 1, 4, 1, 6, 1]], "a polygon has no area"),
    ],
)
def test_an_object_with_a_degenerate_segmentation_is_left_out(
    tmp_path: Path, segmentation: Any, reason: str
) -> None:
    assert f"annotation 101: segmentation: {reason}" in left_out(
        tmp_path, in_annotation(segmentation=segmentation)
    )


def test_a_figure_of_eight_has_an_area(tmp_path: Path) -> None:
    # Two triangles of base 2 and height 1 with opposite orientations: their signed areas cancel.
    def change(document: dict[str, Any]) -> None:
        document["annotations"][0].update(segmentation=[[2, 1, 4, 3, 4, 1, 2, 3]])
        del document["annotations"][0]["area"]

    data = read_coco(*write_coco(tmp_path, change))
    assert data.images[0].annotations[0].area == pytest.approx(2, rel=1e-12)


def test_the_two_flat_records_of_coco_train2017_are_left_out_by_name(tmp_path: Path) -> None:
    # Quoted in cocodataset/cocoapi#355 and visionml/pytracking#18.
    flat = [
        {"segmentation": [[296.65, 388.33, 296.65, 388.33, 297.68, 388.33, 297.68, 388.33]], "area": 0.0,
         "iscrowd": 0, "image_id": 10, "bbox": [296.65, 388.33, 1.03, 0.0], "category_id": 7, "id": 918},
        {"segmentation": [[9.98, 188.56, 15.52, 188.56, 15.52, 188.56, 11.09, 188.56]], "area": 0.0,
         "iscrowd": 0, "image_id": 10, "bbox": [9.98, 188.56, 5.54, 0.0], "category_id": 7, "id": 2206849},
    ]  # fmt: skip

    def change(document: dict[str, Any]) -> None:
        document["images"][0].update(width=640, height=480)
        document["annotations"] = [document["annotations"][0], *flat]

    images, annotations = write_coco(tmp_path, change)
    Image.new("RGB", (640, 480)).save(images / "a.png")
    data = read_coco(images, annotations)
    assert [annotation.id for annotation in data.images[0].annotations] == [101]
    [warning] = data.warnings
    assert "2 annotations whose mask has no area are left out" in warning
    assert "annotation 918" in warning
    assert "annotation 2206849" in warning


def test_the_area_of_overlapping_polygons_is_that_of_their_union(tmp_path: Path) -> None:
    # Two squares of 2 x 2 that overlap by half cover 3 x 2 = 6 px².
    squares = [[1, 1, 3, 1, 3, 3, 1, 3], [2, 1, 4, 1, 4, 3, 2, 3]]
    data = read_coco(*write_coco(tmp_path, in_annotation(area=None, segmentation=squares)))
    assert data.images[0].annotations[0].area == pytest.approx(6, rel=1e-12)


def test_a_polygon_up_to_a_pixel_outside_is_kept(tmp_path: Path) -> None:
    data = read_coco(*write_coco(tmp_path, in_annotation(segmentation=[[-1, 0, 9, 0, 9, 6]])))
    assert data.images[0].annotations[0].segmentation == [[-1, 0, 9, 0, 9, 6]]
    assert not any("beyond the border" in warning for warning in data.warnings)


@pytest.mark.parametrize(
    "polygon", [[2, 1, 4, 1, 9.5, 3], [2, 1, 4, 1, 4, -1.5], [-7, -7, 20, -7, 20, 20, -7, 20]]
)
def test_a_polygon_that_reaches_beyond_the_border_is_clipped_there(
    tmp_path: Path, polygon: list[float]
) -> None:
    data = read_coco(*write_coco(tmp_path, in_annotation(segmentation=[polygon], bbox=None)))
    assert any("annotation 101: segmentation: reaches" in warning for warning in data.warnings)
    rle = coco_mask.merge(coco_mask.frPyObjects([polygon], HEIGHT, WIDTH))
    assert np.array_equal(data.images[0].object_masks().bitmaps()[0].numpy(), coco_mask.decode(rle))
    x1, y1, x2, y2 = data.images[0].annotations[0].box
    assert x1 >= 0
    assert y1 >= 0
    assert x2 <= WIDTH
    assert y2 <= HEIGHT


@pytest.mark.parametrize("degenerate", [[], [2, 1, 4, 1], [2, 1, 4, 1, 6, 1]], ids=["none", "two", "flat"])
def test_a_degenerate_polygon_next_to_a_valid_one_is_left_out(tmp_path: Path, degenerate: list[int]) -> None:
    good = [2, 1, 4, 1, 4, 3, 2, 3]
    data = read_coco(*write_coco(tmp_path, in_annotation(segmentation=[degenerate, good])))
    assert data.images[0].annotations[0].segmentation == [good]


def spoil_three_polygons(document: dict[str, Any]) -> None:
    good, flat = [2, 1, 4, 1, 4, 3, 2, 3], [2, 1, 4, 1]
    document["annotations"][0]["segmentation"] = [good, flat, flat]
    document["annotations"][1]["segmentation"] = [flat, good]


def test_degenerate_polygons_cause_one_warning_that_counts_them(tmp_path: Path) -> None:
    images, annotations = write_coco(tmp_path, spoil_three_polygons)
    warnings = read_coco(images, annotations).warnings
    assert warnings[0] == (
        f"{annotations}: 2 annotations lose their degenerate polygons and keep the others: annotation 101: "
        "segmentation: 2 degenerate polygons are left out (image 10, a.png); annotation 102: segmentation: a "
        "degenerate polygon is left out (image 10, a.png)"
    )


@pytest.mark.parametrize("counts", [RECTANGLE_COUNTS, compressed(RECTANGLE_COUNTS)], ids=["list", "string"])
@pytest.mark.parametrize("size", [[WIDTH, HEIGHT], [HEIGHT, WIDTH, 1], [5], [5, 0], None])
def test_an_rle_of_another_size_than_the_image_is_named(tmp_path: Path, size: Any, counts: Any) -> None:
    text = refusal(tmp_path, in_annotation(segmentation={"size": size, "counts": counts}))
    assert f"annotation 101: segmentation: the RLE's size is {size}, the image's is [5, 8]" in text


@pytest.mark.parametrize(
    ("polygon", "reason"),
    [
        ([20, 1, 40, 1, 40, 3], "the image of 8 x 5 (width x height): x 20 to 40, y 1 to 3"),
        ([2, 1, 4e9, 1, 4, 3], "the image of 8 x 5"),
    ],
)
def test_a_polygon_far_outside_its_image_is_named(tmp_path: Path, polygon: list[float], reason: str) -> None:
    text = refusal(tmp_path, in_annotation(segmentation=[polygon]))
    assert f"annotation 101: segmentation: a polygon reaches outside {reason}" in text
    assert "(image 10, a.png)" in text


def test_a_polygon_with_almost_no_area_inside_its_image_is_refused(tmp_path: Path) -> None:
    # 1 of 40 columns is inside: 2.5 percent. With 4 of 40, 10 percent, the polygon is clipped.
    text = refusal(tmp_path, in_annotation(segmentation=[[7, 1, 47, 1, 47, 3, 7, 3]], bbox=None))
    assert "annotation 101: segmentation: a polygon reaches outside the image of 8 x 5" in text
    data = read_coco(
        *write_coco(tmp_path, in_annotation(segmentation=[[4, 1, 44, 1, 44, 3, 4, 3]], bbox=None))
    )
    assert data.images[0].annotations[0].box == (4, 1, 8, 3)
    assert any("annotation 101: segmentation: reaches 36.0 px beyond the border" in w for w in data.warnings)
