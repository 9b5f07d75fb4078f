"""Repair of the annotations' fields, other than masks and boxes: ids, references, iscrowd, weight and points."""

from __future__ import annotations

import contextlib

import numpy as np

from maskloss.data.findings import Finding, Kind
from maskloss.data.reading import annotations as checks
from maskloss.data.reading import columns
from maskloss.data.reading.entries import (
    BAD_POINTS,
    BAD_WEIGHT,
    BadEntry,
    read_crowd,
    read_points,
    read_weight,
    spelled_number,
)
from maskloss.data.repair.draft import Draft, Fix
from maskloss.data.repair.text import with_numbers


def _number(draft: Draft, kind: Kind, finding: Finding) -> None:
    """Assign a new id. Nothing refers to the ids of annotations."""
    new = draft.ids.assign("annotation", draft.entry(kind, finding))
    draft.record(kind, finding, "given a new id", f"is now {new}")


def _set_crowd(draft: Draft, kind: Kind, finding: Finding) -> None:
    item = draft.entry(kind, finding)
    item["iscrowd"] = read_crowd(item["iscrowd"]) or 0
    draft.record(kind, finding, "iscrowd set to 0 or 1")


def _remove_weight(draft: Draft, kind: Kind, finding: Finding) -> None:
    """Remove a weight that cannot be read, unless it is a number written as text."""
    item = draft.entry(kind, finding)
    with contextlib.suppress(BadEntry):
        item["weight"] = read_weight(with_numbers(item["weight"]))
        draft.record(kind, finding, "weight written as a number")
        return
    del item["weight"]
    draft.record(kind, finding, "weight removed")


def _remove_points(draft: Draft, kind: Kind, finding: Finding) -> None:
    """Remove the points that cannot be read or are labeled and outside the image."""
    item = draft.entry(kind, finding)
    coordinates, labels = item.pop("point_coords", None), item.pop("point_labels", None)
    width, height = draft.size_of_image(item) or (np.inf, np.inf)
    points = []
    if isinstance(coordinates, list) and isinstance(labels, list) and len(coordinates) == len(labels):
        for coordinate, label in zip(coordinates, labels, strict=True):
            with contextlib.suppress(BadEntry):
                ((x, y, number),) = read_points([coordinate], [label])
                if number < 0 or (0 <= x <= width and 0 <= y <= height):
                    points.append((x, y, number))
    if points:
        item["point_coords"] = [[x, y] for x, y, _ in points]
        item["point_labels"] = [label for *_, label in points]
    draft.record(kind, finding, "points that cannot be read removed" if points else "all points removed")


def _find_image(draft: Draft, kind: Kind, finding: Finding) -> None:
    _find(draft, kind, finding, "image")


def _find_category(draft: Draft, kind: Kind, finding: Finding) -> None:
    _find(draft, kind, finding, "category")


def _find(draft: Draft, kind: Kind, finding: Finding, section: str) -> None:
    """Replace an id of text by the number in the text, or by the id of the image or category with this name."""
    item, key = draft.entry(kind, finding), f"{section}_id"
    text = item.get(key)
    number = spelled_number(text)
    if number is not None and number in draft.ids.used[section]:
        item[key] = number
        draft.record(kind, finding, f"{key} written as a number")
        return
    ids = draft.ids_by_name[section].get(text, []) if isinstance(text, str) else []
    if len(ids) == 1:
        item[key] = ids[0]
        draft.record(kind, finding, f"{key} taken from the name")
        return
    draft.leave_out(kind, finding)


FIXES: dict[Kind, Fix] = {
    columns.NO_OBJECT: Draft.leave_out,
    columns.TEXT_ID: _number,
    columns.MISSING_ID: _number,
    checks.DOUBLED_ID: _number,
    columns.FLOAT_ID: Draft.write_integers,
    columns.ODD_CROWD: _set_crowd,
    columns.BAD_CROWD: _set_crowd,
    BAD_WEIGHT: _remove_weight,
    BAD_POINTS: _remove_points,
}

#: Fixes of references, which are right only for images and categories that are repaired.
REFERENCE_FIXES: dict[Kind, Fix] = {
    checks.UNKNOWN_IMAGE: _find_image,
    checks.UNKNOWN_CATEGORY: _find_category,
}
