"""maskloss/data/coco.py: what is read, what is refused, and with which messages."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from maskloss.data.check import check_data
from maskloss.data.coco import find_problems, read_coco
from maskloss.data.dataset import CocoDataset
from maskloss.data.repair import repair
from maskloss.errors import InputError
from tests.data.coco_files import refusal, write_coco

# Files that are read.


def test_a_crowd_is_never_a_target(tmp_path: Path) -> None:
    data = read_coco(*write_coco(tmp_path))
    assert [annotation.crowd for annotation in data.images[0].annotations] == [False, False, True]
    _, target = CocoDataset(data)[0]
    assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"]) == 2
    assert data.num_objects == 2


# Files that are not in COCO format.


def test_a_missing_annotation_file_is_named(tmp_path: Path) -> None:
    images, _ = write_coco(tmp_path)
    with pytest.raises(InputError, match=r"nowhere\.json: cannot be read: No such file or directory"):
        read_coco(images, tmp_path / "nowhere.json")


def test_a_missing_image_folder_is_named(tmp_path: Path) -> None:
    _, annotations = write_coco(tmp_path)
    with pytest.raises(InputError, match="nowhere: the folder of images does not exist"):
        read_coco(tmp_path / "nowhere", annotations)


def test_a_folder_instead_of_the_annotation_file_is_refused(tmp_path: Path) -> None:
    images, _ = write_coco(tmp_path)
    with pytest.raises(InputError, match="images: cannot be read: Is a directory"):
        read_coco(images, images)


@pytest.mark.parametrize(
    "content",
    [b"", b"images: []", b'{"images": [,]}', b"\xff\xfe\x00", b"[" * 100_000],
    ids=["empty", "yaml", "broken", "not utf-8", "endless nesting"],
)
def test_broken_json_is_refused(tmp_path: Path, content: bytes) -> None:
    images, annotations = write_coco(tmp_path)
    annotations.write_bytes(content)
    with pytest.raises(InputError, match=r"annotations\.json: not valid JSON, broken or truncated"):
        read_coco(images, annotations)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_truncated_json_is_refused(tmp_path: Path, share: float) -> None:
    images, annotations = write_coco(tmp_path)
    content = annotations.read_bytes()
    annotations.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=r"annotations\.json: not valid JSON, broken or truncated"):
        read_coco(images, annotations)


@pytest.mark.parametrize("content", [[], 3, None, "text"])
def test_json_that_is_not_an_object_is_refused_as_not_coco(tmp_path: Path, content: Any) -> None:
    images, annotations = write_coco(tmp_path)
    annotations.write_text(json.dumps(content))
    with pytest.raises(
        InputError, match="not a COCO-format file: it has no list of images, annotations, cat"
    ):
        read_coco(images, annotations)


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_a_missing_list_is_named(tmp_path: Path, key: str) -> None:
    text = refusal(tmp_path, lambda document: document.pop(key))
    assert f": not a COCO-format file: it has no list of {key}" in text


def test_an_object_instead_of_a_list_is_refused(tmp_path: Path) -> None:
    text = refusal(tmp_path, lambda document: document.update(annotations={"id": 1}))
    assert text.endswith("it has no list of annotations")


def test_a_file_without_images_is_refused(tmp_path: Path) -> None:
    text = refusal(tmp_path, lambda document: document.update(images=[], annotations=[]))
    assert text.endswith("the file has no images")


# Entries: keys and ids.


@pytest.mark.parametrize(
    ("kind", "position", "name", "key"),
    [
        ("images", 0, "image 10", "file_name"),
        ("annotations", 0, "annotation 101", "image_id"),
        ("annotations", 0, "annotation 101", "category_id"),
        ("categories", 0, "category 7", "name"),
    ],
)
def test_a_missing_key_is_named(tmp_path: Path, kind: str, position: int, name: str, key: str) -> None:
    text = refusal(tmp_path, lambda document: document[kind][position].pop(key))
    assert f"{name}: missing {key}" in text


@pytest.mark.parametrize(
    ("kind", "name"),
    [("images", "image number 1"), ("categories", "category number 1")],
)
def test_an_entry_without_an_id_is_named_by_its_position(tmp_path: Path, kind: str, name: str) -> None:
    text = refusal(tmp_path, lambda document: document[kind][1].pop("id"))
    assert f"{name}: missing id" in text


@pytest.mark.parametrize("kind", ["images", "categories"])
def test_a_duplicate_id_with_other_content_is_named(tmp_path: Path, kind: str) -> None:
    text = refusal(tmp_path, lambda document: document[kind].append({**document[kind][0], "name": "other"}))
    identity = {"images": "image 10", "categories": "category 7"}[kind]
    assert f"{identity}: the id is used twice" in text


@pytest.mark.parametrize("identity", [True, "101", 10**400, 101.5, [101]], ids=lambda i: str(i)[:10])
@pytest.mark.parametrize("kind", ["images", "annotations", "categories"])
def test_an_id_that_is_not_an_integer_is_refused(tmp_path: Path, kind: str, identity: Any) -> None:
    text = refusal(tmp_path, lambda document: document[kind][0].update(id=identity))
    assert re.search(r"(image|annotation|category) \S+: id must be an integer", text)


def test_whole_floats_are_read_as_ids_and_sizes(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["images"][0].update(id=10.0, width=8.0)
        document["annotations"][0].update(id=101.0, image_id=10.0, category_id=7.0)
        document["categories"][0].update(id=7.0)

    images, annotations = write_coco(tmp_path)
    data, plain = read_coco(*write_coco(tmp_path, change, "floats.json")), read_coco(images, annotations)
    assert data.records == plain.records
    assert data.categories == plain.categories
    assert len(data.warnings) == len(plain.warnings) + 3


def test_several_errors_raise_the_first_with_the_count(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["annotations"][0]["iscrowd"] = 7
        document["annotations"][1]["category_id"] = 99
        document["annotations"][2]["image_id"] = 99

    text = refusal(tmp_path, change)
    assert "annotation 103: image_id 99 is not in the file" in text
    assert text.endswith("(and 2 more kinds of errors, `maskloss check` lists them)")


def test_find_problems_lists_every_error_and_keeps_the_valid_entries(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["annotations"][0]["iscrowd"] = 7
        document["annotations"][1]["category_id"] = 99
        document["annotations"].append({**document["annotations"][2], "id": 104, "iscrowd": 0})

    data, problems = find_problems(*write_coco(tmp_path, change))
    assert [problem.error for problem in problems] == [True, True, False]
    assert "annotation 102" in problems[0].text
    assert "annotation 101" in problems[1].text
    assert data is not None
    assert [annotation.id for annotation in data.images[0].annotations] == [103, 104]


def test_the_shared_sample_of_coco_has_no_errors(shared: Path) -> None:
    folder = shared / "coco_mini"
    data = read_coco(folder / "images", folder / "annotations_val2017.json")
    document = json.loads((folder / "annotations_val2017.json").read_text())
    assert len(data.images) == len(document["images"])
    assert data.num_objects == sum(not annotation["iscrowd"] for annotation in document["annotations"])


@pytest.mark.parametrize("depth", [500, 930, 945, 960, 975, 990])
@pytest.mark.parametrize("place", ["annotations", "images", "categories", "bbox", "id", "name"])
def test_values_nested_deeply_are_reported_and_not_an_exception(
    tmp_path: Path, depth: int, place: str
) -> None:
    def change(document: dict[str, Any]) -> None:
        if place in document:
            document[place].append("@")
        elif place == "name":
            document["categories"] += [{"id": 7, "name": "@"}, {"id": 7, "name": "@"}]
        else:
            document["annotations"][0][place] = "@"
            document["images"][0][place] = "@"

    images, annotations = write_coco(tmp_path, change)
    annotations.write_text(annotations.read_text().replace('"@"', "[" * depth + "]" * depth))
    check_data(images, annotations)
    with contextlib.suppress(InputError):
        repair(images, annotations, tmp_path / "fixed.json")
