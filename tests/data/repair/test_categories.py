"""Repair of the categories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from maskloss.data.coco import read_coco
from maskloss.data.repair import repair
from maskloss.errors import InputError
from tests.data.coco_files import refusal, write_coco
from tests.data.repair.repaired_files import ids, repaired


def test_missing_categories_are_added(tmp_path: Path) -> None:
    document, _ = repaired(tmp_path, lambda d: d.update(categories=[]))
    assert document["categories"] == [{"id": 3, "name": "category 3"}, {"id": 7, "name": "category 7"}]
    assert [annotation["category_id"] for annotation in document["annotations"]] == [7, 3, 3]


def test_objects_without_a_label_get_one_category(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["categories"] = []
        for annotation in document["annotations"]:
            del annotation["category_id"]

    document, _ = repaired(tmp_path, change)
    assert document["categories"] == [{"id": 1, "name": "object"}]
    assert [annotation["category_id"] for annotation in document["annotations"]] == [1, 1, 1]


def test_categories_with_the_same_id_and_name_are_one(tmp_path: Path) -> None:
    extended = {"id": 7, "name": "dog", "supercategory": "animal"}
    document, _ = repaired(tmp_path, lambda d: d["categories"].append(extended))
    assert document["categories"] == [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]


def test_categories_with_the_same_id_and_different_names_are_refused(tmp_path: Path) -> None:
    images, annotations = write_coco(tmp_path, lambda d: d["categories"].append({"id": 7, "name": "wolf"}))
    with pytest.raises(InputError, match="category 7: the id is used twice: 'dog' and 'wolf'"):
        repair(images, annotations, tmp_path / "fixed.json")
    assert not (tmp_path / "fixed.json").exists()


@pytest.mark.parametrize(("other", "kept"), [("dog", True), ("wolf", False)])
def test_two_categories_with_the_same_text_id_are_one_only_if_they_have_one_name(
    tmp_path: Path, other: str, kept: bool
) -> None:
    def change(document: dict[str, Any]) -> None:
        document["categories"][0]["id"] = "x"
        document["categories"].append({"id": "x", "name": other})
        document["annotations"][0]["category_id"] = "x"

    if kept:
        document, _ = repaired(tmp_path, change)
        assert [c["name"] for c in document["categories"]] == ["dog", "cat"]
        assert document["annotations"][0]["category_id"] == document["categories"][0]["id"]
    else:
        images, annotations = write_coco(tmp_path, change)
        with pytest.raises(InputError, match="category 'x': the id is used twice: 'dog' and 'wolf'"):
            repair(images, annotations, tmp_path / "fixed.json")


@pytest.mark.parametrize("category", [{"category_id": 7, "name": "dog"}, {"name": "dog"}])
def test_a_category_without_an_id_gets_the_one_that_annotations_refer_to(
    tmp_path: Path, category: Any
) -> None:
    def change(document: dict[str, Any]) -> None:
        document["categories"][0] = category

    document, _ = repaired(tmp_path, change)
    assert document["categories"][0]["id"] == 7
    assert ids(document) == [101, 102, 103]


def test_a_category_without_a_name_is_left_out_if_another_one_has_its_id(tmp_path: Path) -> None:
    document, _ = repaired(tmp_path, lambda d: d["categories"].insert(0, {"id": 7}))
    assert document["categories"] == [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]


def test_a_long_category_name_is_refused_and_cut(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["categories"][0]["name"] = "ä" * 1001

    assert "category 7: name has 1,001 letters, more than 1,000" in refusal(tmp_path, change)
    document, _ = repaired(tmp_path, change)
    assert document["categories"][0]["name"] == "ä" * 1000


@pytest.mark.parametrize("name", [["dog"], {"en": "dog"}, float("inf")])
def test_a_category_name_that_is_not_text_is_refused_and_replaced(tmp_path: Path, name: Any) -> None:
    def change(document: dict[str, Any]) -> None:
        document["categories"][0]["name"] = name

    assert f"category 7: name must be text, not {name}" in refusal(tmp_path, change)
    document, _ = repaired(tmp_path, change)
    assert document["categories"][0]["name"] == "category 7"


@pytest.mark.parametrize("change", [lambda d: d.pop("categories"), lambda d: d.update(categories=None)])
def test_missing_categories_are_added_for_the_ids_that_annotations_have(tmp_path: Path, change: Any) -> None:
    document, _ = repaired(tmp_path, change)
    assert sorted(ids(document, "categories")) == [3, 7]
    with pytest.raises(
        InputError, match=r"no list of categories; `maskloss repair` adds a category for each"
    ):
        read_coco(*write_coco(tmp_path, change))
