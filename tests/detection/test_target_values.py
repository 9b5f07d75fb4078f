"""Values of targets: which are wrong, and that reading them synchronizes once."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from benchmarks.pretended_device import counted, pretended_device, sent
from maskloss.detection.model_inputs import ModelInputs
from maskloss.detection.target_checks import check_inputs
from maskloss.detection.target_errors import ImageName
from maskloss.detection.target_values import find_wrong_values, read_values

from .small_models import (
    NUM_CLASSES,
    batch,
)

Target = dict[str, Any]


@pytest.mark.parametrize("reach", [-0.09, 0.09])
def test_boxes_may_exceed_the_image_by_the_rounding_of_annotations(reach):
    images, targets = batch()
    targets[0]["boxes"][1] = torch.tensor([min(reach, 0.0), 10.0, 80.0 + max(reach, 0.0), 40.0])
    expected = ModelInputs(num_classes=NUM_CLASSES, has_masks=True)
    assert check_inputs(images, targets, expected).warning is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_box_of_the_whole_image_is_accepted_in_any_float_dtype(dtype):
    # bfloat16 rounds 427 and 639 to 428 and 640, outside the image. Such boxes must be accepted.
    target = {
        "boxes": torch.tensor([[0.0, 0.0, 639.0, 427.0]], dtype=dtype),
        "labels": torch.tensor([1]),
        "masks": torch.ones((1, 427, 639), dtype=torch.bool),
    }
    check_inputs([torch.zeros(3, 427, 639)], [target], ModelInputs(num_classes=2, has_masks=True))


SIGNED = [torch.int8, torch.int16, torch.int32, torch.int64]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", [torch.uint8, *SIGNED, *FLOATS], ids=str)
def test_one_pixel_that_is_not_0_or_1_is_found_in_masks_of_any_dtype(dtype):
    images, targets = batch()
    own = targets[1]["masks"].to(dtype)
    values = [2, 127]
    if dtype in SIGNED:
        values += [-1, torch.iinfo(dtype).min]
    if dtype in FLOATS:
        info = torch.finfo(dtype)
        # The neighbors of 1, and numbers whose squares are rounded to 0 or to infinity.
        values += [
            1 - info.eps / 2,
            1 + info.eps,
            0.5,
            -0.25,
            info.tiny,
            info.max,
            -1,
            math.inf,
            -math.inf,
            math.nan,
        ]
    for row in (0, 1):
        for value in values:
            masks = own.clone()
            masks[row, 3, 5] = value
            with pytest.raises(ValueError, match=rf"image 1 .*values other than 0 and 1.*\(instance {row}: "):
                check_inputs(
                    images, [targets[0], {**targets[1], "masks": masks}], ModelInputs(has_masks=True)
                )
    check_inputs(images, [targets[0], {**targets[1], "masks": own}], ModelInputs(has_masks=True))


@pytest.mark.parametrize("gpu_step", [False, True])
def test_keypoints_are_read_with_the_other_fields_in_one_synchronization(gpu_step):
    images, targets = batch()
    with pretended_device():
        there = [
            {key: sent(value) if gpu_step else value for key, value in target.items()} for target in targets
        ]
        images = [sent(image) if gpu_step else image for image in images]
        with counted() as counts:
            check_inputs(images, there, ModelInputs(has_keypoints=True))
    assert counts.waits.total() == int(gpu_step)


def test_all_fields_of_a_batch_are_read_once():
    images, targets = batch()
    expected = ModelInputs(has_masks=True, unit_range=True)
    read = read_values(images, targets, expected)
    assert [values["low"] for values in read] == [image.min() for image in images]
    assert [values["not_binary"].tolist() for values in read] == [[False, False]] * 2
    names = [ImageName(index, target) for index, target in enumerate(targets)]
    assert find_wrong_values(names, images, read, expected) == []


def test_errors_and_warnings_are_found_image_by_image():
    images, targets = batch()
    expected = ModelInputs(num_classes=NUM_CLASSES, has_masks=True, unit_range=True)
    images[0] = images[0] * 255
    targets[0]["boxes"][1, 2] = 90.0  # the image is 80 px wide
    targets[1]["labels"][1] = 0
    names = [ImageName(index, target) for index, target in enumerate(targets)]
    found = find_wrong_values(names, images, read_values(images, targets, expected), expected)
    assert [(finding.image.index, finding.fatal) for finding in found] == [(0, True), (0, False), (1, True)]
    assert [finding.found.tolist() for finding in found] == [True, [False, True], [False, True]]
    error = found[2].to_error(images[1], targets[1])
    assert str(error).startswith(
        "image 1 of the batch (image_id 41), labels: a label is below 1; 0 is background (inst"
    )
