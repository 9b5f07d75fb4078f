"""The data set as torch sees it: images and targets, augmented reproducibly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from maskloss.data.coco import CocoData, ImageRecord
from maskloss.data.images import read_image
from maskloss.errors import InputError

Target = dict[str, Any]
Sample = tuple[Tensor, Target]


def augmentation(*, horizontal_flip: float, photometric_distortion: float) -> v2.Transform:
    """Augment as the reference recipes do; sizes are jittered by the model's own `min_size`.

    Args:
        horizontal_flip: probability in [0, 1].
        photometric_distortion: probability in [0, 1] of each change of brightness, contrast, saturation and hue.
    """
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(horizontal_flip),
            *([v2.RandomPhotometricDistort(p=photometric_distortion)] if photometric_distortion else []),
        ]
    )


class CocoDataset(Dataset[Sample | InputError]):
    """Images and targets of a COCO-format file.

    A target has boxes (G, 4) float32, xyxy in px, labels (G,) int64 from 1, masks and image_id. Crowds
    are left out: they are never positives. An image that cannot be read is returned as the `InputError`
    instead of being raised, because a worker process would bury its message in a traceback.

    Args:
        data: the checked file.
        transforms: torchvision.transforms.v2 on the image and its boxes, labels and masks, whose draws depend
            on the sample's own seed alone. Objects that it pushes out of the image are dropped. None leaves
            masks encoded, as polygons and RLEs; otherwise they are (G, H, W) uint8.
    """

    def __init__(self, data: CocoData, transforms: Callable[..., Any] | None = None) -> None:
        self.data = data
        self.transforms = transforms
        self._labels = data.labels

    def __len__(self) -> int:
        return len(self.data.images)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample | InputError:
        """Give a sample by its index, or by its index and the seed of its augmentation."""
        index, seed = key if isinstance(key, tuple) else (key, 0)
        record = self.data.images[index]
        try:
            image = read_image(self.data.image_path(record), (record.width, record.height))
        except InputError as error:
            return InputError(f"{error} (image {record.id} of {self.data.annotation_file})")
        target = self._target(record)
        pixels = v2.functional.pil_to_tensor(image)
        if self.transforms is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                pixels, target = self._augmented(pixels, target)
        return v2.functional.to_dtype(pixels, torch.float32, scale=True), target

    def _target(self, record: ImageRecord) -> Target:
        objects = record.objects
        labels = [self._labels[annotation.category_id] for annotation in objects]
        return {
            "boxes": torch.tensor([annotation.box for annotation in objects], dtype=torch.float32).reshape(
                -1, 4
            ),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "masks": record.object_masks(),
            "image_id": record.id,
        }

    def _augmented(self, pixels: Tensor, target: Target) -> Sample:
        assert self.transforms is not None
        size = pixels.shape[-2:]
        sample = (
            tv_tensors.Image(pixels),
            {
                **target,
                "boxes": tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size),
                "masks": tv_tensors.Mask(target["masks"].bitmaps()),
            },
        )
        pixels, target = self.transforms(*sample)
        boxes = v2.functional.clamp_bounding_boxes(target["boxes"]).as_subclass(Tensor)
        masks = target["masks"].as_subclass(Tensor)
        kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        return pixels.as_subclass(Tensor), {
            **target,
            "boxes": boxes[kept],
            "labels": target["labels"][kept],
            "masks": masks[kept] if not kept.all() else masks,
        }


def collate(samples: list[Sample | InputError]) -> tuple[list[Tensor], list[Target]] | InputError:
    """Make a batch of lists, as torchvision's detection models take it, or pass on the first error."""
    images, targets = [], []
    for sample in samples:
        if isinstance(sample, InputError):
            return sample
        images.append(sample[0])
        targets.append(sample[1])
    return images, targets
