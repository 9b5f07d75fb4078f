"""torch.jit.trace, which torch.onnx.export(dynamo=False) uses: a trace holds for other images, or is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator

import maskloss

from .small_models import TinyBackbone, tiny_mask_rcnn

pytestmark = pytest.mark.filterwarnings("ignore")


class TwoLevels(TinyBackbone):
    """A backbone with two feature levels, between which the RoIs are distributed."""

    def forward(self, images):
        features = super().forward(images)
        return {"0": features, "1": nn.functional.max_pool2d(features, 2)}


class Outputs(nn.Module):
    """A model that takes and returns tensors, as traces need."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image):
        return tuple(self.model([image])[0].values())


def test_a_trace_with_gradients_enabled_holds_for_other_images():
    model = tiny_mask_rcnn()
    model.backbone = TwoLevels()
    for pool in (model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool):
        pool.featmap_names = ["0", "1"]
    model.rpn.anchor_generator = AnchorGenerator(sizes=((16, 32), (32, 64)), aspect_ratios=((1.0,), (1.0,)))
    model.rpn._post_nms_top_n["testing"] = 1000  # so that the number of RoIs depends on the image
    maskloss.convert(model).eval()
    images = [torch.rand(3, 96, 128), torch.rand(3, 128, 80)]
    traced = torch.jit.trace(Outputs(model), images[0], check_trace=False)
    for image in images:
        for value, expected in zip(traced(image), model([image])[0].values(), strict=True):
            torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("paste", ["matched", "aligned"])
def test_tracing_pasted_masks_is_refused(paste):
    model = maskloss.convert(tiny_mask_rcnn(), paste=paste).eval()
    with pytest.raises(RuntimeError, match=rf"export\(dynamo=False\) cannot record paste='{paste}'"):
        torch.jit.trace(Outputs(model), torch.rand(3, 96, 128), check_trace=False)


def test_tracing_point_rend_is_refused():
    model = maskloss.convert(tiny_mask_rcnn(), mask_branch="point_rend", paste=None).eval()
    with pytest.raises(RuntimeError, match=r"export\(dynamo=False\) cannot record PointRend"):
        torch.jit.trace(Outputs(model), torch.rand(3, 96, 128), check_trace=False)
