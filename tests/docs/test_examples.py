"""The scripts in examples/ run as their users run them."""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torchvision
from pycocotools import mask as coco_mask
from torchvision.models import detection

import maskloss
from maskloss.data.shapes import write_shapes
from maskloss.training.loop import train
from tests.training.small_runs import narrow_models, small_config, write_data
from tests.training.test_partial_labels import weak_labels

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build the examples' model at 64 px, where its user has 800."""

    def small(**options: object) -> object:
        return build(**options, min_size=64, max_size=64)

    build = detection.maskrcnn_resnet50_fpn
    monkeypatch.setattr(detection, "maskrcnn_resnet50_fpn", small)


@pytest.fixture
def data(tmp_path: Path) -> tuple[str, ...]:
    """Write a small data set, and return the options that name it."""
    write_shapes(tmp_path, 2, size=64, seed=0)
    return ("--images", str(tmp_path / "images"), "--annotations", str(tmp_path / "annotations.json"))


def assert_losses(text: str) -> None:
    losses = json.loads(text.replace("'", '"'))
    assert losses["loss_mask"] > 0
    assert all(math.isfinite(value) for value in losses.values())


@pytest.mark.usefixtures("small_models")
def test_weak_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shapes(tmp_path, 4, size=64, seed=0)
    path = tmp_path / "annotations.json"
    document = json.loads(path.read_text())
    for place, annotation in enumerate(document["annotations"]):
        weak_labels(annotation, place)
    path.write_text(json.dumps(document))
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


@pytest.mark.usefixtures("small_models")
def test_training_loop(
    data: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_example("training_loop.py", *data, "--steps", "2", "--weights", "none", monkeypatch=monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2", "evaluation"]
    for line in lines:
        assert_losses(line[line.index("{") :])


@pytest.mark.usefixtures("small_models")
def test_accelerate_loop(
    data: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    run_example("accelerate_loop.py", *data, "--steps", "2", "--weights", "none", monkeypatch=monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2"]
    for line in lines:
        assert_losses(line[line.index("{") :])


@pytest.mark.filterwarnings("ignore")  # Lightning's own
@pytest.mark.usefixtures("small_models")
@pytest.mark.parametrize(
    ("name", "package"), [("lightning_module", "lightning"), ("torchgeo_task", "torchgeo")]
)
def test_examples_of_lightning(
    name: str,
    package: str,
    data: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)  # Lightning writes logs into the working folder
    weights = ("--weights", "none") if package == "lightning" else ()
    run_example(f"{name}.py", *data, "--steps", "2", *weights, monkeypatch=monkeypatch)
    assert_losses(capsys.readouterr().out.splitlines()[-1])


#: What torchvision's reference script does with its options and its model.
REFERENCE = """
import argparse
import helper
import torchvision

parser = argparse.ArgumentParser()
parser.add_argument("--model")
arguments = parser.parse_args()
model = torchvision.models.get_model(
    arguments.model, weights=None, weights_backbone=None, num_classes=helper.CLASSES, min_size=64
)
print(model.roi_heads)
"""


def test_reference_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.py").write_text(REFERENCE)
    (tmp_path / "helper.py").write_text("CLASSES = 3")
    monkeypatch.setattr(torchvision.models, "get_model", torchvision.models.get_model)  # restored afterwards
    monkeypatch.setattr(sys, "path", list(sys.path))
    script = str(tmp_path / "train.py")
    options = ("--loss", "matterport", "--model", "maskrcnn_resnet50_fpn")
    run_example("reference_script.py", script, *options, monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    assert repr(maskloss.MaskRCNNLoss.preset("matterport").box) in printed


@pytest.mark.filterwarnings("ignore")
def test_sahi_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sahi")
    data = write_data(tmp_path / "data")
    with narrow_models():
        train(small_config(data, tmp_path / "run"))
        capsys.readouterr()
        image = str(data / "val/images/000001.png")
        options = ("--image", image, "--tile", "48", "--score-threshold", "0")
        run_example("sahi_tiles.py", "--checkpoint", str(tmp_path / "run"), *options, monkeypatch=monkeypatch)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" px")]
    assert lines
    assert all(line.split()[0] in ("circle", "rectangle", "triangle") for line in lines)


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
