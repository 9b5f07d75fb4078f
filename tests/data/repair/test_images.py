"""Repair of the images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from maskloss.data.coco import read_coco
from tests.data.coco_files import HEIGHT, WIDTH, in_image, refusal, write_coco
from tests.data.repair.repaired_files import ids, repaired


@pytest.mark.parametrize(
    "name",
    [
        "/data/upload/1/a.png",
        "C:\\photos\\a.png",
        "https://example.org/photos/a.png?size=1",
        "/data/local-files/?d=photos/a.png",
        "../a.png",
        "photos/a.png",
        "A.png",
        "photos\\A.PNG",
    ],
)
def test_a_file_name_is_corrected_if_only_one_file_matches(tmp_path: Path, name: str) -> None:
    document, _ = repaired(tmp_path, lambda d: d["images"][0].update(file_name=name))
    assert document["images"][0]["file_name"] == "a.png"
    assert len(document["annotations"]) == 3


def test_images_whose_names_match_the_same_file_are_both_left_out(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["images"] += [
            {**document["images"][0], "id": 30, "file_name": "x/b.png"},
            {**document["images"][0], "id": 40, "file_name": "/y/b.png"},
        ]

    images, _ = write_coco(tmp_path)
    Image.new("RGB", (WIDTH, HEIGHT)).save(images / "b.png")
    document, _ = repaired(tmp_path, change)
    assert ids(document, "images") == [10, 20]


@pytest.mark.parametrize("key", ["coco_url", "url", "flickr_url"])
def test_the_file_that_a_url_names_is_taken_for_a_missing_file_name(tmp_path: Path, key: str) -> None:
    """As in LVIS."""

    def change(document: dict[str, Any]) -> None:
        del document["images"][0]["file_name"]
        document["images"][0][key] = "http://images.example.org/train2017/a.png"

    data = read_coco(*write_coco(tmp_path, change))
    assert [image.file_name for image in data.images] == ["a.png", "nested/b.png"]
    url = "'http://images.example.org/train2017/a.png'"
    assert f"image 10: missing file_name; 'a.png' is read, which {url} names" in data.warnings[0]
    document, _ = repaired(tmp_path, change)
    assert [image["file_name"] for image in document["images"]] == ["a.png", "nested/b.png"]


@pytest.mark.parametrize(
    "other", [{"coco_url": "http://images.example.org/val2017/a.png"}, {"file_name": "a.png"}]
)
def test_a_file_that_two_images_may_mean_is_not_taken_from_a_url(
    tmp_path: Path, other: dict[str, str]
) -> None:
    def change(document: dict[str, Any]) -> None:
        del document["images"][0]["file_name"]
        document["images"][0]["coco_url"] = "http://images.example.org/train2017/a.png"
        document["images"][1] = {"id": 20, "width": WIDTH, "height": HEIGHT, **other}
        document["annotations"][0]["image_id"] = 20

    text = refusal(tmp_path, change)
    assert (
        "image 10: missing file_name, but 'http://images.example.org/train2017/a.png' names 'a.png'" in text
    )
    if "file_name" in other:
        document, _ = repaired(tmp_path, change)
        assert ids(document, "images") == [20]


def test_two_images_with_the_same_id_are_left_out_with_their_annotations(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["images"].append({**document["images"][1], "id": 30, "file_name": "a.png"})
        document["annotations"].append({**document["annotations"][0], "id": 104, "image_id": 30})
        document["images"][1]["id"] = 10

    document, _ = repaired(tmp_path, change)
    assert ids(document, "images") == [30]
    assert ids(document) == [104]


@pytest.mark.parametrize("fields", [{}, {"license": 4}])
def test_an_image_that_is_listed_twice_keeps_its_annotations(tmp_path: Path, fields: dict[str, Any]) -> None:
    document, listing = repaired(tmp_path, lambda d: d["images"].append({**d["images"][0], **fields}))
    assert ids(document, "images") == [10, 20]
    assert "license" not in document["images"][0]
    assert ids(document) == [101, 102, 103]
    assert [r["change"] for r in listing["repairs"]] == ["left out, since it is listed twice"]


def test_an_image_without_an_id_gets_its_image_id(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["images"][0]["image_id"] = document["images"][0].pop("id")

    document, _ = repaired(tmp_path, change)
    assert ids(document, "images") == [10, 20]
    assert ids(document) == [101, 102, 103]


@pytest.mark.parametrize(
    ("width", "height"), [(HEIGHT, WIDTH), (None, None), (0, HEIGHT), ("x", HEIGHT)], ids=str
)
def test_the_size_becomes_that_of_the_file(tmp_path: Path, width: Any, height: Any) -> None:
    document, _ = repaired(tmp_path, in_image(width=width, height=height))
    assert (document["images"][0]["width"], document["images"][0]["height"]) == (WIDTH, HEIGHT)
    assert ids(document) == [101, 102, 103]


def test_an_image_of_another_size_is_left_out(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["images"][0].update(width=WIDTH + 1)
        document["annotations"].append({**document["annotations"][0], "id": 7, "image_id": 20})

    document, _ = repaired(tmp_path, change)
    assert ids(document, "images") == [20]
    assert ids(document) == [7]


@pytest.mark.parametrize(
    ("recorded", "kept"),
    [
        # The polygon reaches x = 4 and y = 3 in the file of 8 x 5 px.
        ((3, 3), True),
        ((8, 2), True),
        # Another version of the image, in which the polygon fits, too.
        ((6, 6), False),
        ((16, 10), False),
    ],
)
def test_a_size_that_the_polygons_contradict_is_taken_from_the_file(
    tmp_path: Path, recorded: tuple[int, int], kept: bool
) -> None:
    def change(document: dict[str, Any]) -> None:
        document["images"][0].update(width=recorded[0], height=recorded[1])
        first = document["annotations"][0]
        document["annotations"] = [first, {**first, "id": 102, "image_id": 20}]

    document, _ = repaired(tmp_path, change)
    assert ids(document, "images") == ([10, 20] if kept else [20])
    if kept:
        assert (document["images"][0]["width"], document["images"][0]["height"]) == (WIDTH, HEIGHT)
        assert ids(document) == [101, 102]
