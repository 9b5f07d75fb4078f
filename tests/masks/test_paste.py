"""`paste_masks`: resample the grid of each detection to the image."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from torch.nn.functional import interpolate
from torchvision.models.detection.roi_heads import paste_masks_in_image, project_masks_on_boxes
from torchvision.ops import masks_to_boxes

from maskloss import mask_targets, paste_masks
from maskloss.masks import paste as paste_module
from maskloss.masks.paste import unaligned_offset
from tests import reference

both_alignments = pytest.mark.parametrize("aligned", [True, False])
HEIGHT, WIDTH = 14, 17
BOXES = {
    "inside": [2.3, 1.7, 13.6, 11.2],
    "whole pixels": [2.0, 3.0, 9.0, 10.0],
    "half pixels": [2.5, 3.5, 9.5, 10.5],
    "the image": [0.0, 0.0, 17.0, 14.0],
    "partly left and above": [-5.4, -4.1, 6.3, 7.7],
    "partly right and below": [9.2, 8.4, 25.1, 20.6],
    "around the image": [-20.3, -15.2, 40.1, 31.9],
    "outside, right": [18.0, 2.0, 25.0, 9.0],
    "outside, above": [2.0, -9.0, 9.0, -1.0],
    "within one pixel": [4.3, 5.3, 4.8, 5.9],
    "between two pixels": [4.6, 5.6, 5.4, 6.4],  # centers are at 4.5 and 5.5 in x, 5.5 and 6.5 in y
    "narrow": [3.1, 2.0, 4.4, 12.0],
}


def encode(mask: torch.Tensor) -> dict:
    """pycocotools' own encoding, with counts as JSON can hold them."""
    rle = coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def decode(rles: list[dict], height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    masks = [torch.from_numpy(coco_mask.decode(rle)).bool() for rle in rles]
    return torch.stack(masks) if masks else torch.zeros(0, height, width, dtype=torch.bool)


def offset_of(aligned):
    """The offset of a network's masks in an image that is not resized."""
    return (0.0, 0.0) if aligned else (0.5, 0.5)


def paste_one(grid, box, size=(HEIGHT, WIDTH), **settings_):
    return paste_masks(grid[None], torch.tensor([box]), size, **settings_)[0]


# Every pixel's probability


@pytest.mark.parametrize("name", BOXES)
@both_alignments
def test_probabilities_are_bilinear_samples_of_the_grid(generator, name, aligned):
    grid = torch.rand(5, 5, generator=generator)
    box = torch.tensor(BOXES[name]).tolist()  # as float32 holds it
    expected = reference.pasted(grid, box, HEIGHT, WIDTH, aligned=aligned)
    pasted = paste_one(grid, box, output="float", offset=offset_of(aligned))
    torch.testing.assert_close(pasted.double(), expected, rtol=0, atol=1e-6)


@both_alignments
def test_detections_are_independent_of_each_other(generator, aligned):
    grids = torch.rand(len(BOXES), 4, 4, generator=generator)
    boxes = torch.tensor(list(BOXES.values()))
    together = paste_masks(grids, boxes, (HEIGHT, WIDTH), output="float", offset=offset_of(aligned))
    alone = [
        paste_one(grid, box.tolist(), output="float", offset=offset_of(aligned))
        for grid, box in zip(grids, boxes, strict=True)
    ]
    torch.testing.assert_close(together, torch.stack(alone), rtol=0, atol=0)


def test_a_grid_on_whole_pixels_is_copied(generator):
    grid = torch.rand(4, 4, generator=generator)
    expected = torch.zeros(HEIGHT, WIDTH)
    expected[3:7, 2:6] = grid
    torch.testing.assert_close(paste_one(grid, [2.0, 3.0, 6.0, 7.0], output="float"), expected)


def test_unaligned_probabilities_are_sampled_half_a_pixel_lower():
    # A grid of the rows 0 0 1 1 on whole pixels. Half a pixel lower, the samples lie between the cells.
    grid = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(4, 4)
    aligned = paste_one(grid, [0.0, 0.0, 4.0, 4.0], (4, 4), output="float")
    unaligned = paste_one(grid, [0.0, 0.0, 4.0, 4.0], (4, 4), output="float", offset=(0.5, 0.5))
    assert aligned[1].tolist() == [0, 0, 1, 1]
    assert unaligned[1].tolist() == [0, 0, 0.5, 1]


def test_unaligned_paste_undoes_unaligned_targets():
    # A vertical edge in the middle of the box comes back in its own column.
    masks = torch.zeros(1, 16, 16, dtype=torch.bool)
    masks[:, :, 8:] = True
    boxes, matched_idxs = torch.tensor([[0.0, 0.0, 16.0, 16.0]]), torch.tensor([0])
    targets = mask_targets(masks, boxes, matched_idxs, 16, aligned=False)
    pasted = paste_masks(targets, boxes, (16, 16), offset=(0.5, 0.5))
    assert torch.equal(pasted[0, 8], masks[0, 8])
    # Pasted as if it were aligned, the edge comes a pixel early.
    assert paste_masks(targets, boxes, (16, 16))[0, 8, 7]


def test_aligned_is_the_default(generator):
    grid = torch.rand(4, 4, generator=generator)
    assert torch.equal(
        paste_one(grid, BOXES["inside"], output="float"),
        paste_one(grid, BOXES["inside"], output="float", offset=(0.0, 0.0)),
    )


def test_probabilities_are_zero_where_no_pixel_center_is_in_the_box():
    grid = torch.ones(3, 3)
    pasted = paste_one(grid, [2.6, 3.5, 6.5, 5.4], output="float")
    rows, columns = pasted.nonzero().unbind(1)
    # Centers at 3.5 to 5.5 in x (6.5 lies on the high edge, so outside), and at 3.5 and 4.5 in y.
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (3, 5, 3, 4)


# Bool and RLE

scenes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10_000),
        "image_size": st.tuples(st.integers(1, 20), st.integers(1, 20)),
        "size": st.integers(1, 6),
        "aligned": st.booleans(),
        "threshold": st.sampled_from([0.1, 0.5, 0.9]),
        "corner": st.tuples(st.floats(-15, 25), st.floats(-15, 25)),
        "extent": st.tuples(st.floats(0.01, 45), st.floats(0.01, 45)),
    }
)


