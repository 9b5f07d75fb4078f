"""maskloss/data/columns.py: annotations and images of a file in columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from maskloss.data.coco import read_coco
from maskloss.data.dataset import CocoDataset
from tests.data.coco_files import (
    in_annotation,
    refusal,
    write_coco,
)


def test_a_missing_iscrowd_means_no_crowd(tmp_path: Path) -> None:
    data = read_coco(*write_coco(tmp_path, lambda document: document["annotations"][2].pop("iscrowd")))
    assert data.num_objects == 3


def test_an_entry_that_is_not_an_object_is_named_by_its_position(tmp_path: Path) -> None:
    text = refusal(tmp_path, lambda document: document["annotations"].append([1, 2]))
    assert "annotation number 3: expected an object, got list" in text


@pytest.mark.parametrize(("crowd", "read"), [(None, 0), (True, 1), ("0", 0), ("1", 1), (1.0, 1), (False, 0)])
def test_an_unambiguous_iscrowd_is_read(tmp_path: Path, crowd: Any, read: int) -> None:
    data = read_coco(*write_coco(tmp_path, in_annotation(iscrowd=crowd)))
    assert data.images[0].annotations[0].crowd == read
    assert any(f"annotation 101: iscrowd {crowd!r} is read as {read}" in warning for warning in data.warnings)


@pytest.mark.parametrize("crowd", [2, -1, "yes", 0.5, []])
def test_an_iscrowd_that_is_neither_0_nor_1_is_named(tmp_path: Path, crowd: Any) -> None:
    text = refusal(tmp_path, in_annotation(iscrowd=crowd))
    assert f"annotation 101: iscrowd must be 0 or 1, not {crowd!r}" in text


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
