"""Repairing annotation files: the decisions that reading leaves to the user are taken, listed and written down."""

from __future__ import annotations

import contextlib
import json
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
from maskloss.data.entries import BadEntry, box_of_mask, read_box, read_crowd, read_segmentation, whole_number
from maskloss.data.findings import Finding, Findings, Kind, shown
from maskloss.data.images import read_image_size
from maskloss.data.json_stream import decoded, without_trailing_commas
from maskloss.data.records import CocoData
from maskloss.errors import InputError
from maskloss.files import existing_folder, make_folder, read_bytes, write_text
from maskloss.masks.coverage import union_area
from maskloss.masks.encoded import decode_counts

#: Each round repairs what the one before has brought to light: three or four do.
_MOST_ROUNDS = 12
#: How far a transposed mask's extent may be from its box, in px.
_FITS = 2.0


@dataclass(frozen=True)
class Repair:
    """What was done about a kind of fault.

    Attributes:
        kind: of the fault.
        section: "file", "category", "image" or "annotation".
        change: in words.
        entries: the names of the entries, and of each what was wrong.
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
    """Repairs, by kind and change, in the order in which they were made."""

    made: dict[tuple[str, str, str], dict[str, str]] = field(default_factory=dict)
    #: Entries that were changed in this round.
    count: int = 0

    def add(self, kind: Kind, change: str, name: str, what: str) -> None:
        self.count += 1
        self.made.setdefault((kind.name, kind.section, change), {}).setdefault(name, what)

    def repairs(self) -> list[Repair]:
        return [Repair(*key, tuple(entries.items())) for key, entries in self.made.items()]


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
    """Write a file that `check_data` finds no error in, and beside it a list of what was changed and left out.

    All fields of the file that nothing is wrong with are kept, also those that are unknown. Repairing a repaired file
    changes nothing.

    Args:
        image_folder: where the `file_name`s are.
        annotation_file: COCO-format JSON; it stays as it is.
        output: the new file; the list is written as `output` with `.repairs.json` for its suffix.
        crowds: "objects" sets `iscrowd` to 0 everywhere, for annotation tools that write brush masks as crowds.
        boxes: "from-masks" takes each box that has a mask from its mask.

    Returns:
        The data set as it is read from the new file, and the repairs.

    Raises:
        InputError: the file cannot be repaired, or not without one of the options, nothing usable is left, or
            the output is there already.
        RunError: the output cannot be written.
    """
    path, folder = Path(annotation_file), existing_folder(image_folder, "images")
    target = Path(output)
    listing = target.with_name(f"{target.name.removesuffix('.json')}.repairs.json")
    for file in (target, listing):
        if file.exists() or file.is_symlink():
            raise InputError(f"{file}: is there already; name another --output")
    log = _Log()
    document = _document(path, log)
    data = _repaired(document, path, folder, crowds, boxes, log)
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
        write_text(target, json.dumps(document))
    except BaseException:
        listing.unlink()
        raise
    return CocoData(target, data.image_folder, data.records, data.categories, data.warnings), repairs


def _document(path: Path, log: _Log) -> dict[str, Any]:
    """Decode the file, also with what makes it no JSON where that can be undone."""
    content = read_bytes(path)
    try:
        text = decoded(content)
    except UnicodeDecodeError as error:
        problem = coco.undecodable(error)
        if "Latin-1" not in problem:
            raise InputError(f"{path}: {problem}") from None
        # Windows-1252 has letters where Latin-1 has control characters, and five bytes that mean nothing.
        text = content.decode("cp1252", errors="replace")
        log.add(ENCODING, "read as Windows-1252, written as UTF-8", "", problem.partition(";")[0])
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        try:
            document = json.loads(without_trailing_commas(text))
        except (ValueError, RecursionError):
            raise InputError(
                f"{path}: not valid JSON, broken or truncated: {error}; it cannot be repaired"
            ) from None
        log.add(COMMAS, "trailing commas removed", "", str(error))
    missing = [key for key in ("images", "annotations", "categories") if not coco.has_list(document, key)]
    if missing:
        raise InputError(f"{path}: {coco.not_coco(document, missing)}; that cannot be repaired")
    result: dict[str, Any] = document
    return result


def _repaired(
    document: dict[str, Any], path: Path, folder: Path, crowds: str, boxes: str, log: _Log
) -> CocoData:
    """Repair a document in place, round by round until it reads without an error; give it as it reads."""
    first: str | None = None
    for _ in range(_MOST_ROUNDS):
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
        """Repair each kind that can be."""
        self.findings = findings
        before = self.log.count
        for kind, fix in self._fixes().items():
            for finding in findings.of(kind):
                fix(kind, finding)
        if self.crowds == "objects":
            self._make_objects()
        for finding in findings.of(rows_of.FRACTIONS):
            self._multiply(finding)
        if findings.of(rows_of.AREA_OF_BOX):
            self._replace_areas()
        # When all else is done, for each box to have its image, and all boxes at once.
        if self.boxes == "from-masks" and self.log.count == before:
            for finding in findings.of(rows_of.BOX_CONVENTION):
                self._convert_boxes(finding)
            self._take_boxes_from_masks()
        for section, left_out in self.left_out.items():
            if left_out:
                items = self._items[section]
                items[:] = [item for position, item in enumerate(items) if position not in left_out]
        self.left_out = {"image": set(), "annotation": set(), "category": set()}

    def _fixes(self) -> dict[Kind, Callable[[Kind, Finding], None]]:
        leave_out, whole = self._leave_out, self._make_whole
        return {
            coco.NO_CATEGORIES: self._add_categories,
            coco.CATEGORY_ENTRY: leave_out,
            coco.CATEGORY_REPEATED: leave_out,
            coco.CATEGORY_TWICE: self._merge_categories,
            coco.CATEGORY_ID: self._number_category,
            coco.CATEGORY_NAME: self._name_category,
            coco.CATEGORY_FLOAT: whole,
            coco.IMAGE_ENTRY: leave_out,
            coco.IMAGE_TWICE: self._untangle_images,
            coco.IMAGE_NO_ID: leave_out,
            coco.IMAGE_ID: self._number_image,
            coco.IMAGE_FLOAT: whole,
            coco.FILE_NAME: leave_out,
            coco.FILE_OUTSIDE: self._rename,
            coco.FILE_ELSEWHERE: self._rename,
            coco.FILE_SPELLING: self._rename,
            coco.FILE_MISSING: leave_out,
            coco.BAD_SIZE: self._measure,
            coco.MISSING_SIZE: self._measure,
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
            entries.FLAT_POLYGON: self._respell,
            entries.POINT_PAIRS: self._respell,
            entries.RLE_IN_LIST: self._respell,
            entries.BAD_SEGMENTATION: self._salvage_polygons,
            rows_of.NOT_FINITE: self._salvage_polygons,
            entries.CORRUPT_RLE: self._leave_mask_out,
            entries.RLE_SIZE: self._transpose,
            rows_of.UNKNOWN_IMAGE: self._find_image,
            rows_of.UNKNOWN_CATEGORY: self._find_category,
            rows_of.DEGENERATE: leave_out,
            rows_of.DEGENERATE_PART: self._drop_degenerate,
            rows_of.OUTSIDE: leave_out,
            rows_of.NO_BOX: leave_out,
            rows_of.FLAT_BOX: self._leave_out_or_take_box,
            rows_of.BOX_OUTSIDE: self._leave_out_or_take_box,
            rows_of.BOX_FROM_MASK: self._write_box,
            rows_of.CLIPPED_BOX: self._write_box,
            rows_of.ODD_AREA: self._write_area,
        }

    # What all sections have.

    def _entry(self, kind: Kind, finding: Finding) -> tuple[int, Any]:
        items = self._items[kind.section]
        position = finding.position
        if position < 0:  # an image that was only found to be unreadable when it was decoded
            position = self._image_positions[
                finding.value[0] if isinstance(finding.value, tuple) else finding.value
            ]
        return position, items[position]

    @cached_property
    def _image_positions(self) -> dict[Any, int]:
        return {_key(item.get("id")): p for p, item in enumerate(self.images) if isinstance(item, dict)}

    def _leave_out(self, kind: Kind, finding: Finding) -> None:
        position, item = self._entry(kind, finding)
        if position in self.left_out[kind.section]:
            return
        self.left_out[kind.section].add(position)
        self.log.add(kind, "left out", finding.name, finding.detail)
        if kind.section == "image" and isinstance(item, dict) and "id" in item:
            self._leave_out_annotations_of(item["id"], finding.name)

    def _leave_out_annotations_of(self, image_id: Any, name: str) -> None:
        if not self.by_image:
            for position, annotation in enumerate(self.annotations):
                if isinstance(annotation, dict):
                    self.by_image.setdefault(_key(annotation.get("image_id")), []).append(position)
        for position in self.by_image.get(_key(image_id), []):
            if position not in self.left_out["annotation"]:
                self.left_out["annotation"].add(position)
                identity = self.annotations[position].get("id", f"number {position}")
                self.log.add(WITH_IMAGE, "left out with their image", f"annotation {shown(identity)}", name)

    def _make_whole(self, kind: Kind, finding: Finding) -> None:
        _, item = self._entry(kind, finding)
        for key in ("id", "image_id", "category_id", "width", "height"):
            number = whole_number(item.get(key))
            if isinstance(item.get(key), float) and number is not None:
                item[key] = number
        self.log.add(kind, "whole floats written as integers", finding.name, finding.detail)

    def _free_id(self, section: str, wanted: Any) -> int:
        """Return the number that a text spells, where that is free, or the next one after the highest."""
        taken = self._taken[section]
        if isinstance(wanted, str) and re.fullmatch(r"\d{1,15}", wanted) and int(wanted) not in taken:
            number = int(wanted)
        else:
            self._highest[section] += 1
            number = self._highest[section]
        taken.add(number)
        return number

    @cached_property
    def _taken(self) -> dict[str, set[int | None]]:
        return {
            section: {whole_number(item.get("id")) for item in items if isinstance(item, dict)}
            for section, items in self._items.items()
        }

    @cached_property
    def _highest(self) -> dict[str, int]:
        # Texts that spell numbers are to find theirs free.
        highest = {}
        for section, items in self._items.items():
            spelled = {int(item["id"]) for item in items if _spells_a_number(item)}
            usual = {n for n in self._taken[section] | spelled if n is not None and n < 2**53}
            highest[section] = max(usual, default=0)
        return highest

    def _references(self, key: str) -> dict[Any, list[Any]]:
        """The annotations by what their image_id or category_id is as it stands."""
        if key not in self._referring:
            referring: dict[Any, list[Any]] = {}
            self._referring[key] = referring
            for item in self.annotations:
                if isinstance(item, dict):
                    referring.setdefault(_exact(item.get(key)), []).append(item)
        return self._referring[key]

    # Categories.

    def _add_categories(self, kind: Kind, finding: Finding) -> None:
        used: dict[Any, None] = {}
        for annotation in self.annotations:
            if isinstance(annotation, dict):
                used[_key(annotation.get("category_id"))] = None
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
        position, item = self._entry(kind, finding)
        names = {
            other.get("name")
            for other in self.categories
            if isinstance(other, dict) and _key(other.get("id")) == _key(item.get("id"))
        }
        if len(names) == 1 and position not in self.left_out["category"]:
            self._leave_out(kind, finding)

    def _number_category(self, kind: Kind, finding: Finding) -> None:
        _, item = self._entry(kind, finding)
        self._renumber(kind, finding, item, "category_id")

    def _name_category(self, kind: Kind, finding: Finding) -> None:
        _, item = self._entry(kind, finding)
        item["name"] = f"category {item['id']}"
        self.log.add(kind, "named after its id", finding.name, finding.detail)

    # Images.

    def _renumber(self, kind: Kind, finding: Finding, item: Any, reference: str) -> None:
        old = item.get("id")
        item["id"] = new = self._free_id(kind.section, old)
        self.log.add(kind, "given a new id", finding.name, f"{shown(old)} is now {new}")
        if old is not None:
            for annotation in self._references(reference).get(_exact(old), []):
                annotation[reference] = new

    def _number_image(self, kind: Kind, finding: Finding) -> None:
        _, item = self._entry(kind, finding)
        if self._twins[_exact(item.get("id"))] > 1:
            # Nobody can tell whose the annotations are.
            self._leave_out(kind, Finding(finding.position, finding.name, "the id is there twice"))
        else:
            self._renumber(kind, finding, item, "image_id")

    @cached_property
    def _twins(self) -> Counter[Any]:
        return Counter(_exact(item.get("id")) for item in self.images if isinstance(item, dict))

    def _untangle_images(self, kind: Kind, finding: Finding) -> None:
        position, item = self._entry(kind, finding)
        first = self.images[finding.value]
        if first.get("file_name") == item.get("file_name"):
            self.left_out["image"].add(position)
            self.log.add(kind, "left out, since it is there twice", finding.name, finding.detail)
            return
        # Nobody can tell whose the annotations are.
        for twin in (finding.value, position):
            self._leave_out(kind, Finding(twin, finding.name, "two files have the id"))

    def _rename(self, kind: Kind, finding: Finding) -> None:
        _, item = self._entry(kind, finding)
        found = finding.value
        if found is None:
            self._leave_out(kind, finding)
            return
        rivals = self._claims.get(found, set()) - {item["file_name"]}
        if kind is not coco.FILE_SPELLING and rivals:
            detail = f"{shown(item['file_name'])}: {shown(found)} may also be {shown(min(rivals))}"
            self._leave_out(kind, Finding(finding.position, finding.name, detail))
            return
        self.log.add(
            kind, "file_name corrected", finding.name, f"{shown(item['file_name'])} is now {shown(found)}"
        )
        item["file_name"] = found

    @cached_property
    def _claims(self) -> dict[str, set[str]]:
        """By the name of a file the names that images have for it."""
        claims: dict[str, set[str]] = {}
        for kind in (coco.FILE_OUTSIDE, coco.FILE_ELSEWHERE):
            for finding in self.findings.of(kind):
                if finding.value is not None:
                    claims.setdefault(finding.value, set()).add(self.images[finding.position]["file_name"])
        for image in self.data.images:
            claims.setdefault(image.file_name, set()).add(image.file_name)
        return claims

    def _measure(self, kind: Kind, finding: Finding) -> None:
        _, item = self._entry(kind, finding)
        try:
            size = finding.value or read_image_size(self.folder / item["file_name"])
        except InputError:
            self._leave_out(kind, finding)
            return
        item["width"], item["height"] = size
        self.log.add(kind, "size taken from the image file", finding.name, finding.detail)

    def _swap_size(self, kind: Kind, finding: Finding) -> None:
        _, item = self._entry(kind, finding)
        size = finding.value if finding.position >= 0 else finding.value[1]
        if (item["height"], item["width"]) != tuple(size):
            self._leave_out(kind, finding)
            return
        item["width"], item["height"] = size
        self.log.add(kind, "width and height swapped", finding.name, finding.detail)

    # Annotations.

    def _number_annotation(self, kind: Kind, finding: Finding) -> None:
        _, item = self._entry(kind, finding)
        old = item.get("id")
        new = self._free_id("annotation", old)
        item["id"] = new
        self.log.add(kind, "given a new id", finding.name, f"is now {new}")

    def _set_crowd(self, kind: Kind, finding: Finding) -> None:
        _, item = self._entry(kind, finding)
        item["iscrowd"] = read_crowd(item["iscrowd"]) or 0
        self.log.add(kind, "iscrowd set to 0 or 1", finding.name, finding.detail)

    def _respell(self, kind: Kind, finding: Finding) -> None:
        _, item = self._entry(kind, finding)
        segmentation = read_segmentation(item["segmentation"])
        if not segmentation.spellings:
            return  # in two odd forms at once
        if segmentation.rle is not None:
            item["segmentation"] = _json_rle(segmentation.rle)
        else:
            # Those of fewer than three points are told, and left out, by themselves.
            item["segmentation"] = segmentation.polygons + [[0, 0, 0, 0]] * segmentation.degenerate
        self.log.add(kind, "segmentation written as COCO has it", finding.name, finding.detail)

    def _salvage_polygons(self, kind: Kind, finding: Finding) -> None:
        """Keep the polygons that can be read, with numbers that are written as text; or the box alone."""
        _, item = self._entry(kind, finding)
        given = item["segmentation"]
        if isinstance(given, str):
            with contextlib.suppress(ValueError, RecursionError):
                item["segmentation"] = given = json.loads(given)
            if not isinstance(given, str):
                self.log.add(
                    kind, "segmentation written as a list, not as text", finding.name, finding.detail
                )
                return
        polygons, lost = [], 0
        for polygon in given if isinstance(given, list) else []:
            try:
                numbers = [float(v) if isinstance(v, str) else v for v in polygon]
                segmentation = read_segmentation([numbers])
            except (ValueError, TypeError):
                lost += 1
                continue
            polygons += segmentation.polygons
        if not polygons:
            self._leave_mask_out(kind, finding)
            return
        item["segmentation"] = polygons
        change = "kept without the polygons that cannot be read" if lost else "coordinates written as numbers"
        self.log.add(kind, change, finding.name, finding.detail)

    def _leave_mask_out(self, kind: Kind, finding: Finding) -> None:
        position, item = self._entry(kind, finding)
        if position in self.left_out["annotation"]:
            return
        if read_box(item.get("bbox")) is None:
            self._leave_out(kind, finding)
            return
        item["segmentation"] = []
        self.log.add(kind, "kept with its box and no mask", finding.name, finding.detail)

    def _transpose(self, kind: Kind, finding: Finding) -> None:
        """Turn an RLE whose size is swapped, in the one of two ways that then fits its box."""
        _, item = self._entry(kind, finding)
        size, box = self.sizes.get(_key(item.get("image_id"))), read_box(item.get("bbox"))
        if size is None:
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
            if np.abs(np.array(coco_mask.toBbox(candidate)) - box).max() <= _FITS
        ]
        if len(fitting) != 1:
            self._leave_mask_out(kind, finding)
            return
        if isinstance(item["segmentation"], dict) and isinstance(item["segmentation"]["counts"], list):
            runs = decode_counts(fitting[0]["counts"]).tolist()
            item["segmentation"] = {**item["segmentation"], "size": [height, width], "counts": runs}
        else:
            item["segmentation"] = _json_rle(fitting[0])
        self.log.add(kind, "RLE turned to the image's size", finding.name, finding.detail)

    def _find_image(self, kind: Kind, finding: Finding) -> None:
        self._find(kind, finding, "image_id")

    def _find_category(self, kind: Kind, finding: Finding) -> None:
        self._find(kind, finding, "category_id")

    def _find(self, kind: Kind, finding: Finding, key: str) -> None:
        """Take a text as the number that it spells, if an entry has that for its id."""
        _, item = self._entry(kind, finding)
        text = item.get(key)
        if isinstance(text, str) and re.fullmatch(r"\s*\d{1,15}(\.0+)?\s*", text):
            number = int(float(text))
            if number in self._taken[key.removesuffix("_id")]:
                item[key] = number
                self.log.add(kind, f"{key} written as a number", finding.name, finding.detail)
                return
        named = self._named.get(text, []) if key == "category_id" and isinstance(text, str) else []
        if len(named) == 1:
            item[key] = named[0]
            self.log.add(kind, "category_id taken from the name", finding.name, finding.detail)
            return
        self._leave_out(kind, finding)

    @cached_property
    def _named(self) -> dict[str, list[int]]:
        named: dict[str, list[int]] = {}
        for category in self.data.categories:
            named.setdefault(category.name, []).append(category.id)
        return named

    def _drop_degenerate(self, kind: Kind, finding: Finding) -> None:
        _, item = self._entry(kind, finding)
        item["segmentation"] = [
            polygon
            for polygon in read_segmentation(item["segmentation"]).polygons
            if union_area([np.array(polygon, dtype=np.float64).reshape(-1, 2)]) > rows_of.NO_AREA
        ]
        self.log.add(kind, "degenerate polygons left out", finding.name, finding.detail)

    def _box_of_mask(self, item: Any) -> list[float] | None:
        """An annotation's box from its mask, inside the image, as x, y, width and height."""
        size = self.sizes.get(_key(item.get("image_id")))
        try:
            segmentation = read_segmentation(item.get("segmentation"))
        except BadEntry:
            return None
        if size is None or (segmentation.rle is None and not segmentation.polygons):
            return None
        x, y, width, height = box_of_mask(segmentation)
        x1, y1, x2, y2 = max(x, 0.0), max(y, 0.0), min(x + width, size[0]), min(y + height, size[1])
        return [x1, y1, x2 - x1, y2 - y1] if x2 > x1 and y2 > y1 else None

    def _leave_out_or_take_box(self, kind: Kind, finding: Finding) -> None:
        position, item = self._entry(kind, finding)
        box = self._box_of_mask(item) if self.boxes == "from-masks" else None
        if box is None:
            self._leave_out(kind, finding)
        elif position not in self.left_out["annotation"]:
            item["bbox"] = box
            self.log.add(FROM_MASKS, "box taken from the mask", finding.name, finding.detail)

    def _write_box(self, kind: Kind, finding: Finding) -> None:
        position, item = self._entry(kind, finding)
        if position not in self.row:
            return  # of an annotation with an error, told again once that is repaired
        x1, y1, x2, y2 = self.data.records.boxes[self.row[position]].tolist()
        item["bbox"] = [x1, y1, x2 - x1, y2 - y1]
        change = "box taken from the mask" if kind is rows_of.BOX_FROM_MASK else "box clipped at the border"
        self.log.add(kind, change, finding.name, finding.detail)

    def _write_area(self, kind: Kind, finding: Finding) -> None:
        position, item = self._entry(kind, finding)
        if position in self.row:
            item["area"] = self.data.records.area(self.row[position])
            self.log.add(kind, "area computed from the mask or the box", finding.name, finding.detail)

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
                        rows_of.AREA_OF_BOX, "area of the box replaced by the mask's", name, "area of the box"
                    )

    def _make_objects(self) -> None:
        for position, item in enumerate(self.annotations):
            if isinstance(item, dict) and read_crowd(item.get("iscrowd", 0)) == 1:
                item["iscrowd"] = 0
                name = f"annotation {shown(item.get('id', position))}"
                self.log.add(TO_OBJECTS, "iscrowd set to 0", name, "a crowd")

    def _convert_boxes(self, finding: Finding) -> None:
        """Read boxes without a mask in the convention that the others have proved."""
        if not finding.value:
            return
        for position, item in enumerate(self.annotations):
            if not isinstance(item, dict) or position in self.left_out["annotation"]:
                continue
            if self._box_of_mask(item) is not None:
                continue
            size, box = self.sizes.get(_key(item.get("image_id"))), read_box(item.get("bbox"))
            if size is None or box is None:
                continue
            reading = rows_of.box_readings(np.array([box]), np.array([size], dtype=np.float64))[finding.value]
            x1, y1, x2, y2 = (float(side[0]) for side in reading)
            item["bbox"] = [x1, y1, x2 - x1, y2 - y1]
            name = f"annotation {shown(item.get('id', position))}"
            self.log.add(rows_of.BOX_CONVENTION, f"box read as {finding.value}", name, "no mask")

    def _multiply(self, finding: Finding) -> None:
        """Turn fractions of the image into px: polygons, and boxes where all of them are fractions, too."""
        items = [item for item in self.annotations if isinstance(item, dict)]
        boxes = [box for box in (read_box(item.get("bbox")) for item in items) if box is not None]
        boxes_too = all(-0.01 <= value <= 1.01 for box in boxes for value in box)
        for item in items:
            size = self.sizes.get(_key(item.get("image_id")))
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
            self.log.add(rows_of.FRACTIONS, "fractions multiplied by the image's size", name, finding.detail)

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
            self.log.add(FROM_MASKS, "box taken from the mask", name, f"bbox {shown(old and list(old))}")


def _key(value: Any) -> Any:
    """A value that an id can be looked up by: whole floats as integers."""
    number = whole_number(value)
    if number is not None:
        return number
    return value if isinstance(value, str | float) or value is None else repr(value)


def _exact(value: Any) -> tuple[type, Any]:
    """A value to look up by, which tells 1 from "1", True and 1.0."""
    return type(value), value if isinstance(value, str | int | float) else repr(value)


def _spells_a_number(item: Any) -> bool:
    text = item.get("id") if isinstance(item, dict) else None
    return isinstance(text, str) and bool(re.fullmatch(r"\d{1,15}", text))


def _json_rle(rle: dict[str, Any]) -> dict[str, Any]:
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}
