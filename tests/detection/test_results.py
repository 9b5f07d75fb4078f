"""mask_offset and coco_results: pasting as documented is no less accurate than stock torchvision's."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.models.detection.roi_heads import paste_masks_in_image, project_masks_on_boxes
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import masks_to_boxes

import maskloss
from maskloss import coco_results, mask_offset, paste_masks

from .small_models import batch, tiny_faster_rcnn, tiny_mask_rcnn


def ellipses(count: int, height: int, width: int) -> Tensor:
    """Tilted ellipses of 8 to 60 px, (G, H, W) uint8."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    masks = []
    for _ in range(count):
        a, b = (8 + 52 * torch.rand(2, generator=generator)).tolist()
        center = torch.rand(2, generator=generator) * torch.tensor([height - 130.0, width - 130.0]) + 65
        turn = 3.14 * torch.rand(1, generator=generator)
        u = (x - center[1]) * turn.cos() + (y - center[0]) * turn.sin()
        v = (y - center[0]) * turn.cos() - (x - center[1]) * turn.sin()
        masks.append((u / a) ** 2 + (v / b) ** 2 <= 1)
    return torch.stack(masks).to(torch.uint8)


def mean_iou(masks: Tensor, pasted: Tensor) -> float:
    masks, pasted = masks.bool(), pasted.bool()
    return float(((masks & pasted).sum((1, 2)) / (masks | pasted).sum((1, 2))).mean())


@pytest.mark.parametrize("size", [(300, 400), (427, 640), (480, 640)])
def test_pasting_with_mask_offset_is_more_accurate_than_torchvisions_paste(size):
    # A network can at best reproduce its targets, here stock torchvision's, made from masks resized to a shorter side
    # of 800. Pasted with mask_offset, they must lose less than with torchvision's paste.
    masks = ellipses(40, *size)
    boxes = masks_to_boxes(masks)
    boxes[:, 2:] += 1
    model = maskloss.convert(tiny_mask_rcnn(), paste=None)
    model.transform.min_size, model.transform.max_size = (800,), 1333
    stock = GeneralizedRCNNTransform(800, 1333, [0.5] * 3, [0.5] * 3).eval()
    resized, _ = stock.resize(torch.zeros(3, *size), None)
    scale = [resized.shape[-2] / size[0], resized.shape[-1] / size[1]]
    large = interpolate(masks[:, None].float(), size=resized.shape[-2:])[:, 0].byte()
    large_boxes = boxes * torch.tensor([scale[1], scale[0], scale[1], scale[0]])
    grids = project_masks_on_boxes(large, large_boxes, torch.arange(len(masks)), 28)
    of_stock = mean_iou(masks, paste_masks_in_image(grids[:, None], boxes, size)[:, 0] > 0.5)
    offset = mask_offset(model, size)
    documented = mean_iou(masks, paste_masks(grids, boxes, size, offset=offset))
    half_a_pixel = mean_iou(masks, paste_masks(grids, boxes, size, offset=(0.5, 0.5)))
    assert documented > of_stock + 0.005
    assert documented >= half_a_pixel


@pytest.mark.parametrize("paste", ["torchvision", "matched", None])
def test_the_offset_depends_on_the_losss_targets(paste):
    model = maskloss.convert(tiny_mask_rcnn(), "torchvision", paste=paste)
    # Images of 64 px keep their size: half a pixel. Images of 128 px are halved: half a pixel of the resized image.
    assert mask_offset(model, (64, 64)) == (0.5, 0.5)
    assert mask_offset(model, (128, 128)) == (0.5, 0.5)
    assert mask_offset(model, (32, 32)) == (0.25, 0.25)
    assert mask_offset(maskloss.convert(model, "aligned", paste=paste), (64, 64)) == (0.0, 0.0)


def pasted(loss: str, paste: Any) -> list[dict[str, Tensor]]:
    model = maskloss.convert(tiny_mask_rcnn(), loss, paste=paste).eval()
    return model(batch()[0])


def test_matched_undoes_the_losss_offset_and_aligned_undoes_nothing():
    images, _ = batch()
    for loss in ("torchvision", "aligned"):
        for image, raw, matched, aligned in zip(
            images, pasted(loss, None), pasted(loss, "matched"), pasted(loss, "aligned"), strict=True
        ):
            size = (image.shape[-2], image.shape[-1])
            model = maskloss.convert(tiny_mask_rcnn(), loss)
            probs = raw["masks"][:, 0]
            for found, offset in ((matched, mask_offset(model, size)), (aligned, (0.0, 0.0))):
                expected = paste_masks(probs, raw["boxes"], size, offset=offset, output="float")
                assert torch.equal(found["masks"][:, 0], expected)
    # With torchvision's targets the two must differ; otherwise this test would prove nothing.
    assert not torch.equal(
        pasted("torchvision", "matched")[0]["masks"], pasted("torchvision", "aligned")[0]["masks"]
    )


