"""Rasterizing polygons: equal to pycocotools, and correct for polygons on which pycocotools crashes."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

import maskloss
from maskloss.masks import coco_format
from maskloss.masks.coco_format import clip_polygon, count_pixels, decode_rle, rasterize_polygons

HEIGHT, WIDTH = 40, 50


def by_pycocotools(polygons: list[np.ndarray]) -> np.ndarray:
    flat = [polygon.reshape(-1).tolist() for polygon in polygons]
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(flat, HEIGHT, WIDTH)))


points = st.tuples(st.floats(-30, 80), st.floats(-30, 70))


@given(st.lists(st.lists(points, min_size=3, max_size=9), min_size=1, max_size=3))
def test_ordinary_polygons_match_pycocotools_bit_for_bit(polygons):
    arrays = [np.array(polygon) for polygon in polygons]
    expected = by_pycocotools(arrays)
    assert np.array_equal(rasterize_polygons(arrays, HEIGHT, WIDTH), expected)
    assert count_pixels(arrays, HEIGHT, WIDTH) == expected.sum()


@given(st.lists(points, min_size=3, max_size=9))
def test_clipping_does_not_change_pixels_inside_the_box(polygon):
    # The margin keeps the clipped border outside the image, so pycocotools fills the same pixels up to rounded slopes.
    array = np.array(polygon)
    clipped = clip_polygon(array, (-5.0, -6.0, 57.0, 48.0))
    expected = by_pycocotools([array])
    found = by_pycocotools([clipped]) if len(clipped) > 2 else np.zeros_like(expected)
    assert np.count_nonzero(found != expected) <= len(polygon) * 4
    assert (clipped >= [-5, -6]).all()
    assert (clipped <= [57, 48]).all()


def test_clipping_by_hand():
    square = np.array([[0.0, 0.0], [10.0, 0.0], [10.0, 10.0], [0.0, 10.0]])
    clipped = clip_polygon(square, (2.0, 3.0, 20.0, 20.0))
    assert {tuple(point) for point in clipped.tolist()} == {(2, 3), (10, 3), (10, 10), (2, 10)}
    assert len(clip_polygon(square, (11.0, 0.0, 20.0, 20.0))) == 0


@pytest.mark.parametrize("far", [1e6, 1e8, 1e9, 1e10])
def test_polygons_that_reach_far_outside_fill_the_right_pixels(far):
    # pycocotools' 32-bit numbers overflow from 1e8 px on, and the process dies.
    masks = maskloss.EncodedMasks(
        [[[20, -far, far, -far, far, far, 20, far]], [[-far, 10, far, 10, far, far]]], 40, 50
    )
    expected = torch.zeros(40, 50)
    expected[:, 20:] = 1
    assert torch.equal(masks.bitmaps()[0].float(), expected)
    box, idxs = torch.tensor([[0.0, 0.0, 50.0, 40.0]]), torch.tensor([0])
    for binary in (True, False):
        targets = maskloss.mask_targets(masks, box, idxs, 10, binary=binary)
        assert torch.equal(targets[0], (torch.arange(10) >= 4).float().expand(10, 10))


def test_coordinates_beyond_the_limit_raise():
    with pytest.raises(
        ValueError, match=r"instance 1: a polygon has a coordinate of 1e\+300 px, more than 1e\+10"
    ):
        maskloss.EncodedMasks([[[0, 0, 5, 0, 5, 5]], [[0, 0, 1e300, 0, 5, 5]]], 40, 50)


def test_a_tiny_box_on_a_long_polygon_takes_little_memory():
    # In the box's grid this outline is 200 edges of up to 373,000 cells; pycocotools would hold 5 points for each.
    zigzag = np.random.default_rng(0).uniform(0, 1333, (200, 2))
    masks = maskloss.EncodedMasks([[zigzag.reshape(-1).tolist()]], 1333, 1333)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    targets = maskloss.mask_targets(
        masks, torch.tensor([[10.0, 10.0, 10.02, 10.02]]), torch.tensor([0]), 28, binary=True
    )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB; it was 1.3 GB
    assert set(targets.unique().tolist()) <= {0.0, 1.0}


def test_a_clipped_polygon_fills_the_same_pixels(monkeypatch):
    star = 60 * np.stack([np.cos(np.arange(9) * 4.2), np.sin(np.arange(9) * 4.2)], axis=1) + [25, 20]
    expected = by_pycocotools([star])
    monkeypatch.setattr(coco_format, "_LONGEST_OUTLINE", 10.0)
    found = rasterize_polygons([star], HEIGHT, WIDTH)
    assert 0 < expected.mean() < 1
    assert np.count_nonzero(found != expected) < 0.01 * found.size


def test_polygons_clipped_to_nothing_give_an_empty_mask():
    far = np.array([[1e9, 1e9], [2e9, 1e9], [2e9, 2e9]])
    mask = rasterize_polygons([far], HEIGHT, WIDTH)
    assert mask.dtype == np.uint8
    assert not mask.any()
    assert count_pixels([far], HEIGHT, WIDTH) == 0


def test_huge_polygons_do_not_crash_the_process():
    code = (
        "import maskloss\n"
        "masks = maskloss.EncodedMasks([[[0, 0, 1e9, 0, 1e9, 1e9, 0, 1e9]]], 64, 64)\n"
        "print(float(masks.bitmaps().float().mean()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.strip() == "1.0"


@pytest.mark.parametrize("far", [429496729.0, -429496729.0, 2.0**28 + 1, 1e9])
def test_small_polygons_far_outside_fill_nothing(far):
    # pycocotools counts fifths of px in 32 bits, and fills columns 5 to 50 of the image with the second of these.
    for polygon in (
        [far - 2, 5, far + 2, 5, far + 2, 50, far - 2, 50],
        [5, far - 2, 50, far - 2, 50, far + 2, 5, far + 2],
    ):
        assert not rasterize_polygons([np.array(polygon).reshape(-1, 2)], 100, 100).any()
        assert not maskloss.EncodedMasks([[polygon]], 100, 100).bitmaps().any()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer")
def test_an_interruption_while_pycocotools_decodes_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    rle = coco_mask.frPyObjects([[2.0, 2, 20, 3, 25, 25, 4, 20]], 28, 28)[0]

    def decode_forever() -> None:
        while True:
            decode_rle(rle)

    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for number in range(40):
            signal.setitimer(signal.ITIMER_REAL, 0.002 + 1e-6 * number)
            with pytest.raises(KeyboardInterrupt):
                decode_forever()
    finally:
        signal.signal(signal.SIGALRM, before)

    # What comes out of NumPy 2 in a third of these cases.
    def interrupted(rle: object) -> None:
        raise TypeError("__array__() got an unexpected keyword argument 'copy'")

    monkeypatch.setattr(coco_mask, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decode_rle(rle)


def test_what_is_no_rle_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        decode_rle({"size": 3, "counts": b"1"})
