"""An experiment: train a network with a loss, and measure it by the object's share of the image."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.imbalance.networks import NETWORKS
from benchmarks.imbalance.pictures import LARGEST_SHARE, LEAST_SHARE, pictures
from maskloss.losses import (
    MaskBackgroundDiceLoss,
    MaskBCELoss,
    MaskDiceLoss,
    MaskFocalLoss,
    MaskWeightedBCELoss,
    MaskWeightedDiceLoss,
    WeightedSum,
    inverse_frequency_weights,
)

SHARES = (LEAST_SHARE, 0.003, 0.01, LARGEST_SHARE)
METRICS = ("IoU", "Dice", "precision", "recall")
#: Weights of object and background pixels, for losses with fixed weights.
ALPHA, BETA = 10.0, 1.0

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """Size of an experiment.

    Attributes:
        size: side length of the images in px.
        train: number of training images.
        test: number of test images.
        steps: number of optimizer steps.
        batch: number of images per step.
    """

    size: int = 64
    train: int = 240
    test: int = 120
    steps: int = 250
    batch: int = 8


def two_logit_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Compute the softmax cross-entropy over background and object, one value per image."""
    return F.cross_entropy(logits, masks[:, 0].long(), reduction="none").mean(dim=(1, 2))


def losses(train_masks: Tensor) -> dict[str, tuple[int, Loss]]:
    """Return the losses by name, each with its number of logits per pixel."""
    by_class = inverse_frequency_weights(
        list(train_masks[:, 0].long()), 100, num_classes=2, generator=torch.Generator().manual_seed(0)
    )
    background, foreground = (2 * by_class / by_class.sum()).tolist()
    weighted = MaskWeightedBCELoss(ALPHA, BETA)
    weighted_dice = MaskWeightedDiceLoss(ALPHA, BETA)
    return {
        "cross-entropy": (1, MaskBCELoss()),
        "softmax cross-entropy": (2, two_logit_loss),
        "weighted cross-entropy": (1, weighted),
        "inverse frequency": (1, MaskWeightedBCELoss(foreground, background)),
        "Dice": (1, MaskDiceLoss()),
        "weighted Dice": (1, weighted_dice),
        "inverse Dice": (1, MaskBackgroundDiceLoss()),
        "focal": (1, MaskFocalLoss()),
        "weighted CE + Dice": (1, WeightedSum([weighted, weighted_dice])),
    }


def trained(
    network: nn.Module, loss: Loss, images: Tensor, masks: Tensor, setting: Setting, seed: int
) -> None:
    """Train a network in place."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=setting.steps)
    network.train()
    for _ in range(setting.steps):
        chosen = torch.randint(len(images), (setting.batch,), generator=generator)
        optimizer.zero_grad()
        loss(network(images[chosen]), masks[chosen]).mean().backward()
        optimizer.step()
        schedule.step()


def measured(
    network: nn.Module, images: Tensor, masks: Tensor, size_of_batch: int
) -> dict[str, dict[str, float]]:
    """Measure IoU, Dice, precision and recall over all pixels, of all images and by the object's share."""
    network.eval()
    with torch.no_grad():
        logits = torch.cat([network(part) for part in images.split(size_of_batch)])
    found = (logits[:, 1:] > logits[:, :1]) if logits.shape[1] == 2 else logits > 0
    wanted = masks > 0.5
    share = wanted.double().mean(dim=(1, 2, 3))
    groups = {"all": torch.ones_like(share, dtype=torch.bool)}
    # Rounding to whole pixels moves some shares slightly past either end; count them in the outer ranges.
    edges = [0.0, *SHARES[1:-1], 1.0]
    for (low, high), (shown_low, shown_high) in zip(pairwise(edges), pairwise(SHARES), strict=True):
        groups[f"{100 * shown_low:g} to {100 * shown_high:g} %"] = (share >= low) & (share < high)
    return {name: scores(found[chosen], wanted[chosen]) for name, chosen in groups.items()}


def scores(found: Tensor, wanted: Tensor) -> dict[str, float]:
    """Compute IoU, Dice, precision and recall of pixels; if nothing is found, the precision is 0."""
    both = int((found & wanted).sum())
    only_found, only_wanted = int((found & ~wanted).sum()), int((~found & wanted).sum())
    return {
        "IoU": both / max(both + only_found + only_wanted, 1),
        "Dice": 2 * both / max(2 * both + only_found + only_wanted, 1),
        "precision": both / max(both + only_found, 1),
        "recall": both / max(both + only_wanted, 1),
    }


def experiment(network_name: str, loss_name: str, seed: int, setting: Setting) -> dict[str, Any]:
    """Train one network with one loss, and measure it on the test images."""
    began = time.perf_counter()
    images, masks = pictures(setting.train, setting.size, seed=1000 + seed)
    channels, loss = losses(masks)[loss_name]
    torch.manual_seed(seed)
    network = NETWORKS[network_name](channels)
    trained(network, loss, images, masks, setting, seed)
    # Use the same test images for every seed, so that only the network differs.
    found = measured(network, *pictures(setting.test, setting.size, seed=1), setting.batch)
    return {"scores": found, "seconds": time.perf_counter() - began}


def table(results: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> str:
    """Make Markdown tables by range of shares: mean and deviation over seeds in percent, per network and loss."""
    first = next(iter(next(iter(results.values())).values()))[0]["scores"]
    header = ["network", "loss", *METRICS]
    sections = []
    for group in first:
        lines = [f"## Objects of {'any share' if group == 'all' else group} of the image", ""]
        lines += ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
        for network, by_loss in results.items():
            for loss, runs in by_loss.items():
                cells = [
                    _mean_and_spread([run["scores"][group][metric] for run in runs]) for metric in METRICS
                ]
                lines.append("| " + " | ".join([network, loss, *cells]) + " |")
        sections.append("\n".join(lines) + "\n")
    return "\n".join(sections)


def _mean_and_spread(values: Sequence[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread}"
