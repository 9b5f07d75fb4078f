"""`mask_targets`: the ground truth on the grid of a RoI, from bitmaps, RLEs and polygons."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from torchvision.models.detection.roi_heads import project_masks_on_boxes

from benchmarks.pretended_device import counted, pretended_device, sent
from maskloss import EncodedMasks, MaskTargets, mask_targets
from maskloss.masks.encoded import polygon_area
from tests import reference
from tests.masks.scenes import (
    BOXES,
    EXACT,
    GOOD_BOX,
    both_alignments,
    boxes_on_a_grid,
    encode,
    masks_of,
    masks_of_kind,
    random_masks,
    roi_aligned,
    scenes,
    targets_of,
)


def star(
    generator: torch.Generator, center: tuple[float, float], radius: float, points: int = 9
) -> np.ndarray:
    """A star-shaped polygon: simple, concave, (V, 2)."""
    angles = 2 * math.pi * np.arange(points) / points
    radii = radius * (0.4 + 0.6 * torch.rand(points, generator=generator, dtype=torch.float64).numpy())
    return np.stack([center[0] + radii * np.cos(angles), center[1] + radii * np.sin(angles)], axis=1)


def of_polygons(polygons: list[np.ndarray], height: int = 40, width: int = 50) -> EncodedMasks:
    return EncodedMasks([[polygon.reshape(-1).tolist() for polygon in polygons]], height, width)


# Bitmaps


def test_unaligned_targets_equal_torchvisions_training_targets(generator):
    masks = random_masks(2, 20, 24, generator)
    boxes, matched_idxs = torch.tensor([[1.2, 3.4, 15.6, 17.8], [0.0, 0.0, 24.0, 20.0]]), torch.tensor([1, 0])
    torch.testing.assert_close(
        mask_targets(masks, boxes, matched_idxs, 28, aligned=False),
        project_masks_on_boxes(masks.to(torch.uint8), boxes, matched_idxs, 28),
        **EXACT,
    )


def test_aligned_targets_of_whole_pixel_boxes_are_the_pixels():
    # Box and grid match pixel by pixel, so each cell is its pixel: the mask sits where it is.
    masks = torch.eye(4, dtype=torch.bool)[None]
    targets = targets_of(masks, [0.0, 0.0, 4.0, 4.0], 4)
    torch.testing.assert_close(targets, torch.eye(4))


def test_unaligned_targets_are_half_a_pixel_off():
    # One row of 0 0 1 1: unaligned, cell k averages pixels k and k + 1, so the edge comes half a pixel early.
    masks = torch.tensor([[[0, 0, 1, 1]]], dtype=torch.bool).expand(1, 4, 4)
    assert targets_of(masks, [0.0, 0.0, 4.0, 4.0], 4, aligned=True)[0].tolist() == [0, 0, 1, 1]
    assert targets_of(masks, [0.0, 0.0, 4.0, 4.0], 4, aligned=False)[0].tolist() == [0, 0.5, 1, 1]


def test_aligned_and_soft_are_the_defaults(generator):
    masks = random_masks(1, 20, 24, generator)
    box = BOXES["inside"]
    torch.testing.assert_close(
        targets_of(masks, box, 5), targets_of(masks, box, 5, aligned=True, binary=False)
    )
    assert MaskTargets() == MaskTargets(aligned=True, binary=False)


@both_alignments
def test_binary_targets_are_the_soft_ones_thresholded_at_a_half(generator, aligned):
    masks = random_masks(1, 20, 24, generator)
    boxes = torch.tensor([BOXES["inside"], BOXES["partly right and below"]])
    matched_idxs = torch.tensor([0, 0])
    targets = mask_targets(masks, boxes, matched_idxs, 7, aligned=aligned, binary=True)
    assert torch.equal(targets, (roi_aligned(masks, boxes, matched_idxs, 7, aligned) >= 0.5).float())


def test_a_cell_that_is_half_covered_counts_as_covered():
    masks = torch.tensor([[[0, 1], [0, 1]]], dtype=torch.bool)
    assert targets_of(masks, [0.0, 0.0, 2.0, 2.0], 1).item() == 0.5
    assert targets_of(masks, [0.0, 0.0, 2.0, 2.0], 1, binary=True).item() == 1


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
@pytest.mark.parametrize("box_dtype", [torch.float32, torch.float64])
def test_targets_are_float32_whatever_the_inputs(generator, dtype, box_dtype):
    masks = random_masks(1, 8, 8, generator).to(dtype)
    targets = mask_targets(masks, torch.tensor([[1.0, 1.0, 6.5, 7.5]], dtype=box_dtype), torch.tensor([0]), 3)
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets[0], targets_of(masks.bool(), [1.0, 1.0, 6.5, 7.5], 3), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["bitmaps", "rle"])
def test_autocast_does_not_change_targets(generator, kind):
    bitmaps = random_masks(2, 40, 50, generator)
    masks = bitmaps if kind == "bitmaps" else EncodedMasks([encode(m) for m in bitmaps], 40, 50)
    boxes = torch.tensor([[3.3, 2.1, 41.7, 33.9], [10.0, 5.0, 30.2, 25.6]])
    expected = mask_targets(masks, boxes, torch.tensor([0, 1]), 14)
    with torch.autocast("cpu", torch.bfloat16):
        targets = mask_targets(masks, boxes, torch.tensor([0, 1]), 14)
    assert targets.dtype == torch.float32
    assert torch.equal(targets, expected)


def test_targets_carry_no_gradient_to_the_boxes(generator):
    boxes = torch.tensor([[1.0, 1.0, 6.0, 7.0]], requires_grad=True)
    assert not mask_targets(random_masks(1, 8, 8, generator), boxes, torch.tensor([0]), 3).requires_grad


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("kind", ["bitmaps", "polygons"])
@both_alignments
@pytest.mark.parametrize("binary", [True, False])
def test_no_boxes_give_no_targets(count, kind, aligned, binary):
    masks = torch.zeros(count, 8, 8, dtype=torch.uint8)
    if kind == "polygons":
        masks = EncodedMasks([[[0.0, 0, 4, 0, 4, 4]]] * count, 8, 8)
    none = torch.zeros(0, dtype=torch.int64)
    targets = mask_targets(masks, torch.zeros(0, 4), none, 5, aligned=aligned, binary=binary)
    assert targets.shape == (0, 5, 5)
    assert targets.dtype == torch.float32


# Errors, and values that are not checked


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64])
def test_masks_of_another_dtype_raise(dtype):
    with pytest.raises(TypeError, match=f"bool or uint8 tensors of 0 and 1, not {dtype}"):
        targets_of(torch.zeros(1, 6, 6, dtype=dtype), [0.0, 0.0, 3.0, 3.0], 3)


@pytest.mark.parametrize("shape", [(6, 6), (1, 1, 6, 6)])
def test_masks_of_another_number_of_axes_raise(shape):
    with pytest.raises(ValueError, match=r"masks must have shape \(G, H, W\), not"):
        targets_of(torch.zeros(shape, dtype=torch.bool), [0.0, 0.0, 3.0, 3.0], 3)


@pytest.mark.parametrize("kind", ["bitmaps", "rle", "polygons"])
@pytest.mark.parametrize("index", [-1, 1])
def test_an_index_without_a_mask_raises(kind, index):
    masks = masks_of_kind(kind, torch.ones(1, 8, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match=rf"matched_idxs must lie in \[0, 1\) .*, found {index}"):
        mask_targets(masks, torch.tensor([GOOD_BOX, GOOD_BOX]), torch.tensor([0, index]), 4)


BOX_OF_FOUR, FIRST = torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.tensor([0])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"gt_masks": [[[1]]]}, TypeError, r"masks must be a tensor \(G, H, W\) or EncodedMasks, not list"),
        ({"gt_masks": np.ones((1, 8, 8), bool)}, TypeError, "masks must be a tensor .*, not ndarray"),
        ({"boxes": [[0, 0, 4, 4]]}, TypeError, "boxes must be a tensor, not list"),
        ({"boxes": BOX_OF_FOUR[0]}, ValueError, r"boxes must have shape \(P, 4\), not \(4,\)"),
        ({"boxes": torch.zeros(1, 5)}, ValueError, r"boxes must have shape \(P, 4\), not \(1, 5\)"),
        ({"boxes": torch.tensor(0.0)}, ValueError, r"boxes must have shape \(P, 4\), not \(\)"),
        ({"matched_idxs": [0]}, TypeError, "matched_idxs must be a tensor, not list"),
        ({"matched_idxs": torch.tensor([0.0])}, TypeError, "matched_idxs must be int64, not torch.float32"),
        ({"matched_idxs": torch.tensor([True])}, TypeError, "matched_idxs must be int64, not torch.bool"),
        ({"matched_idxs": torch.tensor([0, 0])}, ValueError, r"shape \(1,\), one index per box, not \(2,\)"),
        ({"matched_idxs": FIRST[None]}, ValueError, r"shape \(1,\), one index per box, not \(1, 1\)"),
        ({"size": 4.0}, TypeError, "size must be an integer, the number of cells per side, not 4.0"),
        ({"size": (4, 4)}, TypeError, r"size must be an integer.*, not \(4, 4\)"),
        ({"size": True}, TypeError, "size must be an integer.*, not True"),
        ({"aligned": "no"}, TypeError, "aligned=...\\) must be True or False, not str 'no'"),
        ({"binary": 1}, TypeError, "binary=...\\) must be True or False, not int 1"),
    ],
)
def test_arguments_of_another_kind_raise_and_are_named(changes, error, message):
    arguments = {
        "gt_masks": torch.ones(1, 8, 8, dtype=torch.bool),
        "boxes": BOX_OF_FOUR,
        "matched_idxs": FIRST,
        "size": 4,
    }
    with pytest.raises(error, match=message):
        mask_targets(**{**arguments, **changes})


def test_integers_of_numpy_and_int32_are_accepted():
    masks = torch.ones(1, 8, 8, dtype=torch.bool)
    assert mask_targets(masks, BOX_OF_FOUR.int(), FIRST.int(), np.int64(2)).tolist() == [
        [[1.0, 1.0], [1.0, 1.0]]
    ]


def test_a_grid_without_cells_raises():
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        mask_targets(torch.ones(1, 8, 8, dtype=torch.bool), torch.tensor([GOOD_BOX]), torch.tensor([0]), 0)


def test_masks_without_pixels_raise():
    with pytest.raises(ValueError, match=r"masks must have shape \(G, H, W\), not \(1, 0, 8\)"):
        targets_of(torch.ones(1, 0, 8, dtype=torch.bool), GOOD_BOX, 4)


KINDS = pytest.mark.parametrize("kind", ["bitmaps", "rle", "polygons"])


@KINDS
@both_alignments
def test_boxes_without_area_sample_a_single_point(kind, aligned):
    masks = masks_of_kind(kind, torch.ones(1, 8, 8, dtype=torch.bool))
    boxes = torch.tensor([[3.0, 4.0, 3.0, 4.0], [3.0, 4.0, 6.0, 4.0], [20.0, 4.0, 20.0, 4.0]])
    targets = mask_targets(masks, boxes, torch.zeros(3, dtype=torch.int64), 3, aligned=aligned)
    # Unaligned, a box of no area has the size of a pixel.
    torch.testing.assert_close(targets[:2], torch.ones(2, 3, 3))
    assert targets[2].count_nonzero() == 0


@KINDS
@both_alignments
@pytest.mark.parametrize("factor", [1e3, 1e6, 1e9])
def test_boxes_far_larger_than_the_image_neither_fail_nor_take_all_memory(kind, aligned, factor):
    masks = masks_of_kind(kind, torch.ones(1, 8, 8, dtype=torch.bool))
    box = [-factor, -factor, factor, factor]
    targets = targets_of(masks, box, 2, aligned=aligned)
    # Of four cells, each of factor x factor px, one holds the image of 8 x 8, which RoIAlign widens by a pixel.
    assert (targets >= 0).all()
    assert targets.sum() <= 100 / factor**2 + 1e-6
    if factor == 1e3:
        assert targets.sum() >= 49 / factor**2


@KINDS
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (9, 1)])
def test_images_of_one_pixel_width(kind, height, width):
    masks = masks_of_kind(kind, torch.ones(1, height, width, dtype=torch.bool))
    targets = targets_of(masks, [0.0, 0.0, float(width), float(height)], 4)
    torch.testing.assert_close(targets, torch.ones(4, 4))


@KINDS
def test_an_object_of_one_pixel(kind):
    bitmap = torch.zeros(1, 6, 6, dtype=torch.bool)
    bitmap[0, 2, 3] = True
    masks = masks_of_kind(kind, bitmap)
    if kind == "polygons":
        masks = EncodedMasks([[[3, 2, 4, 2, 4, 3, 3, 3]]], 6, 6)
    targets = targets_of(masks, [1.0, 0.0, 6.0, 5.0], 5)
    expected = torch.zeros(5, 5)
    expected[2, 2] = 1
    torch.testing.assert_close(targets, expected)


@pytest.mark.parametrize("kind", ["bitmaps", "rle"])
@both_alignments
def test_an_empty_mask_gives_zeros(kind, aligned):
    masks = masks_of_kind(kind, torch.zeros(1, 6, 6, dtype=torch.bool))
    assert targets_of(masks, GOOD_BOX, 5, aligned=aligned).count_nonzero() == 0


@pytest.mark.parametrize("kind", ["rle", "polygons"])
def test_ten_thousand_objects(kind):
    count = 10_000
    masks = masks_of_kind(kind, torch.ones(1, 8, 8, dtype=torch.bool))[[0] * count]
    boxes = torch.tensor([GOOD_BOX]).expand(count, 4)
    targets = mask_targets(masks, boxes, torch.arange(count), 2)
    torch.testing.assert_close(targets, torch.ones(count, 2, 2))


# Polygons, soft


def test_coverage_by_hand():
    # The triangle (0, 0), (4, 0), (0, 4) on four cells of side 2: whole, half, half, nothing.
    masks = of_polygons([np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])])
    assert targets_of(masks, [0.0, 0.0, 4.0, 4.0], 2).tolist() == [[1, 0.5], [0.5, 0]]


POLYGON_BOXES = {
    "around": [5.0, 2.0, 45.0, 38.0],
    "inside": [21.3, 14.7, 28.9, 24.2],
    "cutting left": [20.0, 5.0, 48.0, 35.0],
    "cutting right": [3.0, 5.0, 27.0, 35.0],
    "cutting above": [8.0, 19.0, 42.0, 39.0],
    "cutting below": [8.0, 1.0, 42.0, 22.0],
    "apart": [0.0, 0.0, 4.0, 4.0],
    "tiny": [24.97, 19.98, 25.04, 20.05],
    "huge": [-500.0, -400.0, 600.0, 500.0],
    "narrow": [25.0, 0.0, 25.5, 40.0],
}


@pytest.mark.parametrize("name", POLYGON_BOXES)
@pytest.mark.parametrize("size", [1, 7])
def test_soft_targets_of_a_polygon_are_the_exact_area_of_each_cell(generator, name, size):
    polygon = star(generator, (25.0, 20.0), 16.0)
    expected = reference.clipped_coverage(polygon, POLYGON_BOXES[name], size)
    # float32 boxes are exact to 3e-6 px at 50 px, and a cell of the tiny box has 0.01 px.
    atol = 1e-3 if name == "tiny" else 1e-5
    targets = targets_of(of_polygons([polygon]), POLYGON_BOXES[name], size)
    torch.testing.assert_close(targets.double(), expected, rtol=0, atol=atol)


def test_soft_targets_agree_with_counting_points(generator):
    polygon = star(generator, (25.0, 20.0), 16.0)
    box, samples = POLYGON_BOXES["cutting left"], 64
    expected = reference.supersampled_coverage([polygon], box, 5, samples)
    targets = targets_of(of_polygons([polygon]), box, 5)
    # Few edges cross a cell, and each misassigns less than one of the 64 points in every row.
    torch.testing.assert_close(targets.double(), expected, rtol=0, atol=2 / samples)


def test_soft_targets_of_disjoint_polygons_add_up(generator):
    left, right = star(generator, (12.0, 20.0), 10.0), star(generator, (37.0, 20.0), 11.0)
    box = [1.0, 4.0, 49.0, 36.0]
    expected = reference.clipped_coverage(left, box, 7) + reference.clipped_coverage(right, box, 7)
    targets = targets_of(of_polygons([left, right]), box, 7)
    torch.testing.assert_close(targets.double(), expected, rtol=0, atol=1e-5)


def test_polygons_that_overlap_in_whole_cells_count_once():
    # Two rectangles share the cells of column 1 and 2 of 4.
    def rectangle(x1, x2):
        return np.array([[x1, 0.0], [x2, 0.0], [x2, 4.0], [x1, 4.0]])

    masks = of_polygons([rectangle(0.0, 3.0), rectangle(1.0, 4.0)])
    assert targets_of(masks, [0.0, 0.0, 4.0, 4.0], 4).tolist() == [[1] * 4] * 4


def test_the_direction_of_a_polygon_does_not_matter(generator):
    polygon = star(generator, (25.0, 20.0), 16.0)
    box = POLYGON_BOXES["around"]
    torch.testing.assert_close(
        targets_of(of_polygons([polygon[::-1]]), box, 7), targets_of(of_polygons([polygon]), box, 7)
    )


def test_an_outline_of_both_directions_counts_every_loop():
    # Two squares as one outline, the first clockwise and the second not: signed areas would cancel.
    polygon = np.array(
        [[0, 0], [2, 0], [2, 2], [0, 2], [0, 0], [2, 2], [2, 4], [4, 4], [4, 2], [2, 2]], dtype=float
    )
    expected = reference.supersampled_coverage([polygon], [0.0, 0.0, 4.0, 4.0], 2, 16)
    targets = targets_of(of_polygons([polygon]), [0.0, 0.0, 4.0, 4.0], 2)
    torch.testing.assert_close(targets.double(), expected, rtol=0, atol=1e-6)


corners = st.one_of(
    # On a coarse lattice edges often lie on each other, and vertices on edges.
    st.tuples(st.integers(0, 4).map(lambda k: 3.0 * k), st.integers(0, 4).map(lambda k: 3.0 * k)),
    st.tuples(st.integers(0, 1200).map(lambda k: k / 100), st.integers(0, 1200).map(lambda k: k / 100)),
)
any_polygons = st.lists(st.lists(corners, min_size=3, max_size=7).map(np.array), min_size=1, max_size=3)


@given(polygons=any_polygons, size=st.integers(1, 3))
def test_polygons_may_cross_themselves_and_each_other_in_any_way(polygons, size):
    box, samples = [0.4, 0.4, 11.6, 12.4], 80
    expected = reference.supersampled_coverage(polygons, box, size, samples)
    targets = targets_of(of_polygons(polygons, 12, 12), box, size)
    # For each edge across a cell, counting points in an 80 x 80 raster is off by up to 1/80.
    torch.testing.assert_close(targets.double(), expected, rtol=0, atol=1.6 / samples)


def test_a_bow_tie_covers_half_of_its_box():
    bow_tie = np.array([[0.0, 0.0], [4.0, 4.0], [4.0, 0.0], [0.0, 4.0]])
    assert targets_of(of_polygons([bow_tie]), [0.0, 0.0, 4.0, 4.0], 1).item() == 0.5
    torch.testing.assert_close(
        targets_of(of_polygons([bow_tie]), [0.0, 0.0, 4.0, 4.0], 2),
        torch.full((2, 2), 0.5),
    )


def test_a_region_that_a_polygon_surrounds_twice_is_outside_as_in_pycocotools():
    # A pentagram of one line: its middle is surrounded twice.
    angles = 2 * math.pi * 2 * np.arange(5) / 5
    polygon = np.stack([20 + 18 * np.sin(angles), 20 - 18 * np.cos(angles)], axis=1)
    masks = of_polygons([polygon], 40, 40)
    assert targets_of(masks, [19.0, 19.0, 21.0, 21.0], 1).item() == 0
    assert masks.bitmaps()[0, 20, 20] == 0


def test_polygons_of_one_instance_that_share_an_edge_leave_no_gap():
    left, right = np.array([[0, 0], [2, 0], [2, 4], [0, 4.0]]), np.array([[2, 0], [4, 0], [4, 4], [2, 4.0]])
    assert targets_of(of_polygons([left, right]), [1.0, 0.0, 3.0, 4.0], 1).item() == 1


def test_a_polygon_that_is_given_twice_counts_once(generator):
    polygon = star(generator, (25.0, 20.0), 16.0)
    once = targets_of(of_polygons([polygon]), POLYGON_BOXES["around"], 7)
    torch.testing.assert_close(targets_of(of_polygons([polygon, polygon]), POLYGON_BOXES["around"], 7), once)


@pytest.mark.parametrize(
    "points", [[[1, 1], [5, 1], [3, 1]], [[2, 2], [2, 2], [2, 2]], [[1, 1], [5, 5], [3, 3]]]
)
def test_a_polygon_without_area_covers_nothing(points):
    targets = targets_of(of_polygons([np.array(points, dtype=float)]), [0.0, 0.0, 6.0, 6.0], 3)
    assert targets.count_nonzero() == 0


@given(seed=st.integers(0, 10_000), size=st.integers(1, 28))
def test_coverage_sums_to_the_polygons_area(seed, size):
    polygon = star(torch.Generator().manual_seed(seed), (25.0, 20.0), 16.0, points=3 + seed % 40)
    targets = targets_of(of_polygons([polygon]), [5.0, 2.0, 45.0, 38.0], size)
    area = targets.double().sum() * (40.0 * 36.0) / size**2
    torch.testing.assert_close(area.item(), polygon_area(polygon), rtol=1e-5, atol=0)


@given(scene=scenes, dx=st.integers(-5, 5), dy=st.integers(-5, 5))
def test_moving_image_and_box_by_whole_pixels_changes_nothing(scene, dx, dy):
    masks, boxes, matched_idxs = masks_of(scene)
    moved_masks = torch.nn.functional.pad(masks.to(torch.uint8), (6 + dx, 6 - dx, 6 + dy, 6 - dy))
    padded_masks = torch.nn.functional.pad(masks.to(torch.uint8), (6, 6, 6, 6))
    boxes = boxes + 6
    moved_boxes = boxes + torch.tensor([dx, dy, dx, dy])
    inside = (
        (boxes.amin() >= 6)
        & (boxes[:, 2].amax() < scene["width"] + 5)
        & (boxes[:, 3].amax() < scene["height"] + 5)
    )
    if not inside:
        return  # RoIAlign extends the image's border pixels, so moving changes the result there
    settings_ = {"aligned": scene["aligned"]}
    torch.testing.assert_close(
        mask_targets(moved_masks, moved_boxes, matched_idxs, scene["size"], **settings_),
        mask_targets(padded_masks, boxes, matched_idxs, scene["size"], **settings_),
        **EXACT,
    )


@given(scene=scenes)
def test_targets_of_flipped_bitmaps_are_flipped(scene):
    masks, boxes, matched_idxs = masks_of(scene)
    # RoIAlign's samples end a pixel beyond the image, where rounding would decide on a sample that lies exactly there.
    assume(bool((boxes[:, 0] >= -0.5).all() and (boxes[:, 2] <= scene["width"] + 0.5).all()))
    flipped = torch.stack(
        [scene["width"] - boxes[:, 2], boxes[:, 1], scene["width"] - boxes[:, 0], boxes[:, 3]], dim=1
    )
    torch.testing.assert_close(
        mask_targets(masks.flip(2), flipped, matched_idxs, scene["size"]),
        mask_targets(masks, boxes, matched_idxs, scene["size"]).flip(2),
        **EXACT,
    )


def test_unaligned_polygon_targets_are_sampled_half_a_pixel_further(generator):
    masks = of_polygons([star(generator, (25.0, 20.0), 16.0)])
    moved = [edge + 0.5 for edge in POLYGON_BOXES["around"]]
    torch.testing.assert_close(
        targets_of(masks, POLYGON_BOXES["around"], 7, aligned=False),
        targets_of(masks, moved, 7, aligned=True),
    )


@both_alignments
def test_polygon_targets_are_close_to_those_of_its_bitmap(generator, aligned):
    # The same object twice: as its outline and as pixels, which round the outline by less than a pixel.
    masks = of_polygons([20 * (star(generator, (25.0, 20.0), 16.0) - 5)], 700, 900)
    box = [80.0, 60.0, 780.0, 610.0]
    soft = targets_of(masks, box, 7, aligned=aligned)
    pixels = targets_of(masks.bitmaps(), box, 7, aligned=aligned)
    # A cell is 100 x 79 px: moving an outline that crosses it by a pixel changes its value by about one percent.
    torch.testing.assert_close(soft, pixels, rtol=0, atol=0.02)


@given(seed=st.integers(0, 10_000), box=boxes_on_a_grid, size=st.integers(1, 6))
def test_soft_targets_of_any_polygon_are_the_exact_area(seed, box, size):
    generator = torch.Generator().manual_seed(seed)
    polygon = star(generator, (6.0, 7.0), 8.0, points=3 + seed % 7)
    targets = targets_of(of_polygons([polygon], 16, 16), box, size)
    expected = reference.clipped_coverage(polygon, box, size)
    torch.testing.assert_close(targets.double(), expected, rtol=0, atol=1e-6)


# Polygons, binary


def rasterized(polygons, box, size):
    """pycocotools' rasterizer on the polygons in units of the grid's cells."""
    x1, y1, x2, y2 = box
    flat = [
        [c for x, y in polygon for c in ((x - x1) * size / (x2 - x1), (y - y1) * size / (y2 - y1))]
        for polygon in polygons
    ]
    return torch.from_numpy(coco_mask.decode(coco_mask.frPyObjects(flat, size, size)).any(axis=2)).float()


@pytest.mark.parametrize("name", [name for name in POLYGON_BOXES if name != "tiny"])
def test_binary_targets_of_polygons_equal_pycocotools_masks_inside_the_box(generator, name):
    polygons = [star(generator, (20.0, 20.0), 14.0), star(generator, (32.0, 22.0), 9.0)]
    box = np.float32(POLYGON_BOXES[name]).tolist()  # as the tensor of boxes holds it
    targets = targets_of(of_polygons(polygons), box, 28, binary=True)
    assert torch.equal(targets, rasterized(polygons, box, 28))


def test_binary_targets_treat_boxes_as_at_least_a_tenth_of_a_pixel():
    # Detectron2's floor: 28 cells per tenth of a pixel. The triangle's long side runs through the box.
    triangle = np.array([[25.0, 20.0], [25.08, 20.0], [25.0, 20.08]])
    x1, y1, x2, y2 = 25.0, 20.0, 25.0625, 20.03125
    targets = targets_of(of_polygons([triangle]), [x1, y1, x2, y2], 28, binary=True)
    assert torch.equal(targets, rasterized([triangle], [x1, y1, x1 + 0.1, y1 + 0.1], 28))
    assert not torch.equal(targets, rasterized([triangle], [x1, y1, x2, y2], 28))


def test_unaligned_binary_polygon_targets_are_sampled_half_a_pixel_further(generator):
    masks = of_polygons([star(generator, (25.0, 20.0), 16.0)])
    moved = [edge + 0.5 for edge in POLYGON_BOXES["around"]]
    unaligned = targets_of(masks, POLYGON_BOXES["around"], 14, aligned=False, binary=True)
    assert torch.equal(unaligned, targets_of(masks, moved, 14, aligned=True, binary=True))
    assert not torch.equal(unaligned, targets_of(masks, POLYGON_BOXES["around"], 14, binary=True))


# Encoded masks of a resized, flipped and cropped image


def test_one_image_may_mix_rles_and_polygons(generator):
    bitmap = random_masks(1, 40, 50, generator)[0]
    polygon = star(generator, (25.0, 20.0), 16.0)
    masks = EncodedMasks([encode(bitmap), [polygon.reshape(-1).tolist()]], 40, 50)
    box = POLYGON_BOXES["around"]
    targets = mask_targets(masks, torch.tensor([box] * 3), torch.tensor([1, 0, 1]), 7)
    torch.testing.assert_close(targets[1], targets_of(bitmap[None], box, 7), **EXACT)
    for index in (0, 2):
        torch.testing.assert_close(targets[index], targets_of(of_polygons([polygon]), box, 7), **EXACT)


@pytest.fixture(params=["rle", "polygons"])
def encoded(request, generator):
    if request.param == "rle":
        return EncodedMasks([encode(random_masks(1, 40, 50, generator)[0])], 40, 50)
    return of_polygons([star(generator, (25.0, 20.0), 16.0)])


BOX = [8.0, 5.0, 40.0, 36.0]


def test_targets_do_not_change_when_image_and_box_are_resized(encoded):
    # 40 x 50 becomes 80 x 75: y by 2, x by 1.5.
    resized_box = [12.0, 10.0, 60.0, 72.0]
    torch.testing.assert_close(
        targets_of(encoded.resize(80, 75), resized_box, 7), targets_of(encoded, BOX, 7), **EXACT
    )


def test_targets_of_a_flipped_image_are_flipped(encoded):
    flipped_box = [50 - BOX[2], BOX[1], 50 - BOX[0], BOX[3]]
    flipped = targets_of(encoded.horizontal_flip(), flipped_box, 7)
    torch.testing.assert_close(flipped, targets_of(encoded, BOX, 7).flip(1), **EXACT)


def test_targets_of_a_cropped_image_equal_those_of_the_uncropped_box(encoded):
    cropped_box = [BOX[0] - 6, BOX[1] - 3, BOX[2] - 6, BOX[3] - 3]
    torch.testing.assert_close(
        targets_of(encoded.crop(top=3, left=6, height=36, width=40), cropped_box, 7),
        targets_of(encoded, BOX, 7),
        **EXACT,
    )


def test_half_a_pixel_of_unaligned_targets_is_one_of_the_resized_image(encoded):
    # Twice as large, the box of unaligned targets moves by half a pixel there, a quarter of one here.
    doubled = targets_of(encoded.resize(80, 100), [2 * edge for edge in BOX], 7, aligned=False)
    torch.testing.assert_close(doubled, targets_of(encoded, [edge + 0.25 for edge in BOX], 7), **EXACT)


def test_an_enlarged_rle_is_sampled_at_its_own_resolution(generator):
    bitmap = random_masks(1, 10, 10, generator)[0]
    masks = EncodedMasks([encode(bitmap)], 10, 10).resize(1000, 1000)
    torch.testing.assert_close(
        targets_of(masks, [100.0, 200.0, 700.0, 800.0], 5),
        targets_of(bitmap[None], [1.0, 2.0, 7.0, 8.0], 5),
        **EXACT,
    )


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@both_alignments
def test_targets_on_a_device_equal_those_on_the_cpu(generator, aligned):
    masks = random_masks(1, 20, 24, generator)
    boxes = torch.tensor(list(BOXES.values()))
    matched_idxs = torch.zeros(len(boxes), dtype=torch.int64)
    targets = mask_targets(masks.cuda(), boxes.cuda(), matched_idxs.cuda(), 7, aligned=aligned)
    assert targets.device.type == "cuda"
    torch.testing.assert_close(
        targets.cpu(), mask_targets(masks, boxes, matched_idxs, 7, aligned=aligned), **EXACT
    )


# Ranges, and devices without float64.


@pytest.mark.parametrize("kind", ["bool", "uint8", "on a GPU", "rle", "polygon"])
@pytest.mark.parametrize("size", [7, 28])
@both_alignments
def test_targets_of_boxes_inside_an_object_never_leave_the_unit_interval(kind, size, aligned, generator):
    # A box inside an object is fully covered. Sums of rounded weights reach 1 + 3.6e-7.
    height, width = 200, 300
    low = torch.rand(400, 2, generator=generator) * torch.tensor([width - 61.0, height - 61.0])
    boxes = torch.cat([low, low + 1 + torch.rand(400, 2, generator=generator) * 58], dim=1)
    whole = torch.ones(1, height, width, dtype=torch.bool)
    masks = {
        "bool": whole,
        "uint8": whole.to(torch.uint8),
        "rle": EncodedMasks([encode(whole[0])], height, width),
        "polygon": EncodedMasks([[[0, 0, width, 0, width, height, 0, height]]], height, width),
    }.get(kind, whole)
    idxs = torch.zeros(400, dtype=torch.int64)
    if kind == "on a GPU":
        with pretended_device():
            targets = mask_targets(sent(masks), sent(boxes), sent(idxs), size, aligned=aligned).values
    else:
        targets = mask_targets(masks, boxes, idxs, size, aligned=aligned)
    assert targets.max() <= 1
    assert targets.min() >= 1 - 1e-6
    torch.nn.functional.binary_cross_entropy(targets, targets)


@pytest.mark.parametrize("kind", ["rle", "polygon"])
def test_targets_of_encoded_masks_for_boxes_on_a_gpu_need_one_wait_and_no_float64_there(kind, generator):
    bitmaps = random_masks(1, 20, 24, generator)
    segmentation = encode(bitmaps[0]) if kind == "rle" else [[2, 3, 20, 4, 15, 18]]
    masks = EncodedMasks([segmentation], 20, 24)
    boxes, idxs = torch.tensor([BOXES["inside"], BOXES["the image"]]), torch.tensor([0, 0])
    with pretended_device():
        there = sent(boxes), sent(idxs)
        with counted() as counts:
            targets = mask_targets(masks, *there, 7)
    assert torch.equal(targets.values, mask_targets(masks, boxes, idxs, 7))
    # One to read the boxes, and one to send the targets, because the caller may change them in between.
    assert counts.waits.total() == 2
    assert torch.float64 not in counts.dtypes


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("rle", [False, True])
@both_alignments
def test_a_vertical_flip_mirrors_the_targets(generator, binary, rle, aligned):
    height, width = 40, 50
    polygon = star(generator, (24.0, 17.0), 14.0)
    masks = of_polygons([polygon], height, width)
    if rle:
        masks = EncodedMasks([encode(masks.bitmaps()[0])], height, width)
    x1, y1, x2, y2 = 12.3, 6.2, 37.8, 29.1
    expected = targets_of(masks, [x1, y1, x2, y2], 9, binary=binary)
    flipped = targets_of(masks.vertical_flip(), [x1, height - y2, x2, height - y1], 9, binary=binary)
    if rle or not binary:
        torch.testing.assert_close(flipped.flip(0), expected, rtol=0, atol=1e-5)
    if rle:
        assert torch.equal(masks.vertical_flip().bitmaps(), masks.bitmaps().flip(1))
    else:
        # pycocotools does not round mirrored polygons symmetrically.
        assert (masks.vertical_flip().bitmaps() != masks.bitmaps().flip(1)).float().mean() < 0.02
        assert (flipped.flip(0) - expected).abs().mean() < 0.1
    twice = masks.vertical_flip().resize(80, 100).vertical_flip()
    large = [2 * x1, 2 * y1, 2 * x2, 2 * y2]
    torch.testing.assert_close(
        targets_of(twice, large, 9, aligned=aligned),
        targets_of(masks.resize(80, 100), large, 9, aligned=aligned),
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
@pytest.mark.parametrize("place", [lambda tensor: tensor, sent], ids=["host", "GPU"])
def test_matches_with_no_mask_at_all_are_refused(place, dtype):
    masks, boxes, matches = (
        torch.zeros(0, 8, 8, dtype=dtype),
        torch.tensor([[0.0, 0, 4, 4]]),
        torch.tensor([0]),
    )
    with (
        pretended_device(),
        pytest.raises(ValueError, match=r"matched_idxs must lie in \[0, 0\) for 0 masks, found 0"),
    ):
        mask_targets(place(masks), place(boxes), place(matches), 4)
