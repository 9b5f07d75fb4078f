"""maskloss/data/findings.py: one short message for each kind of fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from maskloss.data.check import check_data
from maskloss.data.coco import read_coco
from maskloss.data.findings import Findings, Kind, Problem, shown
from maskloss.errors import InputError
from tests.data.coco_files import (
    in_annotation,
    in_image,
    write_coco,
)


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


ERROR = Kind("gone", "image", True, "images without their file", "`maskloss repair` leaves them out")
WARNING = Kind("flat", "annotation", False, "boxes of no area are left out")
CAUSE = Kind("no_objects", "file", False)
CONSEQUENCE = Kind("unknown", "annotation", True, "annotations of unknown images")


def test_one_finding_is_told_alone_and_several_by_their_number_and_three_examples() -> None:
    findings = Findings()
    findings.add(ERROR, 0, "image 1", "a.png does not exist")
    [problem] = findings.problems("x.json")
    assert str(problem) == ("error: x.json: image 1: a.png does not exist; `maskloss repair` leaves them out")
    for number in range(2, 5):
        findings.add(ERROR, number, f"image {number}", "is gone")
    [problem] = findings.problems("x.json")
    assert problem.text == (
        "x.json: 4 images without their file: image 1: a.png does not exist; image 2: is gone; image 3: is gone; ...; "
        "`maskloss repair` leaves them out"
    )
    assert len(problem.examples) == 4
    assert problem.kind == "gone"


def test_three_findings_have_no_dots_and_an_entry_without_a_name_no_colon() -> None:
    findings = Findings()
    for number in range(3):
        findings.add(WARNING, -1, "", f"box {number}")
    assert [str(problem) for problem in findings.problems("x")] == [
        "warning: x: 3 boxes of no area are left out: box 0; box 1; box 2"
    ]


def test_errors_come_before_warnings_and_causes_before_consequences() -> None:
    findings = Findings()
    assert not findings.any_error
    for kind in (WARNING, CONSEQUENCE, CAUSE, ERROR):
        findings.add(kind, 0, "", "text")
    assert [problem.kind for problem in findings.problems("x")] == ["gone", "unknown", "no_objects", "flat"]
    assert findings.any_error
    assert [finding.detail for finding in findings.of(ERROR)] == ["text"]
    assert Findings().of(ERROR) == []


@pytest.mark.parametrize("count", [1, 5])
def test_a_shortened_problem_keeps_the_count_one_example_and_the_way_out(count: int) -> None:
    findings = Findings()
    for number in range(count):
        findings.add(ERROR, number, f"image {number}", "w" * 1000)
    [problem] = findings.problems("x.json")
    text = problem.shortened(200)
    assert 190 <= len(text) <= 200
    start = "x.json: image 0: www" if count == 1 else "x.json: 5 images without their file: image 0: www"
    assert text.startswith(start)
    assert text.endswith(f"...{'' if count == 1 else '; ...'}; `maskloss repair` leaves them out")
    # At least 40 characters of the example are kept.
    assert ": " + ("image 0: " + "w" * 28) + "..." in problem.shortened(1)
    assert Problem("a text without examples").shortened(5) == "a text without examples"


def test_shown_values_are_short_whatever_their_size() -> None:
    assert shown([1, "a"]) == "[1, 'a']"
    assert shown("x" * 78) == repr("x" * 78)
    assert shown("x" * 1000) == f"'{'x' * 39}...{'x' * 19}'"
    assert shown(10**5000) == "a number of thousands of digits"
