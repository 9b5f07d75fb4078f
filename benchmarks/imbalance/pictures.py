"""Synthetic images in which an object fills 0.1 to 5 % of the area, with a different share in each."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_SHARE, LARGEST_SHARE = 0.001, 0.05


def pictures(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw gray blobs on a smooth gray background with noise, and distractors: bright specks and dark blobs.

    Args:
        count: number of images, N.
        size: side length in px, S.
        seed: random seed; the same seed makes the same images.

    Returns:
        Images (N, 3, S, S) around 0, and masks (N, 1, S, S) of 0 and 1. The object's share of an image is log-uniform,
        and it has one to three pieces.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    images, masks = [], []
    for _ in range(count):
        share = LEAST_SHARE * (LARGEST_SHARE / LEAST_SHARE) ** float(random(1))
        pieces = 1 if share < 0.005 else int(1 + 3 * random(1))
        mask = _blobs(random, share * size * size / pieces, pieces, size)
        ground = F.interpolate(random(1, 3, 6, 6), size=(size, size), mode="bicubic")[0] - 0.5
        specks = F.max_pool2d((random(1, size, size) < 0.004).float(), 2, stride=1, padding=1)[
            :, :size, :size
        ]
        dark = _blobs(random, 0.01 * size * size, 2, size)
        contrast = 0.35 + 0.4 * float(random(1))
        image = 0.6 * ground + contrast * mask + 0.5 * specks - 0.5 * dark * (1 - mask)
        images.append(image + 0.18 * torch.randn((3, size, size), generator=generator))
        masks.append(mask)
    return torch.stack(images), torch.stack(masks)


def _blobs(random: object, area: float, pieces: int, size: int) -> Tensor:
    """Draw ellipses of the given area in px² each, at random positions, (1, S, S)."""
    y, x = torch.arange(size)[:, None] + 0.5, torch.arange(size) + 0.5
    mask = torch.zeros(1, size, size)
    for _ in range(pieces):
        aspect = math.exp(float(random(1)) - 0.5)  # type: ignore[operator]
        radius = math.sqrt(area / math.pi)
        (cx, cy), turn = (random(2) * size).tolist(), float(random(1)) * math.pi  # type: ignore[operator]
        u = (x - cx) * math.cos(turn) + (y - cy) * math.sin(turn)
        v = (y - cy) * math.cos(turn) - (x - cx) * math.sin(turn)
        inside = (u / (radius * aspect)) ** 2 + (v * aspect / radius) ** 2 <= 1
        # An ellipse covers at least the pixel that contains its center.
        inside[min(int(cy), size - 1), min(int(cx), size - 1)] = True
        mask[0, inside] = 1.0
    return mask
