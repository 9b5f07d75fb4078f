"""Tests of benchmarks/imbalance at a small size: images, networks, metrics and training."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

torchmetrics = pytest.importorskip(
    "torchmetrics.functional.classification", reason="torchmetrics is not installed"
)
pytest.importorskip("segmentation_models_pytorch", reason="segmentation-models-pytorch is not installed")

from benchmarks.imbalance.experiment import (  # noqa: E402
    Setting,
    experiment,
    losses,
    measured,
    scores,
    table,
    trained,
    two_logit_loss,
)
from benchmarks.imbalance.networks import NETWORKS  # noqa: E402
from benchmarks.imbalance.pictures import pictures  # noqa: E402
from maskloss.losses import mask_bce_loss  # noqa: E402

TINY = Setting(size=32, train=12, test=12, steps=2, batch=2)


def test_objects_fill_0_1_to_5_percent_and_depend_on_the_seed():
    images, masks = pictures(200, 64, seed=0)
    shares = masks.mean(dim=(1, 2, 3))
    assert images.shape == (200, 3, 64, 64)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert shares.min() >= 1 / 4096
    assert shares.max() <= 0.06
    # Log-uniform: a third of the shares lies in each third of the logarithmic range.
    thirds = torch.histogram(shares.log10().clamp(-3, -1.3), bins=3, range=(-3, -1.3)).hist / 200
    assert (thirds > 0.2).all()
    again, _ = pictures(200, 64, seed=0)
    assert torch.equal(images, again)
    other, _ = pictures(200, 64, seed=1)
    assert not torch.equal(images, other)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("channels", [1, 2])
def test_networks_return_logits_of_the_image_size(name, channels):
    network = NETWORKS[name](channels).eval()
    with torch.no_grad():
        assert network(torch.randn(1, 3, 32, 32)).shape == (1, channels, 32, 32)


def test_scores_equal_those_of_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    found, wanted = torch.rand(2, 5, 1, 8, 8, generator=generator) < 0.3
    ours = scores(found, wanted)
    assert ours["IoU"] == pytest.approx(torchmetrics.binary_jaccard_index(found.int(), wanted.int()).item())
    assert ours["Dice"] == pytest.approx(torchmetrics.binary_f1_score(found.int(), wanted.int()).item())
    assert ours["precision"] == pytest.approx(torchmetrics.binary_precision(found.int(), wanted.int()).item())
    assert ours["recall"] == pytest.approx(torchmetrics.binary_recall(found.int(), wanted.int()).item())
    assert scores(torch.zeros(1, dtype=torch.bool), torch.zeros(1, dtype=torch.bool))["IoU"] == 0


def test_loss_of_two_logits_equals_that_of_their_difference():
    generator = torch.Generator().manual_seed(0)
    two = torch.randn(3, 2, 8, 8, generator=generator, dtype=torch.float64)
    masks = (torch.rand(3, 1, 8, 8, generator=generator) < 0.2).double()
    one = two[:, 1:] - two[:, :1]
    torch.testing.assert_close(two_logit_loss(two, masks), mask_bce_loss(one, masks)[:, 0])


def test_images_are_grouped_by_the_share_of_their_object():
    images, masks = pictures(60, 64, seed=3)

    class Oracle(nn.Module):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            index = [int((images - image).abs().flatten(1).sum(1).argmin()) for image in batch]
            return 2 * masks[index] - 1

    found = measured(Oracle(), images, masks, 7)
    assert list(found) == ["all", "0.1 to 0.3 %", "0.3 to 1 %", "1 to 5 %"]
    assert all(group["IoU"] == 1 for group in found.values())


@pytest.mark.parametrize("loss", list(losses(torch.ones(2, 1, 2, 2) * torch.tensor([0.0, 1.0]))))
def test_experiment_runs_with_every_loss(loss):
    found = experiment("small", loss, 0, TINY)
    assert set(found["scores"]["all"]) == {"IoU", "Dice", "precision", "recall"}
    json.dumps(found, allow_nan=False)


def test_table_has_every_metric_by_share_with_its_spread_over_seeds():
    def run(shift: float) -> dict:
        of_all = {"IoU": 0.5 + shift, "Dice": 0.6, "precision": 0.7, "recall": 0.8}
        return {"scores": {"all": of_all, "1 to 5 %": {**of_all, "Dice": 0.9}}}

    lines = table({"small": {"focal": [run(0.0), run(0.1)], "Dice": [run(0.0)]}}).splitlines()
    assert [line for line in lines if line.startswith("#")] == [
        "## Objects of any share of the image",
        "## Objects of 1 to 5 % of the image",
    ]
    assert lines[4:6] == [
        "| small | focal | 55.0 ± 7.1 | 60.0 ± 0.0 | 70.0 ± 0.0 | 80.0 ± 0.0 |",
        "| small | Dice | 50.0 | 60.0 | 70.0 | 80.0 |",
    ]
    assert lines[11] == "| small | focal | 55.0 ± 7.1 | 90.0 ± 0.0 | 70.0 ± 0.0 | 80.0 ± 0.0 |"


def test_training_solves_an_easy_task():
    # Bright on dark: a few steps are enough.
    _, masks = pictures(16, 32, seed=0)
    images = masks.repeat(1, 3, 1, 1) - 0.5
    setting = Setting(size=32, train=16, test=16, steps=60, batch=8)
    torch.manual_seed(0)
    network = NETWORKS["small"](1)
    trained(network, losses(masks)["Dice"][1], images, masks, setting, seed=0)
    assert measured(network, images, masks, 8)["all"]["IoU"] > 0.9
