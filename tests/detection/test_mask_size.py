"""The resolution of torchvision's mask layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor

import maskloss
from maskloss.detection.mask_size import MASK_SIZES, MaskSize, set_mask_size
from maskloss.losses import MaskBCELoss

from .small_models import batch, tiny_mask_rcnn, training_pass


def logits_of(model: Any) -> torch.Tensor:
    """Return the mask logits of two RoIs."""
    heads = model.roi_heads
    features = {
        "0": torch.rand(1, model.backbone.out_channels, 16, 16, generator=torch.Generator().manual_seed(1))
    }
    boxes = [torch.tensor([[4.0, 4.0, 40.0, 44.0], [10.0, 2.0, 60.0, 30.0]])]
    pooled = heads.mask_roi_pool(features, boxes, [(64, 64)])
    logits: torch.Tensor = heads.mask_predictor(heads.mask_head(pooled))
    return logits


class Recorder(MaskBCELoss):
    """A mask term that records the sizes of logits and targets."""

    def forward(self, mask_logits: torch.Tensor, mask_targets: torch.Tensor) -> torch.Tensor:
        self.sizes = [tuple(mask_logits.shape[-2:]), tuple(mask_targets.shape[-2:])]
        return super().forward(mask_logits, mask_targets)


@pytest.fixture
def model() -> Any:
    model = tiny_mask_rcnn().eval()
    model.roi_heads.mask_roi_pool.output_size = (14, 14)  # as in torchvision's own models
    return model


@pytest.mark.parametrize("size", MASK_SIZES)
@pytest.mark.parametrize("converted_first", [False, True])
def test_logits_targets_and_detections_have_the_size(
    size: MaskSize, converted_first: bool, model: Any
) -> None:
    if converted_first:
        maskloss.convert(model, paste=None)
    set_mask_size(model, size)
    assert logits_of(model).shape[-2:] == (size, size)
    term = Recorder()
    maskloss.convert(model, maskloss.MaskRCNNLoss(mask=term), paste=None)
    losses, _ = training_pass(model, *batch())
    assert bool(losses["loss_mask"] > 0)
    assert term.sizes == [(size, size)] * 2
    model.roi_heads.score_thresh = 0.0
    images, _ = batch()
    detections = model.eval()(images)
    assert {tuple(detection["masks"].shape[1:]) for detection in detections} == {(1, size, size)}


def test_at_first_56_cells_repeat_those_of_28(model: Any) -> None:
    before = logits_of(model)
    set_mask_size(model, 56)
    expected = before.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-6)


def test_the_new_layer_trains(model: Any) -> None:
    set_mask_size(model, 56)
    maskloss.convert(model)
    _, gradients = training_pass(model, *batch())
    assert bool(gradients["roi_heads.mask_predictor.conv6_mask.weight"].any())


def test_class_selected_logits_equal_those_of_all_classes(model: Any) -> None:
    set_mask_size(model, 56)
    maskloss.convert(model)
    predictor = model.roi_heads.mask_predictor
    features = torch.rand(3, predictor.conv5_mask.in_channels, 14, 14)
    labels = torch.tensor([2, 0, 2])
    every, own = predictor(features), predictor(features, labels)
    torch.testing.assert_close(own[:, 0], every[torch.arange(3), labels], rtol=1e-5, atol=1e-6)


def test_the_parameters_are_torchvisions_but_for_the_second_upsampling(model: Any) -> None:
    stock = set(model.state_dict())
    parameters = dict(model.named_parameters())
    set_mask_size(model, 14)
    assert set(model.state_dict()) == stock
    set_mask_size(model, 56)
    new = {f"roi_heads.mask_predictor.conv6_mask.{name}" for name in ("weight", "bias")}
    assert set(model.state_dict()) - stock == new
    assert stock <= set(model.state_dict())
    assert all(
        parameter is parameters[name] for name, parameter in model.named_parameters() if name not in new
    )
    second = model.roi_heads.mask_predictor.conv6_mask
    set_mask_size(model, 56)
    assert model.roi_heads.mask_predictor.conv6_mask is second
    set_mask_size(model, 28)
    assert list(model.state_dict()) == list(tiny_mask_rcnn().state_dict())


def test_going_back_restores_the_masks(model: Any) -> None:
    stock = copy.deepcopy(model)
    for size in (56, 14, 28):
        set_mask_size(model, size)
    assert torch.equal(logits_of(model), logits_of(stock))


@pytest.mark.parametrize("size", [0, 7, 27, 112, "28", None])
def test_refuses_other_sizes(size: Any, model: Any) -> None:
    with pytest.raises(ValueError, match="must be 14, 28 or 56 cells, not"):
        set_mask_size(model, size)


class Upsampled(MaskRCNNPredictor):
    """A predictor with a layer of a user's own."""

    def __init__(self) -> None:
        super().__init__(4, 4, 3)
        self.add_module("up", nn.Upsample(scale_factor=2))


@pytest.mark.parametrize(
    ("predictor", "message"),
    [
        (nn.Conv2d(4, 3, 1), "the model has Conv2d"),
        (None, "the model has NoneType"),
        (Upsampled(), "not .*, up"),
    ],
)
def test_refuses_mask_layers_that_are_not_torchvisions(predictor: Any, message: str, model: Any) -> None:
    model.roi_heads.mask_predictor = predictor
    with pytest.raises(TypeError, match=message):
        set_mask_size(model, 56)
    assert model.roi_heads.mask_predictor is predictor
