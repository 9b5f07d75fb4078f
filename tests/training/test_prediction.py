"""maskloss/training/prediction.py: detections of any image files, with masks of each file's size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from pycocotools import mask as coco_mask
from torch import Tensor, nn

from maskloss.data.coco import Category
from maskloss.detection.builders import ModelSettings
from maskloss.detection.transform import RCNNTransform
from maskloss.errors import InputError
from maskloss.training.model_file import ModelDescription
from maskloss.training.prediction import Prediction, image_ids, predict

DESCRIPTION = ModelDescription(
    ModelSettings("resnet18", 3), (Category(4, "cat"), Category(8, "dog")), aligned=True
)


class FixedModel(nn.Module):
    """Finds the same two objects in every image, and remembers the images."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[Tensor] = []
        self.transform = RCNNTransform(32, 64, [0.5] * 3, [0.5] * 3)
        self.transform.aligned_masks = True

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        self.images += images
        return [
            {
                "boxes": torch.tensor([[0.0, 0.0, 4.0, 2.0], [1.0, 1.0, 3.0, 3.0]]),
                "labels": torch.tensor([2, 1]),
                "scores": torch.tensor([0.9, 0.5]),
                "masks": torch.ones(2, 1, 28, 28),
            }
            for _ in images
        ]


def predicted(model: nn.Module, *paths: Path, score_threshold: float = 0.0) -> list[Prediction]:
    device = torch.device("cpu")
    return list(predict(model, DESCRIPTION, paths, device=device, score_threshold=score_threshold))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (6, 4), (255, 0, 51)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_results_carry_the_models_category_ids_and_masks_of_the_images_size(image: Path) -> None:
    (found,) = predicted(FixedModel(), image)
    assert found.path == image
    assert [result["category_id"] for result in found.results] == [8, 4]
    assert [result["bbox"] for result in found.results] == [[0, 0, 4, 2], [1, 1, 2, 2]]
    mask = coco_mask.decode(found.results[0]["segmentation"])
    expected = np.zeros((4, 6), dtype=np.uint8)
    expected[:2, :4] = 1
    assert np.array_equal(mask, expected)


@pytest.mark.parametrize(("threshold", "count"), [(0.0, 2), (0.5, 2), (0.51, 1), (0.9, 1), (0.95, 0)])
def test_scores_below_the_threshold_are_left_out(image: Path, threshold: float, count: int) -> None:
    # 0.9 is rounded to float32, which is above 0.9 - 1e-7 and compared as such.
    (found,) = predicted(FixedModel(), image, score_threshold=threshold)
    assert len(found.results) == count


def test_pixels_go_in_as_rgb_in_0_to_1(image: Path) -> None:
    model = FixedModel()
    predicted(model, image)
    assert model.images[0].shape == (3, 4, 6)
    torch.testing.assert_close(model.images[0][:, 0, 0], torch.tensor([1.0, 0.0, 0.2]))


def test_an_image_is_predicted_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png", exif=exif)
    (found,) = predicted(FixedModel(), tmp_path / "a.png")
    assert found.image.size == (4, 6)
    assert found.results[0]["segmentation"]["size"] == [6, 4]


def test_a_missing_image_is_refused_before_the_first_is_predicted(image: Path) -> None:
    model = FixedModel()
    with pytest.raises(InputError, match=r"nowhere\.png: the image does not exist"):
        predicted(model, image, image.with_name("nowhere.png"))
    assert model.images == []


def test_an_unreadable_image_is_refused_after_those_before_it(image: Path) -> None:
    bad = image.with_name("bad.png")
    bad.write_bytes(b"no image")
    found = predict(FixedModel(), DESCRIPTION, [image, bad], device=torch.device("cpu"), score_threshold=0.0)
    assert next(found).path == image
    with pytest.raises(InputError, match=r"bad\.png: not a readable image"):
        next(found)


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (["000000000139.jpg", "000000000285.jpg"], [139, 285]),
        (["a.jpg", "000000000285.jpg"], [1, 2]),
        (["x/7.jpg", "y/7.png"], [1, 2]),
        (["photo-1.jpg"], [1]),
        ([], []),
    ],
)
def test_image_ids_are_cocos_own_where_all_names_are_different_numbers(names: list[str], ids: Any) -> None:
    assert image_ids([Path(name) for name in names]) == ids
