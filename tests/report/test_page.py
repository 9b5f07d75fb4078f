"""maskloss/report/page.py: the HTML page of a run, from the files that the run has written."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from maskloss.data.coco import CocoData, read_coco
from maskloss.errors import InputError
from maskloss.report.errors import image_errors
from maskloss.report.page import embedded, rendered, shown_name, write_report
from maskloss.training.loop import train
from maskloss.training.metrics import labels
from tests.training.small_runs import TERMS, narrow_models, small_config, write_data

Run = tuple[Path, CocoData, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train a model for three steps; return its folder, its validation set and its results, which are true masks."""
    folder = tmp_path_factory.mktemp("report")
    data = write_data(folder / "data")
    with narrow_models():
        result = train(small_config(data, folder / "run", max_steps=3))
    assert result.validation is not None
    found = [
        {
            "image_id": image.id,
            "category_id": o.category_id,
            "bbox": [o.box[0], o.box[1], o.box[2] - o.box[0], o.box[3] - o.box[1]],
            "score": 0.9,
            "segmentation": encode(mask),
        }
        for image in result.validation.images
        for o, mask in zip(image.objects, image.object_masks().bitmaps().numpy(), strict=True)
    ]
    return folder / "run", result.validation, found


def encode(mask: Any) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(mask))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def copied(trained: Run, folder: Path) -> Run:
    """Copy a run and its validation set, to change them."""
    run, validation, found = trained
    shutil.copytree(
        run, folder / "run", ignore=shutil.ignore_patterns("checkpoints", "*.safetensors", "report.html")
    )
    shutil.copytree(run.parent / "data/val", folder / "val")
    data = read_coco(folder / "val/images", folder / "val/annotations.json")
    assert data.records == validation.records
    return folder / "run", data, found


