"""The user's default dtype and default device change no loss, target or detection."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import maskloss
from maskloss import EncodedMasks
from maskloss.detection.point_rend import PointRendBranch, most_uncertain_cells
from maskloss.detection.sampling import sample_padded

from .small_models import batch, tiny_mask_rcnn, training_pass

DTYPES = [torch.float64, torch.bfloat16, torch.float16]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def encoded(images: list[Tensor], targets: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Return targets with polygons, or runs, instead of bitmaps."""
    found = []
    for image, target in zip(images, targets, strict=True):
        height, width = image.shape[-2:]
        segmentations: list[Any] = [[[x, y, z, y, z, w]] for x, y, z, w in target["boxes"].tolist()]
        if kind == "runs":
            segmentations = [
                {"size": [height, width], "counts": [first, 900, height * width - 900 - first]}
                for first in (300, 2000)
            ]
        found.append({**target, "masks": EncodedMasks(segmentations, height, width)})
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_equal_torchvisions_under_any_default_dtype(dtype):
    stock, model = tiny_mask_rcnn(), maskloss.convert(tiny_mask_rcnn())
    images, targets = batch()
    with default_dtype(dtype):
        expected, _ = training_pass(stock, images, targets)
        losses, gradients = training_pass(model, images, targets)
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value, rtol=1e-5, atol=1e-7)
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])  # float64 takes other random numbers
@pytest.mark.parametrize("kind", ["bitmaps", "polygons", "runs"])
@pytest.mark.parametrize(
    "options",
    [
        {"loss": "aligned"},
        {"loss": "detectron2", "sync_free": True},
        {"loss": "weak"},
        {"mask_branch": "point_rend"},
        {"mask_branch": "mask_iou"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_other_losses_and_branches_have_the_same_numbers_under_any_default_dtype(options, kind, dtype):
    images, targets = batch()
    if kind != "bitmaps":
        targets = encoded(images, targets, kind)
    expected, _ = training_pass(maskloss.convert(tiny_mask_rcnn(), **options), images, targets)
    model = maskloss.convert(tiny_mask_rcnn(), **options)
    with default_dtype(dtype):
        losses, _ = training_pass(model, images, targets)
    for key, value in expected.items():
        assert torch.equal(losses[key], value), key


def test_points_and_random_keys_are_float32():
    model = tiny_mask_rcnn()
    branch = PointRendBranch.of(model)
    sampler = model.rpn.fg_bg_sampler
    logits, labels = torch.randn(2, 1, 7, 7), [torch.tensor([0, 1, 0, 0])]
    for dtype in DTYPES:
        with default_dtype(dtype):
            assert branch._training_points(logits).dtype == torch.float32
            assert most_uncertain_cells(logits, 3)[1].dtype == torch.float32
            # In bfloat16, 300 random keys would often be equal, and the first of them sampled more often.
            sampled = sample_padded([torch.zeros(300, dtype=torch.int64)], sampler)
            assert sampled.indices.unique().numel() == sampled.indices.numel()
            assert sample_padded(labels, sampler).num_positives.tolist() == [1]


@pytest.mark.parametrize("kind", ["bitmaps", "polygons", "runs"])
@pytest.mark.parametrize("binary", [False, True])
def test_mask_targets_do_not_depend_on_the_default_device(kind, binary):
    images, targets = batch()
    if kind != "bitmaps":
        targets = encoded(images, targets, kind)
    masks, boxes, idxs = targets[0]["masks"], targets[0]["boxes"], torch.tensor([0, 1])
    expected = maskloss.mask_targets(masks, boxes, idxs, 7, binary=binary)
    with torch.device("meta"):
        found = maskloss.mask_targets(masks, boxes, idxs, 7, binary=binary)
    assert found.device.type == "cpu"
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["polygons", "runs"])
def test_encoded_masks_do_not_depend_on_the_default_device(kind):
    images, targets = batch()
    masks = encoded(images, targets, kind)[0]["masks"]
    expected = masks.bitmaps(), masks.extents(), masks[torch.tensor([1])].bitmaps()
    chosen = torch.tensor([1])
    with torch.device("meta"):
        found = masks.bitmaps(), masks.extents(), masks[chosen].bitmaps()
    for one, other in zip(found, expected, strict=True):
        assert one.device.type == "cpu"
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pasted_masks_are_the_same_under_any_default_dtype(dtype):
    grids = torch.rand(3, 7, 7, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[300.3, 2.0, 580.7, 41.5], [1.0, 1.0, 9.0, 30.0], [-5.0, 3.0, 20.0, 60.0]])
    expected = maskloss.paste_masks(grids, boxes, (48, 640), offset=(0.25, 0.25), output="float")
    with default_dtype(dtype):
        found = maskloss.paste_masks(grids, boxes, (48, 640), offset=(0.25, 0.25), output="float")
    assert torch.equal(found, expected)
