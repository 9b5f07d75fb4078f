"""Reading COCO-format annotation files, and finding what is wrong with them.

What can be read in one way only is read, with one warning that counts it; what takes a decision is refused with the
command that takes it. `read_coco` refuses a file with the first cause; `find_problems` lists all kinds of faults, as
`maskloss check` prints them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskloss.data.annotations import check_annotations
from maskloss.data.columns import ABSENT, Columns, ImageColumns
from maskloss.data.entries import is_absent, whole_number
from maskloss.data.file_names import ImageFolder, is_absolute, stays_inside
from maskloss.data.findings import Findings, Kind, Problem, shown
from maskloss.data.images import read_image_size
from maskloss.data.json_stream import decode_object, decoded, without_trailing_commas
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

#: The longest error message.
_LONGEST = 300
#: No image is wider or higher, in px.
_LARGEST_SIDE = 1_000_000
#: Images whose files are opened because annotations reach beyond their recorded size.
_MOST_OPENED = 2_000
#: Images whose files are opened to compare their size, spread over all.
_SAMPLE = 64

_LEFT_OUT = "`maskloss repair` leaves them out"
NOT_JSON = Kind("not_json", "file", True)
NOT_COCO = Kind("not_coco", "file", True)
NO_IMAGE = Kind("no_image", "file", True)
NO_CATEGORIES = Kind("no_categories", "category", True)
CATEGORY_ENTRY = Kind("category_entry", "category", True, "categories that cannot be read")
CATEGORY_NAME = Kind(
    "category_name", "category", True, "categories without a name", "`maskloss repair` names them"
)
CATEGORY_ID = Kind(
    "category_id", "category", True, "categories whose id is no integer", "`maskloss repair` numbers them"
)
CATEGORY_TWICE = Kind("category_twice", "category", True, "categories with the id of another one")
CATEGORY_REPEATED = Kind(
    "category_repeated", "category", False, "categories that are there twice are read once"
)
CATEGORY_FLOAT = Kind(
    "float_id_category", "category", False, "category ids that are whole floats are read as integers"
)
OTHER_CATEGORY = Kind("other_category", "category", True, "categories that are not the model's")

IMAGE_ENTRY = Kind("image_entry", "image", True, "images that cannot be read", _LEFT_OUT)
IMAGE_ID = Kind(
    "image_id",
    "image",
    True,
    "images whose id is no integer",
    "`maskloss repair` numbers them",
)
IMAGE_NO_ID = Kind("image_no_id", "image", True, "images without an id", _LEFT_OUT)
IMAGE_TWICE = Kind("image_twice", "image", True, "images with the id of another one", _LEFT_OUT)
IMAGE_FLOAT = Kind(
    "float_id_image", "image", False, "ids and sizes that are whole floats, such as 1.0, are read as integers"
)
FILE_NAME = Kind("file_name", "image", True, "images whose file_name is no file's name", _LEFT_OUT)
FILE_OUTSIDE = Kind(
    "file_outside",
    "image",
    True,
    "images whose file_name leaves the image folder",
    "`maskloss repair` takes the file of that name in the folder, and leaves out the others",
)
FILE_ELSEWHERE = Kind(
    "file_elsewhere",
    "image",
    True,
    "images whose file is there under another name",
    "`maskloss repair` corrects the names",
)
FILE_MISSING = Kind(
    "file_missing", "image", True, "images whose file does not exist", "`maskloss repair` leaves them out"
)
FILE_SPELLING = Kind(
    "file_spelling",
    "image",
    False,
    "file names with backslashes or URL encoding are read as the files that exist",
)
BAD_SIZE = Kind(
    "bad_size",
    "image",
    True,
    "images whose width or height is no positive integer",
    "`maskloss repair` takes the file's",
)
MISSING_SIZE = Kind(
    "missing_size", "image", False, "images without width and height; the files' own are taken"
)
SIZE_DIFFERS = Kind(
    "size_differs",
    "image",
    True,
    "images whose files have another size than is recorded",
    "`maskloss repair` corrects swapped sizes and leaves out the others",
)
LFS_POINTER = Kind("lfs_pointer", "image", True, "image files that are Git LFS pointers, not images")
UNREADABLE_IMAGE = Kind("unreadable_image", "image", True, "image files that cannot be read", _LEFT_OUT)

_FORMATS = (
    (("shapes", "imagePath"), "labelme"),
    (("_via_img_metadata",), "a VGG Image Annotator project"),
    (("infos", "items"), "Datumaro"),
    (("data", "annotations"), "Label Studio's own JSON"),
    (("file_attributes", "regions"), "VGG Image Annotator"),
    (("annotations", "data_row"), "Labelbox's own JSON"),
    (("data_row",), "Labelbox's own JSON"),
)


@dataclass
class Content:
    """An annotation file, decoded: lists of images and categories as they stand, annotations in columns."""

    images: list[Any]
    categories: list[Any]
    annotations: Columns


def read_coco(
    image_folder: str | os.PathLike[str],
    annotation_file: str | os.PathLike[str],
    *,
    categories: Sequence[Category] | None = None,
) -> CocoData:
    """Read and check a COCO-format file.

    Args:
        image_folder: where the `file_name`s are.
        annotation_file: JSON with images, annotations and categories.
        categories: those of the model or of the training set; the file's must be among them. None takes the
            file's own.

    Returns:
        The data set; `warnings` counts what was read in the one way that it can be read, and what was left out.

    Raises:
        InputError: the file cannot be read, or not without a decision; the message names the file, the first cause,
            and the command that decides or lists all causes.
    """
    data, problems = _read(Path(annotation_file), existing_folder(image_folder, "images"), categories)
    errors = [problem for problem in problems if problem.error]
    if errors:
        others = len(errors) - 1
        more = f" (and {others} more kinds of errors, `maskloss check` lists them)" if others else ""
        raise InputError(errors[0].shortened(_LONGEST - len(more)) + more)
    assert data is not None
    return data


def find_problems(
    image_folder: str | os.PathLike[str], annotation_file: str | os.PathLike[str]
) -> tuple[CocoData | None, list[Problem]]:
    """Read a COCO-format file and list everything wrong with it, a line for each kind of fault.

    Returns:
        The data set without what has errors, or None where nothing can be read; and the problems.
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
    """Give the memory of what was decoded back to the system, which glibc would keep."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def decode_file(path: Path, findings: Findings) -> Content | None:
    """Decode an annotation file, or note why that cannot be done."""
    content = read_bytes(path)
    columns = Columns()

    def restarted() -> Any:
        columns.__init__()  # type: ignore[misc]
        return columns.take

    # Millions of small objects that hold no cycle would be searched for one again and again.
    collecting = gc.isenabled()
    gc.disable()
    try:
        text = decoded(content)
        del content
        document = decode_object(text, {"annotations": restarted})
    except UnicodeDecodeError as error:
        findings.add(NOT_JSON, -1, "", undecodable(error))
        return None
    except (ValueError, RecursionError) as error:
        cause = _likely_cause(text[:100].encode("utf-8", "surrogatepass")) or _commas(text)
        findings.add(NOT_JSON, -1, "", f"not valid JSON, broken or truncated: {str(error)[:200]}{cause}")
        return None
    finally:
        if collecting:
            gc.enable()
    missing = [key for key in ("images", "annotations", "categories") if not has_list(document, key)]
    if missing:
        findings.add(NOT_COCO, -1, "", not_coco(document, missing))
        return None
    return Content(document["images"], document["categories"], columns)


def undecodable(error: UnicodeDecodeError) -> str:
    """Say of what encoding a text is that is not Unicode."""
    content = error.object
    if content[:1] in (b"{", b"[") and b"\0" not in content:
        byte = content[error.start]
        line = content.count(b"\n", 0, error.start) + 1
        return (
            f"not valid JSON: the text is not UTF-8, but probably Latin-1 or Windows-1252 (byte 0x{byte:02x} in line "
            f"{line}); save it as UTF-8, or `maskloss repair` reads it so"
        )
    return f"not valid JSON, broken or truncated: {error}{_likely_cause(content[:100])}"


def _commas(text: str) -> str:
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(without_trailing_commas(text))
        return "; `maskloss repair` removes trailing commas"
    return ""


def _likely_cause(beginning: bytes) -> str:
    if beginning.startswith(b"version https://git-lfs"):
        return "; it is a Git LFS pointer: run `git lfs pull`"
    if beginning.startswith((b"\x1f\x8b", b"PK\x03\x04")):
        return "; it is compressed: unpack it"
    if beginning.lstrip().startswith(b"<"):
        return "; it is XML or HTML"
    return ""


def not_coco(document: Any, missing: Sequence[str]) -> str:
    """Say what a JSON lacks, and of which other format it may be."""
    first = document[0] if isinstance(document, list) and document else document
    if isinstance(document, dict) and len(missing) == 3 and document:
        first = {**next((v for v in document.values() if isinstance(v, dict)), {}), **document}
    text = f"not a COCO-format file: it has no list of {', '.join(missing)}"
    keys = first.keys() if isinstance(first, dict) else ()
    for names, tool in _FORMATS:
        if all(name in keys for name in names) and len(missing) > 1:
            return f"{text}; it looks like {tool}: export it as COCO"
    return text


def has_list(document: Any, key: str) -> bool:
    """Whether a key of a JSON object is there with a list."""
    return isinstance(document, dict) and isinstance(document.get(key), list)


def read_content(
    content: Content,
    path: Path,
    image_folder: Path,
    categories: Sequence[Category] | None,
    findings: Findings,
) -> tuple[CocoData, IntArray]:
    """Check a decoded file; give what has no errors, and where in the file's list each annotation of it is."""
    own, faulty = _read_categories(content.categories, content.annotations, findings)
    kept = _reconciled(own, categories, findings)
    folder = ImageFolder(image_folder)
    images = _read_images(content.images, folder, findings)
    if not content.images:
        findings.add(NO_IMAGE, -1, "", "there is no image in it")

    def different_sizes(indices: Iterable[int]) -> set[int]:
        # Those whose annotations reach beyond their size, and some of all: mostly it is wrong throughout.
        some = range(0, len(images.ids), max(len(images.ids) // _SAMPLE, 1))
        chosen = sorted({*sorted(indices)[:_MOST_OPENED], *some})
        return _different_sizes(images, chosen, image_folder, findings)

    records, positions = check_annotations(
        content.annotations,
        images,
        {category.id for category in own},
        faulty,
        different_sizes,
        findings,
    )
    return CocoData(path, image_folder, records, kept, []), positions


def _read_categories(
    items: list[Any], annotations: Columns, findings: Findings
) -> tuple[list[Category], set[Any] | None]:
    """The categories by id, and the ids of those with errors; None where the annotations' errors follow from it."""
    categories: dict[int, tuple[Category, Any]] = {}
    faulty: set[Any] = set()
    if not items:
        unlabeled = len(annotations) and len(annotations.odd_category_ids) == len(annotations)
        findings.add(
            NO_CATEGORIES,
            -1,
            "",
            "there is no category in it"
            + (
                ": the objects were not labeled in the tool; `maskloss repair` gives all the category 'object'"
                if unlabeled
                else ""
            ),
        )
        return [], None
    for position, item in enumerate(items):
        if not isinstance(item, dict):
            text = f"expected an object, got {type(item).__name__}"
            findings.add(CATEGORY_ENTRY, position, f"category number {position}", text)
            faulty.add(ABSENT)
            continue
        given = item.get("id")
        name = f"category {shown(given)}" if "id" in item else f"category number {position}"
        identity = whole_number(given)
        if identity is None:
            text = f"id must be an integer, not {shown(given)}" if "id" in item else "missing id"
            findings.add(CATEGORY_ID, position, name, text)
            faulty.add(_hashable(given))
        elif identity in categories:
            if categories[identity][1] == item:
                findings.add(CATEGORY_REPEATED, position, name, "is there twice, word for word")
            else:
                text = f"the id is there twice: {shown(categories[identity][0].name)} and {shown(item.get('name'))}"
                findings.add(CATEGORY_TWICE, position, name, text)
        elif item.get("name") is None or item["name"] == "":
            findings.add(CATEGORY_NAME, position, name, "missing name")
            faulty.add(identity)
        else:
            if isinstance(given, float):
                findings.add(CATEGORY_FLOAT, position, name, f"id {given} is read as an integer")
            categories[identity] = Category(identity, str(item["name"])), item
    own = sorted((category for category, _ in categories.values()), key=lambda category: category.id)
    return own, None if ABSENT in faulty else faulty


def _hashable(value: Any) -> Any:
    return value if isinstance(value, str | int | float) or value is None else repr(value)


def _reconciled(
    own: list[Category], given: Sequence[Category] | None, findings: Findings
) -> tuple[Category, ...]:
    """The categories that labels are counted from: the given ones, if the file's are among them."""
    if given is None:
        return tuple(own)
    names = {category.id: category.name for category in given}
    for category in own:
        label = f"category {category.id}"
        if category.id not in names:
            text = f"{shown(category.name)} is not among the model's categories"
            findings.add(OTHER_CATEGORY, -1, label, text)
        elif names[category.id] != category.name:
            text = f"is {shown(category.name)} here, but {shown(names[category.id])} among the model's categories"
            findings.add(OTHER_CATEGORY, -1, label, text)
    return tuple(given)


def _read_images(items: list[Any], folder: ImageFolder, findings: Findings) -> ImageColumns:
    images = ImageColumns()
    seen: dict[int, int] = {}
    unread: list[tuple[int, str, str, str]] = []
    for position, item in enumerate(items):
        if not isinstance(item, dict):
            text = f"expected an object, got {type(item).__name__}"
            findings.add(IMAGE_ENTRY, position, f"image number {position}", text)
            images.faulty.add(ABSENT)
            continue
        given = item.get("id")
        identity = whole_number(given)
        name = f"image {shown(given)}" if "id" in item else f"image number {position}"
        if identity is None:
            if is_absent(given):
                findings.add(
                    IMAGE_NO_ID, position, name, "missing id" if "id" not in item else f"id {shown(given)}"
                )
                images.faulty.add(ABSENT)
            else:
                findings.add(IMAGE_ID, position, name, f"id must be an integer, not {shown(given)}")
                images.faulty.add(_hashable(given))
            continue
        if identity in seen:
            findings.add(IMAGE_TWICE, position, name, "the id is there twice", seen[identity])
            continue
        seen[identity] = position
        file_name = item.get("file_name")
        if type(file_name) is str and folder.has(file_name) and stays_inside(file_name):
            found: str | None = file_name
        else:
            found = _found_file(file_name, "file_name" in item, folder, position, name, findings, unread)
        size = None if found is None else _recorded_size(item, found, folder, position, name, findings)
        if found is None or size is None:
            images.faulty.add(identity)
            continue
        if isinstance(given, float):
            findings.add(IMAGE_FLOAT, position, name, f"id {given} is read as an integer")
        images.ids.append(identity)
        images.names.append(found)
        images.widths.append(size[0])
        images.heights.append(size[1])
        images.positions.append(position)
    _tell_missing_files(unread, folder, findings)
    return images


def _found_file(
    file_name: Any,
    given: bool,
    folder: ImageFolder,
    position: int,
    name: str,
    findings: Findings,
    missing: list[tuple[int, str, str, str]],
) -> str | None:
    """The name of an image's file where it can be read, and what there is to say where it is not as written."""
    if not isinstance(file_name, str) or not file_name or "\0" in file_name:
        text = f"file_name must be a file's name, not {shown(file_name)}" if given else "missing file_name"
        findings.add(FILE_NAME, position, name, text)
        return None
    absolute = is_absolute(file_name)
    if not absolute and stays_inside(file_name):
        spelled = folder.as_spelled(file_name)
        if spelled is not None:
            findings.add(
                FILE_SPELLING,
                position,
                name,
                f"file_name {shown(file_name)} is read as {shown(spelled)}",
                spelled,
            )
            return spelled
    found = folder.elsewhere(file_name)
    if absolute or not stays_inside(file_name):
        why = " (an absolute path)" if absolute else ""
        there = f"; {shown(found)} is in the folder" if found else ""
        findings.add(
            FILE_OUTSIDE,
            position,
            name,
            f"file_name {shown(file_name)} leaves the image folder{why}{there}",
            found,
        )
    elif found is not None:
        why = "another letter case" if found.casefold() == file_name.casefold() else "other folders"
        why = f"a Windows path, {why}" if "\\" in file_name else why
        text = f"the file {folder.path / file_name} does not exist, but {shown(found)} does ({why})"
        findings.add(FILE_ELSEWHERE, position, name, text, found)
    else:
        missing.append((position, name, file_name, f"the file {folder.path / file_name} does not exist"))
    return None


def _tell_missing_files(
    missing: list[tuple[int, str, str, str]], folder: ImageFolder, findings: Findings
) -> None:
    if not missing:
        return
    other = folder.other_folder(missing[0][2])
    if other is not None:
        hint = f"; it is in {other}: give --images {other}"
    else:
        found = folder.other_extension(missing[0][2])
        hint = f"; {shown(found)} is there" if found is not None else ""
    if "\\" in missing[0][2]:
        hint += "; its name has backslashes: a Windows path"
    for number, (position, name, file_name, text) in enumerate(missing):
        text = text if len(text) < 1000 else f"the file {shown(file_name)} does not exist"
        findings.add(FILE_MISSING, position, name, text + (hint if number == 0 else ""))


def _recorded_size(
    item: dict[str, Any], file_name: str, folder: ImageFolder, position: int, name: str, findings: Findings
) -> tuple[int, int] | None:
    width, height = item.get("width"), item.get("height")
    if (
        type(width) is int
        and type(height) is int
        and 0 < width <= _LARGEST_SIDE
        and 0 < height <= _LARGEST_SIDE
    ):
        return width, height
    if is_absent(width) or is_absent(height):
        try:
            size = read_image_size(folder.path / file_name)
        except InputError as error:
            findings.add(unreadable_kind(error), position, name, unreadable_text(file_name, error))
            return None
        findings.add(
            MISSING_SIZE,
            position,
            name,
            f"missing width and height; {file_name[:80]} is {size[0]} x {size[1]}",
            size,
        )
        return size
    sizes = whole_number(width), whole_number(height)
    if None in sizes or not all(0 < side <= _LARGEST_SIDE for side in sizes if side is not None):
        text = f"width and height must be positive integers, not {shown(width)} and {shown(height)}"
        findings.add(BAD_SIZE, position, name, text)
        return None
    findings.add(IMAGE_FLOAT, position, name, f"size {shown(width)} x {shown(height)} is read as integers")
    assert sizes[0] is not None
    assert sizes[1] is not None
    return sizes[0], sizes[1]


def _different_sizes(
    images: ImageColumns, indices: Sequence[int], folder: Path, findings: Findings
) -> set[int]:
    """Which images' files have another size than is recorded, or are not there but for a Git LFS pointer."""
    different = set()
    for index in indices:
        recorded = images.widths[index], images.heights[index]
        try:
            size = read_image_size(folder / images.names[index], recorded)
        except InputError as error:
            # Others are told by what decodes them.
            if unreadable_kind(error) is LFS_POINTER:
                different.add(index)
                findings.add(
                    LFS_POINTER,
                    images.positions[index],
                    f"image {images.ids[index]}",
                    unreadable_text(images.names[index], error),
                )
            continue
        if size != recorded:
            different.add(index)
            text = size_text(images.names[index], size, recorded)
            findings.add(SIZE_DIFFERS, images.positions[index], f"image {images.ids[index]}", text, size)
    return different


def unreadable_kind(error: InputError) -> Kind:
    """Return of which kind it is that an image cannot be read."""
    return LFS_POINTER if "Git LFS pointer" in str(error) else UNREADABLE_IMAGE


def unreadable_text(file_name: str, error: InputError) -> str:
    """Say why an image cannot be read, with the name that the file has in the annotations."""
    _, found, reason = str(error).partition(": not a readable image")
    return f"{file_name[:80]}: not a readable image{reason}" if found else str(error)


def size_text(file_name: str, size: tuple[int, int], recorded: tuple[int, int]) -> str:
    """Say that a file has another size than is recorded."""
    swapped = ": they are swapped" if size == recorded[::-1] else ""
    return (
        f"{file_name}: the file is {size[0]} x {size[1]}, but {recorded[0]} x {recorded[1]} (width x height) is "
        f"recorded for it{swapped}"
    )