def paste_scene(scene, output):
    generator = torch.Generator().manual_seed(scene["seed"])
    grids = torch.rand(1, scene["size"], scene["size"], generator=generator)
    (x, y), (width, height) = scene["corner"], scene["extent"]
    boxes = torch.tensor([[x, y, x + width, y + height]])
    return paste_masks(
        grids,
        boxes,
        scene["image_size"],
        offset=offset_of(scene["aligned"]),
        threshold=scene["threshold"],
        output=output,
    )


@given(scene=scenes)
def test_bool_float_and_rle_agree(scene):
    masks, probs = paste_scene(scene, "bool"), paste_scene(scene, "float")
    assert masks.shape == probs.shape == (1, *scene["image_size"])
    assert (masks.dtype, probs.dtype) == (torch.bool, torch.float32)
    assert torch.equal(masks, probs >= scene["threshold"])
    assert torch.equal(decode(paste_scene(scene, "rle")), masks)


@given(scene=scenes)
def test_any_rle_is_byte_for_byte_pycocotools_encoding(scene):
    assert paste_scene(scene, "rle") == [encode(mask) for mask in paste_scene(scene, "bool")]


@pytest.mark.parametrize("pixels_at_once", [1, 300, 2**21])
@both_alignments
def test_many_detections_are_byte_for_byte_pycocotools_encoding(
    monkeypatch, generator, pixels_at_once, aligned
):
    # More detections than one chunk, some of them empty, and boxes that reach the ends of the image's columns.
    monkeypatch.setattr(paste_module, "_PIXELS_AT_ONCE", pixels_at_once)
    boxes = torch.tensor(list(BOXES.values())).repeat(3, 1)
    grids = torch.rand(len(boxes), 5, 5, generator=generator)
    grids[0], grids[1] = 0, 1
    rles = paste_masks(grids, boxes, (HEIGHT, WIDTH), offset=offset_of(aligned), output="rle")
    assert rles == [
        encode(mask) for mask in paste_masks(grids, boxes, (HEIGHT, WIDTH), offset=offset_of(aligned))
    ]


