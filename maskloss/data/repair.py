"""Repair of annotation files.

`repair` makes the decisions that `read_coco` leaves to the user, and lists every change.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pycocotools import mask as coco_mask

from maskloss.data import annotations as rows_of
from maskloss.data import check, coco, columns, entries
from maskloss.data.columns import Columns
from maskloss.data.entries import (
    BadEntry,
    box_of_mask,
    is_absent,
    read_box,
    read_crowd,
    read_points,
    read_segmentation,
    read_weight,
    spelled_number,
    whole_number,
)
from maskloss.data.findings import Finding, Findings, Kind, shown
from maskloss.data.images import read_image_size
from maskloss.data.json_stream import decoded, without_trailing_commas
from maskloss.data.records import CocoData
from maskloss.errors import InputError
from maskloss.files import existing_folder, make_folder, read_bytes, write_text
from maskloss.masks.coverage import union_area
from maskloss.masks.encoded import decode_counts

#: Rounds of repair. Each one repairs the faults that the previous one uncovered; three or four are usually enough.
_MAX_ROUNDS = 12
#: Largest difference between the x, y, width and height of a corrected RLE's extent and those of its box, in px.
_BOX_TOLERANCE = 2.0
_SECTIONS = ("images", "annotations", "categories")


@dataclass(frozen=True)
class Repair:
    """One change that was made for one kind of fault, and the entries that it was made to.

    Attributes:
        kind: Name of the kind of fault.
        section: "file", "category", "image" or "annotation".
        change: Description of the change.
        entries: (name, fault) of each changed entry.
    """

    kind: str
    section: str
    change: str
    entries: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        count = len(self.entries)
        things = {"category": "categories"}.get(self.section, f"{self.section}s")
        number = f"{count} {self.section if count == 1 else things}"
        examples = "; ".join(f"{name}: {what}" if name else what for name, what in self.entries[:3])
        return f"{number}: {self.change} ({examples}{'; ...' if count > 3 else ''})"


@dataclass
class _Log:
    """The changes made so far, grouped by kind and change, in the order in which they were made."""

    entries_by_change: dict[tuple[str, str, str], dict[Any, tuple[str, str]]] = field(default_factory=dict)
    #: Number of changes in the current round.
    count: int = 0
    #: By the identity of an entry whose id is missing or not unique: the entry, and its name by position. Entries that
    #: are left out stay alive here, so that no other entry gets their identity.
    positions: dict[int, tuple[Any, str]] = field(default_factory=dict)

    def name_by_position(self, document: dict[str, Any]) -> None:
        """Name the entries by their position in the file if their id is missing or not unique."""
        for section, key in (("image", "images"), ("annotation", "annotations"), ("category", "categories")):
            items = [
                (position, item) for position, item in enumerate(document[key]) if isinstance(item, dict)
            ]
            counts = Counter(_id_key(item.get("id")) for _, item in items)
            for position, item in items:
                given = item.get("id")
                if is_absent(given):
                    self.positions[id(item)] = item, f"{section} number {position}"
                elif counts[_id_key(given)] > 1:
                    self.positions[id(item)] = item, f"{section} number {position} (id {shown(given)})"

    def add(self, kind: Kind, change: str, name: str, what: str, item: Any = None) -> None:
        """Add a change of an entry, once for each entry and change."""
        self.count += 1
        entries = self.entries_by_change.setdefault((kind.name, kind.section, change), {})
        name = self.positions[id(item)][1] if id(item) in self.positions else name
        # Unique ids and names by position tell the objects apart; other entries have no id and are changed only once.
        entries.setdefault(name if isinstance(item, dict) else len(entries), (name, what))

    def repairs(self) -> list[Repair]:
        return [Repair(*key, tuple(entries.values())) for key, entries in self.entries_by_change.items()]


ENCODING = Kind("encoding", "file", True)
COMMAS = Kind("trailing_commas", "file", True)
FROM_MASKS = Kind("boxes_from_masks", "annotation", True)
TO_OBJECTS = Kind("crowds_to_objects", "annotation", True)
WITH_IMAGE = Kind("image_left_out", "annotation", True)


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
        image_folder: Folder that the `file_name`s are relative to.
        annotation_file: COCO-format JSON; it is not modified.
        output: The new file. The list of changes is written beside it, with the suffix `.repairs.json`.
        crowds: "objects" sets `iscrowd` to 0 everywhere, for annotation tools that write brush masks as crowds.
        boxes: "from-masks" computes the box of each object that has a mask from the mask.

    Returns:
        The data set as read from the new file, and the repairs.

    Raises:
        InputError: The file cannot be repaired, or only with one of the options; or no usable object is left; or the
            output already exists.
        RunError: The output cannot be written.
    """
    path, folder = Path(annotation_file), existing_folder(image_folder, "images")
    target = Path(output)
    listing = target.with_name(f"{target.name.removesuffix('.json')}.repairs.json")
    for file in (target, listing):
        if file.exists() or file.is_symlink():
            raise InputError(f"{file}: is there already; name another --output")
    log = _Log()
    document = _decode_document(path, log)
    log.name_by_position(document)
    data = _repair_document(document, path, folder, crowds, boxes, log)
    text = _encode_document(document, path, log)
    repairs = log.repairs()
    summary = {
        "input": str(path),
        "output": str(target),
        "crowds": crowds,
        "boxes": boxes,
        "repairs": [
            {
                "kind": repair.kind,
                "section": repair.section,
                "change": repair.change,
                "count": len(repair.entries),
                "entries": [{"name": name, "was": what} for name, what in repair.entries],
            }
            for repair in repairs
        ],
    }
    make_folder(target.parent)
    write_text(listing, json.dumps(summary, indent=1) + "\n")
    try:
        write_text(target, text)
    except BaseException:
        listing.unlink()
        raise
    return CocoData(target, data.image_folder, data.records, data.categories, data.warnings), repairs


