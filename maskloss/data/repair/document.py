"""The document in an annotation file: JSON decoded to Python's objects, and encoded again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from maskloss.data.findings import Kind, shown
from maskloss.data.reading import formats
from maskloss.data.reading.json_stream import decoded, without_trailing_commas
from maskloss.data.repair.log import Log
from maskloss.data.repair.sections import LIST_KEYS
from maskloss.errors import InputError
from maskloss.files import read_bytes

ENCODING = Kind("encoding", "file", True)
COMMAS = Kind("trailing_commas", "file", True)


def decode_document(path: Path, log: Log) -> dict[str, Any]:
    """Decode an annotation file, repairing Windows-1252 text and trailing commas.

    Raises:
        InputError: the file is not JSON, or not in COCO's format.
    """
    content = read_bytes(path)
    try:
        text = decoded(content)
    except UnicodeDecodeError as error:
        problem = formats.undecodable(error)
        if "Latin-1" not in problem:
            raise InputError(f"{path}: {problem}") from None
        # Windows-1252 assigns letters to bytes that are control characters in Latin-1, and leaves five bytes undefined.
        text = content.decode("cp1252", errors="replace")
        log.add(ENCODING, "read as Windows-1252, written as UTF-8", "", problem.partition(";")[0])
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        try:
            document = json.loads(without_trailing_commas(text))
        except (ValueError, RecursionError):
            raise InputError(f"{path}: {formats.not_json(text, error)}; it cannot be repaired") from None
        log.add(COMMAS, "trailing commas removed", "", str(error))
    for key in formats.listed(document):
        log.add(formats.KEYED_LIST, "written as a list", "", f"the {key} are an object")
    missing = [key for key in LIST_KEYS.values() if not formats.has_list(document, key)]
    if missing == ["categories"] and document["annotations"] and not document.get("categories"):
        # As an empty list, to which a category is added for each id that annotations have.
        document["categories"] = []
        missing = []
    if missing:
        annotations = document["annotations"] if "annotations" not in missing else []
        problem = formats.not_coco(document, missing, annotations[0] if annotations else None)
        raise InputError(f"{path}: {problem}; that cannot be repaired")
    result: dict[str, Any] = document
    return result


def encode_document(document: dict[str, Any], path: Path, log: Log) -> str:
    """Encode a document as JSON, which has no NaN and no Infinity: in fields that are not COCO's they become null.

    Raises:
        InputError: the document is nested too deeply.
    """
    try:
        try:
            return json.dumps(document, allow_nan=False)
        except ValueError:
            _write_null(document, log)
            return json.dumps(document, allow_nan=False)
    except RecursionError:
        raise InputError(f"{path}: is nested too deeply; it cannot be repaired") from None


def _write_null(document: dict[str, Any], log: Log) -> None:
    """Replace the numbers that are not finite by null, entry by entry in the sections and at once in all other keys."""
    sections = {key: section for section, key in LIST_KEYS.items()}
    for key, value in document.items():
        section = sections.get(key)
        for item in [document] if section is None else value:
            if _remove_non_finite(item, skipped=() if section else tuple(sections)):
                name = f"{section} {shown(item.get('id'))}" if section else ""
                kind = Kind("not_finite_field", section or "file", True)
                change = "numbers that are not finite written as null"
                log.add(kind, change, name, "NaN or Infinity", item)


def _remove_non_finite(value: Any, skipped: tuple[str, ...]) -> bool:
    """Replace numbers that are not finite by null, in place, and return whether there were any."""
    found = False
    left = [value]
    while left:
        inner = left.pop()
        for key, part in list(inner.items() if isinstance(inner, dict) else enumerate(inner)):
            if isinstance(part, float) and not math.isfinite(part):
                inner[key], found = None, True
            elif isinstance(part, dict | list) and not (inner is value and key in skipped):
                left.append(part)
    return found