@both_alignments
def test_whole_images_give_the_same_masks_as_windows(monkeypatch, generator, aligned):
    # Run the code for GPUs on a CPU.
    boxes = torch.tensor(list(BOXES.values()))
    grids = torch.rand(len(boxes), 5, 5, generator=generator)
    expected = paste_masks(grids, boxes, (HEIGHT, WIDTH), offset=offset_of(aligned), output="float")
    monkeypatch.setattr(paste_module, "_windows", paste_module._whole_images)
    pasted = paste_masks(grids, boxes, (HEIGHT, WIDTH), offset=offset_of(aligned), output="float")
    torch.testing.assert_close(pasted, expected, rtol=0, atol=1e-6)
    assert torch.equal(paste_masks(grids, boxes, (HEIGHT, WIDTH), offset=offset_of(aligned)), pasted >= 0.5)


WINDOWS = {
    "nothing": lambda mask: None,
    "the whole image": lambda mask: mask.fill_(1),
    "all but the first pixel": lambda mask: mask.fill_(1)[0, 0].fill_(0),
    "all but the last pixel": lambda mask: mask.fill_(1)[-1, -1].fill_(0),
    "the first pixel": lambda mask: mask[0, 0].fill_(1),
    "the last pixel": lambda mask: mask[-1, -1].fill_(1),
    "the top row": lambda mask: mask[0].fill_(1),
    "the bottom row": lambda mask: mask[-1].fill_(1),
    "the left column": lambda mask: mask[:, 0].fill_(1),
    "the right column": lambda mask: mask[:, -1].fill_(1),
    "two whole columns": lambda mask: mask[:, 2:4].fill_(1),
    "top and bottom rows": lambda mask: mask[::4].fill_(1),
    "all four borders": lambda mask: mask.fill_(1)[1:-1, 1:-1].fill_(0),
    "a chessboard": lambda mask: mask.view(-1)[::2].fill_(1),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_an_rle_is_byte_for_byte_pycocotools_encoding(name):
    # A grid that lies on a 5 x 5 image pixel by pixel: the pasted mask is the grid.
    mask = torch.zeros(5, 5)
    WINDOWS[name](mask)
    (rle,) = paste_masks(mask[None], torch.tensor([[0.0, 0.0, 5.0, 5.0]]), (5, 5), output="rle")
    assert rle == encode(mask)
    assert torch.equal(decode([rle])[0], mask.bool())


@pytest.mark.parametrize(("top", "left"), [(0, 0), (0, 9), (6, 0), (6, 9), (3, 4)])
def test_a_window_of_ones_anywhere_is_byte_for_byte_pycocotools_encoding(top, left):
    expected = torch.zeros(11, 14)
    expected[top : top + 5, left : left + 5] = 1
    box = torch.tensor([[left, top, left + 5, top + 5]], dtype=torch.float32)
    rles = paste_masks(torch.ones(1, 5, 5), box, (11, 14), output="rle")
    assert rles == [encode(expected)]


def test_a_large_image_is_encoded_without_error_in_the_runs():
    # Runs of more than five bits, and differences of both signs, are more than one character each.
    grid = torch.rand(1, 9, 9, generator=torch.Generator().manual_seed(3))
    box = torch.tensor([[31.7, 12.2, 602.9, 371.4]])
    (rle,) = paste_masks(grid, box, (400, 640), output="rle")
    (mask,) = paste_masks(grid, box, (400, 640))
    assert rle == encode(mask)
    assert 0 < mask.sum() < mask.numel()


def test_a_pixel_at_the_threshold_is_set():
    grid = torch.tensor([[0.25, 0.5], [0.75, 0.5]])
    box = [0.0, 0.0, 2.0, 2.0]
    assert paste_one(grid, box, (2, 2)).tolist() == [[False, True], [True, True]]
    assert paste_one(grid, box, (2, 2), threshold=0.75).tolist() == [[False, False], [True, False]]
    rle = paste_one(grid, box, (2, 2), output="rle")
    assert decode([rle])[0].tolist() == [[False, True], [True, True]]


@both_alignments
@pytest.mark.parametrize("name", ["outside, right", "outside, above", "between two pixels"])
def test_a_box_without_a_pixel_gives_an_empty_mask(name, aligned):
    box = torch.tensor([BOXES[name]])
    for output in ("bool", "float"):
        pasted = paste_masks(
            torch.ones(1, 4, 4), box, (HEIGHT, WIDTH), output=output, offset=offset_of(aligned)
        )
        assert pasted.shape == (1, HEIGHT, WIDTH)
        assert pasted.count_nonzero() == 0
    rles = paste_masks(torch.ones(1, 4, 4), box, (HEIGHT, WIDTH), output="rle", offset=offset_of(aligned))
    assert rles == [encode(torch.zeros(HEIGHT, WIDTH))]


@pytest.mark.parametrize(("output", "dtype"), [("bool", torch.bool), ("float", torch.float32)])
def test_no_detections_give_no_masks(output, dtype):
    masks = paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (HEIGHT, WIDTH), output=output)
    assert masks.shape == (0, HEIGHT, WIDTH)
    assert masks.dtype == dtype


