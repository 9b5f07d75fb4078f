"""Files of `tests.data.coco_files` after a repair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from maskloss.data.check import check_data
from maskloss.data.repair import repair
from tests.data.coco_files import write_coco


def repaired(folder: Path, change: Any, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Repair a file, and return its document, which must pass `check`, and the list of repairs."""
    images, annotations = write_coco(folder, change)
    before = annotations.read_bytes()
    repair(images, annotations, folder / "fixed.json", **options)
    assert annotations.read_bytes() == before
    _, problems = check_data(images, folder / "fixed.json")
    assert [problem.text for problem in problems if problem.error] == []
    return json.loads((folder / "fixed.json").read_text()), json.loads(
        (folder / "fixed.repairs.json").read_text()
    )


def ids(document: dict[str, Any], section: str = "annotations") -> list[Any]:
    return [entry["id"] for entry in document[section]]
