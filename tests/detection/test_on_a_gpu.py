"""Whole models on a GPU: torchvision's numbers, and no more synchronizations than counted on the pretended device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from benchmarks.measuring import count_waits
from maskloss import convert
from maskloss.detection import matching
from maskloss.detection.matching import match

from .small_models import batch, tiny_mask_rcnn

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def on_the_gpu() -> tuple[list[Tensor], list[dict[str, Any]]]:
    images, targets = batch()
    there = [
        {key: value.cuda() if isinstance(value, Tensor) else value for key, value in target.items()}
        for target in targets
    ]
    return [image.cuda() for image in images], there


def trained(model: nn.Module) -> dict[str, Tensor]:
    images, targets = on_the_gpu()
    torch.manual_seed(0)
    losses: dict[str, Tensor] = model.cuda().train()(images, targets)
    return losses


def test_losses_equal_torchvisions() -> None:
    expected, losses = trained(tiny_mask_rcnn()), trained(convert(tiny_mask_rcnn()))
    assert losses.keys() == expected.keys()
    for key, loss in expected.items():
        torch.testing.assert_close(losses[key], loss, rtol=1e-5, atol=0)


def test_detections_and_pasted_masks_equal_torchvisions() -> None:
    images, _ = on_the_gpu()
    found = []
    for model in (tiny_mask_rcnn(), convert(tiny_mask_rcnn())):
        with torch.no_grad():
            found.append(model.cuda().eval()(images))
    for expected, detection in zip(*found, strict=True):
        for field in ("boxes", "scores", "labels"):
            assert torch.equal(detection[field], expected[field]), field
        torch.testing.assert_close(detection["masks"], expected["masks"], rtol=0, atol=1e-5)


def test_a_sync_free_step_synchronizes_once_per_image_and_twice_per_batch() -> None:
    model = convert(tiny_mask_rcnn(), sync_free=True).cuda().train()
    model.conversion.box_format_checks = 0
    images, targets = on_the_gpu()

    def step() -> None:
        sum(model(images, targets).values()).backward()

    step()
    assert count_waits(step) <= len(images) + 2


def test_inference_synchronizes_less_than_torchvision() -> None:
    images, _ = on_the_gpu()
    counts = []
    for model in (tiny_mask_rcnn(), convert(tiny_mask_rcnn())):
        model.cuda().eval()
        with torch.no_grad():
            model(images)
            counts.append(count_waits(lambda model=model: model(images)))  # type: ignore[misc]
    assert counts[1] < counts[0] / 4


@pytest.mark.parametrize("remembered", [2**28, 0], ids=["one pass", "two passes"])
def test_matches_in_chunks_equal_torchvisions(remembered: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "_PAIRS_AT_ONCE", {"cuda": 20})
    monkeypatch.setattr(matching, "_PAIRS_REMEMBERED", remembered)
    low = torch.randint(0, 9, (53, 2), generator=torch.Generator().manual_seed(0))
    lattice = torch.cat([low, low + 1 + low % 3], dim=1).float().cuda()
    matcher = Matcher(0.7, 0.3, allow_low_quality_matches=True)
    expected = matcher(box_iou(lattice[:3], lattice[3:]))
    assert torch.equal(match(lattice[:3], lattice[3:], matcher, box_iou), expected)
