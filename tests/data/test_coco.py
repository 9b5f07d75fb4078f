"""maskloss/data/coco.py: what is read, what is refused, and with which messages."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from maskloss.data.check import check_data
from maskloss.data.coco import Category, find_problems, read_coco
from maskloss.data.dataset import CocoDataset
from maskloss.data.repair import repair
from maskloss.errors import InputError
from tests.data.coco_files import in_image, refusal, write_coco

# Files that are read.


def test_labels_are_contiguous_from_1_in_the_order_of_the_category_ids(tmp_path: Path) -> None:
    data = read_coco(*write_coco(tmp_path))
    assert data.categories == (Category(3, "cat"), Category(7, "dog"))
    assert data.labels == {3: 1, 7: 2}
    assert CocoDataset(data)[0][1]["labels"].tolist() == [2, 1]


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


def test_a_file_without_categories_is_refused(tmp_path: Path) -> None:
    text = refusal(tmp_path, lambda document: document.update(categories=[], annotations=[]))
    assert text.endswith("the file has no categories")


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


def test_an_image_repeated_word_for_word_is_read_once(tmp_path: Path) -> None:
    """As in files that were joined from parts."""
    data = read_coco(*write_coco(tmp_path, lambda document: document["images"].append(document["images"][0])))
    assert [image.id for image in data.images] == [10, 20]
    assert data.num_objects == 2
    assert "image 10: is listed twice with equal fields" in data.warnings[0]


def test_a_category_repeated_word_for_word_is_read_once(tmp_path: Path) -> None:
    data = read_coco(
        *write_coco(tmp_path, lambda document: document["categories"].append(document["categories"][0]))
    )
    assert data.categories == (Category(3, "cat"), Category(7, "dog"))
    assert "category 7: is listed twice with equal fields" in data.warnings[0]


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


# Images.


@pytest.mark.parametrize("file_name", ["", None, 3, ["a.png"], "a\0.png"])
def test_a_file_name_that_is_not_a_name_is_refused(tmp_path: Path, file_name: Any) -> None:
    text = refusal(tmp_path, in_image(file_name=file_name))
    assert f"image 10: file_name must be the name of a file, not {file_name!r}" in text


@pytest.mark.parametrize("file_name", ["missing.png", "nested", ".", "a" * 20 + ".png", "a.png/b.png"])
def test_an_image_without_a_file_is_named(tmp_path: Path, file_name: str) -> None:
    text = refusal(tmp_path, in_image(file_name=file_name))
    assert "image 10: " in text
    assert f"{Path(file_name).name} does not exist" in text


@pytest.mark.parametrize(("width", "height"), [(0, 5), (8, -5), (8.5, 5), ("8", 5), (True, 5), (8, 10**9)])
def test_a_recorded_size_that_is_not_a_positive_integer_is_refused(
    tmp_path: Path, width: Any, height: Any
) -> None:
    text = refusal(tmp_path, in_image(width=width, height=height))
    assert f"image 10: width and height must be positive integers, not {width!r} and {height!r}" in text


@pytest.mark.parametrize(
    ("fields", "given"),
    [
        ({"width": None, "height": None}, "missing width and height"),
        ({"width": 0, "height": 0}, "width and height are 0"),
    ],
)
def test_an_unknown_size_is_that_of_the_file(tmp_path: Path, fields: dict[str, Any], given: str) -> None:
    data = read_coco(*write_coco(tmp_path, in_image(**fields)))
    assert (data.images[0].width, data.images[0].height) == (8, 5)
    assert any(f"image 10: {given}; a.png is 8 x 5" in warning for warning in data.warnings)


# A validation file and the categories of the training set.


def test_labels_of_a_validation_file_with_fewer_categories_are_the_training_sets(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["categories"] = [{"id": 7, "name": "dog"}]
        document["annotations"] = document["annotations"][:1]

    training = read_coco(*write_coco(tmp_path))
    images, path = write_coco(tmp_path, change, "validation.json")
    validation = read_coco(images, path, categories=training.categories)
    assert validation.categories == training.categories
    assert CocoDataset(validation)[0][1]["labels"].tolist() == [2]


TRAINED = (Category(3, "cat"), Category(7, "dog"))
COPIES = "`maskloss subset --categories` copies the others"


@pytest.mark.parametrize(
    ("category", "reason"),
    [
        ({"id": 9, "name": "cow"}, "category 9: 'cow' is not among the model's categories"),
        ({"id": 3, "name": "lion"}, "category 3: is 'lion' here, but 'cat' among the model's categories"),
    ],
)
def test_a_validation_file_with_another_category_is_refused_if_an_object_has_it(
    tmp_path: Path, category: dict[str, Any], reason: str
) -> None:
    def change(document: dict[str, Any]) -> None:
        document["categories"] = [category, {"id": 7, "name": "dog"}]
        document["annotations"] = document["annotations"][:2]
        document["annotations"][1]["category_id"] = category["id"]

    images, path = write_coco(tmp_path, change)
    with pytest.raises(InputError) as caught:
        read_coco(images, path, categories=TRAINED)
    assert str(caught.value) == f"{path}: {reason}; {COPIES}"

    def without_object(document: dict[str, Any]) -> None:
        change(document)
        document["annotations"].pop()

    images, path = write_coco(tmp_path, without_object, "other.json")
    data = read_coco(images, path, categories=TRAINED)
    assert data.categories == TRAINED
    assert any("and no annotation refers to it" in warning for warning in data.warnings)


@pytest.mark.parametrize("ids", [{3: 7, 7: 3}, {3: 1, 7: 2}, {3: 3, 7: 2**100}])
def test_categories_with_other_ids_than_the_models_are_read_by_their_names(
    tmp_path: Path, ids: dict[int, int]
) -> None:
    """As in validation files that were exported on their own."""

    def change(document: dict[str, Any]) -> None:
        for category in document["categories"]:
            category["id"] = ids[category["id"]]
        for annotation in document["annotations"]:
            annotation["category_id"] = ids[annotation["category_id"]]

    expected = read_coco(*write_coco(tmp_path), categories=TRAINED)
    data = read_coco(*write_coco(tmp_path, change, "other.json"), categories=TRAINED)
    assert data.categories == TRAINED
    assert data.records.category_ids.tolist() == expected.records.category_ids.tolist() == [7, 3, 3]
    assert CocoDataset(data)[0][1]["labels"].tolist() == [2, 1]
    warning = next(warning for warning in data.warnings if "of the model" in warning)
    assert f"category {ids[7]}: 'dog' is category 7 of the model, and is read as that" in warning


@pytest.mark.parametrize("twice_in", ["file", "model"])
def test_a_name_that_two_categories_have_matches_none_with_another_id(tmp_path: Path, twice_in: str) -> None:
    def change(document: dict[str, Any]) -> None:
        names = ("dog", "dog") if twice_in == "file" else ("dog", "cat")
        document["categories"] = [{"id": 1, "name": names[0]}, {"id": 3, "name": names[1]}]
        document["annotations"][0]["category_id"] = 1

    trained = TRAINED if twice_in == "file" else (*TRAINED, Category(8, "dog"))
    images, path = write_coco(tmp_path, change)
    with pytest.raises(InputError, match="'dog' is not among the model's categories"):
        read_coco(images, path, categories=trained)


def test_the_shared_sample_of_coco_has_no_errors(shared: Path) -> None:
    folder = shared / "coco_mini"
    data = read_coco(folder / "images", folder / "annotations_val2017.json")
    document = json.loads((folder / "annotations_val2017.json").read_text())
    assert len(data.images) == len(document["images"])
    assert data.num_objects == sum(not annotation["iscrowd"] for annotation in document["annotations"])


def test_categories_of_one_name_are_read_with_a_warning(tmp_path: Path) -> None:
    images, annotations = write_coco(tmp_path, lambda d: d["categories"].append({"id": 8, "name": "dog"}))
    data = read_coco(images, annotations)
    assert [category.id for category in data.categories] == [3, 7, 8]
    assert (
        f"{annotations}: category 8: has the same name as category 7, 'dog', but is a separate class"
        in data.warnings
    )


def test_a_message_about_a_file_name_with_a_newline_is_one_line(tmp_path: Path) -> None:
    images, annotations = write_coco(tmp_path, lambda d: d["images"][0].update(file_name="x\n.png"))
    with pytest.raises(InputError, match=r"image 10: the file .*x\\n\.png does not exist") as caught:
        read_coco(images, annotations)
    assert len(str(caught.value).splitlines()) == 1


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
