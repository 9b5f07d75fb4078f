"""COCO results of one image's detections."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from maskloss import paste_masks
from maskloss.masks.results import image_results


def detection(label: int = 2, masks: Tensor | None = None) -> dict[str, Tensor]:
    return {
        "boxes": torch.tensor([[2.0, 1.0, 6.0, 9.0]]),
        "labels": torch.tensor([label]),
        "scores": torch.tensor([0.75]),
        "masks": torch.ones(1, 1, 28, 28) if masks is None else masks,
    }


def test_results_have_xywh_boxes_category_ids_and_rle_masks():
    (found,) = image_results(detection(), 42, (10, 12), category_ids=[3, 7])
    assert found["image_id"] == 42
    assert found["category_id"] == 7
    assert found["bbox"] == [2, 1, 4, 8]
    assert found["score"] == 0.75
    assert found["segmentation"]["size"] == [10, 12]
    # Probability 1 everywhere in the box, so every pixel of the box.
    expected = np.zeros((10, 12), dtype=np.uint8)
    expected[1:9, 2:6] = 1
    assert np.array_equal(coco_mask.decode(found["segmentation"]), expected)
    json.dumps(found)


def test_boxes_are_rounded_to_a_thousandth_of_a_pixel():
    boxes = torch.tensor([[1 / 3, 0.12345, 2 / 3, 9.0]])
    (found,) = image_results({**detection(), "boxes": boxes}, 42, (10, 12))
    assert found["bbox"] == [0.333, 0.123, 0.333, 8.877]


def test_labels_are_the_category_ids_by_default():
    assert image_results(detection(), 42, (10, 12))[0]["category_id"] == 2


def test_mask_scores_are_included_if_the_detection_has_them():
    assert "mask_score" not in image_results(detection(), 42, (10, 12))[0]
    scored = {**detection(), "mask_scores": torch.tensor([0.5])}
    assert image_results(scored, 42, (10, 12))[0]["mask_score"] == 0.5


@pytest.mark.parametrize("offset", [(0.0, 0.0), (0.5, 0.25)])
def test_masks_are_pasted_at_the_offset(offset):
    masks = torch.rand(1, 1, 7, 7, generator=torch.Generator().manual_seed(0))
    (found,) = image_results(detection(masks=masks), 42, (10, 12), offset=offset)
    (expected,) = paste_masks(masks[0], detection()["boxes"], (10, 12), offset=offset, output="rle")
    assert found["segmentation"] == expected


def test_no_detections_give_no_results():
    nothing = {key: value[:0] for key, value in detection().items()}
    assert image_results(nothing, 42, (10, 12)) == []


@pytest.mark.parametrize("label", [0, 3])
def test_a_label_without_a_category_raises(label):
    with pytest.raises(ValueError, match=rf"label {label} has no category: category_ids has 2 entries"):
        image_results(detection(label), 42, (10, 12), category_ids=[3, 7])


def test_masks_that_are_pasted_already_raise():
    with pytest.raises(ValueError, match=r"must be probabilities \(D, 1, M, M\), not \(1, 1, 10, 12\)"):
        image_results(detection(masks=torch.ones(1, 1, 10, 12)), 42, (10, 12))


def test_a_detection_in_float64_stays_as_it_is():
    detection = {
        "boxes": torch.tensor([[2.0, 1.0, 6.0, 9.0]]),
        "labels": torch.tensor([1]),
        "scores": torch.tensor([0.5]),
        "masks": torch.ones(1, 1, 4, 4),
    }
    expected = image_results(detection, 7, (10, 12))
    exact = {key: value.double() if value.is_floating_point() else value for key, value in detection.items()}
    for _ in range(2):
        assert image_results(exact, 7, (10, 12)) == expected
        assert exact["boxes"].tolist() == [[2.0, 1.0, 6.0, 9.0]]
