"""maskloss/data/findings.py: one short message for each kind of fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from maskloss.data.check import check_data
from maskloss.data.coco import read_coco
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
