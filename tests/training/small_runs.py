"""Training runs of a few seconds: four images of 64 px, and resnet18 with a narrow FPN and narrow heads."""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from maskloss.data.shapes import write_shapes
from maskloss.detection import builders
from maskloss.losses.criterion import MaskRCNNLoss
from maskloss.training import trainer
from maskloss.training.config import TrainConfig

#: Channels of the FPN and the heads, an eighth of what users get: three times as fast.
WIDTH = 16
#: What users get.
RESNET18, FULL_WIDTH = torchvision.models.resnet18, builders._SMALL_WIDTH
#: COCO's statistics in metrics.json.
STATISTICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR")
#: The loss terms of a Mask R-CNN without a penalty.
TERMS = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask")


class NarrowResNet(ResNet):
    """ResNet-18 with an eighth of its channels after the stem and half of its blocks: 0.1 of 11 million weights."""

    def __init__(self, weights: None = None) -> None:
        super().__init__(BasicBlock, [1, 1, 1, 1])

    def _make_layer(self, block: type[BasicBlock], planes: int, *args: Any, **options: Any) -> nn.Sequential:
        return super()._make_layer(block, planes // 8, *args, **options)


@contextlib.contextmanager
def narrow_models() -> Iterator[None]:
    """Build small models narrower than users get them, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.models, "resnet18", NarrowResNet)
        patch.setattr(builders, "_SMALL_WIDTH", WIDTH)
        yield


@contextlib.contextmanager
def full_models() -> Iterator[None]:
    """Build small models as users get them, and as processes that a test starts do, inside `narrow_models`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.models, "resnet18", RESNET18)
        patch.setattr(builders, "_SMALL_WIDTH", FULL_WIDTH)
        yield


def write_data(folder: Path) -> Path:
    """Write four training images and two validation images."""
    write_shapes(folder / "train", 4, size=64, seed=0)
    write_shapes(folder / "val", 2, size=64, seed=1)
    return folder


def small_config(data: Path, output: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "train_images": str(data / "train/images"),
        "train_annotations": str(data / "train/annotations.json"),
        "val_images": str(data / "val/images"),
        "val_annotations": str(data / "val/annotations.json"),
        "output": str(output),
        "model": "resnet18",
        "max_steps": 2,
        "batch_size": 2,
        "warmup_steps": 2,
        "min_size": 64,
        "max_size": 64,
        "log_every": 1,
        "evaluate_every": 0,
        "workers": 0,
        "device": "cpu",
    }
    return TrainConfig(**{**settings, **changes})


class Interruption(Exception):
    """Raised in the middle of a run."""


@contextlib.contextmanager
def interrupted_after(batches: int) -> Iterator[None]:
    """Interrupt a run after a number of batches, as if the machine stopped in the next step."""

    def stopping(loader: Any, device: torch.device) -> Iterator[Any]:
        incoming = trainer_batches_on(loader, device)
        for _ in range(batches):
            yield next(incoming)
        raise Interruption

    trainer_batches_on = trainer.batches_on
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "batches_on", stopping)
        with pytest.raises(Interruption):
            yield


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Limit the size of files in bytes: up to the limit they are really written, the rest fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def history(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of history.jsonl without `seconds`, which differs between equal runs."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines(folder / "history.jsonl")]


def files(folder: Path) -> dict[str, bytes]:
    """Return the content of all files below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def assert_same_run(first: Path, second: Path) -> None:
    """Check that two runs have the same history, except for `seconds`, evaluations and bits of the model."""
    assert history(first) == history(second)
    assert lines(first / "evaluations.jsonl") == lines(second / "evaluations.jsonl")
    assert json.loads((first / "metrics.json").read_text()) == json.loads(
        (second / "metrics.json").read_text()
    )
    mine, other = tensors(first), tensors(second)
    assert list(mine) == list(other)
    assert [key for key in mine if not torch.equal(mine[key], other[key])] == []


class NanMaskLoss:
    """A mask loss that is NaN from its n-th call on."""

    def __init__(self, call: int) -> None:
        self.remaining = call

    def __call__(self, mask_logits: Tensor, mask_targets: Tensor) -> Tensor:
        self.remaining -= 1
        value = (mask_logits - mask_targets).square()
        return value * float("nan") if self.remaining <= 0 else value


def nan_in_step_3() -> MaskRCNNLoss:
    """For --loss: with one forward pass per step, the third one's mask term is NaN."""
    return MaskRCNNLoss(mask=NanMaskLoss(3))


def nan_at_once() -> MaskRCNNLoss:
    """For --loss: the first step's mask term is NaN."""
    return MaskRCNNLoss(mask=NanMaskLoss(1))


def no_loss() -> int:
    """For --loss: not a loss."""
    return 3


class LearnedScale(nn.Module):
    """A mask term with a learned temperature, exp(0) at first, whose gradient is not 0."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(0.0))

    def forward(self, mask_logits: Tensor, mask_targets: Tensor) -> Tensor:
        return (mask_logits - mask_targets).square() * torch.exp(-self.log_scale) + self.log_scale


def learned_loss() -> MaskRCNNLoss:
    """For --loss: a loss with a parameter of its own."""
    return MaskRCNNLoss(mask=LearnedScale())