def _encode_document(document: dict[str, Any], path: Path, log: _Log) -> str:
    """Encode the document as JSON, which has no NaN and no Infinity: in fields that are not COCO's they become null."""
    try:
        try:
            return json.dumps(document, allow_nan=False)
        except ValueError:
            for key, value in document.items():
                section = {"images": "image", "annotations": "annotation", "categories": "category"}.get(key)
                for item in value if section is not None else [document]:
                    if _remove_non_finite(item, skipped=() if section else tuple(_SECTIONS)):
                        name = f"{section} {shown(item.get('id'))}" if section else ""
                        kind = Kind("not_finite_field", section or "file", True)
                        log.add(
                            kind, "numbers that are not finite written as null", name, "NaN or Infinity", item
                        )
            return json.dumps(document, allow_nan=False)
    except RecursionError:
        raise InputError(f"{path}: is nested too deeply; it cannot be repaired") from None


def _remove_non_finite(value: Any, skipped: tuple[str, ...]) -> bool:
    """Replace numbers that are not finite by null, in place, and return whether there were any."""
    found = False
    left = [value]
    while left:
        inner = left.pop()
        for key, part in list(inner.items() if isinstance(inner, dict) else enumerate(inner)):
            if isinstance(part, float) and not math.isfinite(part):
                inner[key], found = None, True
            elif isinstance(part, dict | list) and not (inner is value and key in skipped):
                left.append(part)
    return found


def _decode_document(path: Path, log: _Log) -> dict[str, Any]:
    """Decode the file, repairing Windows-1252 text and trailing commas."""
    content = read_bytes(path)
    try:
        text = decoded(content)
    except UnicodeDecodeError as error:
        problem = coco.undecodable(error)
        if "Latin-1" not in problem:
            raise InputError(f"{path}: {problem}") from None
        # Windows-1252 assigns letters to bytes that are control characters in Latin-1, and leaves five bytes undefined.
        text = content.decode("cp1252", errors="replace")
        log.add(ENCODING, "read as Windows-1252, written as UTF-8", "", problem.partition(";")[0])
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        try:
            document = json.loads(without_trailing_commas(text))
        except (ValueError, RecursionError):
            raise InputError(
                f"{path}: not valid JSON, broken or truncated: {str(error)[:200]}"
                f"{coco.likely_cause(content[:100]) or '; it cannot be repaired'}"
            ) from None
        log.add(COMMAS, "trailing commas removed", "", str(error))
    missing = [key for key in ("images", "annotations", "categories") if not coco.has_list(document, key)]
    if missing:
        raise InputError(f"{path}: {coco.not_coco(document, missing)}; that cannot be repaired")
    result: dict[str, Any] = document
    return result


def _repair_document(
    document: dict[str, Any], path: Path, folder: Path, crowds: str, boxes: str, log: _Log
) -> CocoData:
    """Repair a document in place, in rounds until one changes nothing, and return the data set that it contains."""
    first: str | None = None
    for _ in range(_MAX_ROUNDS):
        findings = Findings()
        content = Columns()
        for item in document["annotations"]:
            content.take(item)
        data, positions = coco.read_content(
            coco.Content(document["images"], document["categories"], content), path, folder, None, findings
        )
        first = first or next((p.shortened(200) for p in findings.problems(str(path))), None)
        fixes = _Fixes(document, folder, data, positions, crowds, boxes, log)
        log.count = 0
        fixes.apply(findings)
        if not log.count and not findings.any_error:
            check.check_images(data, findings)
            fixes.apply(findings)
        if not log.count:
            break
    problems = findings.problems(str(path))
    errors = [problem for problem in problems if problem.error]
    if not data.images or not data.num_objects:
        cause = f": {first.removeprefix(f'{path}: ')}" if first else ""
        if not errors or errors[0].kind in ("no_image", "no_categories"):
            raise InputError(f"{path}: no usable object is left after the repair{cause}"[:300])
    if errors:
        cannot = "" if "repair --" in errors[0].text else " (`repair` cannot decide this)"
        raise InputError(errors[0].shortened(300 - len(cannot)) + cannot)
    data.warnings.extend(problem.text for problem in problems)
    return data


