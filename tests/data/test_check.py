"""maskloss/data/check.py: every image is decoded, and data that may be a mistake are warned of."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskloss.data import check
from maskloss.data.check import check_data
from maskloss.errors import InputError
from tests.data.coco_files import (
    in_annotation,
    write_coco,
)


def test_check_finds_only_oddities_in_a_valid_file(tmp_path: Path) -> None:
    data, problems = check_data(*write_coco(tmp_path))
    assert data is not None
    assert [str(problem) for problem in problems] == [
        f"warning: {tmp_path / 'annotations.json'}: 1 images have no annotation; they train as background",
        f"warning: {tmp_path / 'annotations.json'}: 1 of 3 annotations is a crowd (iscrowd 1): crowds are never "
        "positives, and are ignored in evaluation; some annotation tools write brush masks as crowds: if each is one "
        "object, `maskloss repair --crowds objects` makes them objects",
    ]


def test_check_finds_an_unreadable_image(tmp_path: Path) -> None:
    images, annotations = write_coco(tmp_path)
    (images / "a.png").write_bytes(b"no image")
    _, problems = check_data(images, annotations)
    errors = [problem.text for problem in problems if problem.error]
    assert len(errors) == 1
    assert errors[0].startswith(f"{annotations}: image 10: a.png: not a readable image")


def test_check_names_a_git_lfs_pointer(tmp_path: Path) -> None:
    images, annotations = write_coco(tmp_path)
    (images / "a.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    _, problems = check_data(images, annotations)
    [error] = [problem.text for problem in problems if problem.error]
    assert error.endswith("a Git LFS pointer: run `git lfs pull`")


def test_check_finds_an_image_of_another_size(tmp_path: Path) -> None:
    images, annotations = write_coco(tmp_path)
    Image.new("RGB", (9, 5)).save(images / "a.png")
    _, problems = check_data(images, annotations)
    errors = [problem.text for problem in problems if problem.error]
    assert len(errors) == 1
    assert "a.png: the file is 9 x 5, but 8 x 5 (width x height) is recorded for it" in errors[0]


def test_check_finds_that_there_is_no_usable_object(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["annotations"] = document["annotations"][2:]

    _, problems = check_data(*write_coco(tmp_path, change))
    [error] = [p.text for p in problems if p.error]
    assert error.startswith(f"{tmp_path / 'annotations.json'}: all 1 annotations are crowds (iscrowd 1)")
    assert "`maskloss repair --crowds objects`" in error

    _, problems = check_data(*write_coco(tmp_path, lambda document: document.update(annotations=[])))
    assert [p.text for p in problems if p.error] == [
        f"{tmp_path / 'annotations.json'}: contains no usable object"
    ]


def test_check_warns_about_a_box_that_does_not_fit_its_mask(tmp_path: Path) -> None:
    # The mask's extent is 2, 1, 4, 3; the box's right side is 4 px further.
    _, problems = check_data(*write_coco(tmp_path, in_annotation(bbox=[2, 1, 6, 2])))
    assert [p.text for p in problems if not p.error and "bbox" in p.text] == [
        f"{tmp_path / 'annotations.json'}: annotation 101: bbox is up to 4.0 px from the segmentation's extent "
        "(image 10, a.png); if they are wrong, `maskloss repair --boxes from-masks` takes the masks' extents"
    ]


def test_check_warns_about_a_file_that_is_listed_twice(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["images"][1]["file_name"] = "a.png"

    _, problems = check_data(*write_coco(tmp_path, change))
    assert any("2 images have the file_name 'a.png'" in p.text and not p.error for p in problems)


def test_check_warns_about_a_category_without_objects(tmp_path: Path) -> None:
    _, problems = check_data(
        *write_coco(tmp_path, lambda document: document["categories"].append({"id": 8, "name": "cow"}))
    )
    assert any("no object of the categories cow" in p.text and not p.error for p in problems)


@pytest.mark.parametrize(("width", "warned"), [(5, False), (5.5, True)])
def test_check_allows_boxes_3_px_from_their_masks(tmp_path: Path, width: float, warned: bool) -> None:
    # The mask's right side is at 4, and the box's at 7 or 7.5.
    _, problems = check_data(*write_coco(tmp_path, in_annotation(bbox=[2, 1, width, 2])))
    assert any("bbox is up to 3.5 px from" in problem.text for problem in problems) is warned
    assert any("bbox" in problem.text for problem in problems) is warned


def test_check_warns_about_annotations_that_repeat_another_one(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        first, second = document["annotations"][:2]
        document["annotations"] += [
            {**first, "id": 201},
            {**second, "id": 202},
            # None of these repeats another one: another image, mask, box, category, and a crowd.
            {**first, "id": 203, "image_id": 20},
            {**first, "id": 204, "segmentation": [[2, 1, 4, 1, 4, 3]]},
            {**first, "id": 205, "bbox": [2, 1, 2.5, 2]},
            {**first, "id": 206, "category_id": second["category_id"]},
            {**first, "id": 207, "iscrowd": 1},
            # This one does, and names the first.
            {**first, "id": 208},
        ]

    images, annotations = write_coco(tmp_path, change)
    _, problems = check_data(images, annotations)
    [problem] = [problem for problem in problems if problem.kind == "repeated"]
    assert not problem.error
    assert [example.partition(" (")[0] for example in problem.examples] == [
        "annotation 201: repeats annotation 101",
        "annotation 202: repeats annotation 102",
        "annotation 208: repeats annotation 101",
    ]


U_SHAPE = [0, 0, 8, 0, 8, 5, 6, 5, 6, 2, 2, 2, 2, 5, 0, 5]


@pytest.mark.parametrize(
    ("inner", "filled"), [([3, 3, 5, 3, 5, 4, 3, 4], False), ([3, 0.5, 5, 0.5, 5, 1.5, 3, 1.5], True)]
)
def test_check_warns_about_a_polygon_inside_another_but_not_in_its_notch(
    tmp_path: Path, inner: list[float], filled: bool
) -> None:
    change = in_annotation(segmentation=[U_SHAPE, inner], bbox=[0, 0, 8, 5])
    _, problems = check_data(*write_coco(tmp_path, change))
    text = "annotation 101: segmentation: a polygon inside another one is filled (image 10, a.png)"
    assert any(text in problem.text and not problem.error for problem in problems) is filled


def test_check_lists_the_first_ten_categories_without_objects(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["categories"] += [{"id": 10 + i, "name": f"c{i}"} for i in range(12)]

    _, problems = check_data(*write_coco(tmp_path, change))
    [text] = [problem.text for problem in problems if problem.kind == "unused_category"]
    assert text.endswith("no object of the categories c0, c1, c2, c3, c4, c5, c6, c7, c8, c9 and 2 more")


def test_check_returns_no_data_for_a_file_that_cannot_be_decoded(tmp_path: Path) -> None:
    images, annotations = write_coco(tmp_path)
    annotations.write_text("{")
    data, [problem] = check_data(images, annotations)
    assert data is None
    assert problem.error
    assert "not valid JSON" in problem.text


def test_check_of_a_missing_folder_or_file_raises(tmp_path: Path) -> None:
    images, annotations = write_coco(tmp_path)
    with pytest.raises(InputError, match="nowhere: the folder of images does not exist"):
        check_data(tmp_path / "nowhere", annotations)
    with pytest.raises(InputError, match=r"nowhere\.json: cannot be read"):
        check_data(images, tmp_path / "nowhere.json")


def test_check_warns_about_a_jpeg_that_ends_in_zeros(tmp_path: Path) -> None:
    images, annotations = write_coco(tmp_path, lambda d: d["images"][0].update(file_name="a.jpg"))
    Image.open(images / "a.png").resize((80, 50)).resize((8, 5)).save(images / "a.jpg")
    content = (images / "a.jpg").read_bytes()
    (images / "a.jpg").write_bytes(content[:-2] + bytes(50))
    _, problems = check_data(images, annotations)
    assert [problem.text for problem in problems if problem.kind == "no_end"] == [
        f"{annotations}: image 10: a.jpg lacks the end marker of a JPEG, so a part of the image may be missing (gray)"
    ]


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_check_says_that_an_image_without_a_size_is_turned(tmp_path: Path, orientation: int) -> None:
    def change(document: dict[str, Any]) -> None:
        document["images"][0] = {"id": 10, "file_name": "a.jpg"}

    images, annotations = write_coco(tmp_path, change)
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.new("RGB", (8, 5) if orientation < 5 else (5, 8)).save(images / "a.jpg", exif=exif)
    _, problems = check_data(images, annotations)
    texts = [problem.text for problem in problems if problem.kind in ("turned_size", "turned")]
    assert texts == (
        []
        if orientation == 1
        else [
            f"{annotations}: image 10: missing width and height; a.jpg is 8 x 5, rotated or mirrored as its EXIF "
            "orientation says"
        ]
    )


def ring(radius: float, count: int, x: float = 100.0) -> list[float]:
    angles = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return np.stack([x + radius * np.cos(angles), 100 + radius * np.sin(angles)], axis=1).reshape(-1).tolist()


@pytest.mark.parametrize(
    ("segmentation", "filled"),
    [
        ([ring(80, 20_000), ring(40, 20_000)], True),
        (
            [
                ring(80, 2_000),
                *[[20 + i % 50, 150, 21 + i % 50, 150, 21 + i % 50, 151 + i % 40] for i in range(4_000)],
            ],
            True,
        ),
        # The corners of the ring's extent are outside the ring.
        ([ring(80, 2_000), *[[22, 22, 25, 22, 25, 25 + i % 7] for i in range(4_000)]], False),
        ([[10, 10, 100, 10, 100, 100, 10, 60 + i / 100] for i in range(4_000)], None),
        ([[i, j, i + 0.5, j, i + 0.5, j + 0.5] for i in range(70) for j in range(70)], False),
    ],
    ids=["vertices", "parts", "parts outside", "similar parts", "grid"],
)
def test_the_search_for_holes_is_bounded_and_finds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, segmentation: Any, filled: bool | None
) -> None:
    pairs, calls = [0], [0]
    inside = check._are_inside

    def counted(points: Any, outer: Any) -> bool:
        pairs[0] += len(points) * len(outer)
        calls[0] += 1
        return inside(points, outer)

    monkeypatch.setattr(check, "_are_inside", counted)
    corners = np.concatenate([np.reshape(part, (-1, 2)) for part in segmentation])
    low, high = corners.min(axis=0), corners.max(axis=0)
    change = in_annotation(segmentation=segmentation, bbox=[*low.tolist(), *(high - low).tolist()])
    images, annotations = write_coco(
        tmp_path,
        lambda d: (
            d["images"][0].update(width=200, height=200),
            change(d),
            d["annotations"].__delitem__(slice(1, 3)),
        ),
    )
    Image.new("RGB", (200, 200)).save(images / "a.png")
    tracemalloc.start()
    _, problems = check_data(images, annotations)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    if filled is not None:
        assert any(problem.kind == "hole" for problem in problems) is filled
    assert pairs[0] <= check._MOST_TESTS + 100 * 20_000
    assert calls[0] <= 10_100
    assert peak < 200e6
