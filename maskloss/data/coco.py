"""Reading and validation of COCO-format annotation files.

A deviation from the format that has only one possible meaning is read, with one warning per kind that counts the
entries. One that needs the user's decision is an error, whose message names the command that makes the decision.
`read_coco` raises the first error; `find_problems` lists all kinds of faults, as `maskloss check` prints them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from maskloss.data.annotations import build_records
from maskloss.data.columns import ABSENT, Columns, ImageColumns, integers
from maskloss.data.entries import LONGEST_NAME, is_absent, spelled_number, whole_number
from maskloss.data.file_names import ImageFolder, is_absolute, stays_inside
from maskloss.data.findings import Findings, Kind, Problem, printable, shown
from maskloss.data.formats import (
    KEYED_LIST,
    LISTS,
    annotation_hint,
    has_list,
    listed,
    not_coco,
    not_json,
    undecodable,
)
from maskloss.data.images import orientation_of, read_image_size
from maskloss.data.json_stream import decode_object, decoded
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
#: Largest width or height of an image, in px.
_MAX_SIDE = 1_000_000
#: Most image files that are opened because annotations reach beyond the images' recorded size.
_MAX_OPENED = 2_000
#: Image files that are opened to check a sample of the recorded sizes, evenly spaced over the data set.
_SAMPLE_SIZE = 64

_LEFT_OUT = "`maskloss repair` leaves them out"
NOT_JSON = Kind("not_json", "file", True)
NOT_COCO = Kind("not_coco", "file", True)
OTHER_ANNOTATIONS = Kind("other_annotations", "file", True)
NO_IMAGE = Kind("no_image", "file", True)
NO_CATEGORIES = Kind("no_categories", "category", True)
CATEGORY_ENTRY = Kind("category_entry", "category", True, "categories that cannot be read")
CATEGORY_NAME = Kind(
    "category_name", "category", True, "categories without a usable name", "`maskloss repair` names them"
)
CATEGORY_ID = Kind(
    "category_id", "category", True, "categories whose id is not an integer", "`maskloss repair` numbers them"
)
CATEGORY_TWICE = Kind("category_twice", "category", True, "categories with a duplicate id")
CATEGORY_REPEATED = Kind(
    "category_repeated", "category", False, "categories that are listed twice are read once"
)
CATEGORY_FLOAT = Kind(
    "float_id_category", "category", False, "category ids that are whole floats are read as integers"
)
CATEGORY_SAME_NAME = Kind(
    "category_same_name",
    "category",
    False,
    "categories with the name of another category are trained as separate classes",
)
OTHER_CATEGORY = Kind(
    "other_category",
    "category",
    True,
    "categories that do not match the model's",
    "`maskloss subset --categories` copies the others",
)
CATEGORY_BY_NAME = Kind(
    "category_by_name",
    "category",
    False,
    "categories whose id is not the model's are read by their name; results have the model's ids",
)
EXTRA_CATEGORY = Kind(
    "extra_category",
    "category",
    False,
    "categories that the model does not have, and no annotation refers to",
)

IMAGE_ENTRY = Kind("image_entry", "image", True, "images that cannot be read", _LEFT_OUT)
IMAGE_ID = Kind(
    "image_id",
    "image",
    True,
    "images whose id is not an integer",
    "`maskloss repair` numbers them",
)
IMAGE_NO_ID = Kind("image_no_id", "image", True, "images without an id", _LEFT_OUT)
IMAGE_TWICE = Kind("image_twice", "image", True, "images with a duplicate id", _LEFT_OUT)
IMAGE_REPEATED = Kind("image_repeated", "image", False, "images that are listed twice are read once")
IMAGE_FLOAT = Kind(
    "float_id_image", "image", False, "ids and sizes that are whole floats, such as 1.0, are read as integers"
)
FILE_NAME = Kind(
    "file_name",
    "image",
    True,
    "images whose file_name is not the name of a file",
    _LEFT_OUT,
)
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
    "images whose file exists under another name",
    "`maskloss repair` corrects the names",
)
FILE_MISSING = Kind(
    "file_missing", "image", True, "images whose file does not exist", "`maskloss repair` leaves them out"
)
FILE_SPELLING = Kind(
    "file_spelling",
    "image",
    False,
    "file names with backslashes, URL encoding or spaces around them, or only in a URL, are read as the files that "
    "exist",
)
BAD_SIZE = Kind(
    "bad_size",
    "image",
    True,
    "images whose width or height is not a positive integer",
    "`maskloss repair` takes the sizes of the files",
)
MISSING_SIZE = Kind(
    "missing_size", "image", False, "images without width and height; the sizes of the files are taken"
)
TURNED_SIZE = Kind(
    "turned_size",
    "image",
    False,
    "images without width and height are rotated or mirrored as their EXIF orientation says; no size confirms it",
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
    own, faulty = _read_categories(content.categories, annotations, findings)
    used = {*annotations.category_ids, *map(whole_number, annotations.odd_category_ids.values())}
    matches = _match_categories(own, categories, used, findings)
    folder = ImageFolder(image_folder)
    images = _read_images(content.images, folder, findings)
    if not content.images:
        findings.add(NO_IMAGE, -1, "", "the file has no images")

    def different_sizes(indices: Iterable[int]) -> set[int]:
        # Check a sample of all images too: if recorded sizes are wrong, they are usually wrong throughout a file.
        sample = range(0, len(images.ids), max(len(images.ids) // _SAMPLE_SIZE, 1))
        chosen = sorted({*sorted(indices)[:_MAX_OPENED], *sample})
        return _find_different_sizes(images, chosen, image_folder, findings)

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


def _read_categories(
    items: list[Any], annotations: Columns, findings: Findings
) -> tuple[list[Category], set[Any] | None]:
    """Read the categories.

    Returns:
        The valid categories, sorted by id, and the ids of those with errors; None for the latter if any unknown
        category of an annotation may be a consequence of these errors.
    """
    categories: dict[int, tuple[Category, Any]] = {}
    faulty: set[Any] = set()
    if not items:
        unlabeled = len(annotations) and len(annotations.odd_category_ids) == len(annotations)
        findings.add(
            NO_CATEGORIES,
            -1,
            "",
            "the file has no categories"
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
            text = f"id must be an integer, not {shown(given)}"
            findings.add(CATEGORY_ID, position, name, text if "id" in item else "missing id")
            faulty |= {ABSENT} if is_absent(given) else _possible_ids(given)
        elif identity in categories:
            if _are_equal(categories[identity][1], item):
                findings.add(CATEGORY_REPEATED, position, name, "is listed twice with equal fields")
            else:
                text = f"the id is used twice: {shown(categories[identity][0].name)} and {shown(item.get('name'))}"
                findings.add(CATEGORY_TWICE, position, name, text)
        elif (fault := _name_fault(item.get("name"))) is not None:
            findings.add(CATEGORY_NAME, position, name, fault)
            faulty.add(identity)
        else:
            if isinstance(given, float):
                findings.add(CATEGORY_FLOAT, position, name, f"id {given} is read as an integer")
            categories[identity] = Category(identity, str(item["name"])), item
    own = sorted((category for category, _ in categories.values()), key=lambda category: category.id)
    _report_equal_names([category for category, _ in categories.values()], findings)
    return own, None if ABSENT in faulty else faulty - categories.keys()


def _are_equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except RecursionError:  # nested too deeply to be compared
        return False


def _name_fault(name: Any) -> str | None:
    """Return what is wrong with a category's name, or None."""
    if is_absent(name) or name == "":
        return "missing name"
    if isinstance(name, list | dict) or (isinstance(name, float) and math.isinf(name)):
        return f"name must be text, not {shown(name)}"
    length = len(str(name))
    return None if length <= LONGEST_NAME else f"name has {length:,} letters, more than {LONGEST_NAME:,}"


