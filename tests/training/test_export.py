"""maskloss/training/export.py: exported files find the same objects in images of any size, without maskloss."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import maskloss
from maskloss.data.coco import Category
from maskloss.detection import builders
from maskloss.detection.builders import ModelSettings, build_model
from maskloss.detection.mask_branch import DetectedBoxes, MaskBranch
from maskloss.detection.mask_iou import MaskIoUBranch
from maskloss.detection.point_rend import PointRendBranch
from maskloss.errors import InputError
from maskloss.training.export import ExportedDetector, export
from maskloss.training.model_file import ModelDescription

from .small_runs import WIDTH, full_models

#: Runs of whole models, some of them in processes of their own.
pytestmark = pytest.mark.slow

#: A square, and images whose shorter and whose longer side limits the scale.
SIZES = ((96, 96), (150, 100), (100, 220))
SCORE_THRESHOLD = 0.8
CATEGORIES = (Category(3, "cat"), Category(7, "dog"))


def make_model(branch: Any = None) -> tuple[nn.Module, ModelDescription]:
    """Make a small network with random weights, which finds something in noise, but nothing in a gray image."""
    torch.manual_seed(0)
    whole = ModelSettings("resnet18", 3, min_size=(80,), max_size=160)
    with full_models(), pytest.MonkeyPatch.context() as patch:
        # Narrow heads, but the whole backbone: masks of a narrower one would all be empty.
        patch.setattr(builders, "_SMALL_WIDTH", WIDTH)
        model = build_model(whole)
    maskloss.convert(model, "aligned", paste=None, mask_branch=None if branch is None else branch(model))
    model.eval()
    # Spread the scores of a random network, so that some exceed the threshold.
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight.mul_(10)
    model.roi_heads.score_thresh = SCORE_THRESHOLD
    return model, ModelDescription(whole, CATEGORIES, aligned=True, score_thresholds=(0.25, None))


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand((3, *size), generator=generator) for size in SIZES]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Export one model in both formats, because an export takes half a minute."""
    folder = tmp_path_factory.mktemp("exported")
    model, description = make_model(MaskIoUBranch.of)
    paths = {ending: folder / f"model.{ending}" for ending in ("pt2", "onnx")}
    for ending, path in paths.items():
        if ending == "pt2" or find_spec("onnxscript"):
            export(model, description, path)
    return paths


def assert_same(actual: dict[str, Tensor], model: nn.Module, image: Tensor, tolerance: float) -> int:
    """Compare detections with those of the model, and return their number."""
    with torch.no_grad():
        expected = ExportedDetector(model)(image)
    assert list(actual) == list(expected)
    assert torch.equal(actual["labels"], expected["labels"])
    torch.testing.assert_close(actual["boxes"], expected["boxes"], rtol=0, atol=10 * tolerance)
    for key in set(expected) - {"labels", "boxes"}:
        torch.testing.assert_close(actual[key], expected[key], rtol=0, atol=tolerance, msg=key)
    return len(expected["boxes"])


def test_torch_export_finds_the_same(exported: dict[str, Path]) -> None:
    model, _ = make_model(MaskIoUBranch.of)
    program = torch.export.load(exported["pt2"]).module()
    with torch.no_grad():
        found = [assert_same(program(image), model, image, 1e-5) for image in images()]
        # A gray image, whose scores are all below the threshold.
        nothing = assert_same(
            program(torch.full((3, 80, 96), 0.45)), model, torch.full((3, 80, 96), 0.45), 1e-5
        )
    assert min(found) > 0
    assert nothing == 0