def test_no_detections_give_no_rles():
    assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (HEIGHT, WIDTH), output="rle") == []


def test_autocast_does_not_change_pasted_masks(generator):
    probs = torch.rand(2, 14, 14, generator=generator)
    boxes = torch.tensor([[3.3, 2.1, 21.7, 13.9], [1.0, 5.0, 14.2, 15.6]])
    expected = paste_masks(probs, boxes, (HEIGHT, WIDTH), output="float")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(paste_masks(probs, boxes, (HEIGHT, WIDTH), output="float"), expected)


def test_pasted_masks_carry_no_gradient():
    grids = torch.rand(1, 4, 4, requires_grad=True)
    boxes = torch.tensor([BOXES["inside"]], requires_grad=True)
    assert not paste_masks(grids, boxes, (HEIGHT, WIDTH), output="float").requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_probabilities_of_any_dtype_are_pasted_in_float32(generator, dtype):
    grid = torch.rand(4, 4, generator=generator).to(dtype)
    pasted = paste_one(grid, BOXES["inside"], output="float")
    torch.testing.assert_close(
        pasted, paste_one(grid.float(), BOXES["inside"], output="float"), rtol=0, atol=0
    )


@pytest.mark.parametrize("shape", [(4, 4), (1, 1, 4, 4), (1, 4, 5)])
def test_probabilities_of_another_shape_raise(shape):
    with pytest.raises(ValueError, match=r"mask_probs must have shape \(D, M, M\), not"):
        paste_masks(torch.zeros(shape), torch.zeros(1, 4), (HEIGHT, WIDTH))


@pytest.mark.parametrize("shape", [(1, 4), (2, 5), (4,)])
def test_boxes_of_another_shape_raise(shape):
    with pytest.raises(ValueError, match=r"boxes must have shape \(2, 4\) for as many masks"):
        paste_masks(torch.zeros(2, 3, 3), torch.zeros(shape), (HEIGHT, WIDTH))