def _report_equal_names(categories: list[Category], findings: Findings) -> None:
    first: dict[str, int] = {}
    for category in categories:
        other = first.setdefault(category.name, category.id)
        if other != category.id:
            text = f"has the same name as category {other}, {shown(category.name)}, but is a separate class"
            findings.add(CATEGORY_SAME_NAME, -1, f"category {category.id}", text)


def _possible_ids(value: Any) -> set[Any]:
    """Return the ids by which annotations may refer to an entry: the one that is written, and the number it spells."""
    plain = value if isinstance(value, str | int | float) else shown(value)
    return {plain, spelled_number(value)} - {None}


def _match_categories(
    own: list[Category], given: Sequence[Category] | None, used: set[Any], findings: Findings
) -> dict[int, int]:
    """Return the given category that each of the file's categories is, by id; report those that are none of them.

    Files that were exported one by one may give the same categories other ids, so a category is recognized by its name
    if its id does not fit.

    Args:
        own: categories of the file.
        given: categories of the model, or None for those of the file.
        used: ids of the categories that annotations refer to.
        findings: receives the categories that do not match.
    """
    if given is None:
        return {category.id: category.id for category in own}
    names = {category.id: category.name for category in given}
    own_names = Counter(category.name for category in own)
    by_name = {category.name: category.id for category in given if own_names[category.name] == 1}
    for name, count in Counter(names.values()).items():
        if count > 1:
            by_name.pop(name, None)
    matches: dict[int, int] = {}
    for category in own:
        label, name = f"category {category.id}", shown(category.name)
        if names.get(category.id) == category.name:
            matches[category.id] = category.id
        elif category.name in by_name:
            matches[category.id] = by_name[category.name]
            text = f"{name} is category {matches[category.id]} of the model, and is read as that"
            findings.add(CATEGORY_BY_NAME, -1, label, text)
        elif category.id not in used:
            text = f"{name} is not among the model's categories, and no annotation refers to it"
            findings.add(EXTRA_CATEGORY, -1, label, text)
        elif category.id in names:
            text = f"is {name} here, but {shown(names[category.id])} among the model's categories"
            findings.add(OTHER_CATEGORY, -1, label, text)
        else:
            findings.add(OTHER_CATEGORY, -1, label, f"{name} is not among the model's categories")
    return matches


