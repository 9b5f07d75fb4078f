"""benchmarks/loop.py: both sides train on the same images, and the script prints their speeds."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.ops import masks_to_boxes

from maskloss.data.shapes import write_shapes
from tests.training.rectangles import write_rectangles

ROOT = Path(__file__).parents[2]


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("loop")


def test_the_plain_data_set_flips_boxes_with_their_masks(loop: Any, tmp_path: Path) -> None:
    write_shapes(tmp_path / "data", 8, size=64)
    annotations = tmp_path / "data/annotations.json"
    # Keeps the objects with polygons.
    options = argparse.Namespace(annotations=annotations, num_images=4, batch_sizes=[1], min_size=64)
    loop.write_inputs(options, tmp_path)
    dataset = loop.PlainDataset(tmp_path / "data/images", tmp_path / "train.json")
    torch.manual_seed(0)
    found = [dataset[index % len(dataset)] for index in range(8)]
    for pixels, target in found:
        assert pixels.max() <= 1
        assert len(target["labels"]) == len(target["boxes"]) > 0
        # `masks_to_boxes` gives the last pixel, not the edge.
        torch.testing.assert_close(
            masks_to_boxes(target["masks"])[:, :2], target["boxes"][:, :2], atol=1.0, rtol=0
        )
    assert len({target["boxes"].sum().item() for _, target in found}) > len(dataset)


def test_batches_have_one_orientation(loop: Any, tmp_path: Path) -> None:
    sizes = [(8, 5), (5, 8), (8, 5), (8, 5), (5, 8)]
    document = {
        "images": [{"id": i, "width": w, "height": h} for i, (w, h) in enumerate(sizes)],
        "annotations": [],
        "categories": [],
    }
    (tmp_path / "a.json").write_text(json.dumps(document))
    assert loop.PlainDataset(tmp_path, tmp_path / "a.json").batches(2) == [[1, 4], [0, 2], [3]]


@pytest.mark.slow
@pytest.mark.slow
def test_the_script_compares_both_sides(tmp_path: Path) -> None:
    data = write_rectangles(tmp_path / "data")
    images, annotations = data.image_path(data.images[0]).parent, data.annotation_file
    script = tmp_path / "benchmarks"
    script.mkdir()
    for name in ("loop.py", "measuring.py"):
        (script / name).write_text((ROOT / "benchmarks" / name).read_text())
    command = [sys.executable, str(script / "loop.py"), "--images", str(images), "--annotations"]
    command += [str(annotations), "--batch-sizes", "1", "--threads", "1", "--rounds", "2"]
    command += ["--num-images", "4", "--min-sizes", "64"]
    printed = subprocess.check_output(command, text=True, cwd=ROOT)
    row = json.loads((script / "results/loop.json").read_text())["results"]["64 px, batch 1, 1 threads"]
    assert set(row["images_per_second"]) == {"plain loop", "maskloss train"}
    assert all(speed > 0 for speed in row["images_per_second"].values())
    assert f"{row['memory']:.2f}x" in printed
    assert all(seconds > 0 for seconds in row["seconds_until_first_step"].values())
