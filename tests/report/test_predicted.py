"""maskloss/report/predicted.py: the files of `maskloss predict`."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from maskloss.errors import InputError, RunError
from maskloss.report.predicted import COLUMNS, PredictedFiles, perimeter, picture_names
from tests.training.small_runs import largest_file

NAMES = {4: "cat", 8: "dog, or \N{DOG FACE}"}
HEIGHT, WIDTH = 30, 40


def result(mask: Any, category: int, score: float, **more: Any) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(mask))
    box = [float(value) for value in coco_mask.toBbox(rle)]
    segmentation = {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()}
    return {
        "image_id": 1,
        "category_id": category,
        "bbox": box,
        "score": score,
        "segmentation": segmentation,
        **more,
    }


def rectangle(x: int, y: int, width: int, height: int) -> Any:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[y : y + height, x : x + width] = 1
    return mask


RESULTS = [
    result(rectangle(2, 3, 10, 8), 4, 0.875, mask_score=0.5),
    result(rectangle(8, 3, 10, 8), 8, 0.75),
    {"image_id": 1, "category_id": 8, "bbox": [1.0, 2.0, 3.5, 4.0], "score": 0.5},
]


@pytest.fixture
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "objects.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_has_a_row_for_each_object(tmp_path: Path, image: Image.Image) -> None:
    with PredictedFiles(tmp_path, NAMES) as writer:
        writer.add("a.png", Path("photos/a.jpg"), image, RESULTS)
        writer.add("b.png", Path("photos/b.jpg"), image, [])
        writer.add("c.png", Path("photos/c.jpg"), image, RESULTS[:1])
    found = rows(tmp_path)
    assert list(found[0]) == list(COLUMNS)
    assert [(row["image"], row["object"], row["category"]) for row in found] == [
        ("a.jpg", "1", "cat"),
        ("a.jpg", "2", NAMES[8]),
        ("a.jpg", "3", NAMES[8]),
        ("c.jpg", "1", "cat"),
    ]
    assert [row["area"] for row in found] == ["80", "80", "", "80"]
    assert [row["mask_score"] for row in found] == ["0.5", "", "", "0.5"]
    assert [found[0][name] for name in ("x", "y", "width", "height", "score")] == [
        "2.0",
        "3.0",
        "10.0",
        "8.0",
        "0.875",
    ]
    results = json.loads((tmp_path / "results.json").read_text())
    assert [{k: v for k, v in one.items() if k != "file_name"} for one in results] == [*RESULTS, RESULTS[0]]
    assert [one["file_name"] for one in results] == ["a.jpg"] * 3 + ["c.jpg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.png",
        "b.png",
        "c.png",
        "objects.csv",
        "results.json",
    ]


def test_the_label_map_shows_the_better_one_of_overlapping_objects(
    tmp_path: Path, image: Image.Image
) -> None:
    with PredictedFiles(tmp_path, NAMES, label_maps=True) as writer:
        writer.add("a.png", Path("a.jpg"), image, RESULTS)
    label_map = np.asarray(Image.open(tmp_path / "labels/a.png"))
    expected = 2 * rectangle(8, 3, 10, 8)
    expected[rectangle(2, 3, 10, 8) > 0] = 1
    assert np.array_equal(label_map, expected)


def test_cut_outs_are_transparent_outside_the_mask(tmp_path: Path, image: Image.Image) -> None:
    mask = rectangle(2, 3, 10, 8)
    mask[3, 2] = 0
    with PredictedFiles(tmp_path, NAMES, crops=True) as writer:
        writer.add("a.png", Path("a.jpg"), image, [result(mask, 4, 0.9), *RESULTS[1:]])
    assert sorted(path.name for path in (tmp_path / "crops").iterdir()) == ["a-1.png", "a-2.png"]
    crop = np.asarray(Image.open(tmp_path / "crops/a-1.png"))
    assert np.array_equal(crop[..., 3], 255 * mask[3:11, 2:12])
    assert np.array_equal(crop[..., :3], np.asarray(image)[3:11, 2:12])


def test_results_so_far_survive_an_error(tmp_path: Path, image: Image.Image) -> None:
    def fail() -> None:
        with PredictedFiles(tmp_path, NAMES) as writer:
            writer.add("a.png", Path("a.jpg"), image, RESULTS)
            raise ValueError("next")

    with pytest.raises(ValueError, match="next"):
        fail()
    assert len(json.loads((tmp_path / "results.json").read_text())) == len(rows(tmp_path)) == 3


def test_without_an_image_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="first"), PredictedFiles(tmp_path, NAMES):
        raise ValueError("first")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    def fill() -> None:
        with PredictedFiles(tmp_path, NAMES) as writer:
            for number in range(100):
                writer.add(f"{number}.png", Path(f"{number}.jpg"), Image.new("RGB", (4, 4)), RESULTS[2:])

    with largest_file(3000), pytest.raises(RunError, match="cannot be written"):
        fill()


def circle(radius: float, side: int) -> Any:
    y, x = np.mgrid[:side, :side] - side / 2 + 0.3
    return (x * x + y * y <= radius * radius).astype(np.uint8)


@pytest.mark.parametrize("radius", [10, 25, 60])
def test_a_circle_has_its_perimeter(radius: float) -> None:
    assert perimeter(circle(radius, 140)) == pytest.approx(2 * math.pi * radius, rel=0.02)


@pytest.mark.parametrize("turn", [0, 10, 22.5, 30, 45])
def test_a_square_in_any_direction_has_about_its_perimeter(turn: float) -> None:
    y, x = np.mgrid[:200, :200] - 99.7
    angle = math.radians(turn)
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    mask = (np.maximum(abs(u), abs(v)) <= 50).astype(np.uint8)
    assert perimeter(mask) == pytest.approx(400, rel=0.06)


def test_a_hole_adds_its_perimeter() -> None:
    ring = circle(50, 140) - circle(20, 140)
    assert perimeter(ring) == pytest.approx(2 * math.pi * 70, rel=0.02)


def test_nothing_has_no_perimeter() -> None:
    assert perimeter(np.zeros((0, 0), np.uint8)) == perimeter(np.zeros((4, 4), np.uint8)) == 0


def test_a_folder_that_cannot_be_made_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "crops").write_text("a file")
    with pytest.raises(InputError, match="crops"), PredictedFiles(tmp_path, NAMES, crops=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["crops"]


def test_pictures_have_different_names_on_every_file_system() -> None:
    long = "n" * 240
    names = picture_names(
        [Path(name) for name in ("A.jpg", "a.png", "b/A.tif", f"{long}.jpg", f"{long}x.jpg")]
    )
    assert names[:3] == ["A.png", "a-2.png", "A-3.png"]
    assert len({name.casefold() for name in names}) == 5
    assert max(len(name) for name in names) <= 255
