"""maskloss/data/annotations.py: which annotations are kept, with which boxes, areas and ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from maskloss.data.check import check_data
from maskloss.data.coco import read_coco
from maskloss.data.repair import repair
from maskloss.errors import InputError
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


def test_boxes_are_xyxy(tmp_path: Path) -> None:
    data = read_coco(*write_coco(tmp_path, in_annotation(bbox=[2, 1, 3, 4])))
    assert data.images[0].annotations[0].box == (2, 1, 5, 5)


def test_a_missing_area_is_that_of_the_mask(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        for annotation in document["annotations"]:
            del annotation["area"]

    data = read_coco(*write_coco(tmp_path, change))
    assert [annotation.area for annotation in data.images[0].annotations] == [4, 4, 40]


def test_a_box_up_to_a_pixel_outside_is_clipped(tmp_path: Path) -> None:
    data = read_coco(*write_coco(tmp_path, in_annotation(bbox=[-1, -0.5, 10, 6.5])))
    assert data.images[0].annotations[0].box == (0, 0, WIDTH, HEIGHT)


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


@pytest.mark.parametrize("box", [[2.1, 1, 2.8e-14, 2], [2, 1.1, 2, 1e-8]])
def test_an_object_with_a_side_that_is_0_in_float32_is_left_out(tmp_path: Path, box: list[float]) -> None:
    text = left_out(tmp_path, in_annotation(bbox=box))
    assert f"annotation 101: bbox {box} has a side that is 0 in float32" in text


def test_an_rle_without_a_pixel_is_left_out(tmp_path: Path) -> None:
    text = left_out(tmp_path, in_annotation(segmentation={"size": [5, 8], "counts": [40]}))
    assert "annotation 101: segmentation: the RLE has no pixel" in text


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


def test_the_area_of_overlapping_polygons_is_that_of_their_union(tmp_path: Path) -> None:
    # Two squares of 2 x 2 that overlap by half cover 3 x 2 = 6 px².
    squares = [[1, 1, 3, 1, 3, 3, 1, 3], [2, 1, 4, 1, 4, 3, 2, 3]]
    data = read_coco(*write_coco(tmp_path, in_annotation(area=None, segmentation=squares)))
    assert data.images[0].annotations[0].area == pytest.approx(6, rel=1e-12)


def test_areas_that_are_those_of_the_boxes_are_reported(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        for annotation in document["annotations"]:
            annotation.update(segmentation=[[2, 1, 4, 1, 4, 3]], area=4, iscrowd=0, bbox=[2, 1, 2, 2])

    _, problems = check_data(*write_coco(tmp_path, change))
    assert any("area is that of the box, not of the mask, in 3 of 3 annotations" in p.text for p in problems)


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
