"""Decoding and encoding of annotation files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from maskloss.data.repair import repair
from maskloss.data.repair.document import decode_document, encode_document
from maskloss.data.repair.log import Log
from maskloss.errors import InputError
from tests.data.coco_files import write_coco
from tests.data.repair.repaired_files import repaired

EMPTY = b'{"images": [], "annotations": [], "categories": []'


@pytest.mark.parametrize(
    ("content", "change"),
    [
        # Byte 0x80 is the euro sign in Windows-1252, and a control character in Latin-1.
        (EMPTY + b', "info": "\x80\xe4"}', "read as Windows-1252, written as UTF-8"),
        (EMPTY + ', "info": "€ä",}'.encode(), "trailing commas removed"),
    ],
)
def test_text_of_windows_and_trailing_commas_are_decoded(tmp_path: Path, content: bytes, change: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    log = Log()
    document = decode_document(tmp_path / "a.json", log)
    assert document == {"images": [], "annotations": [], "categories": [], "info": "€ä"}
    assert [repair.change for repair in log.repairs()] == [change]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (EMPTY, "not valid JSON, broken or truncated: .*; it cannot be repaired"),
        (b"[" * 10**6, "not valid JSON"),
        (b'{"images": []}', "it has no list of annotations, categories; that cannot be repaired"),
    ],
)
def test_what_cannot_be_decoded_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        decode_document(tmp_path / "a.json", Log())


def test_a_file_that_is_a_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    images, annotations = write_coco(tmp_path)
    annotations.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    with pytest.raises(InputError, match="it is a Git LFS pointer: run `git lfs pull`"):
        repair(images, annotations, tmp_path / "fixed.json")


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


def test_a_document_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    deep: list[Any] = []
    for _ in range(10**5):
        deep = [deep]
    with pytest.raises(InputError, match="is nested too deeply; it cannot be repaired"):
        encode_document({"images": [], "annotations": [], "categories": [], "info": deep}, tmp_path, Log())
