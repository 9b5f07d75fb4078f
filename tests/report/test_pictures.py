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
from maskloss.masks.encoded import EncodedMasks
from maskloss.report.pictures import category_color, cut_out, cut_out_rle, cut_outs, draw_truth, shortened
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


def shapes_of_bitmaps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Record the shape (G, H, W) of all bitmaps that are decoded."""
    shapes = []
    bitmaps = EncodedMasks.bitmaps
    monkeypatch.setattr(EncodedMasks, "bitmaps", lambda self: shapes.append(self.shape) or bitmaps(self))
    return shapes


def test_masks_are_cut_out_one_by_one_and_as_they_are_in_their_bitmaps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = np.random.default_rng(0)
    segmentations: list[Any] = []
    for index in range(60):
        x, y = random.uniform(-3, 400, 2)
        corners = np.array([x, y]) + random.uniform(-4, 9, (5, 2))
        segmentations.append([corners.reshape(-1).tolist()])
        if index % 3 == 0:
            bitmap = np.zeros((400, 400), dtype=np.uint8)
            bitmap[int(max(y, 0)) : int(max(y, 0)) + 5, int(max(x, 0)) : int(max(x, 0)) + 9] = (
                random.integers(0, 2)
            )
            segmentations[-1] = coco_mask.encode(np.asfortranarray(bitmap))
    segmentations[1] = None
    masks = EncodedMasks(segmentations, 400, 400)
    for changed in (masks, masks.horizontal_flip().resize(300, 500), masks.crop(50, 20, 200, 300)):
        expected = [cut_out(bitmap) for bitmap in changed.bitmaps().numpy()]
        shapes = shapes_of_bitmaps(monkeypatch)
        found = list(cut_outs(changed))
        monkeypatch.undo()
        assert len(found) == len(expected)
        for (part, corner), (expected_part, expected_corner) in zip(found, expected, strict=True):
            assert part.shape == expected_part.shape
            assert np.array_equal(part, expected_part)
            assert corner == expected_corner or not part.size
        assert max(number * height * width for number, height, width in shapes) < 1_000
        assert [cut[0].shape for cut in cut_outs(changed.bitmaps())] == [cut[0].shape for cut in expected]