class References(HTMLParser):
    """Parser that collects what a page would load, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")
        ]


@pytest.fixture(scope="module")
def page(trained: Run) -> str:
    return write_report(*trained, labels()).read_text()


def test_the_report_loads_nothing_from_elsewhere(page: str) -> None:
    parser = References()
    parser.feed(page)
    assert parser.references
    assert [r for r in parser.references if not r.startswith(("data:image/", "#"))] == []
    assert not {"link", "iframe", "object", "embed"} & set(parser.tags)
    # The only script is in the page, and fetches nothing.
    assert parser.tags.count("script") == 1
    assert not re.search(r"fetch|XMLHttp|import\(|eval|innerHTML|new Image", page[page.index("<script>") :])
    assert not re.search(r"@import|url\((?!['\"]?(#|data:))", page)


def test_the_report_shows_truth_and_prediction_of_every_validation_image(page: str) -> None:
    parser = References()
    parser.feed(page)
    # Two images, each with ground truth and prediction.
    assert sum(reference.startswith("data:image/jpeg;base64,") for reference in parser.references) == 4
    assert page.count('alt="ground truth of 00000') == page.count('alt="prediction for 00000') == 2


def test_the_report_has_a_curve_for_every_term(page: str) -> None:
    assert "<svg" in page
    for term in TERMS:
        # Once in the table and once as the title of a panel.
        assert f"<td>{term}</td>" in page
        assert page.count(term) >= 2


def test_the_report_shows_the_metrics_in_percent(page: str, trained: Run) -> None:
    metrics = json.loads((trained[0] / "metrics.json").read_text())
    dash = "\N{EN DASH}"
    for kind, label in (("bbox", "box"), ("segm", "mask"), ("boundary", "boundary")):
        row = "".join(
            f"<td>{dash if value is None else f'{100 * value:.1f}'}</td>" for value in metrics[kind].values()
        )
        assert f"<td>{label}</td>{row}" in re.sub(r"\s+", "", page)


def test_the_report_escapes_text_from_files(trained: Run, tmp_path: Path) -> None:
    run, _, found = copied(trained, tmp_path)
    path = tmp_path / "val/annotations.json"
    document = json.loads(path.read_text())
    name = "<script>alert(1)<b>.png"
    image = tmp_path / "val/images" / document["images"][0]["file_name"]
    # A slash would be a folder: "</b>" cannot be in a file's name.
    image.rename(image.with_name(name))
    document["images"][0]["file_name"] = name
    document["categories"][0]["name"] = "<script>"
    path.write_text(json.dumps(document))
    (run / "config.yaml").write_text("model: </pre><script>\n")
    page = write_report(run, read_coco(tmp_path / "val/images", path), found, labels()).read_text()
    assert page.count("<script") == 1  # the page's own
    assert "&lt;script&gt;alert(1)" in page
    assert "model: &lt;/pre&gt;&lt;script&gt;" in page


def test_report_is_written_without_a_missing_image(trained: Run, tmp_path: Path) -> None:
    run, validation, found = copied(trained, tmp_path)
    validation.image_path(validation.images[0]).unlink()
    page = write_report(run, validation, found, labels()).read_text()
    assert page.count('alt="ground truth of') == 1
    assert f'alt="ground truth of {validation.images[1].file_name}"' in page


def pictures(page: str) -> list[Any]:
    """Decode the pictures of a page."""
    encoded = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int) for data in encoded]


def named_pictures(page: str) -> dict[str, Any]:
    """Decode the pictures of a page, by their alternative texts."""
    return dict(zip(re.findall(r'alt="([^"]+)"', page), pictures(page), strict=True))


def test_only_predictions_above_the_threshold_are_drawn(trained: Run, tmp_path: Path) -> None:
    run, validation, found = copied(trained, tmp_path)
    above = named_pictures(write_report(run, validation, found, labels(), score_threshold=0.9).read_text())
    page = write_report(run, validation, found, labels(), score_threshold=0.91).read_text()
    below = named_pictures(page)
    assert set(above) == set(below)
    assert len(above) == 4
    assert "a score of at least 0.91" in page
    for name, picture in above.items():
        if name.startswith("prediction"):
            assert np.abs(picture - below[name]).max() > 50
        else:
            assert np.array_equal(picture, below[name])


def test_each_category_has_its_own_threshold(trained: Run, tmp_path: Path) -> None:
    run, validation, found = copied(trained, tmp_path)
    objects = sum(len(image.objects) for image in validation.images)
    first = validation.categories[0].id
    of_first = sum(result["category_id"] == first for result in found)
    assert 0 < of_first < objects
    thresholds = [0.95, *[None] * (len(validation.categories) - 1)]
    page = write_report(run, validation, found, labels(), thresholds=thresholds).read_text()
    assert f"<td>correct</td><td>{objects - of_first}</td>" in page
    assert f"<td>missed</td><td>{of_first}</td>" in page
    assert "their category's threshold" in page.replace("&#39;", "'")


def test_the_report_has_a_row_for_every_category(trained: Run, page: str) -> None:
    metrics = json.loads((trained[0] / "metrics.json").read_text())
    text = re.sub(r"\s*\n\s*", "", page)
    for row in metrics["classes"]:
        assert f"<tr><td>{row['name']}</td><td>{row['objects']}</td>" in text


def test_images_with_errors_come_first_and_say_which(trained: Run, tmp_path: Path) -> None:
    run, validation, found = copied(trained, tmp_path)
    # Nothing is found in the second image.
    second = validation.images[1]
    page = write_report(
        run, validation, [r for r in found if r["image_id"] != second.id], labels()
    ).read_text()
    names = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    first = validation.images[0]
    assert names == [
        f"{second.file_name}: {len(second.objects)} missed",
        f"{first.file_name}: {len(first.objects)} correct",
    ]
    assert page.index("Images with most errors") < page.index("Other images")


def test_the_confusion_matrix_has_a_row_for_objects_and_a_column_for_detections(
    trained: Run, tmp_path: Path
) -> None:
    run, validation, found = copied(trained, tmp_path)
    ids = [category.id for category in validation.categories]
    # Every object is found as the first category.
    page = write_report(run, validation, [{**r, "category_id": ids[0]} for r in found], labels()).read_text()
    matrix = page[page.index("Confusion matrix") :]
    for category in validation.categories:
        count = sum(r["category_id"] == category.id for r in found)
        assert f"<tr><td>{category.name}</td><td>{count or ''}</td>" in matrix


def test_precision_is_drawn_over_the_steps(trained: Run, tmp_path: Path) -> None:
    run, validation, found = copied(trained, tmp_path)
    path = run / "evaluations.jsonl"
    line = json.loads(path.read_text())
    assert "over the steps" not in write_report(run, validation, found, labels()).read_text()
    path.write_text("".join(json.dumps({**line, "step": step}) + "\n" for step in (1, 3)))
    assert "Average precision over the steps" in write_report(run, validation, found, labels()).read_text()


def test_the_report_counts_the_validation_set_and_the_steps(trained: Run, page: str) -> None:
    _, validation, _ = trained
    objects = sum(len(image.objects) for image in validation.images)
    text = re.sub(r"\s+", " ", page)
    assert (
        f"3 steps in {history(trained)[-1]['seconds']:.0f} s. Evaluated on 2 images with {objects} objects"
        in text
    )


def history(trained: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (trained[0] / "history.jsonl").read_text().splitlines()]


def test_losses_of_the_last_step_and_of_the_validation_are_in_the_table(trained: Run, page: str) -> None:
    last = history(trained)[-1]
    metrics = json.loads((trained[0] / "metrics.json").read_text())
    for term in TERMS:
        assert f"<td>{term}</td><td>{last[term]:.4f}</td><td>{metrics['loss'][term]:.4f}</td>" in page


def test_six_images_with_errors_and_six_evenly_spread_ones_are_shown(trained: Run, tmp_path: Path) -> None:
    run, _, found = copied(trained, tmp_path)
    path = tmp_path / "val/annotations.json"
    document = json.loads(path.read_text())
    first, annotation = document["images"][0], document["annotations"][0]
    document["images"], document["annotations"] = [], []
    # 24 images with an object, each before one without.
    for number in range(48):
        name = f"{number:02}.png"
        shutil.copy(tmp_path / "val/images" / first["file_name"], tmp_path / "val/images" / name)
        document["images"].append({**first, "id": number, "file_name": name})
        if number % 2 == 0:
            document["annotations"].append({**annotation, "id": number + 1, "image_id": number})
    path.write_text(json.dumps(document))
    data = read_coco(tmp_path / "val/images", path)
    page = write_report(run, data, found, labels()).read_text()
    shown = [int(name) for name in re.findall(r'alt="ground truth of (\d+)\.png"', page)]
    assert len(shown) == 12
    errors = {
        image.id: image_errors(image, [r for r in found if r["image_id"] == image.id])
        for image in data.images
    }
    counts = [errors[number].count for number in range(48)]
    assert [counts[number] for number in shown[:6]] == sorted(counts, reverse=True)[:6]
    others = [number for number in range(0, 48, 2) if number not in shown[:6]]
    assert shown[6:] == [others[int(i * len(others) / 6)] for i in range(6)]


def test_a_run_without_history_is_refused(trained: Run, tmp_path: Path) -> None:
    run, validation, found = copied(trained, tmp_path)
    (run / "history.jsonl").write_text("")
    with pytest.raises(InputError, match=r"history\.jsonl: is empty, so there is nothing to report$"):
        write_report(run, validation, found, labels())
    (run / "history.jsonl").unlink()
    with pytest.raises(InputError, match=r"history\.jsonl: cannot be read"):
        write_report(run, validation, found, labels())
    assert not (run / "report.html").exists()


def test_long_names_are_shortened_to_their_end() -> None:
    assert shown_name("a" * 80) == "a" * 80
    assert shown_name("a" * 100 + ".png") == "..." + "a" * 73 + ".png"


def test_a_jpeg_is_embedded_as_a_data_url() -> None:
    assert embedded(b"\xff\xd8") == "data:image/jpeg;base64,/9g="


def test_characters_that_cannot_be_encoded_are_escaped() -> None:
    (last,) = [{"step": 1, "seconds": 1.0}]
    values: dict[str, Any] = {"rows": [("box", {"AP": None})], "metrics": {"loss": {}}, "last": last}
    page = rendered("page.html.j2", title="caf\udce9 <b>", **values)
    assert "<h1>caf\\udce9 &lt;b&gt;</h1>" in page
    page.encode()
