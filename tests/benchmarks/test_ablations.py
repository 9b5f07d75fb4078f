"""Tests of benchmarks/ablations: the sweeps are valid, and the images are hard."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pycocotools import mask as coco_mask
from safetensors.torch import save_file
from torchvision.models import mobilenet_v2

from benchmarks.ablations.hard_shapes import CLASSES, SIZE, write_set
from maskloss.ablation.plan import read_plan
from maskloss.data.shapes import write_shapes
from maskloss.detection.builders import ModelSettings, build_model

SWEEPS = Path(__file__).parents[2] / "benchmarks/ablations"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweeps")
    even = np.full(len(CLASSES), 1 / len(CLASSES))
    for name in ("even/train", "even/val", "long_tail/train"):
        write_set(folder / "runs/ablations/data" / name, 25, even, seed=2)
    model = build_model(ModelSettings("resnet18", len(CLASSES) + 1))
    for name in ("start", "start_masks"):
        save_file(model.state_dict(), folder / f"runs/ablations/{name}.safetensors")
    small = folder / "runs/ablations/small"
    write_shapes(small / "train", 4, size=64, seed=10)
    write_shapes(small / "val", 10, size=64, seed=11)
    save_file(mobilenet_v2(weights=None).state_dict(), small / "mobilenet_v2_imagenet.safetensors")
    return folder


@pytest.mark.parametrize("file", sorted(SWEEPS.glob("*/ablation.yaml")), ids=lambda file: file.parent.name)
def test_sweep_is_valid_and_its_losses_can_be_computed(file, data, monkeypatch):
    monkeypatch.chdir(data)
    plan = read_plan(file, "out")
    assert len(plan.seeds) >= 5
    assert plan.baseline == next(iter(plan.variants))
    written = [repr(changes) for changes in plan.variants.values()]
    assert len(set(written)) == len(written)


def test_number_of_sweeps():
    assert len(list(SWEEPS.glob("*/ablation.yaml"))) == 9


def test_two_bases_differ_only_in_their_weights():
    base, of_masks = (
        yaml.safe_load((SWEEPS / f"{name}.yaml").read_text()) for name in ("base", "base_of_masks")
    )
    assert of_masks.pop("weights") != base.pop("weights")
    assert of_masks == base


def test_objects_touch_and_annotated_masks_do_not_overlap(data):
    document = json.loads((data / "runs/ablations/data/even/train/annotations.json").read_text())
    touching = 0
    for image in document["images"]:
        found = [a for a in document["annotations"] if a["image_id"] == image["id"]]
        masks = np.stack([coco_mask.decode(a["segmentation"]) for a in found]).astype(bool)
        assert masks.shape[1:] == (SIZE, SIZE)
        assert masks.sum(0).max() == 1
        grown = torch.nn.functional.max_pool2d(torch.from_numpy(masks).float()[:, None], 5, 1, 2)[:, 0]
        touching += int((grown.sum(0) > 1).any())
    assert touching > 0.7 * len(document["images"])


def test_softmax_against_background_ignores_the_other_classes(monkeypatch):
    monkeypatch.syspath_prepend(str(SWEEPS / "masks_and_classes"))
    from against_background import SoftmaxAgainstBackgroundLoss

    logits = torch.randn(3, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 4, 2])
    probs = SoftmaxAgainstBackgroundLoss().mask_probs(logits, labels)
    for index, label in enumerate(labels.tolist()):
        two = logits[index, [0, label]].softmax(dim=0)[1]
        torch.testing.assert_close(probs[index], two)
