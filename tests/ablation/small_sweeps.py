"""Sweeps with runs of one or two steps, and terms of the loss that fail in them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import yaml

STEPS = 2


def sometimes_fails(mask_logits: torch.Tensor, mask_targets: torch.Tensor) -> torch.Tensor:
    """Raise in training, but not in the probe, whose grid is 7 x 7."""
    if mask_logits.shape[-1] > 7:
        raise KeyError("in training only")
    return (mask_logits.sigmoid() - mask_targets).abs()


def kills_its_process(mask_logits: torch.Tensor, mask_targets: torch.Tensor) -> torch.Tensor:
    if mask_logits.shape[-1] > 7:
        os._exit(7)
    return (mask_logits.sigmoid() - mask_targets).abs()


def sweep_file(folder: Path, data: Path, variants: dict[str, Any], seeds: list[int]) -> Path:
    content = {
        "base": {
            "train_images": str(data / "train/images"),
            "train_annotations": str(data / "train/annotations.json"),
            "val_images": str(data / "train/images"),
            "val_annotations": str(data / "train/annotations.json"),
            "model": "resnet18",
            "max_steps": STEPS,
            "batch_size": 1,
            "min_size": 64,
            "max_size": 64,
            "warmup_steps": 1,
            "log_every": 1,
            "checkpoint_every": 1,
            "workers": 0,
            "device": "cpu",
        },
        "variants": variants,
        "seeds": seeds,
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


VARIANTS = {
    "bce": {},
    "dice": {"loss": {"mask": "maskloss.losses.MaskDiceLoss"}},
    "fails": {"loss": {"mask": f"{__name__}.sometimes_fails"}},
    "dies": {"loss": {"mask": f"{__name__}.kills_its_process"}},
}
