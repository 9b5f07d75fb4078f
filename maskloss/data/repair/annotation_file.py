"""Repair of an annotation file, from reading it to writing the new file and the list of changes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from maskloss.data.records import CocoData
from maskloss.data.repair.document import decode_document, encode_document
from maskloss.data.repair.log import Log, Repair
from maskloss.data.repair.rounds import repair_document
from maskloss.errors import InputError
from maskloss.files import existing_folder, make_folder, write_text


def repair(
    image_folder: str | os.PathLike[str],
    annotation_file: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    crowds: Literal["keep", "objects"] = "keep",
    boxes: Literal["keep", "from-masks"] = "keep",
) -> tuple[CocoData, list[Repair]]:
    """Write a repaired copy of an annotation file, in which `check_data` finds no errors, and a list of the changes.

    All valid fields are kept, including unknown ones. Repairing a repaired file changes nothing.

    Args:
        image_folder: folder that the `file_name`s are relative to.
        annotation_file: COCO-format JSON; it is not modified.
        output: the new file. The list of changes is written beside it, as `NAME.repairs.json` for `NAME.json`.
        crowds: "objects" sets `iscrowd` to 0 everywhere, for annotation tools that write brush masks as crowds.
        boxes: "from-masks" computes the box of each object that has a mask from the mask.

    Returns:
        The data set as read from the new file, and the repairs.

    Raises:
        InputError: the file cannot be repaired, or only with one of the options; or no usable object is left; or the
            output already exists.
        RunError: the output cannot be written.
    """
    path, folder = Path(annotation_file), existing_folder(image_folder, "images")
    target = Path(output)
    listing = target.with_name(f"{target.name.removesuffix('.json')}.repairs.json")
    for file in (target, listing):
        if file.exists() or file.is_symlink():
            raise InputError(f"{file}: already exists; name another --output")
    log = Log()
    document = decode_document(path, log)
    log.name_by_position(document)
    data = repair_document(
        document,
        path,
        folder,
        boxes_from_masks=boxes == "from-masks",
        crowds_to_objects=crowds == "objects",
        log=log,
    )
    text = encode_document(document, path, log)
    repairs = log.repairs()
    summary = {
        "input": str(path),
        "output": str(target),
        "crowds": crowds,
        "boxes": boxes,
        "repairs": [_as_json(change) for change in repairs],
    }
    make_folder(target.parent)
    write_text(listing, json.dumps(summary, indent=1) + "\n")
    try:
        write_text(target, text)
    except BaseException:
        listing.unlink()
        raise
    return CocoData(target, data.image_folder, data.records, data.categories, data.warnings), repairs


def _as_json(change: Repair) -> dict[str, Any]:
    return {
        "kind": change.kind,
        "section": change.section,
        "change": change.change,
        "count": len(change.entries),
        "entries": [{"name": name, "was": what} for name, what in change.entries],
    }
