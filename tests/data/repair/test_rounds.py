"""The rounds of a repair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from maskloss.data.repair import repair
from maskloss.errors import InputError
from tests.data.coco_files import in_annotation, write_coco
from tests.data.repair.repaired_files import repaired


def test_references_wait_for_the_repair_of_images_and_categories(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["images"][0]["file_name"] = "A.PNG"
        document["annotations"][0]["image_id"] = "a.png"  # the name of no image in the first round
        document["annotations"][1]["image_id"] = "b.png"

    document, _ = repaired(tmp_path, change)
    assert [(a["id"], a["image_id"]) for a in document["annotations"]] == [(101, 10), (103, 10)]


def test_faults_that_a_repair_uncovers_are_repaired_too(tmp_path: Path) -> None:
    # First the text is read as two polygons, then that of no area is left out, then the box is taken from the mask.
    text = "[[2, 1, 4, 1, 4, 3, 2, 3], [1, 1, 1, 1, 1, 1]]"
    document, listing = repaired(tmp_path, in_annotation(segmentation=text, bbox=None))
    assert document["annotations"][0]["segmentation"] == [[2, 1, 4, 1, 4, 3, 2, 3]]
    assert document["annotations"][0]["bbox"] == [2, 1, 2, 2]
    assert [r["kind"] for r in listing["repairs"]] == ["bad_segmentation", "degenerate_part", "box_from_mask"]


def test_if_no_image_can_be_decoded_that_is_the_cause(tmp_path: Path) -> None:
    # The missing mask of an object is a warning of the first round.
    images, annotations = write_coco(tmp_path, in_annotation(segmentation=None))
    for path in (images / "a.png", images / "nested/b.png"):
        path.write_bytes(b"\0\0\0\x1cftypavif\0\0\0\0avifmif1")
    with pytest.raises(InputError, match=r"no usable object is left .*: 2 image files .*it is AVIF"):
        repair(images, annotations, tmp_path / "fixed.json")


def test_images_that_cannot_be_decoded_are_left_out_in_the_end(tmp_path: Path) -> None:
    images, annotations = write_coco(tmp_path)
    content = (images / "nested/b.png").read_bytes()
    (images / "nested/b.png").write_bytes(content[: len(content) // 2])
    data, repairs = repair(images, annotations, tmp_path / "fixed.json")
    assert [image.id for image in data.images] == [10]
    assert [(r.kind, r.change) for r in repairs] == [("unreadable_image", "left out")]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"images": []}, "no usable object is left after the repair: the file has no images"),
        ({"annotations": []}, "no usable object is left after the repair"),
        ({"categories": [{"id": 7, "name": "dog"}, {"id": 7, "name": "wolf"}]}, "`repair` cannot decide"),
    ],
)
def test_a_file_without_a_usable_object_or_with_errors_that_are_left_is_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    images, annotations = write_coco(tmp_path, lambda d: d.update(fields))
    with pytest.raises(InputError, match=message):
        repair(images, annotations, tmp_path / "fixed.json")
    assert not (tmp_path / "fixed.json").exists()
