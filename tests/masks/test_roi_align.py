"""`maskloss.masks.roi_align`: RoIAlign of bitmaps, runs and groups of crops equals torchvision's operator."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torchvision.ops import roi_align

from maskloss import EncodedMasks, mask_targets
from maskloss.masks import roi_align as roi_align_of_masks
from maskloss.masks.encoded import Runs
from maskloss.masks.roi_align import AxisSampling, align_crops, roi_align_bitmaps, roi_align_runs
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


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
@both_alignments
def test_crops_sampled_together_equal_crops_sampled_one_by_one(monkeypatch, generator, dtype, aligned):
    # Run the code for GPUs on a CPU, with a pixel limit so low that there is more than one group.
    masks = random_masks(3, 20, 24, generator).to(dtype)
    boxes = torch.tensor(list(BOXES.values()))
    matched_idxs = torch.randint(0, 3, (len(boxes),), generator=generator)
    expected = mask_targets(masks, boxes, matched_idxs, 7, aligned=aligned)
    monkeypatch.setattr(roi_align_of_masks, "_one_by_one", roi_align_of_masks._in_groups)
    for pixels in (2**24, 300, 1):
        monkeypatch.setattr(roi_align_of_masks, "_PIXELS_AT_ONCE", pixels)
        targets = mask_targets(masks, boxes, matched_idxs, 7, aligned=aligned)
        torch.testing.assert_close(targets, expected, **EXACT)
    if dtype == torch.uint8:
        masks[0, 5, 5] = 2
        with pytest.raises(ValueError, match="masks must hold 0 and 1 only"):
            mask_targets(masks, boxes, torch.zeros_like(matched_idxs), 7, aligned=aligned)


def test_groups_hold_every_crop_once_and_little_padding(generator):
    heights, widths = torch.randint(1, 300, (2, 200), generator=generator).sort().values.tolist()
    sizes = [[height, width] for height, width in zip(heights, widths, strict=True)]
    ends = list(roi_align_of_masks._group_ends(sizes))
    assert ends[0] == 0
    assert ends[-1] == 200
    assert ends == sorted(set(ends))
    for first, last in pairwise(ends):
        group = sizes[first:last]
        padded = len(group) * max(height for height, _ in group) * max(width for _, width in group)
        assert padded <= 2 * sum(height * width for height, width in group)
    assert len(ends) < 20


def test_more_boxes_than_one_chunk_all_get_targets(generator):
    masks = random_masks(2, 20, 24, generator)
    boxes = torch.rand(150, 4, generator=generator) * 10
    boxes[:, 2:] += boxes[:, :2] + 1
    matched_idxs = torch.randint(0, 2, (150,), generator=generator)
    expected = roi_aligned(masks, boxes, matched_idxs, 5, True)
    torch.testing.assert_close(mask_targets(masks, boxes, matched_idxs, 5), expected, **EXACT)
    rles = EncodedMasks([encode(mask) for mask in masks], 20, 24)
    torch.testing.assert_close(mask_targets(rles, boxes, matched_idxs, 5), expected, **EXACT)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(scene=scenes)
def test_targets_of_any_bitmap_and_box_equal_roi_align(scene):
    masks, boxes, matched_idxs = masks_of(scene)
    size, aligned = scene["size"], scene["aligned"]
    targets = mask_targets(masks, boxes, matched_idxs, size, aligned=aligned)
    torch.testing.assert_close(targets, roi_aligned(masks, boxes, matched_idxs, size, aligned), **EXACT)


@settings(deadline=None, max_examples=60, derandomize=True)
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


HEIGHT, WIDTH, M = 60, 80, 7


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def crops(count: int, largest_side: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return masks, boxes, and the index of each box's mask."""
    generator = torch.Generator().manual_seed(count)
    masks = torch.rand(3, HEIGHT, WIDTH, generator=generator) < 0.5
    low = torch.rand(count, 2, generator=generator) * 20
    boxes = torch.cat([low, low + 4 + largest_side * torch.rand(count, 2, generator=generator)], dim=1)
    return masks, boxes, torch.randint(3, (count,), generator=generator)


@pytest.mark.parametrize("aligned", [False, True])
def test_targets_are_one_graph_compiled_once_for_any_boxes(fresh_compiler: None, aligned: bool) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(align_crops, backend=counter, fullgraph=True, dynamic=True)
    compilations = []
    for count, largest_side in ((9, 20.0), (30, 35.0), (5, 12.0), (17, 40.0)):
        masks, boxes, instances = crops(count, largest_side)
        x1, y1, x2, y2 = boxes.unbind(1)
        rows = AxisSampling.of(y1, y2, HEIGHT, M, aligned=aligned)
        columns = AxisSampling.of(x1, x2, WIDTH, M, aligned=aligned)
        targets, _ = compiled(masks, instances, rows, columns, rows.sizes(), columns.sizes())
        rois = torch.cat([instances[:, None].float(), boxes], dim=1)
        expected = roi_align(masks[:, None].float(), rois, (M, M), 1.0, -1, aligned)[:, 0]
        torch.testing.assert_close(targets, expected, rtol=0, atol=2e-6)
        compilations.append(counter.frame_count)
    assert compilations == [1, 1, 1, 1]


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
    assert torch.equal(axis.to(torch.device("cpu")).weights(*axis.sizes()), whole)


@both_alignments
def test_runs_bitmaps_and_padded_crops_equal_roi_align(generator: torch.Generator, aligned: bool) -> None:
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
    targets, largest = align_crops(masks, idxs, rows, columns, rows.sizes(), columns.sizes())
    torch.testing.assert_close(targets, expected, **EXACT)
    assert largest == 1


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


def test_the_largest_value_of_the_crops_is_returned() -> None:
    masks = torch.zeros(2, 6, 6, dtype=torch.uint8)
    masks[1, 2, 2] = 3
    axis = AxisSampling.of(torch.tensor([0.0]), torch.tensor([5.0]), length=6, size=2, aligned=True)
    for instance, expected in ((0, 0), (1, 3)):
        _, largest = align_crops(masks, torch.tensor([instance]), axis, axis, axis.sizes(), axis.sizes())
        assert largest == expected
