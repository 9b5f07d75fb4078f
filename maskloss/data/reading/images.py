"""Reading and validation of the images of an annotation file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maskloss.data.findings import LEFT_OUT, Findings, Kind, printable, shown
from maskloss.data.images import orientation_of, read_image_size
from maskloss.data.reading.columns import ABSENT, ImageColumns
from maskloss.data.reading.entries import (
    are_equal,
    is_absent,
    possible_ids,
    whole_number,
)
from maskloss.data.reading.file_names import ImageFolder, is_absolute, stays_inside
from maskloss.errors import InputError

#: Largest width or height of an image, in px.
_MAX_SIDE = 1_000_000
IMAGE_ENTRY = Kind("image_entry", "image", True, "images that cannot be read", LEFT_OUT)
IMAGE_ID = Kind(
    "image_id",
    "image",
    True,
    "images whose id is not an integer",
    "`maskloss repair` numbers them",
)
IMAGE_NO_ID = Kind(
    "image_no_id",
    "image",
    True,
    "images without an id",
    "`maskloss repair` takes their image_id, and leaves out those without one",
)
IMAGE_TWICE = Kind("image_twice", "image", True, "images with a duplicate id", LEFT_OUT)
IMAGE_REPEATED = Kind("image_repeated", "image", False, "images that are listed twice are read once")
IMAGE_FLOAT = Kind(
    "float_id_image", "image", False, "ids and sizes that are whole floats, such as 1.0, are read as integers"
)
FILE_NAME = Kind(
    "file_name",
    "image",
    True,
    "images whose file_name is not the name of a file",
    LEFT_OUT,
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
    "`maskloss repair` corrects sizes that are swapped, or that contradict the polygons, and leaves out the others",
)
LFS_POINTER = Kind("lfs_pointer", "image", True, "image files that are Git LFS pointers, not images")
UNREADABLE_IMAGE = Kind("unreadable_image", "image", True, "image files that cannot be read", LEFT_OUT)


def read_images(items: list[Any], folder: ImageFolder, findings: Findings) -> ImageColumns:
    """Read the images, and find their files. Those with errors are left out, and their ids kept in `faulty`."""
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
                images.faulty |= possible_ids(given)
            continue
        if identity in seen:
            if are_equal(items[seen[identity]], item):
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


def find_different_sizes(
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
