"""New ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maskloss.data.repair.ids import Ids
from tests.data.repair.repaired_files import ids, repaired


def make_document(**sections: list[dict[str, Any]]) -> dict[str, Any]:
    return {"images": [], "annotations": [], "categories": [], **sections}


def test_an_entry_gets_the_integer_that_its_id_means_or_the_highest_plus_1() -> None:
    images: list[dict[str, Any]] = [
        {"id": 3.0}, {"id": "5"}, {"id": "3"}, {"id": "x"}, {"image_id": 9}, {"id": 2**60}
    ]  # fmt: skip
    new = Ids(make_document(images=images))
    # Image 5 of the first five has the highest number that is meant, 9; 2**60 is a hash, not a number of a series.
    assert [new.assign("image", images[i]) for i in (1, 2, 3, 4)] == [5, 10, 11, 9]
    assert [image["id"] for image in images] == [3.0, 5, 10, 11, 9, 2**60]


def test_the_only_category_without_an_id_gets_the_only_unknown_id() -> None:
    categories: list[dict[str, Any]] = [{"id": 1}, {"name": "dog"}]
    annotations = [{"category_id": number} for number in (1, 7, 7.0, None)]
    assert (
        Ids(make_document(categories=categories, annotations=annotations)).clear("category", categories[1])
        == 7
    )
    annotations.append({"category_id": 8})
    assert (
        Ids(make_document(categories=categories, annotations=annotations)).clear("category", categories[1])
        is None
    )


def test_text_ids_get_the_same_numbers_in_images_annotations_and_categories(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["images"][0]["id"], document["images"][1]["id"] = "b4-1", "7"
        document["categories"][1]["id"] = "cat"
        for annotation, image in zip(document["annotations"], ("b4-1", "7", "b4-1"), strict=True):
            annotation.update(image_id=image, id=f"a{annotation['id']}")
            if annotation["category_id"] == 3:
                annotation["category_id"] = "cat"

    document, _ = repaired(tmp_path, change)
    numbers = {image["file_name"]: image["id"] for image in document["images"]}
    assert numbers == {"a.png": 8, "nested/b.png": 7}  # "7" spells a number that is free
    assert [a["image_id"] for a in document["annotations"]] == [8, 7, 8]
    assert ids(document) == [1, 2, 3]
    assert [c["id"] for c in document["categories"]] == [7, 8]
    assert [a["category_id"] for a in document["annotations"]] == [7, 8, 8]


def test_a_number_that_two_text_ids_spell_is_given_to_neither(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["images"][0]["id"], document["images"][1]["id"] = "5", "05"
        for annotation, reference in zip(document["annotations"], ("5", "05", 5), strict=True):
            annotation["image_id"] = reference

    document, _ = repaired(tmp_path, change)
    numbers = {image["file_name"]: image["id"] for image in document["images"]}
    assert 5 not in numbers.values()
    assert [(a["id"], a["image_id"]) for a in document["annotations"]] == [
        (101, numbers["a.png"]),
        (102, numbers["nested/b.png"]),
    ]