@pytest.mark.parametrize("output", ["bool", "float", "rle"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_box_that_is_not_finite_raises_and_is_named(output, value):
    boxes = torch.tensor([BOXES["inside"], [1.0, 2.0, value, 6.0]])
    with pytest.raises(ValueError, match=r"boxes must be finite, but box 1 is \[1.0, 2.0, .*, 6.0\]"):
        paste_masks(torch.ones(2, 3, 3), boxes, (HEIGHT, WIDTH), output=output)


def test_arrays_raise_and_are_named():
    with pytest.raises(TypeError, match="mask_probs must be a tensor, not ndarray"):
        paste_masks(np.ones((1, 4, 4)), torch.zeros(1, 4), (HEIGHT, WIDTH))
    with pytest.raises(TypeError, match="boxes must be a tensor, not list"):
        paste_masks(torch.ones(1, 4, 4), [BOXES["inside"]], (HEIGHT, WIDTH))


@pytest.mark.parametrize("output", ["bool", "float", "rle"])
def test_the_shape_of_an_image_is_not_its_size(output):
    # A tensor of masks could have this shape, too: the pixels would be pasted into the wrong axes.
    with pytest.raises(ValueError, match=r"an image size is \(H, W\).*not \(3, 14, 17\)"):
        paste_one(torch.ones(4, 4), BOXES["inside"], (3, HEIGHT, WIDTH), output=output)


@pytest.mark.parametrize("output", ["bool", "rle"])
@pytest.mark.parametrize("value", [-2.0, 3.0])
def test_logits_raise(output, value):
    with pytest.raises(
        ValueError, match=rf"must be probabilities in \[0, 1\], but they are in .*{value:g}.*sigmoid"
    ):
        paste_one(torch.tensor([[value, 0.5], [0.5, 0.5]]), BOXES["inside"], output=output)


@pytest.mark.parametrize("output", ["bool", "float", "rle"])
def test_probabilities_may_be_rounded_or_nan(output):
    for value in (-0.005, 1.005, math.nan):
        paste_one(torch.tensor([[value, 0.5], [0.5, 0.5]]), BOXES["inside"], output=output)


def test_float_masks_may_have_any_values():
    pasted = paste_one(torch.full((4, 4), 7.0), [0.0, 0.0, 17.0, 14.0], output="float")
    assert pasted[5, 5] == pytest.approx(7.0)


def test_an_unknown_output_raises():
    with pytest.raises(ValueError, match='output must be "bool", "float" or "rle", not \'mask\''):
        paste_masks(torch.zeros(1, 3, 3), torch.zeros(1, 4), (HEIGHT, WIDTH), output="mask")


@pytest.mark.parametrize("image_size", [(1, 1), (1, 9), (9, 1)])
@pytest.mark.parametrize("size", [1, 28])
def test_images_of_one_pixel_width(image_size, size):
    height, width = image_size
    box = torch.tensor([[0.0, 0.0, width, height]])
    for output in ("bool", "float"):
        # Between the outer cells' centers and the box's edge, the grid fades into the zeros around it.
        pasted = paste_masks(torch.ones(1, size, size), box, image_size, output=output)
        assert (pasted >= 0.25).all()
    assert len(paste_masks(torch.ones(1, size, size), box, image_size, output="rle")) == 1


@pytest.mark.parametrize("side", [-3.0, 0.0])
@both_alignments
def test_a_box_without_area_gives_an_empty_mask(side, aligned):
    box = torch.tensor([[5.0, 5.0, 5.0 + side, 9.0]])
    assert not paste_masks(torch.ones(1, 4, 4), box, (HEIGHT, WIDTH), offset=offset_of(aligned)).any()


@given(scene=scenes, dx=st.integers(0, 9), dy=st.integers(0, 9))
def test_moving_a_box_by_whole_pixels_moves_its_mask(scene, dx, dy):
    probs = torch.rand(
        1, scene["size"], scene["size"], generator=torch.Generator().manual_seed(scene["seed"])
    )
    # Multiples of 1/8 are moved exactly.
    (x, y), (w, h) = scene["corner"], scene["extent"]
    box = torch.tensor([[round(8 * v) / 8 for v in (x, y, x + w, y + h)]])
    height, width = scene["image_size"]
    pasted = paste_masks(probs, box, (height, width), output="float", offset=offset_of(scene["aligned"]))
    moved = paste_masks(
        probs,
        box + torch.tensor([dx, dy, dx, dy]),
        (height + dy, width + dx),
        output="float",
        offset=offset_of(scene["aligned"]),
    )
    torch.testing.assert_close(moved[:, dy:, dx:], pasted, rtol=0, atol=1e-6)


@given(scene=scenes)
def test_a_flipped_grid_in_a_flipped_box_gives_the_flipped_mask(scene):
    probs = torch.rand(
        1, scene["size"], scene["size"], generator=torch.Generator().manual_seed(scene["seed"])
    )
    (x, y), (w, h) = scene["corner"], scene["extent"]
    # Avoid multiples of 1/2: a center on the low edge is inside, on the high edge outside.
    x1, y1, x2, y2 = (round(8 * v) / 8 + 1 / 16 for v in (x, y, x + w, y + h))
    height, width = scene["image_size"]
    pasted = paste_masks(probs, torch.tensor([[x1, y1, x2, y2]]), (height, width), output="float")
    flipped = paste_masks(
        probs.flip(2), torch.tensor([[width - x2, y1, width - x1, y2]]), (height, width), output="float"
    )
    torch.testing.assert_close(flipped.flip(2), pasted, rtol=0, atol=1e-6)


# Masks that are off by parts of a pixel


@pytest.mark.parametrize(
    ("own", "resized"),
    [(20, 20), (20, 40), (20, 30), (48, 80), (64, 80), (37, 53), (80, 50), (53, 37), (7, 7)],
)
def test_the_unaligned_offset_is_half_a_pixel_less_the_shift_of_torchvisions_resizing(own, resized):
    edges = torch.arange(own)
    masks = (torch.arange(own) >= edges[:, None]).float()  # a mask that starts at each pixel
    after = interpolate(masks[:, None], size=resized, mode="nearest")[:, 0]
    moved = (resized - after.sum(dim=1)) - edges * resized / own  # to the right, px of the resized image
    expected = (0.5 - moved.mean().item()) * own / resized
    assert unaligned_offset((own, own), (resized, resized)) == pytest.approx((expected, expected), abs=1e-6)


def test_rows_and_columns_have_separate_offsets():
    assert unaligned_offset((20, 37), (40, 53)) == (0.25, 0.5 / 53)


@pytest.mark.parametrize("offset", [(0.0, 0.0), (0.5, 0.5), (0.25, 0.0), (0.1, 0.4)])
def test_a_pixel_samples_the_grid_at_its_center_minus_the_offset(generator, offset):
    # This equals moving the mask and the box by the offset, in an image of ten times the size.
    grid = torch.rand(1, 5, 5, generator=generator)
    box = torch.tensor([[2.0, 3.0, 12.0, 11.0]])
    pasted = paste_masks(grid, box, (HEIGHT, WIDTH), offset=offset, output="float")[0]
    y, x = offset
    fine_box = 10 * (box + torch.tensor([x, y, x, y]))
    fine = paste_masks(grid, fine_box, (10 * HEIGHT, 10 * WIDTH), output="float")[0]
    centers = (fine[4::10, 4::10] + fine[5::10, 4::10] + fine[4::10, 5::10] + fine[5::10, 5::10]) / 4
    # Away from the box's edges, which have their own rules, and up to the kinks of bilinear interpolation.
    torch.testing.assert_close(pasted[5:9, 4:10], centers[5:9, 4:10], rtol=0, atol=0.05)


# The upper limit of a network's accuracy: pasting its targets


def blobs(radius: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """Smooth blobs (count, H, W) at random sub-pixel positions."""
    side = 3 * radius
    y, x = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
    masks = []
    for _ in range(count):
        center = side / 2 + 2 * torch.rand(2, generator=generator)
        angle = torch.atan2(y - center[0], x - center[1])
        phase, wobble = 2 * math.pi * torch.rand(2, generator=generator)
        outline = radius * (1 + 0.15 * torch.cos(2 * angle + phase) + 0.08 * torch.cos(3 * angle + wobble))
        masks.append(torch.hypot(y - center[0], x - center[1]) < outline)
    return torch.stack(masks)


def mean_iou(masks: torch.Tensor, others: torch.Tensor) -> float:
    intersection, union = (masks & others).sum(dim=(1, 2)), (masks | others).sum(dim=(1, 2))
    return (intersection / union).mean().item()


def tight_boxes(masks: torch.Tensor) -> torch.Tensor:
    # masks_to_boxes returns the last pixels; a box ends at their far edges.
    return masks_to_boxes(masks) + torch.tensor([0.0, 0.0, 1.0, 1.0])


def torchvision_iou(masks: torch.Tensor) -> float:
    """Mean IoU of torchvision's targets, pasted by torchvision."""
    boxes = tight_boxes(masks)
    targets = project_masks_on_boxes(masks.to(torch.uint8), boxes, torch.arange(len(masks)), 28)
    pasted = paste_masks_in_image(targets[:, None], boxes, masks.shape[1:])[:, 0] >= 0.5
    return mean_iou(masks, pasted)


@pytest.mark.parametrize("radius", [8, 16, 32])
@both_alignments
def test_targets_pasted_with_their_own_offset_reproduce_the_mask(generator, radius, aligned):
    masks = blobs(radius, 12, generator)
    boxes = tight_boxes(masks)
    targets = mask_targets(masks, boxes, torch.arange(len(masks)), 28, aligned=aligned)
    matched = mean_iou(masks, paste_masks(targets, boxes, masks.shape[1:], offset=offset_of(aligned)))
    assert matched >= 0.97
    assert matched > torchvision_iou(masks)


@pytest.mark.parametrize("radius", [8, 16, 32])
@both_alignments
def test_pasting_with_the_wrong_offset_is_worse(generator, radius, aligned):
    masks = blobs(radius, 12, generator)
    boxes = tight_boxes(masks)
    targets = mask_targets(masks, boxes, torch.arange(len(masks)), 28, aligned=aligned)
    matched = mean_iou(masks, paste_masks(targets, boxes, masks.shape[1:], offset=offset_of(aligned)))
    other = mean_iou(masks, paste_masks(targets, boxes, masks.shape[1:], offset=offset_of(not aligned)))
    assert other < matched


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@both_alignments
def test_masks_pasted_on_a_device_equal_those_of_the_cpu(generator, aligned):
    grids, boxes = torch.rand(len(BOXES), 5, 5, generator=generator), torch.tensor(list(BOXES.values()))
    pasted = paste_masks(
        grids.cuda(), boxes.cuda(), (HEIGHT, WIDTH), output="float", offset=offset_of(aligned)
    )
    assert pasted.device.type == "cuda"
    expected = paste_masks(grids, boxes, (HEIGHT, WIDTH), output="float", offset=offset_of(aligned))
    torch.testing.assert_close(pasted.cpu(), expected, rtol=0, atol=1e-6)
    rles = paste_masks(grids.cuda(), boxes.cuda(), (HEIGHT, WIDTH), output="rle", offset=offset_of(aligned))
    assert torch.equal(decode(rles), pasted.cpu() >= 0.5)


# The same result on every device


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
def test_pixels_outside_the_box_are_never_set_on_any_device(monkeypatch, generator, threshold):
    grids = torch.rand(3, 5, 5, generator=generator)
    grids[0, 2, 2] = 1
    boxes = torch.tensor([BOXES["inside"], BOXES["partly left and above"], BOXES["narrow"]])
    expected = paste_masks(grids, boxes, (HEIGHT, WIDTH), threshold=threshold)
    monkeypatch.setattr(paste_module, "_windows", paste_module._whole_images)
    assert torch.equal(paste_masks(grids, boxes, (HEIGHT, WIDTH), threshold=threshold), expected)
    if threshold == 0:
        # All pixels whose centers lie in the box, and no other.
        inside = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
        inside[2:11, 2:14] = True
        assert torch.equal(expected[0], inside)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, math.nan])
def test_a_threshold_outside_0_to_1_raises(threshold):
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\]"):
        paste_masks(
            torch.ones(1, 4, 4), torch.tensor([BOXES["inside"]]), (HEIGHT, WIDTH), threshold=threshold
        )


