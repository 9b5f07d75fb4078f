"""Prediction of objects and their masks in images without annotations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional as transforms

from maskloss.data.images import read_image
from maskloss.detection.results import coco_results
from maskloss.errors import InputError
from maskloss.training.evaluation import resized_to_nothing
from maskloss.training.model_file import ModelDescription


@dataclass(frozen=True)
class Prediction:
    """The detections in one image.

    Attributes:
        path: path of the image.
        image: the image, RGB, rotated upright by its EXIF orientation.
        results: COCO results with boxes in px and RLE masks, in descending order of score.
    """

    path: Path
    image: Image.Image
    results: list[dict[str, Any]]


def predict(
    model: nn.Module,
    description: ModelDescription,
    paths: Sequence[str | Path],
    *,
    device: torch.device,
    score_threshold: float,
) -> Iterator[Prediction]:
    """Yield the detections of each image in turn.

    Args:
        model: a model from `load_model`, on `device`.
        description: the description of the model.
        paths: the images. Missing files are reported before the first image is read.
        device: where to run.
        score_threshold: detections with lower scores are dropped.

    Raises:
        InputError: an image is missing, cannot be read, or its shorter side would be resized to 0 px.
    """
    files = [Path(path) for path in paths]
    for path in files:
        if not path.is_file():
            raise InputError(
                f"{path}: {'is a folder; name its images' if path.is_dir() else 'the image does not exist'}"
            )
    for path, image_id in zip(files, image_ids(files), strict=True):
        image = read_image(path)
        if (fault := resized_to_nothing(model, image.width, image.height)) is not None:
            raise InputError(f"{path}: {fault}")
        pixels = transforms.to_dtype(transforms.pil_to_tensor(image), torch.float32, scale=True).to(device)
        with torch.inference_mode():
            detection = model([pixels])[0]
        kept = detection["scores"] >= score_threshold
        detection = {key: value[kept] for key, value in detection.items()}
        category_ids = [category.id for category in description.categories]
        results = coco_results(model, [detection], [(image.height, image.width)], [image_id], category_ids)
        yield Prediction(path, image, results)


def image_ids(files: Sequence[Path]) -> list[int]:
    """Return COCO's ids if each file name is a distinct number, as in COCO, else 1, 2, 3, ..."""
    stems = [path.stem for path in files]
    if all(stem.isdecimal() for stem in stems):
        ids = [int(stem) for stem in stems]
        if len(set(ids)) == len(ids):
            return ids
    return list(range(1, len(files) + 1))
