"""Learned parameters of a loss, and evaluations, in one process and in two."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from maskloss.data.coco import CocoData, read_coco
from maskloss.detection.builders import ModelSettings, build_model
from maskloss.detection.conversion import convert
from maskloss.losses import LossWeights, MaskRCNNLoss
from maskloss.training import trainer
from maskloss.training.evaluation import Evaluation, evaluate
from maskloss.training.loop import train
from tests.processes import run_ranks
from tests.training.small_runs import learned_loss, narrow_models, small_config

pytestmark = pytest.mark.slow

WORLD, LIMIT_S = 2, 240
KEY = "maskloss.loss.mask.log_scale"
CHANGES: dict[str, Any] = {
    "loss": "tests.training.small_runs.learned_loss",
    "batch_size": 1,
    "max_steps": 3,
    "learning_rate": 0.01,
    "warmup_steps": 0,
}


SYNCHRONIZED: dict[str, Any] = {
    "synchronized": True,
    "loss": "matterport",  # whose divisors differ most between processes
    "batch_size": 1,
    "max_steps": 1,
    "warmup_steps": 0,
    "frozen_normalization": True,
}


def write_images(folder: Path) -> Path:
    """Seven noisy images of three sizes with two rectangles each."""
    random = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for number, (width, height) in enumerate(
        [(64, 48), (48, 64), (64, 48), (64, 64), (64, 48), (48, 64), (64, 48)], start=1
    ):
        pixels = random.integers(0, 80, (height, width, 3), dtype=np.uint8)
        for x, y, w, h in ((4, 6, 18, 22), (26, 20, 16, 20)):
            pixels[y : y + h, x : x + w] = random.integers(120, 255, 3)
            corners = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": 1, "bbox": [x, y, w, h],
                 "area": w * h, "iscrowd": 0, "segmentation": [corners]}
            )  # fmt: skip
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "box"}]}
    (folder / "annotations.json").write_text(json.dumps(document))
    return folder


def of_images(folder: Path) -> CocoData:
    return read_coco(folder / "images", folder / "annotations.json")


def evaluated(data: CocoData, batch_size: int, **of_process: int) -> Evaluation:
    """An evaluation of a random network, which finds something in every image."""
    torch.manual_seed(0)
    model = build_model(ModelSettings("resnet18", 2, min_size=(64,), max_size=64))
    convert(model, MaskRCNNLoss(weights=LossWeights(mask=2.0)), paste=None).eval()
    # The caller's random state must not affect the losses.
    torch.manual_seed(batch_size)
    return evaluate(model, data, batch_size=batch_size, device=torch.device("cpu"), **of_process)


def run_rank(rank: int, port: int, shapes: str, images: str, output: str) -> None:
    """Run by each process, with what torchrun tells it."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "MASTER_PORT": str(port),
                   "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    seen: dict[str, Any] = {"before": [], "after": []}
    average = trainer._average_over_processes

    def recorded(accelerator: Any, parameters: list[nn.Parameter]) -> None:
        (parameter,) = parameters
        assert parameter.grad is not None
        seen["before"].append(parameter.grad.item())
        average(accelerator, parameters)
        seen["after"].append(parameter.grad.item())
        seen["parameter"] = parameter

    with pytest.MonkeyPatch.context() as patch, narrow_models():
        patch.setattr(trainer, "_average_over_processes", recorded)
        train(small_config(Path(shapes), Path(output) / "run", **CHANGES))
        found = evaluated(of_images(Path(images)), 2, rank=rank, world_size=WORLD)
    with narrow_models():
        # The statistics of other norms would be those of each process's own images.
        train(small_config(Path(shapes), Path(output) / "synchronized", **SYNCHRONIZED))
    seen["parameter"] = seen["parameter"].item()
    seen["metrics"], seen["results"] = found.metrics, found.results
    (Path(output) / f"{rank}.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture(scope="module")
def two_processes(shapes: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gloo")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    arguments = (port, str(shapes), str(images), str(folder))
    run_ranks(run_rank, arguments, world=WORLD, limit_s=LIMIT_S)
    return folder


@pytest.fixture(scope="module")
def ranks(two_processes: Path) -> list[dict[str, Any]]:
    return [json.loads((two_processes / f"{rank}.json").read_text()) for rank in range(WORLD)]


def test_the_gradient_of_a_losss_parameter_is_the_mean_over_processes(ranks: list[dict[str, Any]]) -> None:
    one, other = ranks
    assert one["before"] != other["before"]
    assert one["after"] == other["after"] == pytest.approx(
        [(a + b) / 2 for a, b in zip(one["before"], other["before"], strict=True)], rel=1e-6
    )  # fmt: skip
    assert one["parameter"] == other["parameter"] != learned_loss().mask.log_scale.item()


def test_two_processes_train_what_one_does_with_all_their_images(
    two_processes: Path, shapes: Path, tmp_path: Path
) -> None:
    train(small_config(shapes, tmp_path / "run", **CHANGES, accumulation_steps=WORLD))
    alone, together = (
        safetensors.torch.load_file(folder / "run/model.safetensors") for folder in (tmp_path, two_processes)
    )
    assert alone[KEY].item() == pytest.approx(together[KEY].item(), rel=1e-5)
    assert alone[KEY] != 0
    key = "roi_heads.mask_predictor.mask_fcn_logits.weight"
    torch.testing.assert_close(alone[key], together[key], rtol=1e-4, atol=1e-6)


def history(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def test_synchronized_losses_are_those_of_one_process_with_the_whole_batch(
    two_processes: Path, shapes: Path, tmp_path: Path
) -> None:
    train(small_config(shapes, tmp_path / "run", **{**SYNCHRONIZED, "batch_size": WORLD}))
    alone, together = history(tmp_path / "run"), history(two_processes / "synchronized")
    for key in alone[0].keys() - {"seconds", "loss", "loss_classifier"}:
        assert alone[0][key] == pytest.approx(together[0][key], rel=1e-6), key
    # The scores of an untrained network nearly tie, and convolutions round differently in larger batches, so proposals
    # swap places, and other negatives are sampled.
    assert alone[0]["loss_classifier"] == pytest.approx(together[0]["loss_classifier"], rel=5e-3)
    one, other = (
        safetensors.torch.load_file(folder / "model.safetensors")
        for folder in (tmp_path / "run", two_processes / "synchronized")
    )
    for key in ("rpn.head.cls_logits.weight", "roi_heads.mask_predictor.mask_fcn_logits.weight"):
        torch.testing.assert_close(one[key], other[key], rtol=1e-3, atol=1e-6)


def assert_same(found: dict[str, Any], results: list[dict[str, Any]], expected: Evaluation) -> None:
    assert found["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-6)
    assert (found["bbox"], found["segm"]) == (expected.metrics["bbox"], expected.metrics["segm"])
    assert [result["image_id"] for result in results] == [result["image_id"] for result in expected.results]
    for one, other in zip(results, expected.results, strict=True):
        assert one["bbox"] == pytest.approx(other["bbox"], abs=0.002)


def test_an_evaluation_does_not_depend_on_its_batches(images: Path) -> None:
    data = of_images(images)
    one_by_one = evaluated(data, 1)
    assert len({result["image_id"] for result in one_by_one.results}) == 7
    for batch_size in (2, 3, 4):
        found = evaluated(data, batch_size)
        assert_same(found.metrics, found.results, one_by_one)


def test_an_evaluation_does_not_depend_on_the_number_of_processes(
    ranks: list[dict[str, Any]], images: Path
) -> None:
    expected = evaluated(of_images(images), 1)
    for rank in ranks:
        assert_same(rank["metrics"], rank["results"], expected)


def test_clipping_includes_the_losss_own_parameters(shapes: Path, tmp_path: Path) -> None:
    train(small_config(shapes, tmp_path / "run", **CHANGES, gradient_clip=1e-4))
    moved = abs(safetensors.torch.load_file(tmp_path / "run/model.safetensors")[KEY].item())
    # Three steps of at most 0.01 * 1e-4, with a momentum of 0.9 from one to the next: 1 + 1.9 + 2.71 of them.
    assert 0 < moved <= 5.61 * 0.01 * 1e-4 * 1.001
