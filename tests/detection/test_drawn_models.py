"""A converted model equals the stock one, with random anchors, sizes, thresholds and heads, and random data."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

import maskloss


class Backbone(nn.Module):
    """Feature maps of decreasing size, as an FPN has them."""

    def __init__(self, levels: int, channels: int) -> None:
        super().__init__()
        self.out_channels = channels
        self.stem = nn.Conv2d(3, channels, 3, stride=4, padding=1)
        self.down = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, stride=2, padding=1) for _ in range(levels - 1)
        )

    def forward(self, images: Tensor) -> dict[str, Tensor] | Tensor:
        maps = [self.stem(images)]
        for layer in self.down:
            maps.append(layer(maps[-1].relu()))
        # A backbone with a single map returns a tensor, such as torchvision's of the tutorials.
        return maps[0] if len(maps) == 1 else OrderedDict((str(level), x) for level, x in enumerate(maps))


@st.composite
def models(draw: st.DrawFn) -> MaskRCNN:
    levels, channels = draw(st.integers(1, 3)), draw(st.sampled_from([4, 8]))
    num_classes = draw(st.integers(2, 6))
    names = [str(level) for level in range(levels)]
    roi_size, mask_size = draw(st.sampled_from([3, 7])), draw(st.sampled_from([4, 7, 14]))
    shorter = draw(st.sampled_from([32, 48, 64]))
    foreground = draw(st.sampled_from([0.5, 0.6, 0.7]))
    torch.manual_seed(draw(st.integers(0, 1000)))
    sizes = [8.0, 12.0, 20.0][: draw(st.integers(1, 3))]
    return MaskRCNN(
        Backbone(levels, channels),
        rpn_anchor_generator=AnchorGenerator(
            tuple(tuple(size * 2**level for size in sizes) for level in range(levels)),
            (draw(st.sampled_from([(1.0,), (0.5, 1.0, 2.0)])),) * levels,
        ),
        box_roi_pool=MultiScaleRoIAlign(names, roi_size, draw(st.sampled_from([0, 2]))),
        box_head=TwoMLPHead(channels * roi_size**2, 16),
        box_predictor=FastRCNNPredictor(16, num_classes),
        mask_roi_pool=MultiScaleRoIAlign(names, mask_size, 2),
        mask_head=MaskRCNNHeads(channels, (channels,) * draw(st.integers(1, 3)), 1),
        mask_predictor=MaskRCNNPredictor(channels, channels, num_classes),
        min_size=shorter,
        max_size=draw(st.sampled_from([shorter, 2 * shorter])),
        rpn_fg_iou_thresh=foreground,
        rpn_bg_iou_thresh=draw(st.sampled_from([0.3, 0.5])),
        rpn_batch_size_per_image=draw(st.sampled_from([8, 64])),
        rpn_positive_fraction=draw(st.sampled_from([0.25, 0.5])),
        rpn_score_thresh=draw(st.sampled_from([0.0, 0.4])),
        rpn_post_nms_top_n_train=draw(st.sampled_from([10, 200])),
        box_fg_iou_thresh=foreground,
        box_bg_iou_thresh=draw(st.sampled_from([0.4, 0.5])),
        box_batch_size_per_image=draw(st.sampled_from([8, 64])),
        box_positive_fraction=draw(st.sampled_from([0.25, 0.5])),
        box_score_thresh=draw(st.sampled_from([0.01, 0.2])),
        box_nms_thresh=draw(st.sampled_from([0.3, 0.5, 0.9])),
        box_detections_per_img=draw(st.sampled_from([3, 20])),
        bbox_reg_weights=draw(st.sampled_from([None, (1.0, 1.0, 1.0, 1.0)])),
    )


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[Tensor], list[dict[str, Any]]]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    images, targets = [], []
    for _ in range(draw(st.integers(1, 3))):
        height, width = draw(st.integers(24, 90)), draw(st.integers(24, 90))
        count = draw(st.integers(0, 5))
        size = torch.tensor([width, height])
        corner = (torch.rand(count, 2, generator=generator) * (size - 12)).floor()
        far = torch.minimum(corner + 4 + (torch.rand(count, 2, generator=generator) * 40).floor(), size)
        masks = torch.zeros(count, height, width, dtype=draw(st.sampled_from([torch.uint8, torch.bool])))
        for mask, (x0, y0), (x1, y1) in zip(masks, corner.int().tolist(), far.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = 1
        images.append(torch.rand(3, height, width, generator=generator))
        targets.append(
            {
                "boxes": torch.cat([corner, far], dim=1),
                "labels": torch.ones(count, dtype=torch.int64),
                "masks": masks,
            }
        )
    return images, targets


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(models(), batches())
def test_a_converted_model_equals_the_stock_one(
    stock: MaskRCNN, batch: tuple[list[Tensor], list[dict[str, Any]]]
) -> None:
    converted = maskloss.convert(copy.deepcopy(stock))
    images, targets = batch
    losses, gradients = [], []
    for model in (stock, converted):
        torch.manual_seed(0)
        losses.append(model.train()(images, copy.deepcopy(targets)))
        sum(losses[-1].values()).backward()
        gradients.append({name: value.grad for name, value in model.named_parameters()})
    assert losses[0].keys() == losses[1].keys()
    for name, value in losses[0].items():
        torch.testing.assert_close(losses[1][name].to(value), value, rtol=1e-5, atol=1e-7, msg=name)
    for name, value in gradients[0].items():
        if value is not None:
            found = gradients[1][name]
            torch.testing.assert_close(
                found, value, rtol=1e-3, atol=1e-5 * float(value.norm()) + 1e-9, msg=name
            )
    with torch.no_grad():
        stock_found, found = stock.eval()(images), converted.eval()(images)
    for one, other in zip(stock_found, found, strict=True):
        for key in ("boxes", "scores", "labels"):
            assert torch.equal(one[key], other[key]), key
        torch.testing.assert_close(other["masks"], one["masks"], rtol=0, atol=1e-6)
