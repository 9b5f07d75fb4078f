"""Detections equal torchvision's bit for bit, for any number of classes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads as TorchvisionRoIHeads

import maskloss

from .small_models import tiny_mask_rcnn


def box_outputs(num_rois: list[int], num_classes: int, seed: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    total = sum(num_rois)
    low = 80 * torch.rand(total, 2, generator=generator)
    proposals = torch.cat([low, low + 60 * torch.rand(total, 2, generator=generator)], dim=1)
    logits = 4 * torch.randn(total, num_classes, generator=generator)
    deltas = 2 * torch.randn(total, 4 * num_classes, generator=generator)
    return logits, deltas, list(proposals.split(num_rois))


@pytest.mark.parametrize("num_rois", [[60, 40], [50], [0, 30], [0]])
@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.9, 1.0])
@pytest.mark.parametrize("num_classes", [2, 91])
def test_detections_are_torchvisions_bit_for_bit(num_rois, threshold, num_classes):
    heads: nn.Module = maskloss.convert(tiny_mask_rcnn()).roi_heads
    heads.score_thresh, heads.detections_per_img = threshold, 25
    for seed in range(3):
        arguments = (*box_outputs(num_rois, num_classes, seed), [(90, 110)] * len(num_rois))
        expected = TorchvisionRoIHeads.postprocess_detections(heads, *arguments)
        found = heads.postprocess_detections(*arguments)
        for ours, theirs in zip(found, expected, strict=True):
            assert len(ours) == len(num_rois)
            for one, other in zip(ours, theirs, strict=True):
                assert torch.equal(one, other)
                assert one.dtype == other.dtype


def test_only_boxes_above_the_threshold_are_decoded(monkeypatch):
    heads = maskloss.convert(tiny_mask_rcnn()).roi_heads
    decoded: list[int] = []
    own = heads.box_coder.decode_single
    monkeypatch.setattr(
        heads.box_coder,
        "decode_single",
        lambda deltas, boxes: decoded.append(len(deltas)) or own(deltas, boxes),
    )
    heads.score_thresh = 0.5
    logits, deltas, proposals = box_outputs([100], 1000, 0)
    heads.postprocess_detections(logits, deltas, proposals, [(90, 110)])
    assert decoded == [int((logits.softmax(1)[:, 1:] > 0.5).sum())]
