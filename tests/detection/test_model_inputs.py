"""What a model accepts: its masks, classes, keypoints and channels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import maskloss
from maskloss.detection.model_inputs import ModelInputs
from maskloss.detection.target_checks import check_inputs

from .small_models import (
    batch,
    tiny_faster_rcnn,
    tiny_keypoint_rcnn,
    tiny_mask_rcnn,
    training_pass,
)

Target = dict[str, Any]


def test_only_models_with_a_mask_branch_need_masks():
    images, targets = batch()
    for target in targets:
        del target["masks"]
    losses, _ = training_pass(maskloss.convert(tiny_faster_rcnn()), images, targets)
    assert all(value.isfinite() for value in losses.values())


def test_without_a_known_number_of_classes_labels_have_no_upper_bound():
    images, targets = batch()
    targets[0]["labels"][0] = 1000
    check_inputs(images, targets, ModelInputs(has_masks=True))


class OwnKeypointPredictor(nn.Module):
    """A predictor whose number of keypoints only its output shows."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layer(features)


def test_the_number_of_keypoints_of_a_custom_predictor_is_that_of_its_heatmaps():
    images, targets = batch()
    model = maskloss.convert(tiny_keypoint_rcnn()).train()
    model.roi_heads.keypoint_predictor = OwnKeypointPredictor(model.roi_heads.keypoint_predictor)
    model(images, targets)
    targets[1]["keypoints"] = targets[1]["keypoints"][:, :3]
    with pytest.raises(ValueError, match=r"image 1 of the batch, keypoints: got 3 keypoints .* predicts 5"):
        model(images, targets)


@pytest.mark.parametrize(
    "constants",
    [
        {"image_mean": [0.5], "image_std": [0.25]},
        {"image_mean": [0.5], "image_std": [0.2, 0.25, 0.3]},
        {"image_mean": (0.4, 0.5, 0.6), "image_std": (0.25,)},
        {"image_mean": torch.tensor([0.5]), "image_std": torch.tensor([0.25])},
    ],
)
def test_one_mean_or_deviation_may_serve_all_channels(constants):
    losses = []
    for build in (tiny_mask_rcnn, lambda: maskloss.convert(tiny_mask_rcnn())):
        model = build()
        for name, value in constants.items():
            setattr(model.transform, name, value)
        losses.append(training_pass(model, *batch())[0])
    for key, value in losses[0].items():
        torch.testing.assert_close(losses[1][key], value, rtol=1e-5, atol=1e-7)
