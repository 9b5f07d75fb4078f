"""The HTML report of a run, in one file that loads nothing from elsewhere."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from maskloss.data.coco import CocoData, ImageRecord
from maskloss.data.images import read_image
from maskloss.errors import InputError
from maskloss.files import read_bytes, write_text
from maskloss.report.curves import loss_curves
from maskloss.report.pictures import draw_results, draw_truth, jpeg

_NUM_PICTURES = 12
_LONGEST_SIDE = 480


def write_report(
    folder: Path,
    validation: CocoData,
    results: Sequence[dict[str, Any]],
    labels: Mapping[str, str],
    *,
    score_threshold: float = 0.5,
) -> Path:
    """Write `report.html` from the files of a run, its validation set and its results on that set.

    Args:
        folder: folder of the run, with history.jsonl, evaluations.jsonl, metrics.json and config.yaml.
        validation: validation set.
        results: COCO results with RLE masks.
        labels: names of the metrics in the table, by their key in metrics.json.
        score_threshold: minimum score of the predictions to draw.

    Returns:
        Path of the page.

    Raises:
        InputError: a file of the run is missing, or its history is empty.
        RunError: the disk is full, or the folder is not writable.
    """
    history, evaluations = _lines(folder / "history.jsonl"), _lines(folder / "evaluations.jsonl")
    if not history:
        raise InputError(f"{folder / 'history.jsonl'}: is empty, so there is nothing to report")
    metrics = json.loads((folder / "metrics.json").read_text())
    names = {category.id: category.name for category in validation.categories}
    pictures = []
    for record in _spread(validation.images, _NUM_PICTURES):
        try:
            image = read_image(validation.image_path(record), (record.width, record.height))
        except InputError:
            # The image was readable when the run was evaluated. Skip it, rather than fail without a page.
            continue
        drawn = [r for r in results if r["image_id"] == record.id and r["score"] >= score_threshold]
        enlarge = max(1, _LONGEST_SIDE // max(image.size))
        pictures.append(
            {
                "name": shown_name(record.file_name),
                "truth": embedded(jpeg(draw_truth(image, record, names, enlarge=enlarge), _LONGEST_SIDE)),
                "prediction": embedded(
                    jpeg(draw_results(image, drawn, names, enlarge=enlarge), _LONGEST_SIDE)
                ),
            }
        )
    page = rendered(
        "page.html.j2",
        title=folder.resolve().name,
        last=history[-1],
        metrics=metrics,
        rows=[(label, metrics[kind]) for kind, label in labels.items() if kind in metrics],
        num_images=len(validation.images),
        num_objects=validation.num_objects,
        num_categories=len(validation.categories),
        curves=loss_curves(history, evaluations),
        validated=bool(evaluations),
        pictures=pictures,
        score_threshold=score_threshold,
        config=(folder / "config.yaml").read_text(),
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def rendered(template: str, **values: Any) -> str:
    """Render one of the templates beside this file."""
    environment = Environment(loader=PackageLoader("maskloss.report", "."), autoescape=True)
    page = environment.get_template(template).render(**values)
    # File names that are not UTF-8 contain characters that cannot be encoded.
    return page.encode(errors="backslashreplace").decode()


def shown_name(file_name: str) -> str:
    """Return a file name for the page, shortened to its last characters, which tell more than the first."""
    return file_name if len(file_name) <= 80 else f"...{file_name[-77:]}"


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in read_bytes(path).decode().splitlines()]


def _spread(images: Sequence[ImageRecord], count: int) -> list[ImageRecord]:
    """Return evenly spread images with objects, the same ones in every report of a data set."""
    shown = [image for image in images if image.annotations] or list(images)
    step = max(len(shown) / count, 1)
    return [shown[int(i * step)] for i in range(min(count, len(shown)))]


def embedded(image: bytes) -> str:
    """Return a JPEG as a data URL, to embed it in the page."""
    return "data:image/jpeg;base64," + base64.b64encode(image).decode("ascii")