class _Fixes:
    """One round of repairs of a document."""

    def __init__(
        self,
        document: dict[str, Any],
        folder: Path,
        data: CocoData,
        positions: Any,
        crowds: str,
        boxes: str,
        log: _Log,
    ) -> None:
        self.folder, self.data, self.log = folder, data, log
        self.images: list[Any] = document["images"]
        self.annotations: list[Any] = document["annotations"]
        self.categories: list[Any] = document["categories"]
        self.crowds, self.boxes = crowds, boxes
        self.row = {int(position): row for row, position in enumerate(positions)}
        self.left_out: dict[str, set[int]] = {"image": set(), "annotation": set(), "category": set()}
        self.sizes = {image.id: (image.width, image.height) for image in data.images}
        self.by_image: dict[Any, list[int]] = {}
        self._items = {"image": self.images, "annotation": self.annotations, "category": self.categories}
        self._referring: dict[str, dict[Any, list[Any]]] = {}
        self.findings = Findings()

    def apply(self, findings: Findings) -> None:
        """Repair all findings of the kinds that have a repair."""
        self.findings = findings
        before = self.log.count
        causes_changed = False
        for kind, fix in self._fix_functions().items():
            # A repaired image or category may be the one that annotations refer to, which the next round shows.
            if kind in (rows_of.UNKNOWN_IMAGE, rows_of.UNKNOWN_CATEGORY) and causes_changed:
                continue
            for finding in findings.of(kind):
                fix(kind, finding)
            causes_changed |= kind.section in ("image", "category") and self.log.count > before
        if self.crowds == "objects":
            self._turn_crowds_into_objects()
        for finding in findings.of(rows_of.FRACTIONS):
            self._scale_fractions(finding)
        if findings.of(rows_of.AREA_OF_BOX):
            self._replace_areas()
        # Only once nothing else changes, because each box needs its image, and all boxes are converted at once.
        if self.boxes == "from-masks" and self.log.count == before:
            for finding in findings.of(rows_of.BOX_CONVENTION):
                self._convert_boxes(finding)
            self._take_boxes_from_masks()
        for section, left_out in self.left_out.items():
            if left_out:
                items = self._items[section]
                items[:] = [item for position, item in enumerate(items) if position not in left_out]
        self.left_out = {"image": set(), "annotation": set(), "category": set()}

    def _fix_functions(self) -> dict[Kind, Callable[[Kind, Finding], None]]:
        leave_out, whole = self._leave_out, self._write_integers
        return {
            coco.NO_CATEGORIES: self._add_categories,
            coco.CATEGORY_ENTRY: leave_out,
            coco.CATEGORY_REPEATED: leave_out,
            coco.CATEGORY_TWICE: self._merge_categories,
            coco.CATEGORY_ID: self._number_category,
            coco.CATEGORY_NAME: self._name_category,
            coco.CATEGORY_FLOAT: whole,
            coco.IMAGE_ENTRY: leave_out,
            coco.IMAGE_TWICE: self._leave_out_duplicate_images,
            coco.IMAGE_NO_ID: self._find_image_id,
            coco.IMAGE_ID: self._number_image,
            coco.IMAGE_FLOAT: whole,
            coco.FILE_NAME: self._rename,
            coco.FILE_OUTSIDE: self._rename,
            coco.FILE_ELSEWHERE: self._rename,
            coco.FILE_SPELLING: self._rename,
            coco.FILE_MISSING: leave_out,
            coco.BAD_SIZE: self._take_size_from_file,
            coco.MISSING_SIZE: self._take_size_from_file,
            coco.TURNED_SIZE: self._take_size_from_file,
            coco.SIZE_DIFFERS: self._swap_size,
            coco.UNREADABLE_IMAGE: leave_out,
            coco.LFS_POINTER: leave_out,
            columns.NO_OBJECT: leave_out,
            columns.TEXT_ID: self._number_annotation,
            columns.MISSING_ID: self._number_annotation,
            rows_of.DOUBLED_ID: self._number_annotation,
            columns.FLOAT_ID: whole,
            columns.ODD_CROWD: self._set_crowd,
            columns.BAD_CROWD: self._set_crowd,
            entries.BAD_WEIGHT: self._remove_weight,
            entries.BAD_POINTS: self._remove_points,
            entries.FLAT_POLYGON: self._rewrite_segmentation,
            entries.POINT_PAIRS: self._rewrite_segmentation,
            entries.RLE_IN_LIST: self._rewrite_segmentation,
            entries.BAD_SEGMENTATION: self._salvage_polygons,
            rows_of.NOT_FINITE: self._salvage_polygons,
            entries.CORRUPT_RLE: self._leave_mask_out,
            entries.RLE_SIZE: self._correct_rle_size,
            rows_of.UNKNOWN_IMAGE: self._find_image,
            rows_of.UNKNOWN_CATEGORY: self._find_category,
            rows_of.DEGENERATE: leave_out,
            rows_of.DEGENERATE_PART: self._drop_degenerate,
            rows_of.OUTSIDE: leave_out,
            rows_of.NO_BOX: self._read_text_box,
            rows_of.FLAT_BOX: self._leave_out_or_take_box,
            rows_of.BOX_OUTSIDE: self._leave_out_or_take_box,
            rows_of.BOX_FROM_MASK: self._write_box,
            rows_of.CLIPPED_BOX: self._write_box,
            rows_of.ODD_AREA: self._write_area,
        }

    # All sections.

    def _find_entry(self, kind: Kind, finding: Finding) -> tuple[int, Any]:
        items = self._items[kind.section]
        position = finding.position
        if position < 0:  # found while decoding the images; such findings have the image's id instead
            position = self._image_positions[
                finding.value[0] if isinstance(finding.value, tuple) else finding.value
            ]
        return position, items[position]

    @cached_property
    def _image_positions(self) -> dict[Any, int]:
        return {_id_key(item.get("id")): p for p, item in enumerate(self.images) if isinstance(item, dict)}

    def _leave_out(self, kind: Kind, finding: Finding) -> None:
        position, item = self._find_entry(kind, finding)
        if position in self.left_out[kind.section]:
            return
        self.left_out[kind.section].add(position)
        self.log.add(kind, "left out", finding.name, finding.detail, item)
        if kind.section == "image" and isinstance(item, dict) and "id" in item:
            self._leave_out_annotations_of(item["id"], finding.name)

    def _leave_out_annotations_of(self, image_id: Any, name: str) -> None:
        if not self.by_image:
            for position, annotation in enumerate(self.annotations):
                if isinstance(annotation, dict):
                    self.by_image.setdefault(_id_key(annotation.get("image_id")), []).append(position)
        for position in self.by_image.get(_id_key(image_id), []):
            if position not in self.left_out["annotation"]:
                self.left_out["annotation"].add(position)
                annotation = self.annotations[position]
                own = f"annotation {shown(annotation.get('id'))}"
                self.log.add(WITH_IMAGE, "left out with their image", own, name, annotation)

    def _write_integers(self, kind: Kind, finding: Finding) -> None:
        _, item = self._find_entry(kind, finding)
        for key in ("id", "image_id", "category_id", "width", "height"):
            number = whole_number(item.get(key))
            if isinstance(item.get(key), float) and number is not None:
                item[key] = number
        self.log.add(kind, "whole floats written as integers", finding.name, finding.detail, item)

    def _give_id(self, section: str, item: Any) -> int:
        """Give an entry an unused id: the integer that its id means if that is clear, else the highest plus 1."""
        number = self._clear_id(section, item)
        if number is None:
            self._highest_ids[section] += 1
            number = self._highest_ids[section]
        self._used_ids[section].add(number)
        item["id"] = number
        return number

    def _clear_id(self, section: str, item: Any) -> int | None:
        """Return the integer that an entry's id means if no other entry has it or may mean it."""
        number = _meant_id(section, item)
        if number is None and section == "category":
            number = self._only_unknown_category
        free = number not in self._used_ids[section] and self._meant_ids[section][number] < 2
        return number if free else None

    @cached_property
    def _meant_ids(self) -> dict[str, Counter[int | None]]:
        return {
            section: Counter(_meant_id(section, item) for item in items if isinstance(item, dict))
            for section, items in self._items.items()
        }

    @cached_property
    def _only_unknown_category(self) -> int | None:
        """The category id that annotations refer to and no category has, if only one category has no id."""
        without = [c for c in self.categories if isinstance(c, dict) and _is_without_id("category", c)]
        known = {*self._used_ids["category"], *self._meant_ids["category"]}
        used = {whole_number(item.get("category_id")) for item in self.annotations if isinstance(item, dict)}
        unknown = {number for number in used - known if number is not None}
        return unknown.pop() if len(without) == 1 and len(unknown) == 1 else None

    @cached_property
    def _used_ids(self) -> dict[str, set[int | None]]:
        return {
            section: {whole_number(item.get("id")) for item in items if isinstance(item, dict)}
            for section, items in self._items.items()
        }

    @cached_property
    def _highest_ids(self) -> dict[str, int]:
        # Include the numbers that ids of text mean, so that those numbers stay unused until these ids are converted.
        highest = {}
        for section in self._items:
            usual = {
                n
                for n in self._used_ids[section] | set(self._meant_ids[section])
                if n is not None and n < 2**53
            }
            highest[section] = max(usual, default=0)
        return highest

    def _references(self, key: str) -> dict[Any, list[Any]]:
        """Group the annotations by image_id or category_id, as written in the file: 1 and "1" are different."""
        if key not in self._referring:
            referring: dict[Any, list[Any]] = {}
            self._referring[key] = referring
            for item in self.annotations:
                if isinstance(item, dict):
                    referring.setdefault(_typed_key(item.get(key)), []).append(item)
        return self._referring[key]

    # Categories.

    def _add_categories(self, kind: Kind, finding: Finding) -> None:
        used: dict[Any, None] = {}
        for annotation in self.annotations:
            if isinstance(annotation, dict):
                used[_id_key(annotation.get("category_id"))] = None
        if not used:
            return
        if used.keys() == {None}:
            self.categories.append({"id": 1, "name": "object"})
            for annotation in self.annotations:
                if isinstance(annotation, dict):
                    annotation["category_id"] = 1
            self.log.add(
                kind, "all objects are given one category, 'object'", "", finding.detail.partition(";")[0]
            )
            return
        for identity in sorted({n for n in map(whole_number, used) if n is not None}):
            self.categories.append({"id": identity, "name": f"category {identity}"})
            self.log.add(
                kind, "added, since annotations refer to it", f"category {identity}", "not in the file"
            )

    def _merge_categories(self, kind: Kind, finding: Finding) -> None:
        position, item = self._find_entry(kind, finding)
        names = {shown(other.get("name")) for other in self._categories_by_id[_id_key(item.get("id"))]}
        if len(names) == 1 and position not in self.left_out["category"]:
            self._leave_out(kind, finding)

    def _number_category(self, kind: Kind, finding: Finding) -> None:
        _, item = self._find_entry(kind, finding)
        old = item.get("id")
        equal = self._categories_by_id[_id_key(old)]
        if is_absent(old) or len(equal) == 1:
            self._renumber(kind, finding, item, "category_id")
        elif len({shown(c.get("name")) for c in equal}) > 1:
            names = " and ".join(shown(c.get("name")) for c in equal[:2])
            raise InputError(
                f"{finding.name}: the id is used twice: {names}; `repair` cannot decide which of them is meant"
            )
        elif item is not equal[0]:
            self._leave_out(kind, Finding(finding.position, finding.name, "is listed twice"))
        else:
            self._renumber(kind, finding, item, "category_id")

    @cached_property
    def _categories_by_id(self) -> dict[Any, list[Any]]:
        groups: dict[Any, list[Any]] = {}
        for item in self.categories:
            if isinstance(item, dict):
                groups.setdefault(_id_key(item.get("id")), []).append(item)
        return groups

    def _name_category(self, kind: Kind, finding: Finding) -> None:
        _, item = self._find_entry(kind, finding)
        name = item.get("name")
        others = (c for c in self.categories if isinstance(c, dict) and c is not item and c.get("name"))
        if isinstance(name, str) and name:
            item["name"] = name[: entries.LONGEST_NAME]
            self.log.add(kind, f"cut to {entries.LONGEST_NAME:,} letters", finding.name, finding.detail, item)
        elif any(_id_key(c.get("id")) == _id_key(item["id"]) for c in others):
            self._leave_out(kind, finding)  # the id is that of another category, which has a name
        else:
            item["name"] = f"category {item['id']}"
            self.log.add(kind, "named after its id", finding.name, finding.detail, item)

    # Images.

    def _renumber(self, kind: Kind, finding: Finding, item: Any, reference: str) -> None:
        old = item.get("id")
        new = self._give_id(kind.section, item)
        self.log.add(kind, "given a new id", finding.name, f"{shown(old)} is now {new}", item)
        if old is not None:
            for annotation in self._references(reference).get(_typed_key(old), []):
                annotation[reference] = new

    def _number_image(self, kind: Kind, finding: Finding) -> None:
        _, item = self._find_entry(kind, finding)
        if self._image_id_counts[_typed_key(item.get("id"))] > 1:
            # It is unknown to which of the images the annotations belong.
            self._leave_out(kind, Finding(finding.position, finding.name, "the id is used twice"))
        else:
            self._renumber(kind, finding, item, "image_id")

    def _find_image_id(self, kind: Kind, finding: Finding) -> None:
        _, item = self._find_entry(kind, finding)
        if self._clear_id("image", item) is None:
            self._leave_out(kind, finding)
        else:
            self._renumber(kind, finding, item, "image_id")

    @cached_property
    def _image_id_counts(self) -> Counter[Any]:
        return Counter(_typed_key(item.get("id")) for item in self.images if isinstance(item, dict))

    def _leave_out_duplicate_images(self, kind: Kind, finding: Finding) -> None:
        """Leave out the second of two images with the same id and file_name, or both if their file_names differ."""
        position, item = self._find_entry(kind, finding)
        first = self.images[finding.value]
        if first.get("file_name") == item.get("file_name"):
            self.left_out["image"].add(position)
            self.log.add(kind, "left out, since it is listed twice", finding.name, finding.detail, item)
            return
        # It is unknown to which of the images the annotations belong.
        for duplicate in (finding.value, position):
            self._leave_out(kind, Finding(duplicate, finding.name, "two files have the id"))

    def _rename(self, kind: Kind, finding: Finding) -> None:
        _, item = self._find_entry(kind, finding)
        found = finding.value
        if found is None:
            self._leave_out(kind, finding)
            return
        given = item.get("file_name") or coco.url_of(item)
        other_names = self._names_of_file.get(found, set()) - {given}
        if kind is not coco.FILE_SPELLING and other_names:
            detail = f"{shown(given)}: {shown(found)} may also be {shown(min(other_names))}"
            self._leave_out(kind, Finding(finding.position, finding.name, detail))
            return
        what = f"{shown(given)} is now {shown(found)}"
        self.log.add(kind, "file_name corrected", finding.name, what, item)
        item["file_name"] = found

    @cached_property
    def _names_of_file(self) -> dict[str, set[str]]:
        """The `file_name`s that may refer to each existing file, by the file's name."""
        names: dict[str, set[str]] = {}
        for kind in (coco.FILE_OUTSIDE, coco.FILE_ELSEWHERE, coco.FILE_NAME):
            for finding in self.findings.of(kind):
                if finding.value is not None:
                    item = self.images[finding.position]
                    names.setdefault(finding.value, set()).add(
                        str(item.get("file_name") or coco.url_of(item))
                    )
        for image in self.data.images:
            names.setdefault(image.file_name, set()).add(image.file_name)
        return names

    def _take_size_from_file(self, kind: Kind, finding: Finding) -> None:
        _, item = self._find_entry(kind, finding)
        try:
            size = finding.value or read_image_size(self.folder / item["file_name"])
        except InputError:
            self._leave_out(kind, finding)
            return
        item["width"], item["height"] = size
        self.log.add(kind, "size taken from the image file", finding.name, finding.detail, item)

    def _swap_size(self, kind: Kind, finding: Finding) -> None:
        _, item = self._find_entry(kind, finding)
        size = finding.value if finding.position >= 0 else finding.value[1]
        if (item["height"], item["width"]) != tuple(size):
            self._leave_out(kind, finding)
            return
        item["width"], item["height"] = size
        self.log.add(kind, "width and height swapped", finding.name, finding.detail, item)

    # Annotations.

    def _number_annotation(self, kind: Kind, finding: Finding) -> None:
        _, item = self._find_entry(kind, finding)
        new = self._give_id("annotation", item)
        self.log.add(kind, "given a new id", finding.name, f"is now {new}", item)

    def _set_crowd(self, kind: Kind, finding: Finding) -> None:
        _, item = self._find_entry(kind, finding)
        item["iscrowd"] = read_crowd(item["iscrowd"]) or 0
        self.log.add(kind, "iscrowd set to 0 or 1", finding.name, finding.detail, item)

    def _remove_weight(self, kind: Kind, finding: Finding) -> None:
        _, item = self._find_entry(kind, finding)
        number = _with_numbers(item["weight"])
        with contextlib.suppress(BadEntry):
            item["weight"] = read_weight(number)
            self.log.add(kind, "weight written as a number", finding.name, finding.detail, item)
            return
        del item["weight"]
        self.log.add(kind, "weight removed", finding.name, finding.detail, item)

    def _remove_points(self, kind: Kind, finding: Finding) -> None:
        _, item = self._find_entry(kind, finding)
        coordinates, labels = item.pop("point_coords", None), item.pop("point_labels", None)
        points = []
        width, height = self.sizes.get(_id_key(item.get("image_id")), (np.inf, np.inf))
        if isinstance(coordinates, list) and isinstance(labels, list) and len(coordinates) == len(labels):
            for coordinate, label in zip(coordinates, labels, strict=True):
                with contextlib.suppress(BadEntry):
                    ((x, y, number),) = read_points([coordinate], [label])
                    if number < 0 or (0 <= x <= width and 0 <= y <= height):
                        points.append((x, y, number))
        if points:
            item["point_coords"] = [[x, y] for x, y, _ in points]
            item["point_labels"] = [label for *_, label in points]
        change = "points that cannot be read removed" if points else "all points removed"
        self.log.add(kind, change, finding.name, finding.detail, item)

    def _rewrite_segmentation(self, kind: Kind, finding: Finding) -> None:
        _, item = self._find_entry(kind, finding)
        segmentation = read_segmentation(item["segmentation"])
        if not segmentation.spellings:
            return  # already rewritten for another finding of the same annotation
        if segmentation.rle is not None:
            item["segmentation"] = _json_rle(segmentation.rle)
        else:
            # Placeholders for polygons of fewer than three points, which have their own finding in the next round.
            item["segmentation"] = segmentation.polygons + [[0, 0, 0, 0]] * segmentation.degenerate
        self.log.add(kind, "segmentation rewritten in COCO's form", finding.name, finding.detail, item)

    def _salvage_polygons(self, kind: Kind, finding: Finding) -> None:
        """Keep the readable polygons, converting numbers written as text, or only the box if there are none."""
        position, item = self._find_entry(kind, finding)
        if position in self.left_out["annotation"] or self._read_text(kind, finding, item):
            return
        given = _with_numbers(item["segmentation"])
        polygons = []
        for part in given if isinstance(given, list) else []:
            with contextlib.suppress(BadEntry):
                polygons += read_segmentation([part]).polygons if isinstance(part, list) else []
        if not polygons:
            self._leave_mask_out(kind, finding)
            return
        item["segmentation"] = polygons
        change = "kept without the polygons that cannot be read"
        self.log.add(kind, change, finding.name, finding.detail, item)

    def _read_text(self, kind: Kind, finding: Finding, item: Any) -> bool:
        """Convert the text in a segmentation to the numbers and lists that it spells, if it then can be read."""
        given = item["segmentation"]
        converted = _with_numbers(given)
        try:
            segmentation = read_segmentation(converted)
        except BadEntry:
            return False
        if segmentation.empty or shown(converted, 10**9) == shown(given, 10**9):
            return False
        item["segmentation"] = converted
        was_text = isinstance(given, str)
        change = (
            "segmentation written as a list, not as text" if was_text else "coordinates written as numbers"
        )
        self.log.add(kind, change, finding.name, finding.detail, item)
        return True

    def _leave_mask_out(self, kind: Kind, finding: Finding) -> None:
        position, item = self._find_entry(kind, finding)
        if position in self.left_out["annotation"] or self._read_text(kind, finding, item):
            return
        box = read_box(_with_numbers(item.get("bbox"), 4))
        if box is None:
            self._leave_out(kind, finding)
            return
        if read_box(item["bbox"]) is None:
            item["bbox"] = list(box)
        item["segmentation"] = []
        self.log.add(kind, "kept with its box and no mask", finding.name, finding.detail, item)

    def _correct_rle_size(self, kind: Kind, finding: Finding) -> None:
        """Correct an RLE whose size is swapped: transpose its mask or swap only the size, whichever fits its box."""
        _, item = self._find_entry(kind, finding)
        size, box = self.sizes.get(_id_key(item.get("image_id"))), read_box(item.get("bbox"))
        if size is None or self._read_text(kind, finding, item):
            return
        width, height = size
        try:
            segmentation = read_segmentation(item["segmentation"])
        except BadEntry:
            segmentation = entries.Segmentation()
        rle = segmentation.rle
        if rle is None or box is None or rle["size"] != [width, height]:
            self._leave_mask_out(kind, finding)
            return
        swapped = coco_mask.encode(np.asfortranarray(coco_mask.decode(rle).T))
        renamed = {"size": [height, width], "counts": rle["counts"]}
        fitting = [
            candidate
            for candidate in (swapped, renamed)
            if np.abs(np.array(coco_mask.toBbox(candidate)) - box).max() <= _BOX_TOLERANCE
        ]
        if len(fitting) != 1:
            self._leave_mask_out(kind, finding)
            return
        if isinstance(item["segmentation"], dict) and isinstance(item["segmentation"]["counts"], list):
            runs = decode_counts(fitting[0]["counts"]).tolist()
            item["segmentation"] = {**item["segmentation"], "size": [height, width], "counts": runs}
        else:
            item["segmentation"] = _json_rle(fitting[0])
        self.log.add(
            kind, "RLE's size and mask corrected to fit the image", finding.name, finding.detail, item
        )

    def _find_image(self, kind: Kind, finding: Finding) -> None:
        self._find(kind, finding, "image_id")

    def _find_category(self, kind: Kind, finding: Finding) -> None:
        self._find(kind, finding, "category_id")

    def _find(self, kind: Kind, finding: Finding, key: str) -> None:
        """Replace an id of text by the number in the text, or by the id of the category or image with this name."""
        _, item = self._find_entry(kind, finding)
        text = item.get(key)
        number = spelled_number(text)
        if number is not None and number in self._used_ids[key.removesuffix("_id")]:
            item[key] = number
            self.log.add(kind, f"{key} written as a number", finding.name, finding.detail, item)
            return
        by_name = self._category_ids_by_name if key == "category_id" else self._image_ids_by_name
        ids = by_name.get(text, []) if isinstance(text, str) else []
        if len(ids) == 1:
            item[key] = ids[0]
            self.log.add(kind, f"{key} taken from the name", finding.name, finding.detail, item)
            return
        self._leave_out(kind, finding)

    @cached_property
    def _category_ids_by_name(self) -> dict[str, list[int]]:
        ids: dict[str, list[int]] = {}
        for category in self.data.categories:
            ids.setdefault(category.name, []).append(category.id)
        return ids

    @cached_property
    def _image_ids_by_name(self) -> dict[str, list[int]]:
        ids: dict[str, list[int]] = {}
        for image in self.data.images:
            ids.setdefault(image.file_name, []).append(image.id)
        return ids

    def _drop_degenerate(self, kind: Kind, finding: Finding) -> None:
        _, item = self._find_entry(kind, finding)
        item["segmentation"] = [
            polygon
            for polygon in read_segmentation(item["segmentation"]).polygons
            if union_area([np.array(polygon, dtype=np.float64).reshape(-1, 2)]) > rows_of.NO_AREA
        ]
        self.log.add(kind, "degenerate polygons left out", finding.name, finding.detail, item)

    def _box_of_mask(self, item: Any) -> list[float] | None:
        """Return the box [x, y, width, height] of an annotation's mask, clipped to the image, or None without one."""
        size = self.sizes.get(_id_key(item.get("image_id")))
        try:
            segmentation = read_segmentation(item.get("segmentation"))
        except BadEntry:
            return None
        if size is None or (segmentation.rle is None and not segmentation.polygons):
            return None
        x, y, width, height = box_of_mask(segmentation)
        x1, y1, x2, y2 = max(x, 0.0), max(y, 0.0), min(x + width, size[0]), min(y + height, size[1])
        return [x1, y1, x2 - x1, y2 - y1] if x2 > x1 and y2 > y1 else None

    def _read_text_box(self, kind: Kind, finding: Finding) -> None:
        _, item = self._find_entry(kind, finding)
        box = read_box(_with_numbers(item.get("bbox"), 4))
        # A box that can be read is one of numbers that are too large.
        if box is None or read_box(item["bbox"]) is not None:
            self._leave_out(kind, finding)
            return
        item["bbox"] = list(box)
        self.log.add(kind, "box written as numbers", finding.name, finding.detail, item)

    def _leave_out_or_take_box(self, kind: Kind, finding: Finding) -> None:
        position, item = self._find_entry(kind, finding)
        box = self._box_of_mask(item) if self.boxes == "from-masks" else None
        if box is None:
            self._leave_out(kind, finding)
        elif position not in self.left_out["annotation"]:
            item["bbox"] = box
            self.log.add(FROM_MASKS, "box taken from the mask", finding.name, finding.detail, item)

    def _write_box(self, kind: Kind, finding: Finding) -> None:
        position, item = self._find_entry(kind, finding)
        if position not in self.row:
            return  # the annotation has an error too; the finding comes back in the round after its repair
        given = item.get("bbox")
        if read_box(given) is None and read_box(_with_numbers(given, 4)) is not None:
            self._read_text_box(kind, finding)
            return
        x1, y1, x2, y2 = self.data.records.boxes[self.row[position]].tolist()
        item["bbox"] = [x1, y1, x2 - x1, y2 - y1]
        change = "box taken from the mask" if kind is rows_of.BOX_FROM_MASK else "box clipped at the border"
        self.log.add(kind, change, finding.name, finding.detail, item)

    def _write_area(self, kind: Kind, finding: Finding) -> None:
        position, item = self._find_entry(kind, finding)
        if position in self.row:
            item["area"] = self.data.records.area(self.row[position])
            self.log.add(kind, "area computed from the mask or the box", finding.name, finding.detail, item)

    def _replace_areas(self) -> None:
        records = self.data.records
        for position, row in self.row.items():
            item = self.annotations[position]
            if (
                records.form[row]
                and not np.isnan(records.areas[row])
                and position not in self.left_out["annotation"]
            ):
                area = records.mask_area(row)
                if abs(area - item["area"]) > 0.1 * item["area"]:
                    item["area"] = area
                    name = f"annotation {shown(item.get('id'))}"
                    self.log.add(
                        rows_of.AREA_OF_BOX,
                        "area of the box replaced by the mask's",
                        name,
                        "area of the box",
                        item,
                    )

    def _turn_crowds_into_objects(self) -> None:
        for position, item in enumerate(self.annotations):
            if isinstance(item, dict) and read_crowd(item.get("iscrowd", 0)) == 1:
                item["iscrowd"] = 0
                name = f"annotation {shown(item.get('id', position))}"
                self.log.add(TO_OBJECTS, "iscrowd set to 0", name, "a crowd", item)

    def _convert_boxes(self, finding: Finding) -> None:
        """Convert the boxes of annotations without a mask from the convention that the other boxes follow."""
        if not finding.value:
            return
        for position, item in enumerate(self.annotations):
            if not isinstance(item, dict) or position in self.left_out["annotation"]:
                continue
            if self._box_of_mask(item) is not None:
                continue
            size, box = self.sizes.get(_id_key(item.get("image_id"))), read_box(item.get("bbox"))
            if size is None or box is None:
                continue
            reading = rows_of.box_readings(np.array([box]), np.array([size], dtype=np.float64))[finding.value]
            x1, y1, x2, y2 = (float(side[0]) for side in reading)
            item["bbox"] = [x1, y1, x2 - x1, y2 - y1]
            name = f"annotation {shown(item.get('id', position))}"
            self.log.add(rows_of.BOX_CONVENTION, f"box read as {finding.value}", name, "no mask", item)

    def _scale_fractions(self, finding: Finding) -> None:
        """Convert polygons from fractions of the image to px, and also the boxes if all of them are fractions."""
        items = [item for item in self.annotations if isinstance(item, dict)]
        boxes = [box for box in (read_box(item.get("bbox")) for item in items) if box is not None]
        boxes_too = all(-0.01 <= value <= 1.01 for box in boxes for value in box)
        for item in items:
            size = self.sizes.get(_id_key(item.get("image_id")))
            if size is None:
                continue
            try:
                polygons = read_segmentation(item.get("segmentation")).polygons
            except BadEntry:
                continue
            if polygons:
                item["segmentation"] = [
                    [v * size[i % 2] for i, v in enumerate(polygon)] for polygon in polygons
                ]
            box = read_box(item.get("bbox"))
            if boxes_too and box is not None:
                item["bbox"] = [value * size[i % 2] for i, value in enumerate(box)]
            name = f"annotation {shown(item.get('id'))}"
            self.log.add(
                rows_of.FRACTIONS, "fractions multiplied by the image's size", name, finding.detail, item
            )

    def _take_boxes_from_masks(self) -> None:
        for position, item in enumerate(self.annotations):
            if not isinstance(item, dict) or position in self.left_out["annotation"]:
                continue
            box, old = self._box_of_mask(item), read_box(item.get("bbox"))
            if box is None or (
                old is not None and max(abs(a - b) for a, b in zip(box, old, strict=True)) < 1e-6
            ):
                continue
            item["bbox"] = box
            name = f"annotation {shown(item.get('id', position))}"
            self.log.add(
                FROM_MASKS, "box taken from the mask", name, f"bbox {shown(old and list(old))}", item
            )


