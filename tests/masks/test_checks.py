"""Argument checks of mask targets and pasting: wrong arguments raise and are named."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from maskloss import mask_targets
from maskloss.masks.checks import check_finite, check_image_size, check_tensors
from tests.masks.scenes import GOOD_BOX, masks_of_kind


@pytest.mark.parametrize("kind", ["bitmaps", "rle", "polygons"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_box_that_is_not_finite_raises_and_is_named(kind, value):
    masks = masks_of_kind(kind, torch.ones(1, 8, 8, dtype=torch.bool))
    boxes = torch.tensor([GOOD_BOX, [1.0, value, 5.0, 6.0]])
    with pytest.raises(ValueError, match=r"boxes must be finite, but box 1 is \[1.0, .*, 5.0, 6.0\]"):
        mask_targets(masks, boxes, torch.tensor([0, 0]), 4)


def test_the_first_box_that_is_not_finite_is_named() -> None:
    boxes = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, math.nan], [math.inf, 0, 1, 1]])
    with pytest.raises(ValueError, match=r"^boxes must be finite, but box 1 is \[0\.0, 0\.0, 1\.0, nan\]$"):
        check_finite(boxes)


def test_finite_boxes_of_any_size_or_none_pass() -> None:
    check_finite(torch.tensor([[3.0, 3, 3, 3], [-1e30, 5, 1e30, -5]]))
    check_finite(torch.zeros(0, 4))


def test_what_is_no_tensor_is_named() -> None:
    check_tensors(boxes=torch.zeros(1), masks=torch.zeros(1))
    with pytest.raises(TypeError, match=r"^masks must be a tensor, not ndarray$"):
        check_tensors(boxes=torch.zeros(1), masks=np.zeros(1))


@pytest.mark.parametrize(
    "size", [(4, 5), [4, 5], torch.Size([4, 5]), torch.tensor([4, 5]), tuple(np.array([4, 5]))], ids=str
)
def test_sizes_of_any_integers_pass(size) -> None:
    check_image_size(size)


@pytest.mark.parametrize("size", [4, (3, 4, 5), (4,), (4.0, 5.0), (0, 5), (4, -5), "45", None], ids=str)
def test_other_sizes_raise(size) -> None:
    with pytest.raises(ValueError, match=r"^an image size is \(H, W\), two positive integers, not "):
        check_image_size(size)
