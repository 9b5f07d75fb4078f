"""maskloss/training/prediction.py: detections of any image files, with masks of each file's size."""

from __future__ import annotations

from dataclasses import replace
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
from maskloss.training.prediction import Prediction, image_files, image_ids, predict, thresholds_of
from maskloss.training.tiling import tiles_of

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


def test_an_unreadable_image_gives_its_error_and_the_others_their_detections(image: Path) -> None:
    bad = image.with_name("bad.png")
    bad.write_bytes(b"no image")
    images = [image, bad, image]
    first, error, last = predict(
        FixedModel(), DESCRIPTION, images, device=torch.device("cpu"), score_threshold=0.0
    )
    assert isinstance(first, Prediction)
    assert isinstance(last, Prediction)
    assert first.path == last.path == image
    assert len(first.results) == len(last.results) > 0
    # The ids count all images.
    assert [found.results[0]["image_id"] for found in (first, last)] == [1, 3]
    assert isinstance(error, InputError)
    assert "bad.png: not a readable image" in str(error)


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


def test_folders_and_patterns_name_their_images(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "notes.txt", "deep/c.tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    # What macOS writes beside images on the file systems of others, and a folder with the name of an image.
    (tmp_path / "._a.png").touch()
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in image_files([tmp_path])] == ["a.png", "b.JPG"]
    named = image_files([tmp_path / "*.png", tmp_path / "notes.txt"])
    assert [path.name for path in named] == ["a.png", "notes.txt"]
    assert [path.name for path in image_files([str(tmp_path / "**/*.tif")])] == ["c.tif"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.png", "the image does not exist"),
        ("empty", "has no images; they end in"),
        ("*.gif", "no file matches"),
    ],
)
def test_paths_without_images_are_refused(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=message):
        image_files([tmp_path / name])


def test_a_folder_whose_images_are_in_folders_of_it_is_refused_with_their_pattern(tmp_path: Path) -> None:
    (tmp_path / "samples/CAM_FRONT").mkdir(parents=True)
    (tmp_path / "samples/CAM_FRONT/n015.GIF").touch()
    with pytest.raises(InputError) as caught:
        image_files([tmp_path])
    given = str(caught.value).split("'")[1]
    assert str(caught.value) == (
        f"{tmp_path}: has no images, but its folders have, such as samples/CAM_FRONT/n015.GIF: give '{given}'"
    )
    assert image_files([given]) == [tmp_path / "samples/CAM_FRONT/n015.GIF"]


@pytest.mark.parametrize(
    ("known", "given", "expected"),
    [((), None, [0.5, 0.5]), ((0.25, None), None, [0.25, 0.5]), ((0.25, None), 0.75, [0.75, 0.75])],
)
def test_thresholds_come_from_the_option_else_from_the_model(known: Any, given: Any, expected: Any) -> None:
    assert thresholds_of(replace(DESCRIPTION, score_thresholds=known), given) == expected


def test_each_category_has_its_own_threshold(image: Path) -> None:
    def categories(*thresholds: float | None) -> list[int]:
        description = replace(DESCRIPTION, score_thresholds=thresholds)
        (found,) = predict(FixedModel(), description, [image], device=torch.device("cpu"))
        return [result["category_id"] for result in found.results]

    # The cat has a score of .5, the dog of .9.
    assert categories(None, 0.9) == [8, 4]
    assert categories(0.6, 0.9) == [8]
    assert categories(0.4, 0.95) == [4]


class BrightSquares(nn.Module):
    """Finds each white square of an image: connected white pixels, which all are rectangles."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, int]] = []
        self.transform = RCNNTransform(32, 64, [0.5] * 3, [0.5] * 3)
        self.transform.aligned_masks = True

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        self.sizes += [(image.shape[-2], image.shape[-1]) for image in images]
        (image,) = images
        white = image[0].numpy() > 0.5
        boxes = []
        while white.any():
            y, x = (int(values[0]) for values in np.nonzero(white))
            width = int(np.argmin([*white[y, x:], False]))
            height = int(np.argmin([*white[y:, x], False]))
            white[y : y + height, x : x + width] = False
            boxes.append([x, y, x + width, y + height])
        count = len(boxes)
        return [
            {
                "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
                "labels": torch.ones(count, dtype=torch.int64),
                "scores": torch.linspace(0.9, 0.6, count),
                "masks": torch.ones(count, 1, 28, 28),
            }
        ]


SQUARES = [(10, 10, 12, 12), (95, 40, 14, 14), (200, 150, 20, 20), (60, 100, 90, 90), (290, 5, 10, 8)]


@pytest.mark.parametrize("tile", [None, 64, 100, 299, 1000])
def test_tiles_find_every_object_once_and_whole(tile: int | None, tmp_path: Path) -> None:
    pixels = np.zeros((200, 300), dtype=np.uint8)
    for x, y, width, height in SQUARES:
        pixels[y : y + height, x : x + width] = 255
    Image.fromarray(pixels).convert("RGB").save(tmp_path / "a.png")
    model = BrightSquares()
    (found,) = predict(model, DESCRIPTION, [tmp_path / "a.png"], device=torch.device("cpu"), tile=tile)
    boxes = sorted(tuple(int(value) for value in result["bbox"]) for result in found.results)
    assert boxes == sorted(SQUARES)
    for result in found.results:
        x, y, width, height = (int(value) for value in result["bbox"])
        mask = coco_mask.decode(result["segmentation"])
        assert mask.shape == (200, 300)
        # Pasting rounds the corners by half a cell of 28.
        assert mask[y : y + height, x : x + width].mean() > 0.95
        assert mask.sum() < 1.1 * width * height
    cut = tile is not None and tile < 300
    assert len(model.sizes) == (1 + len(tiles_of(300, 200, tile)) if cut else 1)