def test_results_equal_the_pasted_masks():
    images, _ = batch()
    model = maskloss.convert(tiny_mask_rcnn(), paste=None).eval()
    detections = model(images)
    sizes = [(image.shape[-2], image.shape[-1]) for image in images]
    results = coco_results(model, detections, sizes, [7, 9], [10, 20, 30])
    assert len(results) == sum(len(detection["boxes"]) for detection in detections)
    expected = pasted("torchvision", "matched")
    for image_id, detection in zip([7, 9], expected, strict=True):
        own = [result for result in results if result["image_id"] == image_id]
        for result, mask, label in zip(own, detection["masks"], detection["labels"].tolist(), strict=True):
            assert torch.equal(
                torch.from_numpy(coco_mask.decode(result["segmentation"])).bool(), mask[0] >= 0.5
            )
            assert result["category_id"] == 10 * label


@pytest.mark.parametrize(
    ("sizes", "ids", "message"),
    [
        ([(64, 80)], [1, 2], "got 2 detections, 1 image_sizes and 2 image_ids"),
        ([(64, 80), (72, 72)], [1], "got 2 detections, 2 image_sizes and 1 image_ids"),
    ],
)
def test_other_numbers_of_sizes_and_ids_raise(sizes, ids, message):
    model = maskloss.convert(tiny_mask_rcnn(), paste=None).eval()
    with pytest.raises(ValueError, match=message):
        coco_results(model, model(batch()[0]), sizes, ids)


def test_pasted_masks_raise():
    model = maskloss.convert(tiny_mask_rcnn()).eval()
    with pytest.raises(ValueError, match=r"must be probabilities.*convert\(model, paste=None\)"):
        coco_results(model, model(batch()[0][:1]), [(64, 80)], [1])


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (tiny_mask_rcnn(), r"not a stock .*MaskRCNN: call maskloss\.convert\(model\) first"),
        (nn.Linear(1, 1), r"not torch\.nn\.modules\.linear\.Linear$"),
        (
            nn.DataParallel(maskloss.convert(tiny_mask_rcnn())),
            r"not torch.*DataParallel; the detector inside is model\.module",
        ),
    ],
    ids=["stock", "another module", "a wrapper"],
)
def test_a_model_that_is_not_converted_raises(model, found):
    for name, call in {
        "mask_offset": lambda: mask_offset(model, (4, 4)),
        "coco_results": lambda: coco_results(model, [], [], []),
        "loss_parameters": lambda: list(maskloss.loss_parameters(model)),
    }.items():
        with pytest.raises(TypeError, match=rf"^{name} takes a model from maskloss\.convert, {found}"):
            call()


def test_a_model_with_another_transform_raises():
    model = maskloss.convert(tiny_mask_rcnn())
    model.transform = GeneralizedRCNNTransform(64, 128, [0.5] * 3, [0.5] * 3)
    with pytest.raises(
        TypeError, match=r"torchvision's own transform, but its transform is torchvision.*Transform$"
    ):
        mask_offset(model, (4, 4))


@pytest.mark.parametrize("size", [(3, 64, 80), 64, (0, 64)])
def test_sizes_that_are_not_height_and_width_raise(size):
    model = maskloss.convert(tiny_mask_rcnn(), paste=None).eval()
    with pytest.raises(ValueError, match=r"an image size is \(H, W\)"):
        mask_offset(model, size)
    with pytest.raises(ValueError, match=r"an image size is \(H, W\)"):
        coco_results(model, model(batch()[0][:1]), [size], [1])


def test_ids_in_tensors_become_numbers():
    # A target's image_id is a tensor. pycocotools compares ids as numbers, and JSON holds no tensors.
    model = maskloss.convert(tiny_mask_rcnn(), paste=None).eval()
    images, targets = batch()
    detections, sizes = model(images), [tuple(image.shape[-2:]) for image in images]
    expected = coco_results(model, detections, sizes, [40, 41], [10, 20, 30])
    for ids in ([target["image_id"] for target in targets], torch.tensor([40, 41]), np.array([40, 41])):
        assert json.dumps(
            coco_results(model, detections, sizes, ids, torch.tensor([10, 20, 30]))
        ) == json.dumps(expected)


def test_categories_that_would_be_shifted_raise():
    model = maskloss.convert(tiny_mask_rcnn(), paste=None).eval()
    detections = model(batch()[0][:1])
    with pytest.raises(TypeError, match=r"category_ids must be a list with .*, not a mapping"):
        coco_results(model, detections, [(64, 80)], [1], {1: 10, 2: 20, 3: 30})
    with pytest.raises(ValueError, match="category_ids has 4 entries, but the model has 3 classes besides"):
        coco_results(model, detections, [(64, 80)], [1], [0, 10, 20, 30])
    model.roi_heads.box_predictor.cls_score = nn.Sequential(model.roi_heads.box_predictor.cls_score)
    coco_results(model, detections, [(64, 80)], [1], [0, 10, 20, 30])  # the number of classes is unknown


def test_the_detections_of_one_image_are_no_list():
    model = maskloss.convert(tiny_mask_rcnn(), paste=None).eval()
    with pytest.raises(TypeError, match="lists with one entry per image, but detections is a dict"):
        coco_results(model, model(batch()[0][:1])[0], [(64, 80)], [1])


def test_the_model_shows_its_paste():
    assert "Paste(paste='aligned')" in repr(maskloss.convert(tiny_mask_rcnn(), paste="aligned"))
    assert "Paste(paste=None)" in repr(maskloss.convert(tiny_faster_rcnn(), paste=None))
