"""The HTML report of a run, in one file that loads nothing from elsewhere."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from maskloss import __version__
from maskloss.data.coco import CocoData, ImageRecord
from maskloss.data.images import read_image
from maskloss.errors import InputError
from maskloss.files import read_bytes, write_text
from maskloss.report.curves import loss_curves, precision_curves
from maskloss.report.errors import KINDS, ImageErrors, image_errors
from maskloss.report.pictures import draw_results, draw_truth, jpeg, names_for, shortened, spread
from maskloss.report.run_pictures import TRAINING_DATA, TRAINING_IMAGES

#: Number of pictures in each gallery.
_NUM_PICTURES = 6
#: Largest number of categories in a confusion matrix.
_MOST_CONFUSED = 20
_LONGEST_SIDE = 480


def write_report(
    folder: Path,
    validation: CocoData,
    results: Sequence[dict[str, Any]],
    labels: Mapping[str, str],
    *,
    score_threshold: float = 0.5,
    thresholds: Sequence[float | None] = (),
    threshold_svg: str = "",
) -> Path:
    """Write `report.html` from the files of a run, its validation set and its results on that set.

    Args:
        folder: folder of the run, with history.jsonl, evaluations.jsonl, metrics.json and config.yaml.
        validation: validation set.
        results: COCO results with RLE masks.
        labels: names of the metrics in the table, by their key in metrics.json.
        score_threshold: minimum score of the predictions to draw and to count.
        thresholds: minimum score for each category, where it is known; they replace `score_threshold`.
        threshold_svg: curves over the score threshold, from `report.curves.threshold_curves`.

    Returns:
        Path of the page.

    Raises:
        InputError: a file of the run is missing, or its history is empty.
        RunError: the disk is full, or the folder is not writable.
    """
    history, evaluations = _lines(folder / "history.jsonl"), _lines(folder / "evaluations.jsonl")
    if not history:
        raise InputError(f"{folder / 'history.jsonl'}: is empty, so there is nothing to report")
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    names = {category.id: category.name for category in validation.categories}
    least = {
        category.id: score_threshold if threshold is None else threshold
        for category, threshold in zip(
            validation.categories, thresholds or [None] * len(validation.categories), strict=True
        )
    }
    shown: dict[int, list[dict[str, Any]]] = {image.id: [] for image in validation.images}
    for result in results:
        if result["score"] >= least[result["category_id"]]:
            shown[result["image_id"]].append(result)
    errors = {image.id: image_errors(image, shown[image.id]) for image in validation.images}
    worst = sorted(validation.images, key=lambda image: -errors[image.id].count)
    worst = [image for image in worst[:_NUM_PICTURES] if errors[image.id].count]
    others = spread([image for image in validation.images if image not in worst], _NUM_PICTURES)
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
        classes=metrics.get("classes", []),
        threshold_curves=threshold_svg,
        precisions=precision_curves(evaluations, {k: label for k, label in labels.items() if k in metrics}),
        kinds=_kinds(list(errors.values())),
        confusion=_confusion(list(errors.values()), names),
        training=[
            (title, _embedded_file(folder / name))
            for title, name in (
                ("The first training images, augmented", TRAINING_IMAGES),
                ("The training data", TRAINING_DATA),
            )
            if (folder / name).exists()
        ],
        galleries=[
            {"title": title, "pictures": _pictures(validation, images, shown, errors, names)}
            for title, images in (("Images with most errors", worst), ("Other images", others))
        ],
        score_threshold=None if any(t is not None for t in thresholds) else score_threshold,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        config=(folder / "config.yaml").read_text("utf-8"),
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def _pictures(
    validation: CocoData,
    images: Sequence[ImageRecord],
    shown: Mapping[int, Sequence[dict[str, Any]]],
    errors: Mapping[int, ImageErrors],
    names: dict[int, str],
) -> list[dict[str, str]]:
    """Draw ground truth and detections of some images."""
    pictures = []
    for record in images:
        try:
            image = read_image(validation.image_path(record), (record.width, record.height))
        except InputError:
            # The image was readable when the run was evaluated. Skip it, rather than fail without a page.
            continue
        found = shown[record.id]
        enlarge = max(1, _LONGEST_SIDE // max(image.size))
        named = names_for(names, max(len(found), len(record.object_rows)))
        counts = [f"{count} {kind}" for kind, count in errors[record.id].kinds.items() if count]
        pictures.append(
            {
                "name": shown_name(record.file_name),
                "errors": ", ".join(counts),
                "truth": embedded(jpeg(draw_truth(image, record, named, enlarge=enlarge), _LONGEST_SIDE)),
                "prediction": embedded(
                    jpeg(draw_results(image, found, named, enlarge=enlarge), _LONGEST_SIDE)
                ),
            }
        )
    return pictures


def _kinds(errors: Sequence[ImageErrors]) -> list[tuple[str, int, str]]:
    """Return the number of each kind of error over all images, with its explanation."""
    return [(kind, sum(one.kinds[kind] for one in errors), text) for kind, text in KINDS.items()]


def _confusion(errors: Sequence[ImageErrors], names: Mapping[int, str]) -> dict[str, Any] | None:
    """Return the confusion matrix, or None if there are too many categories to show it."""
    if len(names) > _MOST_CONFUSED:
        return None
    pairs: Counter[tuple[int | None, int | None]] = Counter()
    for one in errors:
        pairs.update(one.confusions)
    ids = [*names, None]
    rows = [
        {
            "name": "no object" if row is None else shortened(names[row]),
            "counts": [pairs[row, column] for column in ids],
        }
        for row in ids
    ]
    return {"columns": [*(shortened(name) for name in names.values()), "not found"], "rows": rows}


def rendered(template: str, **values: Any) -> str:
    """Render one of the templates beside this file."""
    environment = Environment(loader=PackageLoader("maskloss.report", "."), autoescape=True)
    page = environment.get_template(template).render(**values)
    # File names that are not UTF-8 contain characters that cannot be encoded.
    return page.encode(errors="backslashreplace").decode()


def shown_name(file_name: str) -> str:
    """Return a file name for the page, shortened to its last characters, which tell more than the first."""
    return file_name if len(file_name) <= 80 else f"...{file_name[-77:]}"


def _embedded_file(path: Path) -> str:
    kind = "jpeg" if path.suffix == ".jpg" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in read_bytes(path).decode().splitlines()]


def embedded(image: bytes) -> str:
    """Return a JPEG as a data URL, to embed it in the page."""
    return "data:image/jpeg;base64," + base64.b64encode(image).decode("ascii")
