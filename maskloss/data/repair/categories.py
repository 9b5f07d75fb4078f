"""Repair of the categories."""

from __future__ import annotations

from maskloss.data.findings import Finding, Kind, shown
from maskloss.data.reading import categories as checks
from maskloss.data.reading.entries import LONGEST_NAME, is_absent, whole_number
from maskloss.data.repair.draft import Draft, Fix
from maskloss.data.repair.sections import id_key
from maskloss.errors import InputError


def _add_categories(draft: Draft, kind: Kind, finding: Finding) -> None:
    """Add the categories that annotations refer to, or one for all annotations if they refer to none."""
    annotations = [item for _, item in draft.entries("annotation")]
    categories = draft.document["categories"]
    used = {id_key(annotation.get("category_id")) for annotation in annotations}
    if used == {None}:
        categories.append({"id": 1, "name": "object"})
        for annotation in annotations:
            annotation["category_id"] = 1
        change = "all objects are given one category, 'object'"
        draft.log.add(kind, change, "", finding.detail.partition(";")[0])
        return
    for identity in sorted({number for number in map(whole_number, used) if number is not None}):
        name = f"category {identity}"
        categories.append({"id": identity, "name": name})
        draft.log.add(kind, "added, since annotations refer to it", name, "not in the file")


def _merge(draft: Draft, kind: Kind, finding: Finding) -> None:
    """Leave out a category if all categories with its id have its name."""
    equal = draft.categories_by_id[id_key(draft.entry(kind, finding).get("id"))]
    if len({shown(category.get("name")) for category in equal}) == 1:
        draft.leave_out(kind, finding)


def _number(draft: Draft, kind: Kind, finding: Finding) -> None:
    """Replace an id that is missing or not an integer, unless several categories have it.

    Raises:
        InputError: categories with different names have the id.
    """
    item = draft.entry(kind, finding)
    old = item.get("id")
    equal = draft.categories_by_id[id_key(old)]
    if is_absent(old) or len(equal) == 1:
        draft.renumber(kind, finding)
    elif len({shown(category.get("name")) for category in equal}) > 1:
        names = " and ".join(shown(category.get("name")) for category in equal[:2])
        raise InputError(
            f"{finding.name}: the id is used twice: {names}; `repair` cannot decide which of them is meant"
        )
    elif item is not equal[0]:
        draft.leave_out(kind, finding, "is listed twice")
    else:
        draft.renumber(kind, finding)


def _name(draft: Draft, kind: Kind, finding: Finding) -> None:
    """Cut a name that is too long, and name a category without one after its id."""
    item = draft.entry(kind, finding)
    name = item.get("name")
    if isinstance(name, str) and name:
        item["name"] = name[:LONGEST_NAME]
        draft.record(kind, finding, f"cut to {LONGEST_NAME:,} letters")
        return
    named = (other for _, other in draft.entries("category") if other is not item and other.get("name"))
    if any(id_key(other.get("id")) == id_key(item["id"]) for other in named):
        draft.leave_out(kind, finding)  # the id is that of another category, which has a name
    else:
        item["name"] = f"category {item['id']}"
        draft.record(kind, finding, "named after its id")


FIXES: dict[Kind, Fix] = {
    checks.NO_CATEGORIES: _add_categories,
    checks.CATEGORY_ENTRY: Draft.leave_out,
    checks.CATEGORY_REPEATED: Draft.leave_out,
    checks.CATEGORY_TWICE: _merge,
    checks.CATEGORY_ID: _number,
    checks.CATEGORY_NAME: _name,
    checks.CATEGORY_FLOAT: Draft.write_integers,
}
