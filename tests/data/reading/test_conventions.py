"""maskloss/data/reading/conventions.py: conventions of boxes and units of coordinates, from all of a file."""

from __future__ import annotations

import numpy as np
import pytest

from maskloss.data.reading.conventions import (
    box_readings,
    distance_beyond,
    look_like_corners,
    look_like_percentages,
    suspected_convention,
    xyxy_of,
)

# A box from (10, 20) to (40, 60) in an image of 100 x 200 px.

SIZES = np.array([[100.0, 200.0]])
CONVENTIONS = {
    "x1, y1, x2, y2": [10, 20, 40, 60],
    "center x, center y, width, height": [25, 40, 30, 40],
    "y1, x1, y2, x2": [20, 10, 60, 40],
    "y, x, height, width": [20, 10, 40, 30],
    "fractions x, y, width, height": [0.1, 0.1, 0.3, 0.2],
    "fractions x1, y1, x2, y2": [0.1, 0.1, 0.4, 0.3],
    "fractions of center x, center y, width, height": [0.25, 0.2, 0.3, 0.2],
}


def test_every_convention_is_read() -> None:
    assert box_readings(np.zeros((1, 4)), SIZES).keys() == CONVENTIONS.keys()


@pytest.mark.parametrize("name", CONVENTIONS)
def test_a_box_of_another_convention_is_converted_and_recognized_by_its_mask(name: str) -> None:
    boxes, extents = np.array([CONVENTIONS[name]], dtype=float), np.array([[10.0, 20, 40, 60]])
    np.testing.assert_allclose(np.stack(box_readings(boxes, SIZES)[name], axis=1), extents)
    assert suspected_convention(boxes, extents, SIZES) == (name, 1)


def test_boxes_of_coco_or_none_follow_no_other_convention() -> None:
    boxes, extents = np.array([[10.0, 20, 30, 40]]), np.array([[10.0, 20, 40, 60]])
    assert suspected_convention(boxes, extents, SIZES) is None
    assert suspected_convention(boxes[:0], extents[:0], SIZES[:0]) is None


def test_boxes_may_fit_the_part_of_their_mask_inside_the_image() -> None:
    boxes, extents = np.array([[50.0, 20, 100, 60]]), np.array([[50.0, 20, 130, 60]])
    assert suspected_convention(boxes, extents, SIZES) == ("x1, y1, x2, y2", 1)
    assert suspected_convention(np.array([[50.0, 20, 50, 40]]), extents, SIZES) is None


def test_one_box_far_from_its_mask_proves_nothing_and_two_do() -> None:
    boxes, extents = np.array([[70.0, 150, 20, 20]] * 2), np.array([[10.0, 20, 40, 60]] * 2)
    assert suspected_convention(boxes[:1], extents[:1], SIZES) is None
    assert suspected_convention(boxes, extents, SIZES.repeat(2, axis=0)) == ("", 2)


def test_the_distance_beyond_the_border_is_that_of_the_farthest_side() -> None:
    corners = xyxy_of(np.array([[-3.0, 5, 10, 10], [90.0, 5, 12.5, 10], [10.0, 20, 30, 40]]))
    assert distance_beyond(corners, SIZES.repeat(3, axis=0)).tolist() == [3, 2.5, -10]


def test_boxes_without_masks_are_corners_if_they_are_outside_otherwise() -> None:
    boxes = np.array([[40.0, 60, 90, 180], [10.0, 20, 40, 60]])
    assert look_like_corners(boxes, SIZES.repeat(2, axis=0))
    # One box proves nothing, and neither do boxes that are inside as x, y, width, height.
    assert not look_like_corners(boxes[:1], SIZES)
    assert not look_like_corners(boxes[[1, 1]], SIZES.repeat(2, axis=0))


@pytest.mark.parametrize(
    ("number", "size", "reach", "expected"),
    [
        # The chance that an object is in the corner is 100 / 250 x 100 / 200 = 1 / 5; 5 ** 13 = 1.2e9.
        (13, (250, 200), (95, 92), True),
        (12, (250, 200), (95, 92), False),
        (40, (250, 199), (95, 92), False),
        (5, (1000, 1000), (95, 92), True),
        # Such as logos in the corner of each image.
        (1000, (1000, 1000), (95, 60), False),
        (1000, (1000, 1000), (60, 95), False),
    ],
)
def test_coordinates_are_percentages_if_chance_is_improbable(
    number: int, size: tuple[int, int], reach: tuple[float, float], expected: bool
) -> None:
    corners = np.array([[10.0, 20, *reach]]).repeat(number, axis=0)
    sizes = np.array([size], dtype=float).repeat(number, axis=0)
    assert look_like_percentages(corners, np.arange(number), sizes) is expected
    # Of any number of objects of an image, one counts.
    assert not look_like_percentages(corners, np.zeros(number, dtype=int), sizes)


# Objects of a public data set, whose boxes were drawn apart from the masks, as x1, y1, x2, y2; images of 1000 x 667 px.
LOOSE = np.array(
    [
        [422, 273, 894, 566],
        [420, 276, 913, 579],
        [197, 75, 869, 494],
        [96, 71, 954, 534],
        [144, 61, 841, 544],
        [99, 88, 696, 505],
        [378, 111, 904, 499],
        [359, 66, 977, 629],
        [56, 144, 627, 645],
    ],
    dtype=float,
)
THEIR_MASKS = np.array(
    [
        [441, 296, 881, 568],
        [440, 291, 878, 571],
        [239, 88, 818, 476],
        [130, 79, 884, 531],
        [175, 66, 818, 541],
        [118, 95, 659, 473],
        [398, 123, 895, 494],
        [368, 106, 917, 619],
        [37, 199, 624, 629],
    ],
    dtype=float,
)


def test_boxes_drawn_apart_from_their_masks_follow_the_convention_in_which_they_overlap_them() -> None:
    sizes = np.array([[1000.0, 667.0]]).repeat(9, axis=0)
    assert suspected_convention(LOOSE, THEIR_MASKS, sizes) == ("x1, y1, x2, y2", 9)
    usual = np.concatenate([LOOSE[:, :2], LOOSE[:, 2:] - LOOSE[:, :2]], axis=1)
    assert suspected_convention(usual, THEIR_MASKS, sizes) is None


def test_boxes_of_no_convention_are_told_from_loose_ones() -> None:
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 300, (20, 2))
    extents = np.concatenate([corners, corners + 100], axis=1)
    sizes = np.full((20, 2), 500.0)
    # Each box is 75 px beside its mask: an IoU of 25 x 100 / (2 x 100 x 100 - 25 x 100) = 1 / 7.
    beside = np.concatenate([corners + np.array([75, 0]), np.full((20, 2), 100.0)], axis=1)
    assert suspected_convention(beside, extents, sizes) == ("", 20)
    assert suspected_convention(beside[:9], extents[:9], sizes[:9]) is None
    # Amodal boxes contain their masks, and may be far larger.
    amodal = np.concatenate([corners, np.full((20, 2), 300.0)], axis=1)
    assert suspected_convention(amodal, extents, sizes) is None
