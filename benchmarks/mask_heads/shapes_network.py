"""The network that trunk.yaml trains, for compare.py. Its path is relative to the working folder."""

from __future__ import annotations

from typing import Any

from maskloss.training.model_file import load_model

CATEGORY_IDS = [1, 2, 3, 4, 5, 6]


def build() -> Any:
    """Return the trained network in evaluation mode."""
    return load_model("runs/mask_heads/trunk").model
