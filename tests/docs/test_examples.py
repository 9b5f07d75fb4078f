"""The scripts in examples/ run as their users run them."""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
from torchvision.models import detection

from maskloss.data.shapes import write_shapes
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
