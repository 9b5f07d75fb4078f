"""Forms of targets: images without objects in many shapes, and devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import maskloss
from maskloss.detection.model_inputs import ModelInputs
from maskloss.detection.target_checks import check_inputs

from .small_models import (
    NUM_KEYPOINTS,
    batch,
    tiny_keypoint_rcnn,
    tiny_mask_rcnn,
    training_pass,
    without_objects,
)

Target = dict[str, Any]


@pytest.mark.parametrize("shape", [(0, NUM_KEYPOINTS, 3), (0, 3), (0, 0, 3), (0,)])
def test_empty_keypoints_are_accepted_in_odd_shapes(shape):
    keypoint_model = maskloss.convert(tiny_keypoint_rcnn())
    images, targets = batch()
    targets[0] = {**without_objects(images)[0], "keypoints": torch.zeros(shape)}
    expected, _ = training_pass(keypoint_model, images, [without_objects(images)[0], targets[1]])
    losses, _ = training_pass(keypoint_model, images, targets)
    assert torch.equal(losses["loss_keypoint"], expected["loss_keypoint"])


def test_empty_keypoints_may_be_a_list():
    keypoint_model = maskloss.convert(tiny_keypoint_rcnn())
    images, targets = batch()
    targets[0] = {**without_objects(images)[0], "keypoints": []}
    expected, _ = training_pass(keypoint_model, images, [without_objects(images)[0], targets[1]])
    losses, _ = training_pass(keypoint_model, images, targets)
    assert torch.equal(losses["loss_keypoint"], expected["loss_keypoint"])


def test_placeholders_in_images_without_objects_train_as_torchvision_trains_them():
    """Recipes for negative images have one background label, and sometimes an empty mask, instead of none."""
    images, targets = batch()
    placeholder = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(1, dtype=torch.int64),
        "masks": torch.zeros(1, *images[1].shape[-2:], dtype=torch.uint8),
    }
    targets[1] = placeholder
    expected, _ = training_pass(tiny_mask_rcnn(), images, targets)
    losses, _ = training_pass(maskloss.convert(tiny_mask_rcnn()), images, targets)
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value)


def test_keypoints_without_boxes_are_refused():
    images, targets = batch()
    targets[0] = {**without_objects(images)[0], "keypoints": torch.ones(1, NUM_KEYPOINTS, 3)}
    with pytest.raises(ValueError, match=r"^image 0 of the batch, keypoints: got shape \(1, 5, 3\), but"):
        training_pass(maskloss.convert(tiny_keypoint_rcnn()), images, targets)


@pytest.mark.parametrize("key", ["labels", "keypoints"])
def test_fields_on_another_device_than_the_image_are_named(key):
    # torch's error would name neither the image nor the field.
    images, targets = batch()
    targets[1][key] = targets[1][key].to("meta")
    with pytest.raises(ValueError, match=rf"image 1 .*, {key}: is on meta, but the image is on cpu; move"):
        check_inputs(images, targets, ModelInputs(has_keypoints=True))