def _read_images(items: list[Any], folder: ImageFolder, findings: Findings) -> ImageColumns:
    images = ImageColumns()
    seen: dict[int, int] = {}
    missing: list[tuple[int, str, str, str]] = []
    of_urls = _files_of_urls(items, folder)
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
                images.faulty |= _possible_ids(given)
            continue
        if identity in seen:
            if _are_equal(items[seen[identity]], item):
                findings.add(
                    IMAGE_REPEATED, position, name, "is listed twice with equal fields", seen[identity]
                )
            else:
                findings.add(IMAGE_TWICE, position, name, "the id is used twice", seen[identity])
            continue
        seen[identity] = position
        file_name = item.get("file_name")
        if type(file_name) is str and folder.has(file_name) and stays_inside(file_name):
            found: str | None = file_name
        elif position in of_urls:
            found = of_urls[position]
            text = f"missing file_name; {shown(found)} is read, which {shown(url_of(item))} names"
            findings.add(FILE_SPELLING, position, name, text, found)
        else:
            found = _find_file(item, folder, position, name, findings, missing)
        size = None if found is None else _read_size(item, found, folder, position, name, findings)
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
    images.faulty.difference_update(images.ids)
    _report_missing_files(missing, folder, findings)
    return images


def url_of(item: dict[str, Any]) -> str | None:
    """Return the URL of an image's file, which LVIS has instead of a `file_name`, or None."""
    urls = (item.get(key) for key in ("coco_url", "url", "flickr_url"))
    return next((url for url in urls if isinstance(url, str) and url and "\0" not in url), None)


def _files_of_urls(items: list[Any], folder: ImageFolder) -> dict[int, str]:
    """Return the existing files that the URLs of images without a `file_name` name, by the images' positions.

    A file that another image names too is left out, because it is unknown which of the images it belongs to.
    """
    found: dict[int, str] = {}
    claims: Counter[str] = Counter()
    for position, item in enumerate(items):
        file_name = item.get("file_name") if isinstance(item, dict) else ""
        url = url_of(item) if is_absent(file_name) else None
        if isinstance(file_name, str):
            claims[file_name] += 1
        elif url is not None and (file := folder.elsewhere(url)) is not None:
            found[position] = file
            claims[file] += 1
    return {position: file for position, file in found.items() if claims[file] == 1}


