"""maskloss/data/subset.py: which images are taken, and what is copied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from maskloss.data.coco import read_coco
from maskloss.data.subset import write_subset
from maskloss.errors import InputError, RunError

#: The categories in each of the images 1 to 6; "!" marks a crowd.
CONTENTS = (("cat",), ("cat", "dog"), (), ("dog",), ("cow", "!dog"), ("cat", "cow"))
NAMES = ("cat", "dog", "cow")


@pytest.fixture
def whole(tmp_path: Path) -> tuple[str, str]:
    folder = tmp_path / "whole"
    (folder / "images" / "sub").mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, contents in enumerate(CONTENTS, start=1):
        file_name = f"sub/{number}.png"
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / "images" / file_name)
        images.append({"id": number, "file_name": file_name, "width": 8, "height": 8, "license": number})
        for name in contents:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": 5 + NAMES.index(name.removeprefix("!")),
                    "bbox": [1, 1, 4, 4],
                    "area": 16,
                    "iscrowd": int(name.startswith("!")),
                    "segmentation": {"size": [8, 8], "counts": [9, 4, 4, 4, 4, 4, 4, 4, 27]}
                    if name.startswith("!")
                    else [[1, 1, 5, 1, 5, 5, 1, 5], [1, 1, 2, 2]],
                    "note": f"as it stands {number}",
                }
            )
    document = {
        "info": {"description": "whole"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 5 + i, "name": name} for i, name in enumerate(NAMES)],
    }
    (folder / "annotations.json").write_text(json.dumps(document))
    return str(folder / "images"), str(folder / "annotations.json")


def taken(output: Path) -> list[int]:
    document = json.loads((output / "annotations.json").read_text())
    return [image["id"] for image in document["images"]]


def test_max_images_takes_the_first(whole: tuple[str, str], tmp_path: Path) -> None:
    write_subset(*whole, str(tmp_path / "out"), max_images=3)
    assert taken(tmp_path / "out") == [1, 2, 3]


def test_images_per_class_skips_images_that_add_nothing_needed(
    whole: tuple[str, str], tmp_path: Path
) -> None:
    # Image 1 has the first cat, 2 the first dog, 3 nothing, 4 a second dog, 5 the first cow, 6 only second ones.
    write_subset(*whole, str(tmp_path / "out"), images_per_class=1)
    assert taken(tmp_path / "out") == [1, 2, 5]


def test_images_per_class_does_not_count_a_crowd(whole: tuple[str, str], tmp_path: Path) -> None:
    # Images 2 and 4 have dogs; the crowd of dogs in 5 does not count as a third one. 6 has the second cow.
    write_subset(*whole, str(tmp_path / "out"), images_per_class=2)
    assert taken(tmp_path / "out") == [1, 2, 4, 5, 6]


def test_images_per_class_stops_at_max_images(whole: tuple[str, str], tmp_path: Path) -> None:
    write_subset(*whole, str(tmp_path / "out"), images_per_class=1, max_images=2)
    assert taken(tmp_path / "out") == [1, 2]


def test_categories_keep_only_their_images_and_annotations(whole: tuple[str, str], tmp_path: Path) -> None:
    data = write_subset(*whole, str(tmp_path / "out"), categories=["dog"])
    assert taken(tmp_path / "out") == [2, 4]
    assert [category.name for category in data.categories] == ["dog"]
    document = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert [annotation["id"] for annotation in document["annotations"]] == [3, 4]


def test_entries_are_copied_unchanged(whole: tuple[str, str], tmp_path: Path) -> None:
    write_subset(*whole, str(tmp_path / "out"), max_images=2)
    original = json.loads(Path(whole[1]).read_text())
    copied = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert copied["info"] == original["info"]
    assert copied["images"] == original["images"][:2]
    assert copied["annotations"] == original["annotations"][:3]
    assert copied["categories"] == original["categories"]


def test_image_files_are_copied_byte_by_byte_and_no_others(whole: tuple[str, str], tmp_path: Path) -> None:
    write_subset(*whole, str(tmp_path / "out"), max_images=2)
    copies = sorted(p for p in (tmp_path / "out" / "images").rglob("*") if p.is_file())
    assert [path.relative_to(tmp_path / "out" / "images").as_posix() for path in copies] == [
        "sub/1.png",
        "sub/2.png",
    ]
    for path in copies:
        assert path.read_bytes() == (Path(whole[0]) / "sub" / path.name).read_bytes()


def test_the_returned_subset_is_read_from_the_new_files(whole: tuple[str, str], tmp_path: Path) -> None:
    data = write_subset(*whole, str(tmp_path / "out"), max_images=2)
    assert data == read_coco(tmp_path / "out" / "images", tmp_path / "out" / "annotations.json")
    assert data.num_objects == 3


def test_the_same_call_gives_the_same_subset(whole: tuple[str, str], tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_subset(*whole, str(tmp_path / name), images_per_class=1)
    first, second = ((tmp_path / name / "annotations.json").read_bytes() for name in ("first", "second"))
    assert first == second


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give --images-per-class, --max-images, --fraction or --categories"),
        ({"max_images": 0}, "--max-images must be at least 1, got 0"),
        ({"images_per_class": -1}, "--images-per-class must be at least 1, got -1"),
        ({"categories": ["dog", "unicorn"]}, "no category is named 'unicorn'"),
        ({"categories": [""]}, "no category is named ''"),
    ],
)
def test_bad_options_are_refused_and_nothing_is_written(
    whole: tuple[str, str], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        write_subset(*whole, str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_refused_and_left_as_it_was(
    whole: tuple[str, str], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="out: is not an empty folder"):
        write_subset(*whole, str(tmp_path / "out"), max_images=1)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_set_with_errors_is_refused(whole: tuple[str, str], tmp_path: Path) -> None:
    Path(whole[0], "sub", "1.png").unlink()
    with pytest.raises(InputError, match=r"image 1: .*1\.png does not exist"):
        write_subset(*whole, str(tmp_path / "out"), max_images=1)


def test_a_failed_copy_leaves_no_annotation_file_and_no_half_image(
    whole: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, destination: Path) -> None:
        destination.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("maskloss.files.shutil.copyfile", full)
    with pytest.raises(RunError, match=r"1\.png: cannot be written: No space left on device"):
        write_subset(*whole, str(tmp_path / "out"), max_images=1)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


# A fraction and the rest.


def names_of(folder: Path) -> set[str]:
    document = json.loads((folder / "annotations.json").read_text())
    files = {str(path.relative_to(folder / "images")) for path in (folder / "images").rglob("*.png")}
    assert {image["file_name"] for image in document["images"]} == files
    return files


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.7])
def test_a_fraction_and_the_rest_are_the_whole(
    whole: tuple[str, str], tmp_path: Path, fraction: float
) -> None:
    write_subset(*whole, str(tmp_path / "a"), fraction=fraction, rest=str(tmp_path / "b"))
    one, other = names_of(tmp_path / "a"), names_of(tmp_path / "b")
    assert not one & other
    assert one | other == {f"sub/{number}.png" for number in range(1, 7)}
    documents = [json.loads((tmp_path / part / "annotations.json").read_text()) for part in "ab"]
    whole_document = json.loads(Path(whole[1]).read_text())
    # Crowds and unknown fields are copied too.
    assert sum(len(d["annotations"]) for d in documents) == len(whole_document["annotations"])
    assert all("license" in image for d in documents for image in d["images"])
    # Both parts have some of the three cats, two dogs and two cows if possible.
    if fraction == 0.5:
        for document in documents:
            assert {a["category_id"] for a in document["annotations"] if not a["iscrowd"]} == {5, 6, 7}


def large_set(folder: Path) -> tuple[str, str]:
    """Write 200 images with categories in 100, 50, 20, 4 and 1 of them, and 30 without any."""
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "images/a.png")
    images, annotations = [], []
    for number in range(200):
        images.append({"id": number, "file_name": "a.png", "width": 8, "height": 8})
        if number >= 170:
            continue
        for category, count, step in ((1, 100, 7), (2, 50, 11), (3, 20, 13), (4, 4, 17), (5, 1, 1)):
            if number * step % 170 < count:
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": number, "category_id": category, "bbox": [1, 1, 4, 4],
                     "segmentation": [[1, 1, 5, 1, 5, 5, 1, 5]], "area": 16, "iscrowd": 0}
                )  # fmt: skip
    document = {"images": images, "annotations": annotations}
    document["categories"] = [{"id": i, "name": str(i)} for i in range(1, 6)]
    (folder / "a.json").write_text(json.dumps(document))
    return str(folder / "images"), str(folder / "a.json")


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.8])
def test_each_category_has_its_share(tmp_path: Path, fraction: float) -> None:
    source = large_set(tmp_path / "whole")
    data = write_subset(*source, str(tmp_path / "a"), fraction=fraction, rest=str(tmp_path / "b"))
    rest = read_coco(tmp_path / "b/images", tmp_path / "b/annotations.json")
    assert len(data.images) == pytest.approx(fraction * 200, abs=2)
    assert len(data.images) + len(rest.images) == 200
    for category in range(1, 6):
        one, other = (
            sum(any(a.category_id == category for a in image.annotations) for image in part.images)
            for part in (data, rest)
        )
        # Within one image of its share; a category of one image is in the larger part.
        assert one == pytest.approx(fraction * (one + other), abs=1.5), category
        if category == 5:
            assert one == (1 if fraction > 0.5 else 0)
    again = write_subset(*source, str(tmp_path / "c"), fraction=fraction)
    assert [image.id for image in again.images] == [image.id for image in data.images]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, "--fraction must be above 0 and below 1, got 0"),
        ({"fraction": 1.0}, "--fraction must be above 0 and below 1, got 1"),
        ({"fraction": float("nan")}, "--fraction must be above 0 and below 1, got nan"),
        ({"fraction": 0.5, "max_images": 3}, "--fraction and --max-images each say how many images"),
        ({"rest": "b", "max_images": 3}, "--rest takes what --fraction leaves"),
        ({"fraction": 0.5, "rest": "a"}, "--rest .* and --output .*: one contains the other"),
        ({"fraction": 0.5, "rest": "a/b"}, "--rest .* and --output .*: one contains the other"),
        ({"fraction": 0.99, "rest": "b"}, "leaves none for --rest"),
    ],
)
def test_contradictory_options_are_refused(
    whole: tuple[str, str], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    if "rest" in options:
        options = {**options, "rest": str(tmp_path / options["rest"])}
    with pytest.raises(InputError, match=message):
        write_subset(*whole, str(tmp_path / "a"), **options)
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


# Parts that would be refused.


def change_document(whole: tuple[str, str], change: Any) -> None:
    document = json.loads(Path(whole[1]).read_text())
    change(document)
    Path(whole[1]).write_text(json.dumps(document))


def to_crowds(*numbers: int) -> Any:
    def change(document: dict[str, Any]) -> None:
        for annotation in document["annotations"]:
            if annotation["image_id"] in numbers:
                annotation["iscrowd"] = 1

    return change


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (to_crowds(1), {"max_images": 1}, "out: all 1 annotations are crowds"),
        (to_crowds(1, 2), {"max_images": 2}, "out: all 3 annotations are crowds"),
        (to_crowds(2, 4, 5), {"categories": ["dog", "cow"], "max_images": 1}, None),
    ],
)
def test_a_part_that_would_be_refused_is_not_written(
    whole: tuple[str, str], tmp_path: Path, change: Any, options: dict[str, Any], message: str | None
) -> None:
    change_document(whole, change)
    read_coco(*whole)
    if message is None:
        write_subset(*whole, str(tmp_path / "out"), **options)
        return
    with pytest.raises(InputError, match=message) as caught:
        write_subset(*whole, str(tmp_path / "out"), **options)
    assert str(caught.value).startswith(f"{whole[1]}: nothing is written: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.8])
def test_both_parts_can_be_read_or_none_is_written(
    whole: tuple[str, str], tmp_path: Path, fraction: float
) -> None:
    written = 0
    for crowds in ((1,), (1, 2), (2, 4), (4, 5, 6), (1, 2, 4, 5)):
        change_document(whole, to_crowds(*crowds))
        name = "".join(map(str, crowds))
        outputs = tmp_path / f"a{name}", tmp_path / f"b{name}"
        try:
            write_subset(*whole, str(outputs[0]), fraction=fraction, rest=str(outputs[1]))
        except InputError:
            assert not any(output.exists() for output in outputs)
        else:
            written += 1
            for output in outputs:
                read_coco(output / "images", output / "annotations.json")
    assert written > 0


# Names of categories.


def test_all_categories_of_a_name_are_taken(whole: tuple[str, str], tmp_path: Path) -> None:
    change_document(whole, lambda d: d["categories"][2].update(name="dog"))
    data = write_subset(*whole, str(tmp_path / "out"), categories=["dog"])
    assert [category.id for category in data.categories] == [6, 7]
    assert taken(tmp_path / "out") == [2, 4, 5, 6]


@pytest.mark.parametrize("name", ["lamp, table", "lamp,table", " lamp , table", "lamp, table, blue"])
def test_a_name_with_commas_may_come_in_parts(whole: tuple[str, str], tmp_path: Path, name: str) -> None:
    def change(document: dict[str, Any]) -> None:
        document["categories"][0]["name"], document["categories"][1]["name"] = name, "lamp"

    change_document(whole, change)
    # As the command line splits it.
    parts = [part.strip() for part in name.split(",")]
    for given, expected in (
        (parts, [5]),
        ([name], [5]),
        (["cow", *parts], [5, 7]),
        (["lamp", "cow"], [6, 7]),
        ([*parts, "lamp"], [5, 6]),
    ):
        output = tmp_path / f"out {len(list(tmp_path.iterdir()))}"
        data = write_subset(*whole, str(output), categories=given)
        assert [category.id for category in data.categories] == expected
    with pytest.raises(InputError, match="no category is named 'table'"):
        write_subset(*whole, str(tmp_path / "last"), categories=["cow", "table"])
