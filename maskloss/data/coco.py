"""Reading and validation of COCO-format annotation files.

A deviation from the format that has only one possible meaning is read, with one warning per kind that counts the
entries. One that needs the user's decision is an error, whose message names the command that makes the decision.
`read_coco` raises the first error; `find_problems` lists all kinds of faults, as `maskloss check` prints them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from maskloss.data.findings import Findings, Kind, Problem
from maskloss.data.reading.annotations import build_records
from maskloss.data.reading.categories import match_categories, read_categories
from maskloss.data.reading.columns import Columns, integers
from maskloss.data.reading.entries import whole_number
from maskloss.data.reading.file_names import ImageFolder
from maskloss.data.reading.formats import (
    KEYED_LIST,
    LISTS,
    annotation_hint,
    has_list,
    listed,
    not_coco,
    not_json,
    undecodable,
)
from maskloss.data.reading.images import find_different_sizes, read_images
from maskloss.data.reading.json_stream import decode_object, decoded
from maskloss.data.records import (
    Annotation,
    Category,
    CocoData,
    ImageRecord,
    ImageRecords,
)
from maskloss.errors import InputError
from maskloss.files import existing_folder, read_bytes
from maskloss.masks.encoded import IntArray

__all__ = [
    "Annotation",
    "Category",
    "CocoData",
    "ImageRecord",
    "ImageRecords",
    "Problem",
    "find_problems",
    "read_coco",
]

#: Maximum length of an error message, in characters.
_MAX_MESSAGE_LENGTH = 300
#: Most image files that are opened because annotations reach beyond the images' recorded size.
_MAX_OPENED = 2_000
#: Image files that are opened to check a sample of the recorded sizes, evenly spaced over the data set.
_SAMPLE_SIZE = 64

NOT_JSON = Kind("not_json", "file", True)
NOT_COCO = Kind("not_coco", "file", True)
OTHER_ANNOTATIONS = Kind("other_annotations", "file", True)
NO_IMAGE = Kind("no_image", "file", True)


@dataclass
class Content:
    """A decoded annotation file: unchecked lists of images and categories, and annotations in columns."""

    images: list[Any]
    categories: list[Any]
    annotations: Columns

    @classmethod
    def of_document(cls, document: dict[str, Any]) -> Content:
        """Make the content of a document that is already decoded, with COCO's three lists."""
        columns = Columns()
        for annotation in document["annotations"]:
            columns.take(annotation)
        return cls(document["images"], document["categories"], columns)


def read_coco(
    image_folder: str | os.PathLike[str],
    annotation_file: str | os.PathLike[str],
    *,
    categories: Sequence[Category] | None = None,
) -> CocoData:
    """Read and validate a COCO-format file.

    Args:
        image_folder: folder that the `file_name`s are relative to.
        annotation_file: JSON with images, annotations and categories.
        categories: categories of the model or of the training set, which must include those that the file's annotations
            refer to. Ids that differ are replaced by those of the category with the same name. Defaults to the
            categories of the file.

    Returns:
        The data set. Its `warnings` count the deviations that were corrected, and the entries that were left out.

    Raises:
        InputError: the file cannot be read, or only with a decision by the user. The message names the file, the first
            cause, and the command that makes the decision or lists all causes.
    """
    data, problems = _read(Path(annotation_file), existing_folder(image_folder, "images"), categories)
    errors = [problem for problem in problems if problem.error]
    if errors:
        others = len(errors) - 1
        more = f" (and {others} more kinds of errors, `maskloss check` lists them)" if others else ""
        raise InputError(errors[0].shortened(_MAX_MESSAGE_LENGTH - len(more)) + more)
    assert data is not None
    return data


def find_problems(
    image_folder: str | os.PathLike[str], annotation_file: str | os.PathLike[str]
) -> tuple[CocoData | None, list[Problem]]:
    """Read a COCO-format file and list all its problems, one for each kind of fault.

    Returns:
        The data set without the entries that have errors, or None if the file cannot be decoded; and the problems.
    """
    return _read(Path(annotation_file), existing_folder(image_folder, "images"), None)


