"""The scripts in examples/ run as their users run them."""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
from pycocotools import mask as coco_mask
from torchvision.models import detection

from maskloss.data.shapes import write_shapes
from maskloss.training.loop import train
from tests.training.small_runs import narrow_models, small_config, write_data
from tests.training.test_partial_labels import weak_labels

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_weak_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shapes(tmp_path, 4, size=64, seed=0)
    path = tmp_path / "annotations.json"
    document = json.loads(path.read_text())
    for place, annotation in enumerate(document["annotations"]):
        weak_labels(annotation, place)
    path.write_text(json.dumps(document))

    # The example's model at 64 px, where its user has 800.
    def small(**options: object) -> object:
        return build(**options, min_size=64, max_size=64)

    build = detection.maskrcnn_resnet50_fpn
    monkeypatch.setattr(detection, "maskrcnn_resnet50_fpn", small)
    monkeypatch.setattr(
        sys,
        "argv",
        ["weak_labels.py", "--images", str(tmp_path / "images"), "--annotations", str(path), "--steps", "3",
         "--weights", "none"],
    )  # fmt: skip
    runpy.run_path(str(EXAMPLES / "weak_labels.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2", "3"]
    for line in lines:
        losses = json.loads(line.split(maxsplit=1)[1].replace("'", '"'))
        assert losses["loss_mask"] > 0
        assert all(math.isfinite(value) for value in losses.values())


def run_example(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_training_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shapes(tmp_path, 2, size=64, seed=0)

    # The example's model at 64 px, where its user has 800.
    def small(**options: object) -> object:
        return build(**options, min_size=64, max_size=64)

    build = detection.maskrcnn_resnet50_fpn
    monkeypatch.setattr(detection, "maskrcnn_resnet50_fpn", small)
    run_example(
        "training_loop.py",
        *("--images", str(tmp_path / "images"), "--annotations", str(tmp_path / "annotations.json")),
        *("--steps", "2", "--weights", "none"),
        monkeypatch=monkeypatch,
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2", "evaluation"]
    for line in lines:
        losses = json.loads(line[line.index("{") :].replace("'", '"'))
        assert losses["loss_mask"] > 0
        assert all(math.isfinite(value) for value in losses.values())


def test_predict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_data(tmp_path / "data")
    with narrow_models():
        train(small_config(data, tmp_path / "run"))
        capsys.readouterr()
        image = data / "val/images/000001.png"
        run_example(
            "predict.py",
            *("--checkpoint", str(tmp_path / "run"), "--image", str(image), "--score-threshold", "0"),
            monkeypatch=monkeypatch,
        )
    *objects, results = capsys.readouterr().out.splitlines()
    assert objects
    assert all(
        line.split()[0] in ("circle", "rectangle", "triangle") and line.endswith(" px") for line in objects
    )
    (first,) = json.loads(results)
    area = int(coco_mask.area(first["segmentation"]))
    assert objects[0].endswith(f": {area} px")
