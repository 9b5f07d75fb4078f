"""Repair of the images: their ids, file names and sizes."""

from __future__ import annotations

from dataclasses import replace

from maskloss.data.findings import Finding, Kind, shown
from maskloss.data.images import read_image_size
from maskloss.data.reading import images as checks
from maskloss.data.reading.conventions import BORDER_TOLERANCE
from maskloss.data.repair.draft import Draft, Fix
from maskloss.data.repair.sections import typed_key
from maskloss.errors import InputError


def _leave_out_repetition(draft: Draft, kind: Kind, finding: Finding) -> None:
    """Leave out the second of two images with the same id and file_name, or both if their file_names differ."""
    first = draft.document["images"][finding.value]
    if first.get("file_name") == draft.entry(kind, finding).get("file_name"):
        # Its annotations are those of the first.
        draft.left_out["image"].add(finding.position)
        draft.record(kind, finding, "left out, since it is listed twice")
        return
    # It is unknown to which of the images the annotations belong.
    for position in (finding.value, finding.position):
        draft.leave_out(kind, replace(finding, position=position), "two files have the id")


def _find_id(draft: Draft, kind: Kind, finding: Finding) -> None:
    """Take the missing id of an image from its image_id."""
    if draft.ids.clear("image", draft.entry(kind, finding)) is None:
        draft.leave_out(kind, finding)
    else:
        draft.renumber(kind, finding)


def _number(draft: Draft, kind: Kind, finding: Finding) -> None:
    """Replace an id that is not an integer."""
    if draft.image_id_counts[typed_key(draft.entry(kind, finding).get("id"))] > 1:
        # It is unknown to which of the images the annotations belong.
        draft.leave_out(kind, finding, "the id is used twice")
    else:
        draft.renumber(kind, finding)


def _rename(draft: Draft, kind: Kind, finding: Finding) -> None:
    """Correct a file_name if it can only mean one file, and no other file_name may mean that file."""
    item, found = draft.entry(kind, finding), finding.value
    if found is None:
        draft.leave_out(kind, finding)
        return
    given = item.get("file_name") or checks.url_of(item)
    other_names = draft.names_of_file.get(found, set()) - {given}
    if kind is not checks.FILE_SPELLING and other_names:
        what = f"{shown(given)}: {shown(found)} may also be {shown(min(other_names))}"
        draft.leave_out(kind, finding, what)
        return
    draft.record(kind, finding, "file_name corrected", f"{shown(given)} is now {shown(found)}")
    item["file_name"] = found


def _take_size_from_file(draft: Draft, kind: Kind, finding: Finding) -> None:
    item = draft.entry(kind, finding)
    try:
        size = finding.value or read_image_size(draft.folder / item["file_name"])
    except InputError:
        draft.leave_out(kind, finding)
        return
    item["width"], item["height"] = size
    draft.record(kind, finding, "size taken from the image file")


def _correct_size(draft: Draft, kind: Kind, finding: Finding) -> None:
    """Swap width and height if the file then has this size, or take that if only it holds the annotations' polygons.

    Otherwise, the image may be another one, or another version of it, so it is left out.
    """
    item = draft.entry(kind, finding)
    size = tuple(finding.value if finding.position >= 0 else finding.value[1])
    if (item["height"], item["width"]) == size:
        what = "width and height swapped"
    elif _holds_polygons_alone(size, (item["width"], item["height"]), draft.polygons_of_image(item)):
        what = "size taken from the image file, because the polygons fit no other"
    else:
        draft.leave_out(kind, finding)
        return
    item["width"], item["height"] = size
    draft.record(kind, finding, what)


def _holds_polygons_alone(
    size: tuple[int, ...], recorded: tuple[int, ...], polygons: list[list[float]]
) -> bool:
    """Return whether an image's polygons lie within the width and height of its file, and far beyond those recorded."""
    ends = [max((max(polygon[axis::2]) for polygon in polygons), default=0.0) for axis in (0, 1)]
    is_beyond = any(end > 1.1 * side for end, side in zip(ends, recorded, strict=True))
    return is_beyond and all(end <= side + BORDER_TOLERANCE for end, side in zip(ends, size, strict=True))


FIXES: dict[Kind, Fix] = {
    checks.IMAGE_ENTRY: Draft.leave_out,
    checks.IMAGE_TWICE: _leave_out_repetition,
    checks.IMAGE_REPEATED: _leave_out_repetition,
    checks.IMAGE_NO_ID: _find_id,
    checks.IMAGE_ID: _number,
    checks.IMAGE_FLOAT: Draft.write_integers,
    checks.FILE_NAME: _rename,
    checks.FILE_OUTSIDE: _rename,
    checks.FILE_ELSEWHERE: _rename,
    checks.FILE_SPELLING: _rename,
    checks.FILE_MISSING: Draft.leave_out,
    checks.BAD_SIZE: _take_size_from_file,
    checks.MISSING_SIZE: _take_size_from_file,
    checks.TURNED_SIZE: _take_size_from_file,
    checks.SIZE_DIFFERS: _correct_size,
    checks.UNREADABLE_IMAGE: Draft.leave_out,
    checks.LFS_POINTER: Draft.leave_out,
}