def _find_file(
    item: dict[str, Any],
    folder: ImageFolder,
    position: int,
    name: str,
    findings: Findings,
    missing: list[tuple[int, str, str, str]],
) -> str | None:
    """Return the name of the file that a `file_name` refers to, or None; report a `file_name` that is not exact."""
    file_name, given = item.get("file_name"), "file_name" in item
    if not isinstance(file_name, str) or not file_name or "\0" in file_name:
        text = (
            f"file_name must be the name of a file, not {shown(file_name)}" if given else "missing file_name"
        )
        url = url_of(item) if is_absent(file_name) else None
        found = None if url is None else folder.elsewhere(url)
        if found is not None:
            text += f", but {shown(url)} names {shown(found)}, which is in the folder"
        findings.add(FILE_NAME, position, name, text, found)
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
        text = (
            f"the file {printable(folder.path / file_name)} does not exist, but {shown(found)} does ({why})"
        )
        findings.add(FILE_ELSEWHERE, position, name, text, found)
    else:
        missing.append(
            (position, name, file_name, f"the file {printable(folder.path / file_name)} does not exist")
        )
    return None


def _report_missing_files(
    missing: list[tuple[int, str, str, str]], folder: ImageFolder, findings: Findings
) -> None:
    if not missing:
        return
    other = folder.other_folder(missing[0][2])
    if other is not None:
        hint = f"; it is in {other}: use --images {other}"
    else:
        found = folder.other_extension(missing[0][2])
        hint = f"; {shown(found)} exists" if found is not None else ""
    if "\\" in missing[0][2]:
        hint += "; its name has backslashes: a Windows path"
    for number, (position, name, file_name, text) in enumerate(missing):
        text = text if len(text) < 1000 else f"the file {shown(file_name)} does not exist"
        findings.add(FILE_MISSING, position, name, text + (hint if number == 0 else ""))


def _read_size(
    item: dict[str, Any], file_name: str, folder: ImageFolder, position: int, name: str, findings: Findings
) -> tuple[int, int] | None:
    width, height = item.get("width"), item.get("height")
    if type(width) is int and type(height) is int and 0 < width <= _MAX_SIDE and 0 < height <= _MAX_SIDE:
        return width, height
    # Datumaro and others write 0 for a size that they do not know.
    if is_absent(width) or is_absent(height) or (width == 0 and height == 0):
        try:
            size = read_image_size(folder.path / file_name)
            turned = orientation_of(folder.path / file_name) != 1
        except InputError as error:
            findings.add(unreadable_kind(error), position, name, unreadable_text(file_name, error))
            return None
        given = "missing width and height" if width != 0 else "width and height are 0"
        text = f"{given}; {file_name[:80]} is {size[0]} x {size[1]}"
        findings.add(
            TURNED_SIZE if turned else MISSING_SIZE,
            position,
            name,
            f"{text}, rotated or mirrored as its EXIF orientation says" if turned else text,
            size,
        )
        return size
    sizes = whole_number(width), whole_number(height)
    if None in sizes or not all(0 < side <= _MAX_SIDE for side in sizes if side is not None):
        text = f"width and height must be positive integers, not {shown(width)} and {shown(height)}"
        findings.add(BAD_SIZE, position, name, text)
        return None
    findings.add(IMAGE_FLOAT, position, name, f"size {shown(width)} x {shown(height)} is read as integers")
    assert sizes[0] is not None
    assert sizes[1] is not None
    return sizes[0], sizes[1]


def _find_different_sizes(
    images: ImageColumns, indices: Sequence[int], folder: Path, findings: Findings
) -> set[int]:
    """Return the indices of images whose file has another size than recorded, or is only a Git LFS pointer."""
    different = set()
    for index in indices:
        recorded = images.widths[index], images.heights[index]
        try:
            size = read_image_size(folder / images.names[index], recorded)
        except InputError as error:
            # Other unreadable images are reported when they are decoded.
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
    """Return the kind of fault of an image that cannot be read."""
    return LFS_POINTER if "Git LFS pointer" in str(error) else UNREADABLE_IMAGE


def unreadable_text(file_name: str, error: InputError) -> str:
    """Return the message for an image that cannot be read, with its `file_name` instead of the full path."""
    _, found, reason = str(error).partition(": not a readable image")
    return f"{file_name[:80]}: not a readable image{reason}" if found else str(error)


def size_text(file_name: str, size: tuple[int, int], recorded: tuple[int, int]) -> str:
    """Return the message for an image file that has another size than recorded."""
    swapped = ": they are swapped" if size == recorded[::-1] else ""
    return (
        f"{file_name}: the file is {size[0]} x {size[1]}, but {recorded[0]} x {recorded[1]} (width x height) is "
        f"recorded for it{swapped}"
    )
