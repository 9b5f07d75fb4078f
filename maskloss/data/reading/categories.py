"""Reading and validation of the categories of an annotation file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from maskloss.data.findings import Findings, Kind, shown
from maskloss.data.reading.columns import ABSENT, Columns
from maskloss.data.reading.entries import (
    LONGEST_NAME,
    are_equal,
    is_absent,
    possible_ids,
    whole_number,
)
from maskloss.data.records import Category

NO_CATEGORIES = Kind("no_categories", "category", True)
CATEGORY_ENTRY = Kind("category_entry", "category", True, "categories that cannot be read")
CATEGORY_NAME = Kind(
    "category_name", "category", True, "categories without a usable name", "`maskloss repair` names them"
)
CATEGORY_ID = Kind(
    "category_id", "category", True, "categories whose id is not an integer", "`maskloss repair` numbers them"
)
CATEGORY_TWICE = Kind(
    "category_twice",
    "category",
    True,
    "categories with a duplicate id",
    "give each an id of its own, also in its annotations",
)
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


def read_categories(
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
            faulty |= {ABSENT} if is_absent(given) else possible_ids(given)
        elif identity in categories:
            if are_equal(categories[identity][1], item):
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


def match_categories(
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
