"""The document in one round of repair, and the changes that entries of every section have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from maskloss.data.findings import Finding, Findings, Kind, shown
from maskloss.data.reading import images
from maskloss.data.reading.entries import BadEntry, read_segmentation, whole_number
from maskloss.data.records import CocoData
from maskloss.data.repair import sections
from maskloss.data.repair.ids import Ids
from maskloss.data.repair.log import Log
from maskloss.data.repair.sections import LIST_KEYS, grouped, id_key, typed_key

WITH_IMAGE = Kind("image_left_out", "annotation", True)


@dataclass
class Draft:
    """A document in one round of repair.

    The indices are built when they are first used, and show the document as it was then. Entries keep their position
    until `remove_left_out` ends the round.

    Attributes:
        document: the decoded file, which is changed in place.
        folder: folder of the images.
        data: what `read_coco` would return: the images, annotations and categories without errors.
        rows: row in `data.records` of each annotation without errors, by its position in the document.
        findings: the faults and oddities of the document.
        boxes_from_masks: whether the boxes are computed from the masks.
        crowds_to_objects: whether crowds become objects.
        log: the list that changes are added to.
        left_out: positions of the entries that are left out, by section.
    """

    document: dict[str, Any]
    folder: Path
    data: CocoData
    rows: dict[int, int]
    findings: Findings
    boxes_from_masks: bool
    crowds_to_objects: bool
    log: Log
    left_out: dict[str, set[int]] = field(
        init=False, default_factory=lambda: {section: set() for section in LIST_KEYS}
    )

    # The entry of a finding.

    def position(self, finding: Finding) -> int:
        """Return the position of the entry that a finding is about."""
        if finding.position >= 0:
            return finding.position
        # Found while decoding the images; such findings have the image's id instead.
        image_id = finding.value[0] if isinstance(finding.value, tuple) else finding.value
        return self._image_positions[image_id]

    def entry(self, kind: Kind, finding: Finding) -> Any:
        """Return the entry that a finding is about."""
        return self.document[LIST_KEYS[kind.section]][self.position(finding)]

    def entries(self, section: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield position and entry for the entries of a section that are JSON objects, also those left out."""
        return sections.entries(self.document, section)

    def size_of_image(self, annotation: dict[str, Any]) -> tuple[int, int] | None:
        """Return width and height of an annotation's image, or None if the image is unknown or has errors."""
        return self._sizes.get(id_key(annotation.get("image_id")))

    # Changes.

    def record(self, kind: Kind, finding: Finding, change: str, what: str | None = None) -> None:
        """Add a change of a finding's entry to the log, with the finding's description unless `what` is given."""
        what = finding.detail if what is None else what
        self.log.add(kind, change, finding.name, what, self.entry(kind, finding))

    def leave_out(self, kind: Kind, finding: Finding, what: str | None = None) -> None:
        """Leave out a finding's entry, and if it is an image, its annotations."""
        position, item = self.position(finding), self.entry(kind, finding)
        if self.is_left_out(kind.section, position):
            return
        self.left_out[kind.section].add(position)
        self.record(kind, finding, "left out", what)
        if kind.section == "image" and isinstance(item, dict) and "id" in item:
            self._leave_out_annotations_of(item["id"], finding.name)

    def _leave_out_annotations_of(self, image_id: Any, name: str) -> None:
        for position, annotation in self._annotations_by_image.get(id_key(image_id), []):
            if not self.is_left_out("annotation", position):
                self.left_out["annotation"].add(position)
                own = f"annotation {shown(annotation.get('id'))}"
                self.log.add(WITH_IMAGE, "left out with their image", own, name, annotation)

    def is_left_out(self, section: str, position: int) -> bool:
        """Return whether the entry at a position was left out in this round."""
        return position in self.left_out[section]

    def remove_left_out(self) -> None:
        """Remove the entries that were left out from the document."""
        for section, left_out in self.left_out.items():
            if left_out:
                items = self.document[LIST_KEYS[section]]
                items[:] = [item for position, item in enumerate(items) if position not in left_out]
                left_out.clear()

    def renumber(self, kind: Kind, finding: Finding) -> None:
        """Assign a new id to an image or a category, also in the annotations that refer to it."""
        item, reference = self.entry(kind, finding), f"{kind.section}_id"
        old = item.get("id")
        new = self.ids.assign(kind.section, item)
        self.record(kind, finding, "given a new id", f"{shown(old)} is now {new}")
        if old is not None:
            for annotation in self._annotations_by_reference[reference].get(typed_key(old), []):
                annotation[reference] = new

    def write_integers(self, kind: Kind, finding: Finding) -> None:
        """Write the whole floats in the ids and the size of an entry as integers."""
        item = self.entry(kind, finding)
        for key in ("id", "image_id", "category_id", "width", "height"):
            number = whole_number(item.get(key))
            if isinstance(item.get(key), float) and number is not None:
                item[key] = number
        self.record(kind, finding, "whole floats written as integers")

    def polygons_of_image(self, item: dict[str, Any]) -> list[list[float]]:
        """Return the polygons of an image's annotations that can be read, each x0, y0, x1, y1, ..."""
        polygons: list[list[float]] = []
        for _, annotation in self._annotations_by_image.get(id_key(item.get("id")), []):
            with suppress(BadEntry):
                polygons += read_segmentation(annotation.get("segmentation")).polygons
        return polygons

    # Indices.

    @cached_property
    def ids(self) -> Ids:
        """The ids of all entries."""
        return Ids(self.document)

    @cached_property
    def ids_by_name(self) -> dict[str, dict[str, list[int]]]:
        """The ids of images by `file_name` and of categories by name, by section."""
        return {
            "image": grouped((image.file_name, image.id) for image in self.data.images),
            "category": grouped((category.name, category.id) for category in self.data.categories),
        }

    @cached_property
    def categories_by_id(self) -> dict[Any, list[dict[str, Any]]]:
        """The categories by id, with whole floats as integers."""
        return grouped((id_key(item.get("id")), item) for _, item in self.entries("category"))

    @cached_property
    def image_id_counts(self) -> Counter[Any]:
        """Number of images with each id, as written in the file: 1 and "1" are different."""
        return Counter(typed_key(item.get("id")) for _, item in self.entries("image"))

    @cached_property
    def names_of_file(self) -> dict[str, set[str]]:
        """The `file_name`s that may refer to each existing file, by the file's name."""
        names: dict[str, set[str]] = {}
        for kind in (images.FILE_OUTSIDE, images.FILE_ELSEWHERE, images.FILE_NAME):
            for finding in self.findings.of(kind):
                if finding.value is not None:
                    item = self.entry(kind, finding)
                    given = str(item.get("file_name") or images.url_of(item))
                    names.setdefault(finding.value, set()).add(given)
        for image in self.data.images:
            names.setdefault(image.file_name, set()).add(image.file_name)
        return names

    @cached_property
    def _sizes(self) -> dict[Any, tuple[int, int]]:
        return {image.id: (image.width, image.height) for image in self.data.images}

    @cached_property
    def _image_positions(self) -> dict[Any, int]:
        return {id_key(item.get("id")): position for position, item in self.entries("image")}

    @cached_property
    def _annotations_by_image(self) -> dict[Any, list[tuple[int, dict[str, Any]]]]:
        """The annotations with their positions by image_id, with whole floats as integers."""
        return grouped((id_key(pair[1].get("image_id")), pair) for pair in self.entries("annotation"))

    @cached_property
    def _annotations_by_reference(self) -> dict[str, dict[Any, list[dict[str, Any]]]]:
        """The annotations by image_id and by category_id, as written in the file: 1 and "1" are different."""
        return {
            key: grouped((typed_key(item.get(key)), item) for _, item in self.entries("annotation"))
            for key in ("image_id", "category_id")
        }


#: A repair of the entry of a finding.
Fix = Callable[[Draft, Kind, Finding], None]
