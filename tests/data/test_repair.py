"""maskloss/data/repair.py: what it changes, what it keeps, and what it lists."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from maskloss.data.check import check_data
from maskloss.data.coco import read_coco
from maskloss.data.repair import repair
from maskloss.errors import InputError
from tests.data.coco_files import HEIGHT, RECTANGLE_COUNTS, WIDTH, refusal, write_coco


def repaired(folder: Path, change: Any, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Repair a file, and return its document, which must pass `check`, and the list of repairs."""
    images, annotations = write_coco(folder, change)
    before = annotations.read_bytes()
    repair(images, annotations, folder / "fixed.json", **options)
    assert annotations.read_bytes() == before
    _, problems = check_data(images, folder / "fixed.json")
    assert [problem.text for problem in problems if problem.error] == []
    return json.loads((folder / "fixed.json").read_text()), json.loads(
        (folder / "fixed.repairs.json").read_text()
    )


def ids(document: dict[str, Any], section: str = "annotations") -> list[Any]:
    return [entry["id"] for entry in document[section]]


def test_a_valid_file_is_not_changed(tmp_path: Path) -> None:
    document, listing = repaired(tmp_path, None)
    assert document == json.loads((tmp_path / "annotations.json").read_text())
    assert listing["repairs"] == []


def test_valid_fields_are_kept(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document.update(info={"year": 2026}, licenses=[{"id": 4}], **{"$schema": [None]})
        document["images"][0].update(license=4, file_name="A.PNG")
        document["annotations"][0].update(bbox=None, keypoints=[1, 2, 2], attributes={"occluded": True})
        document["annotations"][1].update(category_id=99)
        document["categories"][0].update(supercategory="animal", skeleton=[[1, 2]])

    document, _ = repaired(tmp_path, change)
    assert document["info"] == {"year": 2026}
    assert document["licenses"] == [{"id": 4}]
    assert document["$schema"] == [None]
    assert document["images"][0] == {"id": 10, "file_name": "a.png", "width": 8, "height": 5, "license": 4}
    assert document["annotations"][0]["keypoints"] == [1, 2, 2]
    assert document["annotations"][0]["attributes"] == {"occluded": True}
    assert document["annotations"][0]["bbox"] == [2, 1, 2, 2]
    assert document["categories"][0] == {
        "id": 7,
        "name": "dog",
        "supercategory": "animal",
        "skeleton": [[1, 2]],
    }
    assert ids(document) == [101, 103]


def test_the_list_names_every_entry_by_kind(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        first = document["annotations"][0]
        document["annotations"] += [{**first, "id": 200 + i, "category_id": 99} for i in range(5)]
        document["images"][1]["file_name"] = "gone.png"
        document["annotations"].append({**first, "id": 300, "image_id": 20})

    document, listing = repaired(tmp_path, change)
    assert ids(document) == [101, 102, 103]
    assert ids(document, "images") == [10]
    found = {
        (entry["kind"], entry["section"], entry["change"]): [e["name"] for e in entry["entries"]]
        for entry in listing["repairs"]
    }
    assert found == {
        ("file_missing", "image", "left out"): ["image 20"],
        ("image_left_out", "annotation", "left out with their image"): ["annotation 300"],
        ("unknown_category", "annotation", "left out"): [f"annotation {200 + i}" for i in range(5)],
    }
    assert {entry["kind"]: entry["count"] for entry in listing["repairs"]}["unknown_category"] == 5


@pytest.mark.parametrize("taken", ["fixed.json", "fixed.repairs.json"])
def test_nothing_is_overwritten(tmp_path: Path, taken: str) -> None:
    images, annotations = write_coco(tmp_path)
    (tmp_path / taken).write_text("mine")
    with pytest.raises(InputError, match="is there already; name another --output"):
        repair(images, annotations, tmp_path / "fixed.json")
    assert (tmp_path / taken).read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["annotations.json", "images", taken])


def test_the_input_is_never_the_output(tmp_path: Path) -> None:
    images, annotations = write_coco(tmp_path)
    with pytest.raises(InputError, match="is there already"):
        repair(images, annotations, annotations)


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


@pytest.mark.parametrize("number", ["10", " 10 ", "10.0"])
def test_text_that_spells_an_image_id_is_converted(tmp_path: Path, number: str) -> None:
    document, _ = repaired(tmp_path, lambda d: d["annotations"][0].update(image_id=number))
    assert document["annotations"][0]["image_id"] == 10


def test_a_category_name_instead_of_an_id_is_replaced_by_the_id(tmp_path: Path) -> None:
    document, _ = repaired(tmp_path, lambda d: d["annotations"][0].update(category_id="cat"))
    assert document["annotations"][0]["category_id"] == 3


def test_a_file_name_instead_of_an_image_id_is_replaced_by_the_id(tmp_path: Path) -> None:
    document, _ = repaired(tmp_path, lambda d: d["annotations"][0].update(image_id="nested/b.png"))
    assert document["annotations"][0]["image_id"] == 20


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


def test_two_images_with_the_same_id_are_left_out_with_their_annotations(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["images"].append({**document["images"][1], "id": 30, "file_name": "a.png"})
        document["annotations"].append({**document["annotations"][0], "id": 104, "image_id": 30})
        document["images"][1]["id"] = 10

    document, _ = repaired(tmp_path, change)
    assert ids(document, "images") == [30]
    assert ids(document) == [104]


def test_categories_with_the_same_id_and_different_names_are_refused(tmp_path: Path) -> None:
    images, annotations = write_coco(tmp_path, lambda d: d["categories"].append({"id": 7, "name": "wolf"}))
    with pytest.raises(InputError, match="category 7: the id is used twice: 'dog' and 'wolf'"):
        repair(images, annotations, tmp_path / "fixed.json")
    assert not (tmp_path / "fixed.json").exists()


def test_a_transposed_rle_is_corrected_and_one_that_fits_neither_way_loses_its_mask(tmp_path: Path) -> None:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[0:2, 3:8] = 1
    turned = coco_mask.encode(np.asfortranarray(mask.T))

    def change(document: dict[str, Any]) -> None:
        rle = {"size": [WIDTH, HEIGHT], "counts": turned["counts"].decode()}
        document["annotations"][0].update(segmentation=rle, bbox=[3, 0, 5, 2])
        document["annotations"][1].update(segmentation=rle, bbox=[0, 3, 1, 1])

    document, _ = repaired(tmp_path, change)
    data = read_coco(tmp_path / "images", tmp_path / "fixed.json")
    assert np.array_equal(data.images[0].object_masks().bitmaps()[0].numpy(), mask)
    assert [annotation.has_mask for annotation in data.images[0].objects] == [True, False]
    assert document["annotations"][1]["segmentation"] == []


def test_an_rle_of_which_only_the_size_is_swapped_gets_the_images_size(tmp_path: Path) -> None:
    rle = {"size": [WIDTH, HEIGHT], "counts": RECTANGLE_COUNTS}
    document, _ = repaired(tmp_path, lambda d: d["annotations"][1].update(segmentation=rle))
    assert document["annotations"][1]["segmentation"] == {"size": [HEIGHT, WIDTH], "counts": RECTANGLE_COUNTS}


@pytest.mark.parametrize(
    ("convention", "box"),
    [
        ("x1, y1, x2, y2", lambda x, y, w, h: [x, y, x + w, y + h]),
        ("center x, center y, width, height", lambda x, y, w, h: [x + w / 2, y + h / 2, w, h]),
        ("y1, x1, y2, x2", lambda x, y, w, h: [y, x, y + h, x + w]),
        ("fractions x1, y1, x2, y2", lambda x, y, w, h: [x / 80, y / 50, (x + w) / 80, (y + h) / 50]),
        (
            "fractions of center x, center y, width, height",
            lambda x, y, w, h: [(x + w / 2) / 80, (y + h / 2) / 50, w / 80, h / 50],
        ),
    ],
)
def test_boxes_of_another_convention_are_reported_and_taken_from_the_masks(
    tmp_path: Path, convention: str, box: Any
) -> None:
    sides = [(10, 5, 20, 30), (40, 10, 30, 12), (50, 30, 25, 15), (5, 20, 12, 25)]

    def change(document: dict[str, Any]) -> None:
        document["images"][0].update(width=80, height=50)
        document["annotations"] = [
            {"id": i, "image_id": 10, "category_id": 7, "bbox": box(x, y, w, h), "iscrowd": 0,
             "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}
            for i, (x, y, w, h) in enumerate(sides)
        ]  # fmt: skip
        # A box without a mask follows the convention of the others.
        document["annotations"].append({**document["annotations"][0], "id": 9, "segmentation": []})

    images, annotations = write_coco(tmp_path, change)
    Image.new("RGB", (80, 50)).save(images / "a.png")
    with pytest.raises(InputError, match=f"the boxes look like {convention} instead of x, y, width, height"):
        repair(images, annotations, tmp_path / "fixed.json")
    repair(images, annotations, tmp_path / "fixed.json", boxes="from-masks")
    data = read_coco(images, tmp_path / "fixed.json")
    boxes = [annotation.box for annotation in data.images[0].annotations]
    expected = [(x, y, x + w, y + h) for x, y, w, h in [*sides, sides[0]]]
    assert np.allclose(boxes, expected)


def test_coordinates_that_are_fractions_are_reported_and_multiplied(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        for annotation in document["annotations"]:
            annotation.update(
                bbox=[0.25, 0.2, 0.25, 0.4], segmentation=[[0.25, 0.2, 0.5, 0.2, 0.5, 0.6]], iscrowd=0
            )

    images, annotations = write_coco(
        tmp_path, lambda d: (d["images"][0].update(width=16, height=10), change(d))
    )
    Image.new("RGB", (16, 10)).save(images / "a.png")
    with pytest.raises(InputError, match="the polygons look like fractions of the image instead of px"):
        read_coco(images, annotations)
    repair(images, annotations, tmp_path / "fixed.json")
    data = read_coco(images, tmp_path / "fixed.json")
    assert data.images[0].annotations[0].segmentation == [[4, 2, 8, 2, 8, 6]]
    assert data.images[0].annotations[0].box == (4, 2, 8, 6)


def test_crowds_become_objects_with_the_option(tmp_path: Path) -> None:
    document, _ = repaired(tmp_path, None, crowds="objects")
    assert [annotation["iscrowd"] for annotation in document["annotations"]] == [0, 0, 0]


# References whose image or category has an id of another type.


def refer(document: dict[str, Any], section: str, number: Any, reference: Any) -> None:
    """Change the id of the only image or category that annotations use, and what they refer to it by."""
    document["images"], document["categories"] = document["images"][:1], document["categories"][:1]
    for annotation in document["annotations"]:
        annotation.update(image_id=10, category_id=7)
        annotation[f"{section}_id"] = reference
    document["images" if section == "image" else "categories"][0]["id"] = number


@pytest.mark.parametrize("section", ["image", "category"])
@pytest.mark.parametrize(
    ("number", "reference"),
    [("5", 5), ("5", "5.0"), (" 5", 5), ("5.0", 5), (True, 1), (True, True), (5, "5"), ("-5", -5), ("a", "a"),
     ("1234567890123456789", 1234567890123456789), (1234567890123456789, "1234567890123456789")],
)  # fmt: skip
def test_annotations_are_kept_that_refer_to_an_id_of_another_type(
    tmp_path: Path, section: str, number: Any, reference: Any
) -> None:
    images, annotations = write_coco(tmp_path, lambda d: refer(d, section, number, reference))
    _, problems = check_data(images, annotations)
    # The references are a consequence if the id itself is wrong.
    assert [problem.kind for problem in problems if problem.error] == [
        f"{section}_id" if type(number) is not int else f"unknown_{section}"
    ]
    document, listing = repaired(tmp_path, lambda d: refer(d, section, number, reference))
    assert ids(document) == [101, 102, 103]
    assert {repair["kind"] for repair in listing["repairs"]} <= {f"{section}_id", f"unknown_{section}"}


@pytest.mark.parametrize("category", [{"category_id": 7, "name": "dog"}, {"name": "dog"}])
def test_a_category_without_an_id_gets_the_one_that_annotations_refer_to(
    tmp_path: Path, category: Any
) -> None:
    def change(document: dict[str, Any]) -> None:
        document["categories"][0] = category

    document, _ = repaired(tmp_path, change)
    assert document["categories"][0]["id"] == 7
    assert ids(document) == [101, 102, 103]


def test_an_image_without_an_id_gets_its_image_id(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["images"][0]["image_id"] = document["images"][0].pop("id")

    document, _ = repaired(tmp_path, change)
    assert ids(document, "images") == [10, 20]
    assert ids(document) == [101, 102, 103]


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


def test_a_category_without_a_name_is_left_out_if_another_one_has_its_id(tmp_path: Path) -> None:
    document, _ = repaired(tmp_path, lambda d: d["categories"].insert(0, {"id": 7}))
    assert document["categories"] == [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]


# The limits of a model file.


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


# The list of repairs.


def test_annotations_with_the_same_id_or_none_are_counted_and_named_one_by_one(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        first = document["annotations"][0]
        document["images"].append({**document["images"][1], "id": 30, "file_name": "gone.png"})
        document["annotations"] += [{**first, "id": 101, "category_id": 99} for _ in range(4)]
        document["annotations"] += [{**first, "id": None, "image_id": 30} for _ in range(3)]
        document["annotations"] += [5, 5, "x"]

    document, listing = repaired(tmp_path, change)
    assert len(document["annotations"]) == 3
    found = {r["kind"]: [entry["name"] for entry in r["entries"]] for r in listing["repairs"]}
    assert found["unknown_category"] == [f"annotation number {i} (id 101)" for i in range(3, 7)]
    assert found["image_left_out"] == [f"annotation number {i}" for i in range(7, 10)]
    assert found["not_an_object"] == [f"annotation number {i}" for i in range(10, 13)]


# Text instead of numbers.


@pytest.mark.parametrize(
    "segmentation",
    [
        ["2", "1", "4", "1", "4", "3"],
        [["2", "1", "4", "1", "4", "3"]],
        [["2", "1"], ["4", "1"], ["4", "3"]],
        [[["2", "1"], ["4", "1"], ["4", 3]]],
        ["2,1,4,1,4,3"],
        ["2 1 4 1 4 3.0"],
        ["[2, 1, 4, 1, 4, 3]"],
        "[[2, 1, 4, 1, 4, 3]]",
        "2 1 4 1 4 3",
        [[{"x": "2", "y": "1"}, {"x": "4", "y": "1"}, {"x": "4", "y": "3"}]],
    ],
    ids=str,
)
def test_polygons_written_as_text_are_kept(tmp_path: Path, segmentation: Any) -> None:
    document, _ = repaired(tmp_path, lambda d: d["annotations"][0].update(segmentation=segmentation))
    assert document["annotations"][0]["segmentation"] == [[2, 1, 4, 1, 4, 3]]


@pytest.mark.parametrize(
    "rle",
    [
        {"size": [str(HEIGHT), str(WIDTH)], "counts": RECTANGLE_COUNTS},
        {"size": [HEIGHT, WIDTH], "counts": [str(run) for run in RECTANGLE_COUNTS]},
        json.dumps({"size": [HEIGHT, WIDTH], "counts": RECTANGLE_COUNTS}),
        [json.dumps({"size": [HEIGHT, WIDTH], "counts": RECTANGLE_COUNTS})],
    ],
    ids=str,
)
def test_an_rle_written_as_text_is_kept(tmp_path: Path, rle: Any) -> None:
    good = write_coco(tmp_path)
    mask = read_coco(*good).images[0].object_masks().bitmaps()[1]
    repaired(tmp_path, lambda d: d["annotations"][1].update(segmentation=rle))
    data = read_coco(tmp_path / "images", tmp_path / "fixed.json")
    assert data.images[0].object_masks().bitmaps()[1].equal(mask)


@pytest.mark.parametrize(
    "segmentation",
    [["123456", "234561", "345612"], ["8,5", "9,5", "7,5"], "abcdef", ["2,1 4,1 4,3"]],
    ids=str,
)
def test_no_polygon_is_invented_from_text(tmp_path: Path, segmentation: Any) -> None:
    document, _ = repaired(tmp_path, lambda d: d["annotations"][0].update(segmentation=segmentation))
    assert document["annotations"][0]["segmentation"] == []


@pytest.mark.parametrize(
    "box", [["2", "1", "2", "2"], [2, 1, "2.0", 2], "2 1 2 2", "[2, 1, 2, 2]", "2,1,2,2"]
)
@pytest.mark.parametrize("segmentation", [[], "unreadable", [[2, 1, 4, 1, 4, 3]]], ids=str)
def test_a_box_written_as_text_is_kept(tmp_path: Path, box: Any, segmentation: Any) -> None:
    document, _ = repaired(
        tmp_path, lambda d: d["annotations"][0].update(bbox=box, segmentation=segmentation)
    )
    assert document["annotations"][0]["bbox"] == [2, 1, 2, 2]


def test_a_weight_written_as_text_is_kept(tmp_path: Path) -> None:
    document, _ = repaired(tmp_path, lambda d: d["annotations"][0].update(weight="0.5"))
    assert document["annotations"][0]["weight"] == 0.5


# Other fields.


def test_numbers_that_json_does_not_have_become_null_in_unknown_fields(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["info"] = {"mean": [1.5, float("nan")]}
        document["annotations"][0]["attributes"] = {"score": [{"a": float("-inf")}]}
        document["images"][1]["time"] = float("nan")

    document, listing = repaired(tmp_path, change)
    text = (tmp_path / "fixed.json").read_text()
    json.loads(text, parse_constant=lambda constant: pytest.fail(constant))
    assert document["info"] == {"mean": [1.5, None]}
    assert document["annotations"][0]["attributes"] == {"score": [{"a": None}]}
    assert {r["section"]: [e["name"] for e in r["entries"]] for r in listing["repairs"]} == {
        "file": [""],
        "image": ["image 20"],
        "annotation": ["annotation 101"],
    }


@pytest.mark.parametrize("key", ["coco_url", "url", "flickr_url"])
def test_the_file_that_a_url_names_is_taken_for_a_missing_file_name(tmp_path: Path, key: str) -> None:
    def change(document: dict[str, Any]) -> None:
        del document["images"][0]["file_name"]
        document["images"][0][key] = "http://images.example.org/train2017/a.png"

    text = refusal(tmp_path, change)
    assert (
        "image 10: missing file_name, but 'http://images.example.org/train2017/a.png' names 'a.png'" in text
    )
    document, _ = repaired(tmp_path, change)
    assert [image["file_name"] for image in document["images"]] == ["a.png", "nested/b.png"]


def test_a_file_that_is_a_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    images, annotations = write_coco(tmp_path)
    annotations.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    with pytest.raises(InputError, match="it is a Git LFS pointer: run `git lfs pull`"):
        repair(images, annotations, tmp_path / "fixed.json")


@pytest.mark.parametrize("seed", range(80))
def test_random_changes_end_in_a_valid_file_or_a_one_line_error(tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    junk = [None, True, 0, -1, 1.0, 2.5, float("nan"), 10**400, "", "10", [], {}, [[]], [1, 2], [[1, 2, 3, 4]],
            [[1, 2], [3, 4], [5, 6]], {"size": [5, 8], "counts": [11, 2, 27]}, {"size": [8, 5], "counts": [40]},
            "7", 2**63, float("inf"), "a" * 1200, ["2", "1", "4", "1", "4", "3"], "2,1,2,2", "http://x.org/a.png",
            "A.png", "x\\a.png", "..", [[2, 1, 20, 1, 20, 9]], [[1e9, 1, 2, 3, 4, 5]]]  # fmt: skip

    def change(document: dict[str, Any]) -> None:
        for _ in range(generator.randint(1, 3)):
            entry = generator.choice(
                document[generator.choice(["images", "annotations", "annotations", "categories"])]
            )
            entry[generator.choice(list(entry))] = generator.choice(junk)

    images, annotations = write_coco(tmp_path, change)
    _, problems = check_data(images, annotations)
    if any(problem.error for problem in problems if problem.kind != "no_usable_object"):
        with pytest.raises(InputError):
            read_coco(images, annotations)
    else:
        read_coco(images, annotations)
    try:
        repair(images, annotations, tmp_path / "fixed.json")
    except InputError:
        assert not (tmp_path / "fixed.json").exists()
        return
    _, problems = check_data(images, tmp_path / "fixed.json")
    assert [problem.text for problem in problems if problem.error] == []
    truth, data = COCO(str(tmp_path / "fixed.json")), read_coco(images, tmp_path / "fixed.json")
    for record in data.images:
        for annotation, mask in zip(record.objects, record.object_masks().bitmaps().numpy(), strict=True):
            if annotation.has_mask:
                assert np.array_equal(mask, truth.annToMask(truth.anns[annotation.id]))
    _, again = repair(images, tmp_path / "fixed.json", tmp_path / "again.json")
    assert again == []
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "fixed.json").read_bytes()
