"""Prediction of objects and their masks in images without annotations."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional as transforms

from maskloss.data.images import read_image
from maskloss.detection.results import mask_offset
from maskloss.errors import InputError
from maskloss.masks.results import image_results
from maskloss.training.evaluation import resized_to_nothing
from maskloss.training.model_file import ModelDescription
from maskloss.training.tiling import OVERLAP, Tile, in_image, is_cut, merged, tiles_of

#: Minimum score where a model's file has no score with the best F1.
_UNKNOWN_THRESHOLD = 0.5


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


#: Endings of the files that are images, for folders.
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".ppm", ".pgm")


def image_files(paths: Sequence[str | Path]) -> list[Path]:
    """Return the images that paths name: files, the images in folders, and what patterns such as `*.jpg` match.

    Raises:
        InputError: a file does not exist, a folder has no images, or a pattern matches nothing.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_file():
            files.append(path)
            continue
        if path.is_dir():
            found = sorted(filter(_is_image, path.iterdir()))
            if not found:
                raise InputError(f"{path}: has no images{_other_images(path)}")
        elif glob.has_magic(str(path)):
            found = [
                Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()
            ]
            if not found:
                raise InputError(f"{path}: no file matches")
        else:
            raise InputError(f"{path}: the image does not exist")
        files += found
    return files


def _is_image(path: Path) -> bool:
    # macOS writes "._NAME.jpg", which is no image, beside NAME.jpg on the file systems of others.
    return path.suffix.lower() in _IMAGE_SUFFIXES and not path.name.startswith(".") and not path.is_dir()


def _other_images(folder: Path) -> str:
    """Return a hint at the images in the folders of a folder, or at the endings that images have."""
    found = next(filter(_is_image, folder.rglob("*")), None)
    if found is None:
        return f"; they end in {', '.join(_IMAGE_SUFFIXES)}"
    return f", but its folders have, such as {found.relative_to(folder)}: give '{folder}/**/*{found.suffix}'"


def thresholds_of(description: ModelDescription, score_threshold: float | None) -> list[float]:
    """Return the minimum score for each category.

    Args:
        description: the description of the model.
        score_threshold: minimum for all categories; None for the scores with the best F1 on the validation set, and
            0.5 where they are unknown.
    """
    if score_threshold is not None:
        return [score_threshold] * len(description.categories)
    known = description.score_thresholds or [None] * len(description.categories)
    return [_UNKNOWN_THRESHOLD if threshold is None else threshold for threshold in known]


def predict(
    model: nn.Module,
    description: ModelDescription,
    paths: Sequence[str | Path],
    *,
    device: torch.device,
    score_threshold: float | None = None,
    tile: int | None = None,
) -> Iterator[Prediction | InputError]:
    """Yield the detections of each image in turn, or an error for an image that cannot be read.

    Args:
        model: a model from `load_model`, on `device`.
        description: the description of the model.
        paths: the images; see `image_files`. Missing files are reported before the first image is read.
        device: where to run.
        score_threshold: detections with lower scores are dropped; see `thresholds_of`.
        tile: side in px of the tiles that larger images are cut into; None for whole images. The whole image is
            predicted too, for objects larger than the overlap of two tiles.

    Raises:
        InputError: an image is missing. If one cannot be read, or its shorter side would be resized to 0 px, this error
            is yielded in place of its detections.
    """
    files = image_files(paths)
    category_ids = [category.id for category in description.categories]
    least = torch.tensor([0.0, *thresholds_of(description, score_threshold)])
    for path, image_id in zip(files, image_ids(files), strict=True):
        try:
            image = read_image(path)
            whole = Tile(0, 0, image.width, image.height)
            cuts = (
                [] if tile is None or max(image.size) <= tile else tiles_of(image.width, image.height, tile)
            )
            for part in [whole, *cuts]:
                if (fault := resized_to_nothing(model, part.width, part.height)) is not None:
                    raise InputError(f"{path}: {fault}")
        except InputError as error:
            yield error
            continue
        results: list[dict[str, Any]] = []
        cut: list[bool] = []
        for part in [whole, *cuts]:
            window = image.crop((part.left, part.top, part.left + part.width, part.top + part.height))
            pixels = transforms.to_dtype(transforms.pil_to_tensor(window), torch.float32, scale=True)
            with torch.inference_mode():
                (detection,) = model([pixels.to(device)])
            kept = detection["scores"] >= least.to(detection["scores"])[detection["labels"]]
            if cuts and part is whole:
                assert tile is not None
                sides = detection["boxes"][:, 2:] - detection["boxes"][:, :2]
                kept &= sides.max(dim=1).values > tile * OVERLAP
            detection = {key: value[kept] for key, value in detection.items()}
            cut += is_cut(detection["boxes"], part, image.width, image.height).tolist()
            size = (image.height, image.width)
            offset = mask_offset(model, (part.height, part.width))
            results += image_results(
                in_image(detection, part), image_id, size, offset=offset, category_ids=category_ids
            )
        yield Prediction(path, image, merged(results, cut) if cuts else results)


def image_ids(files: Sequence[Path]) -> list[int]:
    """Return COCO's ids if each file name is a distinct number, as in COCO, else 1, 2, 3, ..."""
    stems = [path.stem for path in files]
    if all(stem.isdecimal() for stem in stems):
        ids = [int(stem) for stem in stems]
        if len(set(ids)) == len(ids):
            return ids
    return list(range(1, len(files) + 1))
