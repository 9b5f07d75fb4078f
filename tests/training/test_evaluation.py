"""maskloss/training/evaluation.py: losses averaged over images, and errors of images and workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.pretended_device import DEVICE, counted, pretended_device
from maskloss import EncodedMasks
from maskloss.data.coco import read_coco
from maskloss.data.dataset import CocoDataset, collate
from maskloss.detection.transform import RCNNTransform
from maskloss.errors import InputError, RunError
from maskloss.training import evaluation
from maskloss.training.evaluation import batches_on, dead_workers_named, evaluate
from tests.data.coco_files import HEIGHT, WIDTH, write_coco
from tests.photos import ANNOTATIONS, FOLDER, read_photos
from tests.training.rectangles import write_rectangles


def bare_model() -> nn.Module:
    """The parts of a model that evaluation reads itself."""
    model = nn.Module()
    model.transform = RCNNTransform(32, 64, [0.5] * 3, [0.5] * 3)
    model.roi_heads = nn.Module()
    model.roi_heads.detections_per_img = 100
    return model


def test_losses_are_means_over_images_that_are_seen_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rectangles(tmp_path / "data")
    seen: list[list[int]] = []

    def fake(model: nn.Module, images: list[Any], targets: list[dict[str, Any]]) -> Any:
        ids = [target["image_id"] for target in targets]
        seen.append(ids)
        nothing = {
            "boxes": torch.zeros(0, 4),
            "labels": torch.zeros(0, dtype=torch.int64),
            "scores": torch.zeros(0),
            "masks": torch.zeros(0, 1, 28, 28),
        }
        mean = torch.tensor(float(np.mean(ids)))
        return {"loss_a": mean, "loss_b": 10 * mean}, [nothing] * len(images)

    monkeypatch.setattr(evaluation, "losses_and_detections", fake)
    found = evaluate(bare_model(), data, batch_size=4, device=torch.device("cpu"))
    assert seen == [[1], [2], [3], [4], [5], [6]]
    # Images 1 to 6 have the mean 3.5; the mean of the batches' means would be (2.5 + 5.5) / 2 = 4.
    assert found.metrics["loss"] == pytest.approx({"loss_a": 3.5, "loss_b": 35.0, "loss": 38.5})
    assert found.results == []


def test_an_unreadable_image_is_raised_as_an_input_error(tmp_path: Path) -> None:
    data = write_rectangles(tmp_path / "data")
    (tmp_path / "data/images/1.png").write_bytes(b"no image")
    model = bare_model()
    model.roi_heads.eval()
    with pytest.raises(InputError, match=r"1\.png: not a readable image"):
        evaluate(model, data, batch_size=2, device=torch.device("cpu"))
    # Each part has its mode again.
    assert model.training
    assert not model.roi_heads.training


def test_a_batch_is_sent_to_a_gpu_as_bytes_without_waiting(tmp_path: Path) -> None:
    data = read_coco(*write_coco(tmp_path))
    expected, unscaled = CocoDataset(data), CocoDataset(data, scaled=False)
    with pretended_device(), counted() as counts:
        [(images, targets)] = batches_on([collate([unscaled[0], unscaled[1]])], DEVICE)
    assert counts.waits.total() == 0
    for index, (image, target) in enumerate(zip(images, targets, strict=True)):
        pixels, fields = expected[index]
        assert torch.equal(image.values, pixels)
        assert torch.equal(target["boxes"].values, fields["boxes"])
        assert torch.equal(target["labels"].values, fields["labels"])
        assert isinstance(target["masks"], EncodedMasks)
    # A byte per pixel and channel, and 16 + 8 bytes per object.
    objects = sum(len(expected[index][1]["labels"]) for index in (0, 1))
    assert counts.bytes_sent == 2 * 3 * HEIGHT * WIDTH + 24 * objects


def test_a_dead_worker_is_a_run_error() -> None:
    with (
        pytest.raises(RunError, match=r"a data-loader worker died: .*Killed.*use fewer --workers"),
        dead_workers_named(),
    ):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")


def test_another_error_of_the_loader_is_not_called_a_dead_worker() -> None:
    with pytest.raises(RuntimeError, match="The size of tensor a"), dead_workers_named():
        raise RuntimeError("The size of tensor a (3) must match")


def test_photographs_are_sent_in_a_quarter_of_the_bytes_of_floats_and_bitmaps() -> None:
    photos = read_photos()
    dataset = CocoDataset(read_coco(FOLDER, ANNOTATIONS), scaled=False)
    batch = collate([dataset[index] for index in range(len(photos))])
    with pretended_device(), counted() as counts:
        next(batches_on([batch], DEVICE))
    plain = sum(image.nbytes + target["masks"].to(torch.uint8).nbytes for image, target in photos)
    assert 0 < counts.bytes_sent < plain / 4
