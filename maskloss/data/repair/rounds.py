"""The rounds of a repair: each reads the document, and fixes the faults that the previous round uncovered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maskloss.data import check, coco
from maskloss.data.findings import Findings, Kind, Problem
from maskloss.data.records import CocoData
from maskloss.data.repair import annotations as annotation_fields
from maskloss.data.repair import categories, conventions, geometry, images, segmentations
from maskloss.data.repair.draft import Draft, Fix
from maskloss.data.repair.log import Log
from maskloss.errors import InputError

#: Most rounds of a repair. Three or four are usually enough.
_MAX_ROUNDS = 12


def repair_document(
    document: dict[str, Any],
    path: Path,
    folder: Path,
    *,
    boxes_from_masks: bool,
    crowds_to_objects: bool,
    log: Log,
) -> CocoData:
    """Repair a document in place, in rounds until one changes nothing, and return the data set that it contains.

    Args:
        document: the decoded file.
        path: annotation file, for messages.
        folder: folder of the images.
        boxes_from_masks: whether to compute the boxes from the masks.
        crowds_to_objects: whether to turn crowds into objects.
        log: receives the changes.

    Raises:
        InputError: errors are left, or no object.
    """
    first: Problem | None = None
    for _ in range(_MAX_ROUNDS):
        findings = Findings()
        data, positions = _read(document, path, folder, findings)
        first = _first_problem(first, findings, path)
        rows = {int(position): row for row, position in enumerate(positions)}
        draft = Draft(
            document,
            folder,
            data,
            rows,
            findings,
            boxes_from_masks=boxes_from_masks,
            crowds_to_objects=crowds_to_objects,
            log=log,
        )
        log.count = 0
        _apply_fixes(draft)
        if not log.count and not findings.any_error:
            check.decode_images(data, findings)
            first = _first_problem(first, findings, path)
            _apply_fixes(draft)
        if not log.count:
            break
    _check_result(data, findings, path, first)
    data.warnings.extend(problem.text for problem in findings.problems(str(path)))
    return data


def _read(document: dict[str, Any], path: Path, folder: Path, findings: Findings) -> tuple[CocoData, Any]:
    """Read a document as `read_coco` reads a file, and return the data set and its annotations' positions."""
    return coco.read_content(coco.Content.of_document(document), path, folder, None, findings)


def _apply_fixes(draft: Draft) -> None:
    """Fix all findings that have a fix, causes before consequences, and remove the entries that are left out."""
    before = draft.log.count
    _fix(draft, categories.FIXES)
    _fix(draft, images.FIXES)
    causes_changed = draft.log.count > before
    _fix(draft, annotation_fields.FIXES)
    _fix(draft, segmentations.FIXES)
    # A repaired image or category may be the one that annotations refer to, which the next round shows.
    if not causes_changed:
        _fix(draft, annotation_fields.REFERENCE_FIXES)
    _fix(draft, geometry.FIXES)
    if draft.crowds_to_objects:
        conventions.turn_crowds_into_objects(draft)
    _fix(draft, conventions.FIXES)
    # Only once nothing else changes, because each box needs its image, and all boxes are converted at once.
    if draft.boxes_from_masks and draft.log.count == before:
        _fix(draft, conventions.BOX_FIXES)
        conventions.take_boxes_from_masks(draft)
    draft.remove_left_out()


def _fix(draft: Draft, fixes: dict[Kind, Fix]) -> None:
    """Fix the findings of the kinds in a table, in the table's order."""
    for kind, fix in fixes.items():
        for finding in draft.findings.of(kind):
            fix(draft, kind, finding)


def _first_problem(first: Problem | None, findings: Findings, path: Path) -> Problem | None:
    """Return the first error of all rounds, or the first warning if there is no error so far."""
    if first is not None and first.error:
        return first
    found = next(iter(findings.problems(str(path))), None)
    return found if first is None or (found is not None and found.error) else first


def _check_result(data: CocoData, findings: Findings, path: Path, first: Problem | None) -> None:
    """Raise if errors are left, or no object, for which `first`, the first problem of all, is the cause."""
    errors = [problem for problem in findings.problems(str(path)) if problem.error]
    if not data.images or not data.num_objects:
        most = 230 + len(str(path))
        cause = f": {first.shortened(most).removeprefix(f'{path}: ')}" if first else ""
        if not errors or errors[0].kind in ("no_image", "no_categories"):
            raise InputError(f"{path}: no usable object is left after the repair{cause}"[: most + 70])
    if errors:
        cannot = "" if "repair --" in errors[0].text else " (`repair` cannot decide this)"
        raise InputError(errors[0].shortened(300 - len(cannot)) + cannot)
