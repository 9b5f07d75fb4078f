"""maskloss/data/coco.py and check.py: what is read, what is refused, and with which messages."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from maskloss.data.check import check_data
from maskloss.data.coco import Category, find_problems, read_coco
from maskloss.data.dataset import CocoDataset
from maskloss.errors import InputError
from tests.data.coco_files import HEIGHT, RECTANGLE_COUNTS, WIDTH, write_coco

Change = Callable[[dict[str, Any]], object]


def refusal(folder: Path, change: Change) -> str:
    """Return the error message for a changed data set: one line that starts with the file."""
    images, annotations = write_coco(folder, change)
    with pytest.raises(InputError) as caught:
        read_coco(images, annotations)
    text = str(caught.value)
    assert text.startswith(f"{annotations}: ")
    assert "\n" not in text
    return text


def left_out(folder: Path, change: Change) -> str:
    """Return the warning that annotation 101 of a changed data set is left out."""
    data = read_coco(*write_coco(folder, change))
    assert [annotation.id for annotation in data.images[0].annotations] == [102, 103]
    return data.warnings[0]


def in_annotation(**fields: Any) -> Change:
    """Set fields of annotation 101."""
    return lambda document: document["annotations"][0].update(fields)


def in_image(**fields: Any) -> Change:
    """Set fields of image 10."""
    return lambda document: document["images"][0].update(fields)


# Files that are read.


def test_labels_are_contiguous_from_1_in_the_order_of_the_category_ids(tmp_path: Path) -> None:
    data = read_coco(*write_coco(tmp_path))
    assert data.categories == (Category(3, "cat"), Category(7, "dog"))
    assert data.labels == {3: 1, 7: 2}
    assert CocoDataset(data)[0][1]["labels"].tolist() == [2, 1]


def test_boxes_are_xyxy(tmp_path: Path) -> None:
    data = read_coco(*write_coco(tmp_path, in_annotation(bbox=[2, 1, 3, 4])))
    assert data.images[0].annotations[0].box == (2, 1, 5, 5)


def test_a_crowd_is_never_a_target(tmp_path: Path) -> None:
    data = read_coco(*write_coco(tmp_path))
    assert [annotation.crowd for annotation in data.images[0].annotations] == [False, False, True]
    _, target = CocoDataset(data)[0]
    assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"]) == 2
    assert data.num_objects == 2


def test_uncompressed_rle_equals_the_compressed_one(tmp_path: Path) -> None:
    rectangle = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    rectangle[1:3, 2:4] = 1
    encoded = coco_mask.encode(np.asfortranarray(rectangle))
    compressed = {"size": [HEIGHT, WIDTH], "counts": encoded["counts"].decode()}
    images, first = write_coco(tmp_path)
    _, second = write_coco(
        tmp_path, lambda document: document["annotations"][1].update(segmentation=compressed), "second.json"
    )
    masks = [CocoDataset(read_coco(images, path))[0][1]["masks"].bitmaps() for path in (first, second)]
    assert np.array_equal(masks[0][1].numpy(), rectangle)
    assert np.array_equal(masks[1][1].numpy(), rectangle)


def test_a_missing_area_is_that_of_the_mask(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        for annotation in document["annotations"]:
            del annotation["area"]

    data = read_coco(*write_coco(tmp_path, change))
    assert [annotation.area for annotation in data.images[0].annotations] == [4, 4, 40]


def test_a_missing_iscrowd_means_no_crowd(tmp_path: Path) -> None:
    data = read_coco(*write_coco(tmp_path, lambda document: document["annotations"][2].pop("iscrowd")))
    assert data.num_objects == 3


def test_a_box_up_to_a_pixel_outside_is_clipped(tmp_path: Path) -> None:
    data = read_coco(*write_coco(tmp_path, in_annotation(bbox=[-1, -0.5, 10, 6.5])))
    assert data.images[0].annotations[0].box == (0, 0, WIDTH, HEIGHT)


def test_a_file_name_with_dots_that_stays_inside_is_read(tmp_path: Path) -> None:
    data = read_coco(*write_coco(tmp_path, in_image(file_name="nested/../a.png")))
    assert data.image_path(data.images[0]).is_file()


def test_a_symbolic_link_out_of_the_folder_is_followed(tmp_path: Path) -> None:
    images, annotations = write_coco(tmp_path, in_image(file_name="link.png"))
    elsewhere = tmp_path / "elsewhere.png"
    (images / "a.png").rename(elsewhere)
    (images / "link.png").symlink_to(elsewhere)
    assert len(read_coco(images, annotations).images) == 2


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
    assert text.endswith(f"not a COCO-format file: it has no list of {key}")


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


def test_an_entry_that_is_not_an_object_is_named_by_its_position(tmp_path: Path) -> None:
    text = refusal(tmp_path, lambda document: document["annotations"].append([1, 2]))
    assert "annotation number 3: expected an object, got list" in text


@pytest.mark.parametrize("kind", ["images", "categories"])
def test_a_duplicate_id_with_other_content_is_named(tmp_path: Path, kind: str) -> None:
    text = refusal(tmp_path, lambda document: document[kind].append({**document[kind][0], "name": "other"}))
    identity = {"images": "image 10", "categories": "category 7"}[kind]
    assert f"{identity}: the id is used twice" in text


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


def test_annotations_without_an_id_or_with_a_duplicate_one_get_new_ids(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["annotations"][0].pop("id")
        document["annotations"][2]["id"] = 102

    data = read_coco(*write_coco(tmp_path, change))
    assert [annotation.id for annotation in data.images[0].annotations] == [103, 102, 104]
    assert any("annotation number 0: missing id" in warning for warning in data.warnings)
    assert any("annotation 102: the id is used twice" in warning for warning in data.warnings)


@pytest.mark.parametrize("identity", [99, True, "10", None, [10]])
def test_an_annotation_of_an_unknown_image_is_named(tmp_path: Path, identity: Any) -> None:
    text = refusal(tmp_path, in_annotation(image_id=identity))
    assert f"annotation 101: image_id {identity!r} is not in the file" in text


@pytest.mark.parametrize("identity", [99, True, "7", None, [7]])
def test_an_annotation_of_an_unknown_category_is_named(tmp_path: Path, identity: Any) -> None:
    text = refusal(tmp_path, in_annotation(category_id=identity))
    assert f"annotation 101: category_id {identity!r} is not in the file" in text


@pytest.mark.parametrize(("crowd", "read"), [(None, 0), (True, 1), ("0", 0), ("1", 1), (1.0, 1), (False, 0)])
def test_an_unambiguous_iscrowd_is_read(tmp_path: Path, crowd: Any, read: int) -> None:
    data = read_coco(*write_coco(tmp_path, in_annotation(iscrowd=crowd)))
    assert data.images[0].annotations[0].crowd == read
    assert any(f"annotation 101: iscrowd {crowd!r} is read as {read}" in warning for warning in data.warnings)


@pytest.mark.parametrize("crowd", [2, -1, "yes", 0.5, []])
def test_an_iscrowd_that_is_neither_0_nor_1_is_named(tmp_path: Path, crowd: Any) -> None:
    text = refusal(tmp_path, in_annotation(iscrowd=crowd))
    assert f"annotation 101: iscrowd must be 0 or 1, not {crowd!r}" in text


def test_several_errors_raise_the_first_with_the_count(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["annotations"][0]["iscrowd"] = 7
        document["annotations"][1]["category_id"] = 99
        document["annotations"][2]["image_id"] = 99

    text = refusal(tmp_path, change)
    assert "annotation 103: image_id 99 is not in the file" in text
    assert text.endswith("(and 2 more kinds of errors, `maskloss check` lists them)")


def test_errors_of_a_kind_are_one_message_with_a_count_and_three_examples(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["annotations"] = [
            {**document["annotations"][0], "id": i, "category_id": 99} for i in range(1136)
        ]

    images, annotations = write_coco(tmp_path, change)
    _, problems = check_data(images, annotations)
    assert [problem.text for problem in problems if problem.error] == [
        f"{annotations}: 1136 annotations of categories that are not in the file: annotation 0: category_id 99 is not "
        "in the file (image 10, a.png); annotation 1: category_id 99 is not in the file (image 10, a.png); "
        "annotation 2: category_id 99 is not in the file (image 10, a.png); ...; `maskloss repair` converts text that "
        "spells an id or a name, and leaves out the others"
    ]
    assert len(problems[0].examples) == 1136


def test_annotations_of_an_image_with_an_error_have_no_error_of_their_own(tmp_path: Path) -> None:
    images, annotations = write_coco(tmp_path)
    (images / "a.png").unlink()
    _, problems = check_data(images, annotations)
    assert [problem.text for problem in problems] == [
        f"{annotations}: image 10: the file {images / 'a.png'} does not exist; `maskloss repair` leaves them out"
    ]


def test_a_message_is_short_whatever_the_file_holds(tmp_path: Path) -> None:
    for number, change in enumerate(
        [
            in_annotation(category_id="x" * 1_000_000),
            in_annotation(iscrowd=list(range(100_000))),
            in_image(file_name="y" * 1_000_000),
            in_image(id="z" * 1_000_000),
            in_annotation(segmentation={"size": "s" * 100_000, "counts": []}),
            in_annotation(segmentation=[["t" * 100_000]]),
            lambda document: document["categories"][0].update(id="u" * 100_000),
        ]
    ):
        images, annotations = write_coco(tmp_path, change, f"{number}.json")
        with pytest.raises(InputError) as caught:
            read_coco(images, annotations)
        assert len(str(caught.value)) - len(str(tmp_path)) < 300
        _, problems = check_data(images, annotations)
        assert all(len(problem.text) - 4 * len(str(tmp_path)) < 1500 for problem in problems)


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


@pytest.mark.parametrize(
    "file_name",
    ["../a.png", "nested/../../a.png", "..", "nested/../../images/a.png", "./../images/a.png"],
)
def test_a_file_name_that_leaves_the_folder_is_refused(tmp_path: Path, file_name: str) -> None:
    text = refusal(tmp_path, in_image(file_name=file_name))
    assert f"image 10: file_name {file_name!r} leaves the image folder" in text


def test_an_absolute_file_name_is_refused_even_inside_the_folder(tmp_path: Path) -> None:
    file_name = str(tmp_path / "images" / "a.png")
    text = refusal(tmp_path, in_image(file_name=file_name))
    # In a message, the middle of a long name is cut out.
    assert f"image 10: file_name {file_name[:5]!r}"[:-1] in text
    assert "a.png' leaves the image folder" in text


@pytest.mark.parametrize("file_name", ["", None, 3, ["a.png"], "a\0.png"])
def test_a_file_name_that_is_not_a_name_is_refused(tmp_path: Path, file_name: Any) -> None:
    text = refusal(tmp_path, in_image(file_name=file_name))
    assert f"image 10: file_name must be the name of a file, not {file_name!r}" in text


@pytest.mark.parametrize("file_name", ["missing.png", "nested", ".", "a" * 50 + ".png", "a.png/b.png"])
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


# Boxes.


@pytest.mark.parametrize("box", [[2.1, 1, 2.8e-14, 2], [2, 1.1, 2, 1e-8]])
def test_an_object_with_a_side_that_is_0_in_float32_is_left_out(tmp_path: Path, box: list[float]) -> None:
    text = left_out(tmp_path, in_annotation(bbox=box))
    assert f"annotation 101: bbox {box} has a side that is 0 in float32" in text


def test_an_rle_without_a_pixel_is_left_out(tmp_path: Path) -> None:
    text = left_out(tmp_path, in_annotation(segmentation={"size": [5, 8], "counts": [40]}))
    assert "annotation 101: segmentation: the RLE has no pixel" in text


@pytest.mark.parametrize("box", [[2, 1, 0, 2], [2, 1, 2, 0], [2, 1, -2, 2], [2, 1, 2, -1e-9]])
def test_a_box_with_a_zero_or_negative_side_is_left_out(tmp_path: Path, box: list[float]) -> None:
    text = left_out(tmp_path, in_annotation(bbox=box))
    assert f"annotation 101: bbox has a side that is zero or negative: {box}" in text
    assert "(image 10, a.png)" in text


@pytest.mark.parametrize(
    "box",
    [
        None,
        [2, 1, 2],
        [2, 1, 2, 2, 2],
        [2, 1, 2, "2"],
        [2, 1, 2, True],
        [2, 1, float("nan"), 2],
        [2, 1, 2, float("inf")],
        {"x": 2},
        [2, 1, 2, 10**400],
    ],
    ids=lambda box: str(box)[:30],
)
def test_a_box_that_is_not_four_finite_numbers_is_taken_from_the_mask(tmp_path: Path, box: Any) -> None:
    data = read_coco(*write_coco(tmp_path, in_annotation(bbox=box)))
    assert data.images[0].annotations[0].box == (2, 1, 4, 3)
    assert any(
        "annotation 101: bbox" in warning and "is taken from the mask" in warning for warning in data.warnings
    )


def test_an_annotation_with_neither_box_nor_mask_is_refused(tmp_path: Path) -> None:
    text = refusal(tmp_path, in_annotation(bbox=[2, 1, 2, "2"], segmentation=[]))
    assert "annotation 101: bbox must be four finite numbers x, y, width, height, not [2, 1, 2, '2']" in text


@pytest.mark.parametrize(
    ("box", "clipped"),
    [
        ([-1.5, 1, 4, 2], (0, 1, 2.5, 3)),
        ([2, -1.5, 2, 4], (2, 0, 4, 2.5)),
        ([7, 1, 2.5, 2], (7, 1, 8, 3)),
        ([2, 4, 2, 2.5], (2, 4, 4, 5)),
    ],
)
def test_a_box_that_reaches_beyond_the_border_is_clipped(
    tmp_path: Path, box: list[float], clipped: Any
) -> None:
    data = read_coco(*write_coco(tmp_path, in_annotation(bbox=box)))
    assert data.images[0].annotations[0].box == clipped
    text = f"annotation 101: bbox {box} reaches 1.5 px beyond the border"
    assert any(text in warning for warning in data.warnings)


def test_a_box_entirely_beyond_the_border_is_refused(tmp_path: Path) -> None:
    # Within the tolerance of 1 px, but nothing is left after clipping.
    text = refusal(tmp_path, in_annotation(bbox=[8.2, 1, 0.5, 2]))
    assert "annotation 101: bbox [8.2, 1, 0.5, 2] lies outside the image" in text


# Polygons.


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([[2, 1, 4, 1, 4, 3, 2]], "a polygon has an odd number of coordinates (7)"),
        ([[2, 1, 4]], "a polygon has an odd number of coordinates (3)"),
        ([[2, 1, 4, 1, 4, float("nan")]], "a polygon has a coordinate that is not finite"),
        ([[2, 1, 4, 1, 4, float("-inf")]], "a polygon has a coordinate that is not finite"),
        (
            [[20, 1, 40, 1, 40, 3]],
            "a polygon reaches outside the image of 8 x 5 (width x height): x 20 to 40, y 1 to 3",
        ),
        ([[2, 1, 4e9, 1, 4, 3]], "a polygon reaches outside the image of 8 x 5"),
        ([[2, 1, 4, 1, 4, "3"]], "a polygon is a flat list of numbers"),
        ([[2, 1, 4, 1, 4, None]], "a polygon is a flat list of numbers"),
        ([[2, 1, 4, 1, 4, 10**400]], "a polygon"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_bad_polygon_is_named(tmp_path: Path, segmentation: Any, reason: str) -> None:
    text = refusal(tmp_path, in_annotation(segmentation=segmentation))
    assert "annotation 101: segmentation" in text
    assert reason in text
    assert "(image 10, a.png)" in text


@pytest.mark.parametrize("segmentation", ["polygon", 3])
def test_a_segmentation_of_another_type_is_named(tmp_path: Path, segmentation: Any) -> None:
    text = refusal(tmp_path, in_annotation(segmentation=segmentation))
    assert f"annotation 101: segmentation must be a list of polygons or an RLE, not {segmentation!r}" in text


@pytest.mark.parametrize("segmentation", [[], None, [[]], {}, "missing"])
def test_an_empty_segmentation_with_a_box_is_an_object_without_a_mask(
    tmp_path: Path, segmentation: Any
) -> None:
    def change(document: dict[str, Any]) -> None:
        document["annotations"][0]["segmentation"] = segmentation
        if segmentation == "missing":
            del document["annotations"][0]["segmentation"]

    data = read_coco(*write_coco(tmp_path, change))
    annotation = data.images[0].annotations[0]
    assert not annotation.has_mask
    assert annotation.segmentation is None
    assert annotation.box == (2, 1, 4, 3)
    assert any("annotation 101: has a box and no mask" in warning for warning in data.warnings)


POINTS = [[2, 1], [4, 1], [4, 3], [2, 3]]


@pytest.mark.parametrize(
    "segmentation",
    [
        [2, 1, 4, 1, 4, 3, 2, 3],
        POINTS,
        [POINTS],
        [[point] for point in POINTS],
        [[[point] for point in POINTS]],
        [{"x": x, "y": y} for x, y in POINTS],
        [{"size": [HEIGHT, WIDTH], "counts": RECTANGLE_COUNTS}],
        [{"size": [HEIGHT, WIDTH], "counts": [11, 2, 27]}, {"size": [HEIGHT, WIDTH], "counts": [16, 2, 22]}],
        {"size": [5.0, 8.0], "counts": [float(run) for run in RECTANGLE_COUNTS]},
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_segmentation_in_an_unambiguous_form_is_read(tmp_path: Path, segmentation: Any) -> None:
    data = read_coco(*write_coco(tmp_path, in_annotation(segmentation=segmentation)))
    # Columns 2 and 3 of rows 1 and 2.
    expected = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    expected[1:3, 2:4] = 1
    assert np.array_equal(data.images[0].object_masks().bitmaps()[0].numpy(), expected)
    assert len(data.warnings) == (1 if isinstance(segmentation, dict) else 2)


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([[2, 1, 4, 1]], "a polygon has fewer than 3 points"),
        ([[2, 1, 4, 1, 6, 1]], "a polygon has no area"),
    ],
)
def test_an_object_with_a_degenerate_segmentation_is_left_out(
    tmp_path: Path, segmentation: Any, reason: str
) -> None:
    assert f"annotation 101: segmentation: {reason}" in left_out(
        tmp_path, in_annotation(segmentation=segmentation)
    )


def test_a_figure_of_eight_has_an_area(tmp_path: Path) -> None:
    # Two triangles of base 2 and height 1 with opposite orientations: their signed areas cancel.
    def change(document: dict[str, Any]) -> None:
        document["annotations"][0].update(segmentation=[[2, 1, 4, 3, 4, 1, 2, 3]])
        del document["annotations"][0]["area"]

    data = read_coco(*write_coco(tmp_path, change))
    assert data.images[0].annotations[0].area == pytest.approx(2, rel=1e-12)


def test_the_two_flat_records_of_coco_train2017_are_left_out_by_name(tmp_path: Path) -> None:
    # Quoted in cocodataset/cocoapi#355 and visionml/pytracking#18.
    flat = [
        {"segmentation": [[296.65, 388.33, 296.65, 388.33, 297.68, 388.33, 297.68, 388.33]], "area": 0.0,
         "iscrowd": 0, "image_id": 10, "bbox": [296.65, 388.33, 1.03, 0.0], "category_id": 7, "id": 918},
        {"segmentation": [[9.98, 188.56, 15.52, 188.56, 15.52, 188.56, 11.09, 188.56]], "area": 0.0,
         "iscrowd": 0, "image_id": 10, "bbox": [9.98, 188.56, 5.54, 0.0], "category_id": 7, "id": 2206849},
    ]  # fmt: skip

    def change(document: dict[str, Any]) -> None:
        document["images"][0].update(width=640, height=480)
        document["annotations"] = [document["annotations"][0], *flat]

    images, annotations = write_coco(tmp_path, change)
    Image.new("RGB", (640, 480)).save(images / "a.png")
    data = read_coco(images, annotations)
    assert [annotation.id for annotation in data.images[0].annotations] == [101]
    [warning] = data.warnings
    assert "2 annotations whose mask has no area are left out" in warning
    assert "annotation 918" in warning
    assert "annotation 2206849" in warning


@pytest.mark.parametrize(
    "area", [-4, 0, float("nan"), 1e11, "400", [4], 10**400, True], ids=lambda a: str(a)[:10]
)
def test_an_unusable_area_is_replaced_by_the_masks(tmp_path: Path, area: Any) -> None:
    data = read_coco(*write_coco(tmp_path, in_annotation(area=area)))
    assert data.images[0].annotations[0].area == pytest.approx(4)
    assert any("annotation 101: area" in w and "is replaced by the mask's" in w for w in data.warnings)


def test_the_area_of_an_object_without_a_mask_is_that_of_its_box(tmp_path: Path) -> None:
    data = read_coco(*write_coco(tmp_path, in_annotation(area=0, segmentation=[], bbox=[2, 1, 3, 2.5])))
    assert data.images[0].annotations[0].area == 7.5
    assert not any("area 0" in warning for warning in data.warnings)


def test_the_area_of_overlapping_polygons_is_that_of_their_union(tmp_path: Path) -> None:
    # Two squares of 2 x 2 that overlap by half cover 3 x 2 = 6 px².
    squares = [[1, 1, 3, 1, 3, 3, 1, 3], [2, 1, 4, 1, 4, 3, 2, 3]]
    data = read_coco(*write_coco(tmp_path, in_annotation(area=None, segmentation=squares)))
    assert data.images[0].annotations[0].area == pytest.approx(6, rel=1e-12)


def test_areas_that_are_those_of_the_boxes_are_reported(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        for annotation in document["annotations"]:
            annotation.update(segmentation=[[2, 1, 4, 1, 4, 3]], area=4, iscrowd=0, bbox=[2, 1, 2, 2])

    _, problems = check_data(*write_coco(tmp_path, change))
    assert any("area is that of the box, not of the mask, in 3 of 3 annotations" in p.text for p in problems)


def test_a_polygon_up_to_a_pixel_outside_is_kept(tmp_path: Path) -> None:
    data = read_coco(*write_coco(tmp_path, in_annotation(segmentation=[[-1, 0, 9, 0, 9, 6]])))
    assert data.images[0].annotations[0].segmentation == [[-1, 0, 9, 0, 9, 6]]
    assert not any("beyond the border" in warning for warning in data.warnings)


@pytest.mark.parametrize(
    "polygon", [[2, 1, 4, 1, 9.5, 3], [2, 1, 4, 1, 4, -1.5], [-7, -7, 20, -7, 20, 20, -7, 20]]
)
def test_a_polygon_that_reaches_beyond_the_border_is_clipped_there(
    tmp_path: Path, polygon: list[float]
) -> None:
    data = read_coco(*write_coco(tmp_path, in_annotation(segmentation=[polygon], bbox=None)))
    assert any("annotation 101: segmentation: reaches" in warning for warning in data.warnings)
    rle = coco_mask.merge(coco_mask.frPyObjects([polygon], HEIGHT, WIDTH))
    assert np.array_equal(data.images[0].object_masks().bitmaps()[0].numpy(), coco_mask.decode(rle))
    x1, y1, x2, y2 = data.images[0].annotations[0].box
    assert x1 >= 0
    assert y1 >= 0
    assert x2 <= WIDTH
    assert y2 <= HEIGHT


@pytest.mark.parametrize("degenerate", [[], [2, 1, 4, 1], [2, 1, 4, 1, 6, 1]], ids=["none", "two", "flat"])
def test_a_degenerate_polygon_next_to_a_valid_one_is_left_out(tmp_path: Path, degenerate: list[int]) -> None:
    good = [2, 1, 4, 1, 4, 3, 2, 3]
    data = read_coco(*write_coco(tmp_path, in_annotation(segmentation=[degenerate, good])))
    assert data.images[0].annotations[0].segmentation == [good]


def spoil_three_polygons(document: dict[str, Any]) -> None:
    good, flat = [2, 1, 4, 1, 4, 3, 2, 3], [2, 1, 4, 1]
    document["annotations"][0]["segmentation"] = [good, flat, flat]
    document["annotations"][1]["segmentation"] = [flat, good]


def test_degenerate_polygons_cause_one_warning_that_counts_them(tmp_path: Path) -> None:
    images, annotations = write_coco(tmp_path, spoil_three_polygons)
    warnings = read_coco(images, annotations).warnings
    assert warnings[0] == (
        f"{annotations}: 2 annotations lose their degenerate polygons and keep the others: annotation 101: "
        "segmentation: 2 degenerate polygons are left out (image 10, a.png); annotation 102: segmentation: a "
        "degenerate polygon is left out (image 10, a.png)"
    )


# RLEs. The same checks for both encodings, because the counts of either may be wrong.


def compressed(counts: list[int], size: tuple[int, int] = (HEIGHT, WIDTH)) -> str:
    rle = coco_mask.frPyObjects({"size": list(size), "counts": counts}, *size)
    return rle["counts"].decode()


@pytest.mark.parametrize("counts", [RECTANGLE_COUNTS, compressed(RECTANGLE_COUNTS)], ids=["list", "string"])
@pytest.mark.parametrize("size", [[WIDTH, HEIGHT], [HEIGHT, WIDTH, 1], [5], [5, 0], None])
def test_an_rle_of_another_size_than_the_image_is_named(tmp_path: Path, size: Any, counts: Any) -> None:
    text = refusal(tmp_path, in_annotation(segmentation={"size": size, "counts": counts}))
    assert f"annotation 101: segmentation: the RLE's size is {size}, the image's is [5, 8]" in text


@pytest.mark.parametrize(
    "counts",
    [
        [11, 2, 3, 2, 21],
        [11, 2, 3, 2, 23],
        [11, 2, 3, -2, 26],
        [11, 2, 3, 2.5, 21.5],
        [11, 2, 3, 2, float("nan")],
        [11, 2, 3, 2, "22"],
        [40, 10**30],
        [],
        None,
        7,
        {"11": 2},
        "",
        compressed(RECTANGLE_COUNTS)[:-1],
        compressed(RECTANGLE_COUNTS) + "1",
        compressed([11, 2, 3, 2, 23], (1, 41)),
        "\x01\x02",
        "é",
        "oooooo",
        "z" * 1000,
    ],
    ids=repr,
)
def test_a_corrupt_rle_is_named(tmp_path: Path, counts: Any) -> None:
    text = refusal(tmp_path, in_annotation(segmentation={"size": [HEIGHT, WIDTH], "counts": counts}))
    assert "annotation 101: segmentation: the RLE's counts are corrupt" in text


@pytest.mark.parametrize("key", ["size", "counts"])
def test_an_rle_without_a_key_is_named(tmp_path: Path, key: str) -> None:
    rle = {"size": [HEIGHT, WIDTH], "counts": RECTANGLE_COUNTS}
    del rle[key]
    text = refusal(tmp_path, in_annotation(segmentation=rle))
    assert "annotation 101: segmentation: an RLE needs the keys size and counts" in text


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


@pytest.mark.parametrize(
    ("category", "reason"),
    [
        ({"id": 9, "name": "cow"}, "category 9: 'cow' is not among the model's categories"),
        ({"id": 3, "name": "lion"}, "category 3: is 'lion' here, but 'cat' among the model's categories"),
    ],
)
def test_a_validation_file_with_another_category_is_refused(
    tmp_path: Path, category: dict[str, Any], reason: str
) -> None:
    def change(document: dict[str, Any]) -> None:
        document["categories"] = [category]
        document["annotations"] = []

    training = read_coco(*write_coco(tmp_path))
    images, path = write_coco(tmp_path, change, "validation.json")
    with pytest.raises(InputError) as caught:
        read_coco(images, path, categories=training.categories)
    assert str(caught.value) == f"{path}: {reason}"


# check


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
        "(image 10, a.png)"
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


def test_the_shared_sample_of_coco_has_no_errors(shared: Path) -> None:
    folder = shared / "coco_mini"
    data = read_coco(folder / "images", folder / "annotations_val2017.json")
    document = json.loads((folder / "annotations_val2017.json").read_text())
    assert len(data.images) == len(document["images"])
    assert data.num_objects == sum(not annotation["iscrowd"] for annotation in document["annotations"])


def test_a_data_set_without_masks_is_read_with_a_warning(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        for annotation in document["annotations"]:
            annotation.update(segmentation=[], iscrowd=0)

    data = read_coco(*write_coco(tmp_path, change))
    assert data.num_objects == 3
    assert data.num_masks == 0
    assert "none of the 3 objects has a mask: only the boxes are trained" in data.warnings[0]


def test_ids_of_more_than_64_bits_are_read(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["images"][0]["id"] = 2**100
        document["categories"][0]["id"] = 2**64
        for annotation in document["annotations"]:
            annotation["image_id"] = 2**100
        document["annotations"][0].update(category_id=2**64, id=2**70)

    data = read_coco(*write_coco(tmp_path, change))
    assert [image.id for image in data.images] == [2**100, 20]
    assert [annotation.id for annotation in data.images[0].annotations] == [2**70, 102, 103]
    assert CocoDataset(data)[0][1]["labels"].tolist() == [2, 1]


@pytest.mark.parametrize("field", ["image_id", "category_id"])
def test_true_is_not_the_id_1(tmp_path: Path, field: str) -> None:
    def change(document: dict[str, Any]) -> None:
        for entry in (document["images"][0], document["categories"][0]):
            entry["id"] = 1
        for annotation in document["annotations"]:
            annotation.update(image_id=1, category_id=1)
        document["annotations"][0][field] = True

    assert f"annotation 101: {field} True is n" in refusal(tmp_path, change)