def _id_key(value: Any) -> Any:
    """Return a hashable key for an id, with whole floats as integers."""
    number = whole_number(value)
    if number is not None:
        return number
    return value if isinstance(value, str | float) or value is None else shown(value)


def _typed_key(value: Any) -> tuple[type, Any]:
    """Return a hashable key that distinguishes 1, "1", True and 1.0."""
    return type(value), value if isinstance(value, str | int | float) else shown(value)


_NUMBER = re.compile(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?\s*")


def _with_numbers(value: Any, least: int = 6, depth: int = 0) -> Any:
    """Return a value with the numbers and the lists that its text spells.

    Text is a number, JSON, or a list of numbers with either commas or spaces between them. A shorter list than `least`
    is ambiguous: "8,5" is a point or a number with a decimal comma.
    """
    if depth > 4:
        return value
    if isinstance(value, list):
        return [_with_numbers(part, least, depth + 1) for part in value]
    if isinstance(value, dict):
        # Compressed counts are text.
        return {key: part if isinstance(part, str) and key == "counts" else _with_numbers(part, least, depth + 1)
                for key, part in value.items()}  # fmt: skip
    if not isinstance(value, str):
        return value
    if _NUMBER.fullmatch(value):
        number = float(value)
        return int(number) if number.is_integer() and abs(number) < 2**53 else number
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(value)
        if isinstance(found, list | dict):
            return _with_numbers(found, least, depth + 1)
    words = value.split(",") if "," in value else value.split()
    if len(words) >= least and all(map(_NUMBER.fullmatch, words)):
        return [_with_numbers(word) for word in words]
    return value


def _is_without_id(section: str, item: dict[str, Any]) -> bool:
    return is_absent(item.get("id")) and whole_number(item.get(f"{section}_id")) is None


def _meant_id(section: str, item: dict[str, Any]) -> int | None:
    """Return the integer that an id of text spells, or that an entry without an id has as "image_id" and the like."""
    given = item.get("id")
    number = spelled_number(given)
    if is_absent(given) and section != "annotation":
        number = whole_number(item.get(f"{section}_id"))
    return number


def _json_rle(rle: dict[str, Any]) -> dict[str, Any]:
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}