@pytest.mark.parametrize("offset", [(math.nan, 0.0), (0.0,), (0.0, math.inf), 0.5])
def test_an_invalid_offset_raises(offset):
    with pytest.raises(ValueError, match="offset must be two finite numbers"):
        paste_masks(torch.ones(1, 4, 4), torch.tensor([BOXES["inside"]]), (HEIGHT, WIDTH), offset=offset)


@pytest.mark.parametrize("output", ["bool", "float", "rle"])
def test_on_the_host_no_whole_images_are_computed(monkeypatch, generator, output):
    def refused(*_):
        raise AssertionError("pixels outside the box were computed")

    monkeypatch.setattr(paste_module, "_whole_images", refused)
    grids = torch.rand(1, 5, 5, generator=generator)
    paste_masks(grids, torch.tensor([BOXES["inside"]]), (HEIGHT, WIDTH), output=output)


@pytest.mark.parametrize("pixels_at_once", [1, 40, 2**21])
@pytest.mark.parametrize("output", ["bool", "float", "rle"])
def test_large_boxes_are_pasted_in_chunks(monkeypatch, generator, pixels_at_once, output):
    grids = torch.rand(4, 6, 6, generator=generator)
    boxes = torch.tensor(
        [BOXES[name] for name in ("the image", "inside", "around the image", "outside, right")]
    )
    expected = paste_masks(grids, boxes, (HEIGHT, WIDTH), output="float")
    monkeypatch.setattr(paste_module, "_PIXELS_AT_ONCE", pixels_at_once)
    monkeypatch.setattr(paste_module, "_WEIGHTS_AT_ONCE", 1)
    found = paste_masks(grids, boxes, (HEIGHT, WIDTH), output=output)
    if output == "rle":
        assert found == [encode(mask) for mask in paste_masks(grids, boxes, (HEIGHT, WIDTH))]
        found = decode(found).float()
        expected = (expected >= 0.5).float()
    torch.testing.assert_close(found.float(), (expected >= 0.5).float() if output == "bool" else expected)