def test_onnxruntime_finds_the_same(exported: dict[str, Path]) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model, _ = make_model(MaskIoUBranch.of)
    session = runtime.InferenceSession(exported["onnx"])
    (declared,) = session.get_inputs()
    assert declared.name == "image"
    for image in (*images(), torch.full((3, 80, 96), 0.45)):
        values = session.run(None, {"image": image.numpy()})
        names = [output.name for output in session.get_outputs()]
        actual = {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}
        assert_same(actual, model, image, 1e-4)
    content = json.loads(session.get_modelmeta().custom_metadata_map["maskloss"])
    assert content["categories"] == [
        {"label": 1, "id": 3, "name": "cat", "score_threshold": 0.25},
        {"label": 2, "id": 7, "name": "dog", "score_threshold": None},
    ]
    assert content["resized_to"] == {"shorter_side": 80, "longer_side_at_most": 160}
    assert content["opset"] == 20


def test_the_recipe_of_the_docs_pastes_masks_as_maskloss_does(
    exported: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    page = (Path(__file__).parents[2] / "docs/export.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    shutil.copy(exported["onnx"], tmp_path / "model.onnx")
    picture = (images()[1].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/export.md", "exec"), names)
    found = {name: torch.from_numpy(value) for name, value in names["found"].items()}
    expected = maskloss.paste_masks(found["masks"][:, 0], found["boxes"], picture.shape[:2])
    thresholds = torch.tensor([names["thresholds"][label] for label in found["labels"].tolist()])
    kept = found["scores"] >= thresholds
    assert names["thresholds"] == {1: 0.25, 2: 0.5}
    masks = torch.from_numpy(np.stack(names["masks"]))
    assert masks.shape == expected[kept].shape
    assert masks.any()
    # Probabilities of exactly .5 may be rounded either way.
    assert (masks != expected[kept]).float().mean() < 1e-4


def test_masks_refined_at_points_are_exported(tmp_path: Path) -> None:
    model, description = make_model(PointRendBranch.of)
    export(model, description, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        assert assert_same(program(images()[1]), model, images()[1], 1e-4) > 0


WITHOUT_MASKLOSS = """
import sys
sys.modules["maskloss"] = None
import numpy as np
image = np.load(sys.argv[2])
if sys.argv[1].endswith(".onnx"):
    sys.modules["torch"] = None
    import onnxruntime
    boxes = onnxruntime.InferenceSession(sys.argv[1]).run(["boxes"], {"image": image})[0]
else:
    import torch, torchvision
    extra = {"maskloss": ""}
    program = torch.export.load(sys.argv[1], extra_files=extra)
    assert "categories" in extra["maskloss"]
    boxes = program.module()(torch.from_numpy(image))["boxes"].numpy()
np.save(sys.argv[3], boxes)
"""


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_the_file_runs_without_maskloss(ending: str, exported: dict[str, Path], tmp_path: Path) -> None:
    if ending == "onnx":
        pytest.importorskip("onnxruntime")
    image = images()[1]
    np.save(tmp_path / "image.npy", image.numpy())
    arguments = [exported[ending], tmp_path / "image.npy", tmp_path / "boxes.npy"]
    subprocess.run([sys.executable, "-c", WITHOUT_MASKLOSS, *map(str, arguments)], check=True, cwd=tmp_path)
    model, _ = make_model(MaskIoUBranch.of)
    with torch.no_grad():
        expected = ExportedDetector(model)(image)["boxes"]
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "boxes.npy")), expected, rtol=0, atol=1e-3)


class Counting(MaskBranch):
    """Its masks depend on the number of detections, in Python."""

    def predict(
        self, features: dict[str, Tensor], detections: DetectedBoxes
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        return [boxes.new_ones((len(boxes), 1, 7, 7)) for boxes in detections.boxes], None


def test_a_model_that_cannot_be_exported_is_refused_in_a_line(tmp_path: Path) -> None:
    model, description = make_model(lambda _: Counting())
    with pytest.raises(
        InputError, match=r"the model cannot be exported: .* must not depend on the number"
    ) as caught:
        export(model, description, tmp_path / "model.pt2")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must end in \.onnx or \.pt2"):
        export(*make_model(), tmp_path / "model.pb")


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match=r"need onnxscript: pip install 'maskloss\[export\]'"):
        export(*make_model(), tmp_path / "model.onnx")