def _read(
    path: Path, image_folder: Path, categories: Sequence[Category] | None
) -> tuple[CocoData | None, list[Problem]]:
    findings = Findings()
    content = decode_file(path, findings)
    data = None
    if content is not None:
        data, _ = read_content(content, path, image_folder, categories, findings)
    problems = findings.problems(str(path))
    del content, findings
    _return_memory()
    if data is not None:
        data.warnings.extend(problem.text for problem in problems if not problem.error)
    return data, problems


def _return_memory() -> None:
    """Return the memory of the decoded file to the system; glibc would keep it."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def decode_file(path: Path, findings: Findings) -> Content | None:
    """Decode an annotation file, or return None and add the reason to the findings."""
    content = read_bytes(path)
    columns = Columns()

    def restart() -> Any:
        columns.__init__(may_have_booleans="true" in text or "false" in text)  # type: ignore[misc]
        return columns.take

    # Decoding allocates millions of small objects without reference cycles, and the collector would scan them again
    # and again.
    collecting = gc.isenabled()
    gc.disable()
    try:
        text = decoded(content)
        del content
        document = decode_object(text, {"annotations": restart})
    except UnicodeDecodeError as error:
        findings.add(NOT_JSON, -1, "", undecodable(error))
        return None
    except (ValueError, RecursionError) as error:
        findings.add(NOT_JSON, -1, "", not_json(text, error))
        return None
    finally:
        if collecting:
            gc.enable()
    for key in listed(document):
        findings.add(
            KEYED_LIST, -1, "", f"the {key} are an object with an entry for each, and are read as a list"
        )
        if key == "annotations":
            take = restart()
            for item in document[key]:
                take(item)
    missing = [key for key in LISTS if not has_list(document, key)]
    if missing:
        findings.add(NOT_COCO, -1, "", not_coco(document, missing, columns.first_without_geometry))
        return None
    return Content(document["images"], document["categories"], columns)


def read_content(
    content: Content,
    path: Path,
    image_folder: Path,
    categories: Sequence[Category] | None,
    findings: Findings,
) -> tuple[CocoData, IntArray]:
    """Validate a decoded file.

    Returns:
        The data set without the entries that have errors, and the position of each of its annotations in the file's
        list.
    """
    annotations = content.annotations
    hint = annotation_hint(annotations.first_without_geometry)
    if hint is not None and annotations.without_geometry == annotations.count:
        findings.add(OTHER_ANNOTATIONS, -1, "", hint)
        annotations = Columns()
    own, faulty = read_categories(content.categories, annotations, findings)
    used = {*annotations.category_ids, *map(whole_number, annotations.odd_category_ids.values())}
    matches = match_categories(own, categories, used, findings)
    folder = ImageFolder(image_folder)
    images = read_images(content.images, folder, findings)
    if not content.images:
        findings.add(NO_IMAGE, -1, "", "the file has no images")

    def different_sizes(indices: Iterable[int]) -> set[int]:
        # Check a sample of all images too: if recorded sizes are wrong, they are usually wrong throughout a file.
        sample = range(0, len(images.ids), max(len(images.ids) // _SAMPLE_SIZE, 1))
        chosen = sorted({*sorted(indices)[:_MAX_OPENED], *sample})
        return find_different_sizes(images, chosen, image_folder, findings)

    records, positions = build_records(
        annotations,
        images,
        {category.id for category in own},
        faulty,
        different_sizes,
        findings,
    )
    if any(identity != match for identity, match in matches.items()):
        ids = [matches.get(identity, identity) for identity in records.category_ids.tolist()]
        records = replace(records, category_ids=integers(ids))
    return CocoData(
        path, image_folder, records, tuple(own if categories is None else categories), []
    ), positions
