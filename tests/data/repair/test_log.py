"""The list of changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maskloss.data.findings import Kind
from maskloss.data.repair import Repair
from maskloss.data.repair.log import Log
from tests.data.repair.repaired_files import repaired

GONE = Kind("gone", "category", True)


def test_a_repair_is_one_line_with_three_examples() -> None:
    entries = [(f"category {i}", "is gone") for i in range(4)]
    assert str(Repair("gone", "category", "left out", tuple(entries[:1]))) == (
        "1 category: left out (category 0: is gone)"
    )
    assert str(Repair("gone", "category", "left out", tuple(entries))) == (
        "4 categories: left out (category 0: is gone; category 1: is gone; category 2: is gone; ...)"
    )
    assert str(Repair("bytes", "file", "decoded", (("", "Latin-1"),))) == "1 file: decoded (Latin-1)"


def test_an_entry_is_listed_once_for_each_change() -> None:
    log, item = Log(), {"id": 7}
    for change, what in (("renamed", "first"), ("numbered", "second"), ("renamed", "third")):
        log.add(GONE, change, "category 7", what, item)
    assert log.count == 3
    assert log.repairs() == [
        Repair("gone", "category", "renamed", (("category 7", "first"),)),
        Repair("gone", "category", "numbered", (("category 7", "second"),)),
    ]


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
