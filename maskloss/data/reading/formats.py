"""Recognition of files that are not in COCO's format, for error messages that name the way out."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from typing import Any

from maskloss.data.findings import Kind
from maskloss.data.reading.json_stream import without_trailing_commas

#: The lists that a COCO-format file needs.
LISTS = ("images", "annotations", "categories")

KEYED_LIST = Kind(
    "keyed_list", "file", False, "lists that are objects, with an entry for each key, are read as lists"
)

_Hints = tuple[tuple[tuple[str, ...], str], ...]

#: Keys that only a document of a format, or each entry of its list, has together, and what to do with it.
_TOOLS: _Hints = (
    (("shapes", "imagePath"), "it looks like labelme: export it as COCO"),
    (("_via_img_metadata",), "it looks like a VGG Image Annotator project: export it as COCO"),
    (("infos", "items"), "it looks like Datumaro: export it as COCO"),
    (("data", "annotations"), "it looks like Label Studio's own JSON: export it as COCO"),
    (("file_attributes", "regions"), "it looks like VGG Image Annotator: export it as COCO"),
    (("filename", "regions"), "it looks like VGG Image Annotator: export it as COCO"),
    (("data_row",), "it looks like Labelbox's own JSON: export it as COCO"),
    (("type", "features"), "it looks like GeoJSON: convert it to COCO"),
    (
        ("image", "annotations"),
        "it looks like Segment Anything's SA-1B, with a file for each image: join the files, with one category for all "
        "masks",
    ),
)

#: Keys that each entry of a list has together.
_LISTS: _Hints = (
    (LISTS, "it is a list of COCO documents: join them into one, with ids that are unique"),
    (("image_id", "score"), "it looks like detections in COCO's format for results, not like ground truth"),
    (("file_name", "annotations"), "it looks like Detectron2's list of images: convert it to COCO"),
)

#: Keys of annotations that have neither a box nor a segmentation, and what to do with them.
_ANNOTATIONS = {
    "segments_info": "are panoptic, with masks in PNG files: use instances_*.json of the same images, or convert them "
    "with panopticapi's panoptic2detection_coco_format.py",
    "caption": "are captions, without boxes and masks: use instances_*.json of the same images",
    "regions": "have several objects each, in `regions`, as in COCO amodal: make an annotation of each region",
    "a_segm": "are amodal ones of KINS: rename a_segm and a_bbox, or i_segm and i_bbox, to segmentation and bbox",
    "points": "have `points` instead of segmentations, as Segments.ai writes them: rename them to segmentation",
}


def annotation_hint(annotation: Any) -> str | None:
    """Return what an annotation without box and segmentation is, and the way out; None if that is unknown.

    Example:
        >>> annotation_hint({"image_id": 1, "caption": "A cat."})
        'the annotations are captions, without boxes and masks: use instances_*.json of the same images'
    """
    if not isinstance(annotation, dict) or "bbox" in annotation or "segmentation" in annotation:
        return None
    return next((f"the annotations {text}" for key, text in _ANNOTATIONS.items() if key in annotation), None)


def undecodable(error: UnicodeDecodeError) -> str:
    """Return the error message for a file that is not Unicode, with the likely encoding."""
    content = error.object
    if content[:1] in (b"{", b"[") and _is_east_asian(content):
        return "not valid JSON: the text is not UTF-8, but probably GBK or EUC-KR; save it as UTF-8"
    if content[:1] in (b"{", b"[") and b"\0" not in content:
        byte = content[error.start]
        line = content.count(b"\n", 0, error.start) + 1
        return (
            f"not valid JSON: the text is not UTF-8, but probably Latin-1 or Windows-1252 (byte 0x{byte:02x} in line "
            f"{line}); save it as UTF-8, or run `maskloss repair`, which converts it"
        )
    return f"not valid JSON, broken or truncated: {error}{likely_cause(content[:100])}"


def _is_east_asian(content: bytes) -> bool:
    """Return whether bytes beyond ASCII come in pairs as in GBK and EUC-KR, whose common letters begin with B0 to D7.

    In Latin-1, two such bytes in a row would be two symbols or capitals with accents.
    """
    words = re.findall(rb"[\x80-\xff]+", content[:10_000_000])
    common = sum(len(word) for word in words if re.fullmatch(rb"([\xb0-\xd7][\xa1-\xfe])+", word))
    return common >= 4 and 10 * common >= 9 * sum(map(len, words))


def not_json(text: str, error: ValueError | RecursionError) -> str:
    """Return the error message for text that is not JSON, with its likely cause."""
    cause = likely_cause(text[:100].encode("utf-8", "surrogatepass"))
    if not cause and "Extra data" in str(error):
        cause = "; another JSON value follows the first one: JSON Lines, .odgt or two files in one"
    with contextlib.suppress(ValueError, RecursionError):
        if not cause:
            json.loads(without_trailing_commas(text))
            cause = "; `maskloss repair` removes trailing commas"
    return f"not valid JSON, broken or truncated: {str(error)[:200]}{cause}"


def likely_cause(beginning: bytes) -> str:
    """Return a hint at what a file that is not JSON is, judged by its beginning; empty if unknown."""
    if not beginning.strip():
        return "; it is empty"
    if beginning.startswith(b"version https://git-lfs"):
        return "; it is a Git LFS pointer: run `git lfs pull`"
    if beginning.startswith((b"\x1f\x8b", b"PK\x03\x04")):
        return "; it is compressed: unpack it"
    if beginning.lstrip().startswith(b"<"):
        return "; it is XML or HTML"
    if beginning.lstrip().startswith((b"{'", b"[{'")):
        return "; it is Python's text of a dict: write the file with json.dump"
    return ""


def not_coco(document: Any, missing: Sequence[str], annotation: Any = None) -> str:
    """Return the error message for JSON that lacks COCO's lists, with the format that it may be in.

    Args:
        document: the decoded JSON.
        missing: the lists that it lacks.
        annotation: the first annotation, if there is one.
    """
    hint = _hint(document, missing, annotation)
    return f"not a COCO-format file: it has no list of {', '.join(missing)}{f'; {hint}' if hint else ''}"


def _hint(document: Any, missing: Sequence[str], annotation: Any) -> str | None:
    first = document[0] if isinstance(document, list) and document else document
    if isinstance(document, dict) and len(missing) == 3 and document:
        for key, value in document.items():
            if all(has_list(value, name) for name in ("images", "annotations")):
                return f"its lists are in {key[:40]!r}: make that the document"
        first = {**next((v for v in document.values() if isinstance(v, dict)), {}), **document}
    keys = first.keys() if isinstance(first, dict) else ()
    for names, hint in _TOOLS + (_LISTS if isinstance(document, list) else ()):
        if len(missing) > 1 and all(name in keys for name in names):
            return hint
    if list(missing) == ["images"] and "videos" in document:
        return "it is about videos, as YouTube-VIS: list each frame as an image, with annotations of its own"
    if list(missing) == ["annotations"] and "annotations" not in document:
        return "it only lists images, as the files of COCO's test sets do"
    if list(missing) == ["categories"]:
        return (
            annotation_hint(annotation)
            or "`maskloss repair` adds a category for each category_id of annotations"
        )
    return annotation_hint(annotation)


def has_list(document: Any, key: str) -> bool:
    """Return whether a document is a JSON object that has a list for a key."""
    return isinstance(document, dict) and isinstance(document.get(key), list)


def listed(document: Any) -> list[str]:
    """Replace COCO's lists that are objects, with an entry for each key, by lists, and return their names.

    Example:
        >>> document = {"annotations": {"7": {"id": 7}}}
        >>> listed(document), document
        (['annotations'], {'annotations': [{'id': 7}]})
    """
    found = []
    for key in LISTS if isinstance(document, dict) else ():
        entries = document.get(key)
        if (
            isinstance(entries, dict)
            and entries
            and all(isinstance(entry, dict) for entry in entries.values())
        ):
            document[key] = list(entries.values())
            found.append(key)
    return found
