"""Ids for entries whose own is missing or not an integer."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import Any

from maskloss.data.reading.entries import is_absent, spelled_number, whole_number
from maskloss.data.repair.sections import LIST_KEYS, entries


class Ids:
    """The ids of a document's entries, by section, with those that were assigned since.

    Args:
        document: the decoded file.
    """

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document

    def assign(self, section: str, item: dict[str, Any]) -> int:
        """Assign an unused id to an entry: the integer that its id means if that is clear, else the highest plus 1."""
        number = self.clear(section, item)
        if number is None:
            self._highest[section] += 1
            number = self._highest[section]
        self.used[section].add(number)
        item["id"] = number
        return number

    def clear(self, section: str, item: dict[str, Any]) -> int | None:
        """Return the integer that an entry's id means if no other entry has it or may mean it, else None."""
        number = _meant_id(section, item)
        if number is None and section == "category":
            number = self._only_unknown_category
        free = number not in self.used[section] and self._meant[section][number] < 2
        return number if free else None

    @cached_property
    def used(self) -> dict[str, set[int | None]]:
        """The integers that are ids, whole floats included."""
        return {
            section: {whole_number(item.get("id")) for _, item in entries(self._document, section)}
            for section in LIST_KEYS
        }

    @cached_property
    def _meant(self) -> dict[str, Counter[int | None]]:
        """How many entries mean each integer."""
        return {
            section: Counter(_meant_id(section, item) for _, item in entries(self._document, section))
            for section in LIST_KEYS
        }

    @cached_property
    def _highest(self) -> dict[str, int]:
        # Include the numbers that ids of text mean, so that those numbers stay unused until these ids are converted.
        return {
            section: max(
                (n for n in {*self.used[section], *self._meant[section]} if n is not None and n < 2**53),
                default=0,
            )
            for section in LIST_KEYS
        }

    @cached_property
    def _only_unknown_category(self) -> int | None:
        """The one category id that annotations use but no category has, if exactly one category lacks an id."""
        categories = (item for _, item in entries(self._document, "category"))
        annotations = (item for _, item in entries(self._document, "annotation"))
        without = [c for c in categories if is_absent(c.get("id")) and _meant_id("category", c) is None]
        known = {*self.used["category"], *self._meant["category"]}
        unknown = {whole_number(item.get("category_id")) for item in annotations} - known - {None}
        return unknown.pop() if len(without) == 1 and len(unknown) == 1 else None


def _meant_id(section: str, item: dict[str, Any]) -> int | None:
    """Return the integer that an id of text spells, or that an entry without an id has as "image_id" and the like."""
    given = item.get("id")
    number = spelled_number(given)
    if is_absent(given) and section != "annotation":
        number = whole_number(item.get(f"{section}_id"))
    return number
