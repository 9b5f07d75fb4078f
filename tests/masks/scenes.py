"""Masks and boxes that several tests share, and torchvision's RoIAlign of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from torchvision.ops import roi_align

from maskloss import EncodedMasks, mask_targets

both_alignments = pytest.mark.parametrize("aligned", [True, False])


EXACT = {"rtol": 0, "atol": 2e-6}


def random_masks(count: int, height: int, width: int, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(count, height, width, generator=generator) > 0.5


def roi_aligned(masks, boxes, matched_idxs, size, aligned):
    """torchvision's own RoIAlign of each box on its own mask."""
    rois = torch.cat([matched_idxs[:, None].to(boxes), boxes], dim=1)
    return roi_align(masks[:, None].float(), rois, (size, size), 1.0, -1, aligned=aligned)[:, 0]


def encode(bitmap: torch.Tensor) -> dict:
    return coco_mask.encode(np.asfortranarray(bitmap.numpy().astype(np.uint8)))


def targets_of(masks, box, size, **settings_):
    return mask_targets(masks, torch.tensor([box]), torch.tensor([0]), size, **settings_)[0]


BOXES = {
    "inside": [3.3, 2.1, 20.7, 17.9],
    "whole pixels": [4.0, 3.0, 18.0, 17.0],
    "half pixels": [4.5, 3.5, 18.5, 17.5],
    "partly left and above": [-6.2, -3.9, 9.4, 8.8],
    "partly right and below": [15.1, 12.2, 37.7, 29.3],
    "around the image": [-30.5, -20.5, 55.0, 60.2],
    "the image": [0.0, 0.0, 24.0, 20.0],
    "outside": [30.0, 25.0, 40.0, 35.0],
    "just outside": [24.5, 3.0, 30.0, 9.0],
    "tiny": [7.31, 8.27, 7.36, 8.31],
    "less than a pixel": [7.3, 8.2, 8.0, 8.9],
    "one pixel": [7.0, 8.0, 8.0, 9.0],
    "long": [2.2, 9.1, 21.9, 9.7],
    "huge": [-900.0, -1100.0, 1000.0, 900.0],
}


boxes_on_a_grid = st.tuples(
    # Multiples of 1/8 are exact, so adding and subtracting half a pixel is exact too, and rounding cannot change
    # RoIAlign's number of samples per cell, which is a ceiling.
    st.integers(-40, 110),
    st.integers(-40, 110),
    st.integers(8, 160),
    st.integers(8, 160),
).map(lambda box: [box[0] / 8, box[1] / 8, (box[0] + box[2]) / 8, (box[1] + box[3]) / 8])


scenes = st.fixed_dictionaries(
    {
        "height": st.integers(1, 12),
        "width": st.integers(1, 12),
        "seed": st.integers(0, 10_000),
        "boxes": st.lists(boxes_on_a_grid, min_size=1, max_size=4),
        "size": st.integers(1, 6),
        "aligned": st.booleans(),
    }
)


def masks_of(scene) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(scene["seed"])
    masks = random_masks(2, scene["height"], scene["width"], generator)
    boxes = torch.tensor(scene["boxes"])
    return masks, boxes, torch.randint(0, 2, (len(boxes),), generator=generator)


GOOD_BOX = [1.0, 2.0, 5.0, 6.0]


def masks_of_kind(kind: str, bitmaps: torch.Tensor):
    """The same masks as bitmaps and as RLEs; as polygons, the whole image."""
    height, width = bitmaps.shape[1:]
    if kind == "bitmaps":
        return bitmaps
    if kind == "rle":
        return EncodedMasks([encode(bitmap) for bitmap in bitmaps], height, width)
    return EncodedMasks([[[0, 0, width, 0, width, height, 0, height]]] * len(bitmaps), height, width)
