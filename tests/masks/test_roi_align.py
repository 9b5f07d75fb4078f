"""`maskloss.masks.roi_align`: RoIAlign of bitmaps and runs equals torchvision's operator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.pretended_device import counted, pretended_device, sent
from maskloss import EncodedMasks, mask_targets
from maskloss.masks import roi_align as roi_align_of_masks
from maskloss.masks.encoded import Runs
from maskloss.masks.roi_align import AxisSampling, roi_align_bitmaps, roi_align_runs
from maskloss.masks.targets import targets_of_bitmaps
from tests.masks.scenes import (
    BOXES,
    EXACT,
    both_alignments,
    encode,
    masks_of,
    random_masks,
    roi_aligned,
    scenes,
    targets_of,
)


@pytest.mark.parametrize("name", BOXES)
@pytest.mark.parametrize("size", [1, 5, 28])
@both_alignments
def test_targets_of_bitmaps_equal_torchvisions_roi_align(generator, name, size, aligned):
    masks = random_masks(1, 20, 24, generator)
    boxes, matched_idxs = torch.tensor([BOXES[name]]), torch.tensor([0])
    targets = mask_targets(masks, boxes, matched_idxs, size, aligned=aligned)
    torch.testing.assert_close(targets, roi_aligned(masks, boxes, matched_idxs, size, aligned), **EXACT)


@both_alignments
def test_boxes_of_every_size_in_one_call_are_independent(generator, aligned):
    masks = random_masks(3, 20, 24, generator)
    boxes = torch.tensor(list(BOXES.values()))
    matched_idxs = torch.arange(len(boxes)) % 3
    targets = mask_targets(masks, boxes, matched_idxs, 7, aligned=aligned)
    torch.testing.assert_close(targets, roi_aligned(masks, boxes, matched_idxs, 7, aligned), **EXACT)


def test_each_box_uses_its_matched_mask():
    masks = torch.zeros(3, 4, 4, dtype=torch.bool)
    masks[2] = True
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0]]).expand(3, 4)
    targets = mask_targets(masks, boxes, torch.tensor([2, 0, 2]), 2)
    assert targets.tolist() == [[[1, 1], [1, 1]], [[0, 0], [0, 0]], [[1, 1], [1, 1]]]


# On a GPU, whose code runs here on a pretended device.


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
@pytest.mark.parametrize("masks_at_once", [5, 2, 1])
@both_alignments
def test_a_gpu_samples_the_same_with_one_wait(monkeypatch, generator, dtype, masks_at_once, aligned):
    monkeypatch.setattr(roi_align_of_masks, "_PIXELS_AT_ONCE", masks_at_once * 20 * 24 + 5)
    masks = random_masks(5, 20, 24, generator).to(dtype)
    boxes = torch.tensor(list(BOXES.values()))
    matched_idxs = torch.arange(len(boxes)) % 5
    expected = mask_targets(masks, boxes, matched_idxs, 7, aligned=aligned)
    with pretended_device():
        there = sent(masks), sent(boxes), sent(matched_idxs)
        with counted() as counts:
            targets = mask_targets(*there, 7, aligned=aligned)
    assert targets.device.type == "cuda"
    torch.testing.assert_close(targets.values, expected, **EXACT)
    assert counts.waits.total() == 1
    # Apple's devices have no float64.
    assert torch.float64 not in counts.dtypes


def test_a_gpu_launches_four_operations_for_the_masks_of_an_image(generator):
    masks, boxes = random_masks(3, 20, 24, generator), torch.tensor(list(BOXES.values()))
    idxs = torch.arange(len(boxes)) % 3
    with pretended_device():
        there = sent(masks), sent(boxes), sent(idxs)
        with counted() as counts:
            targets_of_bitmaps(*there, 7, aligned=False, binary=False)
    assert counts.launches.total() == 4
    assert counts.waits.total() == 0


def test_a_mask_of_0_and_2_on_a_gpu_raises(generator):
    masks = 2 * random_masks(3, 20, 24, generator).to(torch.uint8)
    with pretended_device(), pytest.raises(ValueError, match="masks must hold 0 and 1 only"):
        mask_targets(sent(masks), sent(torch.tensor([[1.0, 1.0, 9.0, 9.0]])), sent(torch.tensor([1])), 7)


def test_more_boxes_than_one_chunk_all_get_targets(generator):
    masks = random_masks(2, 20, 24, generator)
    boxes = torch.rand(150, 4, generator=generator) * 10
    boxes[:, 2:] += boxes[:, :2] + 1
    matched_idxs = torch.randint(0, 2, (150,), generator=generator)
    expected = roi_aligned(masks, boxes, matched_idxs, 5, True)
    torch.testing.assert_close(mask_targets(masks, boxes, matched_idxs, 5), expected, **EXACT)
    rles = EncodedMasks([encode(mask) for mask in masks], 20, 24)
    torch.testing.assert_close(mask_targets(rles, boxes, matched_idxs, 5), expected, **EXACT)


@given(scene=scenes)
def test_targets_of_any_bitmap_and_box_equal_roi_align(scene):
    masks, boxes, matched_idxs = masks_of(scene)
    size, aligned = scene["size"], scene["aligned"]
    targets = mask_targets(masks, boxes, matched_idxs, size, aligned=aligned)
    torch.testing.assert_close(targets, roi_aligned(masks, boxes, matched_idxs, size, aligned), **EXACT)


@given(scene=scenes, binary=st.booleans())
def test_targets_of_any_rle_equal_those_of_its_bitmap(scene, binary):
    masks, boxes, matched_idxs = masks_of(scene)
    rles = EncodedMasks([encode(mask) for mask in masks], scene["height"], scene["width"])
    settings_ = {"aligned": scene["aligned"], "binary": binary}
    torch.testing.assert_close(
        mask_targets(rles, boxes, matched_idxs, scene["size"], **settings_),
        mask_targets(masks, boxes, matched_idxs, scene["size"], **settings_),
        **EXACT,
    )


@both_alignments
def test_masks_of_0_and_255_raise(aligned):
    masks = torch.full((1, 6, 6), 255, dtype=torch.uint8)
    with pytest.raises(ValueError, match="masks must hold 0 and 1 only"):
        targets_of(masks, [1.0, 1.0, 4.0, 4.0], 2, aligned=aligned)


def test_a_single_pixel_of_2_inside_a_box_raises():
    masks = torch.zeros(1, 6, 6, dtype=torch.uint8)
    masks[0, 3, 3] = 2
    with pytest.raises(ValueError, match="masks must hold 0 and 1 only"):
        targets_of(masks, [1.0, 1.0, 5.0, 5.0], 4)


def test_only_pixels_that_are_read_are_checked():
    masks = torch.zeros(2, 6, 6, dtype=torch.uint8)
    masks[0, 5, 5] = 255  # far from the box
    masks[1] = 255  # not matched
    assert targets_of(masks, [0.0, 0.0, 3.0, 3.0], 3).count_nonzero() == 0


# The functions by themselves.


def test_weights_by_hand() -> None:
    # A box from 1 to 3 in an image of 4 px, one cell, two samples at 1.5 and 2.5: aligned, at the centers of pixels 1
    # and 2; unaligned, halfway between pixels 1 and 2, and 2 and 3.
    low, high = torch.tensor([1.0]), torch.tensor([3.0])
    aligned = AxisSampling.of(low, high, length=4, size=1, aligned=True)
    assert aligned.samples.tolist() == [2]
    assert aligned.start.item() == 0
    assert aligned.weights(4, 2).tolist() == [[[0, 0.5, 0.5, 0]]]
    unaligned = AxisSampling.of(low, high, length=4, size=1, aligned=False)
    assert unaligned.weights(4, 2).tolist() == [[[0, 0.25, 0.5, 0.25]]]


def test_a_window_far_from_the_first_pixel_is_as_short_as_its_box() -> None:
    axis = AxisSampling.of(torch.tensor([60.0]), torch.tensor([62.0]), length=100, size=1, aligned=True)
    window, most_samples = axis.sizes()
    assert 2 <= window <= 6  # the two pixels of the box, and at most two more at either end
    assert most_samples == 2


def test_a_given_number_of_samples_replaces_that_of_one_per_pixel() -> None:
    # Three samples in the cell from 0 to 6, at 1, 3 and 5: halfway between pixels.
    axis = AxisSampling.of(
        torch.tensor([0.0]), torch.tensor([6.0]), length=6, size=1, aligned=True, sampling_ratio=3
    )
    assert axis.samples.tolist() == [3]
    torch.testing.assert_close(axis.weights(6, 3), torch.full((1, 1, 6), 1 / 6))


@both_alignments
def test_unaligned_boxes_are_at_least_a_pixel_long(aligned: bool) -> None:
    axis = AxisSampling.of(torch.tensor([2.0]), torch.tensor([2.25]), length=9, size=2, aligned=aligned)
    assert axis.cell.tolist() == [0.125 if aligned else 0.5]


def test_the_window_holds_every_pixel_with_a_weight(generator: torch.Generator) -> None:
    low = torch.rand(500, generator=generator) * 60 - 20
    high = low + torch.rand(500, generator=generator) * 60
    for aligned in (False, True):
        axis = AxisSampling.of(low, high, length=24, size=7, aligned=aligned)
        window, samples = axis.sizes()
        assert (axis.start >= 0).all()
        assert (axis.stop <= 24).all()
        assert (axis.start < axis.stop).all()
        weights = axis.weights(window, samples)
        assert weights.shape == (500, 7, window)
        beyond = torch.arange(window) >= (axis.stop - axis.start)[:, None]
        assert weights.transpose(1, 2)[beyond].abs().max() == 0
        # With the whole image as the window, the weights are the same.
        whole = AxisSampling(
            axis.low, axis.cell, axis.samples, torch.zeros_like(axis.start), axis.stop, 24, 7
        )
        torch.testing.assert_close(whole.weights(24, samples).sum(2), weights.sum(2), rtol=0, atol=2e-6)


def test_selected_boxes_have_their_own_weights(generator: torch.Generator) -> None:
    low = torch.rand(6, generator=generator) * 10
    axis = AxisSampling.of(low, low + 8, length=24, size=3, aligned=True)
    whole = axis.weights(*axis.sizes())
    for boxes in (slice(2, 5), torch.tensor([5, 0])):
        assert torch.equal(axis.of_boxes(boxes).weights(*axis.sizes()), whole[boxes])


@both_alignments
def test_runs_and_bitmaps_equal_roi_align(generator: torch.Generator, aligned: bool) -> None:
    masks = random_masks(3, 20, 24, generator)
    boxes = torch.tensor(list(BOXES.values()))
    idxs = torch.arange(len(boxes)) % 3
    expected = roi_aligned(masks, boxes, idxs, 5, aligned)
    torch.testing.assert_close(roi_align_bitmaps(masks, boxes, idxs, 5, aligned=aligned), expected, **EXACT)
    x1, y1, x2, y2 = boxes.unbind(1)
    rows = AxisSampling.of(y1, y2, 20, 5, aligned=aligned)
    columns = AxisSampling.of(x1, x2, 24, 5, aligned=aligned)
    runs = [runs_of(masks[index].numpy()) for index in idxs.tolist()]
    torch.testing.assert_close(roi_align_runs(runs, rows, columns), expected, **EXACT)


def runs_of(mask: np.ndarray) -> Runs:
    """Find a mask's vertical runs with a loop over its pixels."""
    found = []
    for column in range(mask.shape[1]):
        top = None
        for row in range(mask.shape[0] + 1):
            inside = row < mask.shape[0] and mask[row, column]
            if inside and top is None:
                top = row
            elif not inside and top is not None:
                found.append((column, top, row))
                top = None
    return Runs(*np.array(found, dtype=np.int64).reshape(-1, 3).T)
