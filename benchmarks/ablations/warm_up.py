"""Weights that the sweeps start from: a network trained on separate images, without the layers in question.

    python benchmarks/ablations/warm_up.py --folder runs/ablations

Requires the data of `hard_shapes.py` in `data/` of the folder; takes about a quarter of an hour on two CPU cores.
Writes `warm_up/`, a resumable run of `maskloss train` with torchvision's losses, and its weights:
`start_masks.safetensors` without the mask branch, for questions about masks, and `start.safetensors` also without the
layers that predict classes and box deltas. Each variant trains the removed layers from scratch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import safetensors.torch

from maskloss.training.checkpoints import read_weights
from maskloss.training.config import TrainConfig
from maskloss.training.loop import train

MASK_BRANCH = ("roi_heads.mask_head.", "roi_heads.mask_predictor.")
LEFT_OUT = {
    "start_masks.safetensors": MASK_BRANCH,
    "start.safetensors": ("roi_heads.box_predictor.", *MASK_BRANCH),
}


def main() -> None:
    """Train the network, and write its weights without the layers in question."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    folder = parser.parse_args().folder
    data = folder / "data"
    train(
        TrainConfig(
            train_images=str(data / "warm_up/images"),
            train_annotations=str(data / "warm_up/annotations.json"),
            val_images=str(data / "even/val/images"),
            val_annotations=str(data / "even/val/annotations.json"),
            output=str(folder / "warm_up"),
            model="resnet18",
            max_steps=900,
            batch_size=8,
            optimizer="adamw",
            learning_rate=5e-4,
            weight_decay=1e-3,
            warmup_steps=30,
            schedule="cosine",
            min_size=96,
            max_size=96,
            log_every=20,
            checkpoint_every=100,
            workers=0,
            device="cpu",
            resume=True,
        )
    )
    weights, _ = read_weights(folder / "warm_up/model.safetensors")
    for file, left_out in LEFT_OUT.items():
        kept = {name: value for name, value in weights.items() if not name.startswith(left_out)}
        safetensors.torch.save_file(kept, folder / file, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
