"""Changes that entries of every section have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from maskloss.data.check import check_data
from maskloss.data.findings import Finding, Findings
from maskloss.data.reading.categories import CATEGORY_ENTRY
from maskloss.data.reading.images import FILE_MISSING
from maskloss.data.repair.draft import Draft
from maskloss.data.repair.log import Log
from tests.data.coco_files import good_document, write_coco
from tests.data.repair.repaired_files import ids, repaired


def draft_of(document: dict[str, Any]) -> Draft:
    nothing: Any = None
    return Draft(
        document,
        Path(),
        nothing,
        {},
        Findings(),
        boxes_from_masks=False,
        crowds_to_objects=False,
        log=Log(),
    )


def test_an_image_is_left_out_with_its_annotations() -> None:
    document = good_document()
    document["annotations"].insert(1, {"id": 7, "image_id": 20.0})
    draft = draft_of(document)
    # Faults that are found while decoding have the image's id in the place of its position.
    finding = Finding(-1, "image 20", "is gone", 20)
    draft.leave_out(FILE_MISSING, finding)
    draft.leave_out(FILE_MISSING, finding)
    assert draft.log.count == 2
    assert len(document["images"]) == 2
    assert draft.is_left_out("image", 1)
    assert draft.is_left_out("annotation", 1)
    draft.remove_left_out()
    assert ids(document, "images") == [10]
    assert ids(document) == [101, 102, 103]
    assert [(repair.change, repair.entries) for repair in draft.log.repairs()] == [
        ("left out", (("image 20", "is gone"),)),
        ("left out with their image", (("annotation 7", "image 20"),)),
    ]


def test_a_reason_replaces_the_findings_description() -> None:
    draft = draft_of(good_document())
    draft.leave_out(CATEGORY_ENTRY, Finding(0, "category 7", "id must be an integer"), "is listed twice")
    assert draft.log.repairs()[0].entries == (("category 7", "is listed twice"),)


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


def test_whole_floats_are_written_as_integers(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["images"][0].update(id=10.0, width=8.0, height=5.0)
        document["categories"][0].update(id=7.0)
        document["annotations"][0].update(id=101.0, image_id=10.0, category_id=7.0)

    document, _ = repaired(tmp_path, change)
    entries = [document["images"][0], document["categories"][0], document["annotations"][0]]
    numbers = [entry[key] for entry in entries for key in ("id", "image_id", "category_id", "width", "height")
               if key in entry]  # fmt: skip
    assert numbers == [10, 8, 5, 7, 101, 10, 7]
    assert {type(number) for number in numbers} == {int}
