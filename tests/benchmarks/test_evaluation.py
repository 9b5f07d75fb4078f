"""benchmarks/evaluation.py: the plain evaluation has the AP of ours, and the script compares the two."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.photos import ANNOTATIONS, FOLDER

ROOT = Path(__file__).parents[2]
#: A network that finds something in every image. Its classes are those of two categories.
NETWORK = """
import torch
from maskloss.detection.builders import ModelSettings, build_model

CATEGORY_IDS = [1, 3]

def build():
    torch.manual_seed(0)
    model = build_model(ModelSettings("resnet18", num_classes=3, min_size=(64,), max_size=96))
    model.roi_heads.score_thresh = 0.0
    return model.eval()
"""


@pytest.mark.slow
def test_the_script_compares_both_sides(tmp_path: Path) -> None:
    script = tmp_path / "benchmarks"
    script.mkdir()
    for name in ("evaluation.py", "loop.py", "measuring.py"):
        (script / name).write_text((ROOT / "benchmarks" / name).read_text())
    (tmp_path / "network.py").write_text(NETWORK)
    document = json.loads(ANNOTATIONS.read_text())
    document["annotations"] = [one for one in document["annotations"] if one["category_id"] in (1, 3)]
    (tmp_path / "annotations.json").write_text(json.dumps(document))
    command = [sys.executable, str(script / "evaluation.py"), "--images", str(FOLDER), "--annotations"]
    command += [str(tmp_path / "annotations.json"), "--network", str(tmp_path / "network.py")]
    # The script fails if the two sides have different box AP.
    printed = subprocess.check_output([*command, "--rounds", "2", "--threads", "1"], text=True, cwd=ROOT)
    results = json.loads((script / "results/evaluation.json").read_text())["results"]["1 threads"]
    assert set(results) == {"torchvision", "AP alone", "AP and losses"}
    assert f"{results['AP alone']['times_faster']['median']:.2f}x" in printed
