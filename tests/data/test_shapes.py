"""maskloss/data/shapes.py: the annotations match the pixels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from maskloss.data.check import check_data
from maskloss.data.shapes import CATEGORIES, write_shapes
from maskloss.errors import InputError

NUM_IMAGES = 24
SIZE = 96


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "data"
    write_shapes(folder, NUM_IMAGES, size=SIZE, seed=3)
    return folder


@pytest.fixture(scope="module")
def annotations(shapes: Path) -> list[dict]:
    return json.loads((shapes / "annotations.json").read_text())["annotations"]


def decoded(annotation: dict) -> np.ndarray:
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, dict):
        return coco_mask.decode(segmentation)
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(segmentation, SIZE, SIZE)))


def test_check_finds_nothing(shapes: Path) -> None:
    data, problems = check_data(shapes / "images", shapes / "annotations.json")
    assert problems == []
    assert data is not None
    assert len(data.images) == NUM_IMAGES
    assert [category.name for category in data.categories] == list(CATEGORIES)


def test_every_category_and_both_encodings_are_there(annotations: list[dict]) -> None:
    assert {annotation["category_id"] for annotation in annotations} == {1, 2, 3}
    assert {type(annotation["segmentation"]) for annotation in annotations} == {list, dict}


def test_masks_have_their_recorded_area(annotations: list[dict]) -> None:
    for annotation in annotations:
        assert int(decoded(annotation).sum()) == annotation["area"], annotation["id"]


def test_masks_fill_their_recorded_box(annotations: list[dict]) -> None:
    for annotation in annotations:
        rows, columns = np.nonzero(decoded(annotation))
        extent = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        x, y, width, height = annotation["bbox"]
        # A polygon's box ends at its vertices, and its pixels end up to 2 px before a sharp one; an RLE's box
        # is exactly that of its pixels.
        allowed = 0 if isinstance(annotation["segmentation"], dict) else 2
        assert np.abs(extent - [x, y, x + width, y + height]).max() <= allowed, annotation["id"]


def test_masks_of_one_image_do_not_overlap(annotations: list[dict]) -> None:
    for image_id in range(1, NUM_IMAGES + 1):
        masks = [decoded(a) for a in annotations if a["image_id"] == image_id]
        assert masks, image_id
        assert np.sum(masks, axis=0).max() == 1, image_id


def test_pixels_of_a_mask_differ_from_those_around_it(shapes: Path, annotations: list[dict]) -> None:
    for image_id in range(1, NUM_IMAGES + 1):
        pixels = np.asarray(Image.open(shapes / "images" / f"{image_id:06d}.png"), dtype=float)
        masks = {a["id"]: decoded(a).astype(bool) for a in annotations if a["image_id"] == image_id}
        covered = np.any(list(masks.values()), axis=0)
        for identity, mask in masks.items():
            ring = dilated(dilated(dilated(mask))) & ~dilated(covered)
            if ring.sum() < 20:
                continue
            difference = np.abs(pixels[mask].mean(axis=0) - pixels[ring].mean(axis=0)).max()
            # The color differs by at least 80, minus the variation of the background and the shading.
            assert difference > 30, identity


def test_pixels_outside_every_mask_are_the_gray_background(shapes: Path, annotations: list[dict]) -> None:
    for image_id in range(1, NUM_IMAGES + 1):
        pixels = np.asarray(Image.open(shapes / "images" / f"{image_id:06d}.png"), dtype=float)
        covered = np.any([decoded(a) for a in annotations if a["image_id"] == image_id], axis=0)
        ground = pixels[~dilated(dilated(covered))]
        # Two channels of the background are up to 60 apart; bicubic interpolation may overshoot slightly.
        assert (ground.max(axis=1) - ground.min(axis=1)).max() <= 75, image_id


def dilated(mask: np.ndarray) -> np.ndarray:
    framed = np.pad(mask, 1)
    return (
        framed[1:-1, 1:-1] | framed[:-2, 1:-1] | framed[2:, 1:-1] | framed[1:-1, :-2] | framed[1:-1, 2:]
    ).astype(bool)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_shapes(tmp_path / name, 2, size=48, seed=5)
    first, second = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("first", "second")
    )
    assert len(first) == 3
    assert first == second


def test_another_seed_gives_other_pictures(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_shapes(tmp_path / str(seed), 1, size=48, seed=seed)
    first, second = ((tmp_path / str(seed) / "images/000001.png").read_bytes() for seed in (0, 1))
    assert first != second


def test_the_first_images_do_not_depend_on_the_number_of_images(tmp_path: Path) -> None:
    write_shapes(tmp_path / "one", 1, size=48)
    write_shapes(tmp_path / "two", 2, size=48)
    first, second = ((tmp_path / name / "images/000001.png").read_bytes() for name in ("one", "two"))
    assert first == second


@pytest.mark.parametrize(
    ("num_images", "size", "message"),
    [(0, 64, "--images must be at least 1, got 0"), (1, 31, "--size must be at least 32 px, got 31")],
)
def test_a_number_out_of_range_is_refused(tmp_path: Path, num_images: int, size: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_shapes(tmp_path / "out", num_images, size=size)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is not an empty folder"):
        write_shapes(tmp_path, 1, size=48)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_file_instead_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="file: is not an empty folder"):
        write_shapes(tmp_path / "file", 1, size=48)
