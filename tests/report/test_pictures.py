"""Pictures of annotations: what is drawn where, by the colors of single pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools import mask as coco_mask

from maskloss.data.coco import CocoData, read_coco
from maskloss.report.pictures import category_color, cut_out, cut_out_rle, draw_truth, shortened
from tests.data.coco_files import write_coco

GRAY = (150, 150, 150)


def data_with(folder: Path, **fields: Any) -> CocoData:
    def change(document: dict[str, Any]) -> None:
        document["annotations"][0].update(fields)
        document["annotations"][2]["bbox"] = [0, 0, 8, 5]

    return read_coco(*write_coco(folder, change))


def drawn(data: CocoData, enlarge: int = 20) -> Any:
    image = Image.new("RGB", (8, 5), (0, 0, 0))
    names = {category.id: category.name for category in data.categories}
    return np.asarray(draw_truth(image, data.images[0], names, enlarge=enlarge))


def color_at(picture: Any, x: float, y: float) -> tuple[int, ...]:
    return tuple(int(value) for value in picture[int(y), int(x)])


@pytest.mark.parametrize("label", [1, 0, -1])
def test_labeled_points_are_drawn_where_they_are(label: int, tmp_path: Path) -> None:
    points = {"point_coords": [[6.5, 3.5]], "point_labels": [label], "segmentation": []}
    picture = drawn(data_with(tmp_path, **points))
    expected = {1: category_color(7), 0: (255, 255, 255), -1: (0, 0, 0)}[label]
    assert color_at(picture, 6.5 * 20, 3.5 * 20) == expected


def test_crowds_are_outlined_in_gray(tmp_path: Path) -> None:
    picture = drawn(data_with(tmp_path))
    assert color_at(picture, 0, 99) == GRAY
    assert color_at(picture, 0, 60) == GRAY


def test_masks_are_tinted_and_boxes_outlined(tmp_path: Path) -> None:
    picture = drawn(data_with(tmp_path))
    # Columns 2 and 3, rows 1 and 2, of two objects with the same mask, the second of category 3 above the first.
    tint = 0.45 * np.array(category_color(7))
    tint = 0.55 * tint + 0.45 * np.array(category_color(3))
    np.testing.assert_allclose(picture[50, 62], tint, atol=1.5)
    assert color_at(picture, 6 * 20, 4 * 20) == (0, 0, 0)


def test_names_and_ids_of_any_length_are_drawn() -> None:
    assert category_color(10**400)
    assert category_color(3) == category_color(3 + 2**31)
    assert len(shortened("W" * 2_000_000)) == 40
    assert shortened("caf\udce9") == "caf\\udce9"


@given(
    mask=arrays(np.uint8, st.tuples(st.integers(1, 30), st.integers(1, 30)), elements=st.integers(0, 1)),
    as_text=st.booleans(),
)
def test_the_part_of_an_rle_that_is_set_is_that_of_the_decoded_mask(mask: Any, as_text: bool) -> None:
    rle = coco_mask.encode(np.asfortranarray(mask))
    if as_text:
        rle["counts"] = rle["counts"].decode()
    part, corner = cut_out_rle(rle)
    expected, expected_corner = cut_out(coco_mask.decode(rle))
    assert part.shape == expected.shape
    assert np.array_equal(part, expected)
    assert corner == expected_corner or not expected.size


def test_runs_of_length_0_change_nothing() -> None:
    rle = coco_mask.frPyObjects({"size": [3, 2], "counts": [0, 2, 0, 1, 3]}, 3, 2)
    part, corner = cut_out_rle(rle)
    assert np.array_equal(part, [[1], [1], [1]])
    assert corner == (0, 0)
