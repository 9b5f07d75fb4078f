"""`MaskRCNNLoss(synchronized=True)`: the losses of a global batch do not depend on how processes share it."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from maskloss import BoxRegression, MaskRCNNLoss
from maskloss.losses.normalizers import BatchCounts
from maskloss.losses.presets import PRESETS
from maskloss.losses.terms import KeypointBatch, MaskBatch, RoIBatch, RPNBatch
from tests.processes import run_ranks

pytestmark = pytest.mark.slow

WORLD, LIMIT_S, C = 2, 120, 4
#: Per process: images, sampled anchors, positives among them, sampled RoIs, positives among them, keypoints.
SHARES = [(1, 40, 3, 30, 11, 5), (3, 90, 20, 70, 0, 0)]


def tensors(share: int) -> dict[str, Tensor]:
    _, anchors, positive_anchors, rois, positives, keypoints = SHARES[share]
    generator = torch.Generator().manual_seed(share)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "objectness": values(anchors),
        "is_object": (torch.arange(anchors) < positive_anchors).float(),
        "rpn_deltas": values(positive_anchors, 4),
        "class_logits": values(rois, C),
        "labels": (torch.arange(rois) < positives).long(),
        "deltas": values(positives, 4),
        "mask_logits": values(positives, 1, 5, 5),
        "mask_targets": values(positives, 5, 5).sigmoid(),
        "keypoint_logits": values(keypoints, 9),
        "cells": torch.randint(9, (keypoints,), generator=generator),
    }


def losses_of(loss: MaskRCNNLoss, images: int, given: dict[str, Tensor]) -> dict[str, Tensor]:
    positives = len(given["deltas"])
    rpn = BatchCounts(images, len(given["objectness"]), len(given["rpn_deltas"]), 256, locations=100 * images)
    rois = BatchCounts(images, len(given["labels"]), positives, 512)
    return {
        **loss.rpn_losses(
            RPNBatch(
                given["objectness"],
                given["is_object"],
                BoxRegression(given["rpn_deltas"], 0 * given["rpn_deltas"]),
                rpn,
            )
        ),
        **loss.roi_losses(
            RoIBatch(
                given["class_logits"],
                given["labels"],
                BoxRegression(given["deltas"], 0 * given["deltas"]),
                rois,
            )
        ),
        **loss.mask_losses(
            MaskBatch(
                given["mask_logits"], given["mask_targets"], torch.ones(positives, dtype=torch.int64), rois
            )
        ),
        **loss.keypoint_losses(
            KeypointBatch(
                given["keypoint_logits"],
                given["cells"],
                BatchCounts(images, len(given["cells"]), positives, 512),
            )
        ),
    }


def losses() -> dict[str, MaskRCNNLoss]:
    made: dict[str, Any] = {name: MaskRCNNLoss.preset(name) for name in PRESETS}
    made["matterport"] = MaskRCNNLoss.preset(
        "matterport", active_classes=torch.tensor([True, True, False, True])
    )
    return {name: MaskRCNNLoss(**{**loss.settings(), "synchronized": True}) for name, loss in made.items()}


def compute(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=LIMIT_S),
    )
    found = {name: losses_of(loss, SHARES[rank][0], tensors(rank)) for name, loss in losses().items()}
    own = losses_of(MaskRCNNLoss(), SHARES[rank][0], tensors(rank))
    in_evaluation = losses_of(losses()["torchvision"].eval(), SHARES[rank][0], tensors(rank))
    torch.save([found, own, in_evaluation], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder: Path = tmp_path_factory.mktemp("synchronized")
    run_ranks(compute, (str(folder),), world=WORLD, limit_s=LIMIT_S)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("name", PRESETS)
def test_the_mean_over_processes_is_the_loss_of_the_global_batch(name: str, results: list[Any]) -> None:
    whole = {key: torch.cat([tensors(0)[key], tensors(1)[key]]) for key in tensors(0)}
    expected = losses_of(losses()[name], SHARES[0][0] + SHARES[1][0], whole)
    for key, value in expected.items():
        mean = (results[0][0][name][key] + results[1][0][name][key]) / WORLD
        torch.testing.assert_close(mean, value, rtol=1e-6, atol=1e-7)


def test_without_it_the_mean_is_another(results: list[Any]) -> None:
    whole = {key: torch.cat([tensors(0)[key], tensors(1)[key]]) for key in tensors(0)}
    expected = losses_of(MaskRCNNLoss(), SHARES[0][0] + SHARES[1][0], whole)
    mean = (results[0][1]["loss_mask"] + results[1][1]["loss_mask"]) / WORLD
    # One process has all the masks, so the mean is half of what it should be.
    torch.testing.assert_close(mean, expected["loss_mask"] / 2)


def test_evaluation_is_each_processs_own(results: list[Any]) -> None:
    for rank in range(WORLD):
        own = losses_of(MaskRCNNLoss(), SHARES[rank][0], tensors(rank))
        for key, value in own.items():
            torch.testing.assert_close(results[rank][2][key], value)


def test_one_process_needs_no_group() -> None:
    images = SHARES[0][0]
    torch.testing.assert_close(
        losses_of(losses()["torchvision"], images, tensors(0)), losses_of(MaskRCNNLoss(), images, tensors(0))
    )


def test_settings_keep_it_and_other_types_raise() -> None:
    assert MaskRCNNLoss(**MaskRCNNLoss(synchronized=True).settings()).synchronized
    with pytest.raises(TypeError, match="synchronized must be True or False, not str"):
        MaskRCNNLoss(synchronized="yes")  # type: ignore[arg-type]
