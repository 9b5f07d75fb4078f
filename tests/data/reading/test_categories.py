"""maskloss/data/reading/categories.py: the categories of a file, and those of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from maskloss.data.coco import Category, read_coco
from maskloss.data.dataset import CocoDataset
from maskloss.errors import InputError
from tests.data.coco_files import refusal, write_coco


def test_labels_are_contiguous_from_1_in_the_order_of_the_category_ids(tmp_path: Path) -> None:
    data = read_coco(*write_coco(tmp_path))
    assert data.categories == (Category(3, "cat"), Category(7, "dog"))
    assert data.labels == {3: 1, 7: 2}
    assert CocoDataset(data)[0][1]["labels"].tolist() == [2, 1]


def test_a_file_without_categories_is_refused(tmp_path: Path) -> None:
    text = refusal(tmp_path, lambda document: document.update(categories=[], annotations=[]))
    assert text.endswith("the file has no categories")


def test_a_category_repeated_word_for_word_is_read_once(tmp_path: Path) -> None:
    data = read_coco(
        *write_coco(tmp_path, lambda document: document["categories"].append(document["categories"][0]))
    )
    assert data.categories == (Category(3, "cat"), Category(7, "dog"))
    assert "category 7: is listed twice with equal fields" in data.warnings[0]


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


def test_categories_of_one_name_are_read_with_a_warning(tmp_path: Path) -> None:
    images, annotations = write_coco(tmp_path, lambda d: d["categories"].append({"id": 8, "name": "dog"}))
    data = read_coco(images, annotations)
    assert [category.id for category in data.categories] == [3, 7, 8]
    assert (
        f"{annotations}: category 8: has the same name as category 7, 'dog', but is a separate class"
        in data.warnings
    )
