"""The data set as torch sees it: images and targets, augmented reproducibly."""

from __future__ import annotations

import gc
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from torchvision.transforms import v2

from maskloss.data.augmentation import Target, Transforms, augmented
from maskloss.data.coco import CocoData, ImageRecord
from maskloss.data.images import read_image
from maskloss.data.records import NO_MASK
from maskloss.errors import InputError

Sample = tuple[Tensor, Target]

#: What a crowd is to training: "leave_out" or "ignore", see `CocoDataset`.
Crowds = Literal["leave_out", "ignore"]


class CocoDataset(Dataset[Sample | InputError]):
    """Images and targets of a COCO-format file.

    A target has boxes (G, 4) float32, xyxy in px, labels (G,) int64 from 1, masks and image_id; where an object of the
    image has a box and no mask, also has_mask (G,) bool. Crowds are never positives. An image that cannot be read is
    returned as the `InputError` instead of being raised, because a worker process would bury its message in a
    traceback.

    Args:
        data: the checked file.
        transforms: torchvision.transforms.v2 on the image and its boxes, labels and masks, whose draws depend
            on the sample's own seed alone. Masks stay encoded where `data.augmentation` has an exact way,
            and are (G, H, W) uint8 otherwise. Objects that are pushed out of the image are dropped.
        crowds: "leave_out" leaves crowds out of the targets, so that what lies inside one trains as background.
            "ignore" gives their boxes as ignore_boxes (I, 4): what lies mostly inside one trains as nothing.
    """

    def __init__(
        self,
        data: CocoData,
        transforms: Transforms | None = None,
        *,
        crowds: Crowds = "leave_out",
    ) -> None:
        self.data = data
        self.transforms = transforms
        self.crowds = crowds
        self._labels = data.labels
        self._settled = False

    def __len__(self) -> int:
        return len(self.data.images)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample | InputError:
        """Give a sample by its index, or by its index and the seed of its augmentation."""
        if not self._settled:
            self._settle()
        index, seed = key if isinstance(key, tuple) else (key, 0)
        record = self.data.images[index]
        try:
            image = read_image(self.data.image_path(record), (record.width, record.height))
        except InputError as error:
            return InputError(f"{error} (image {record.id} of {self.data.annotation_file})")
        target = self._target(record)
        pixels = v2.functional.pil_to_tensor(image)
        if self.transforms is not None:
            pixels, target = augmented(self.transforms, pixels, target, seed)
        return v2.functional.to_dtype(pixels, torch.float32, scale=True), target

    def _settle(self) -> None:
        """Share memory with the process that a worker was forked from.

        A garbage collection writes to every object that it looks at, which copies some 80 MiB of torch's alone.
        """
        if get_worker_info() is not None:
            gc.freeze()
        self._settled = True

    def _target(self, record: ImageRecord) -> Target:
        records, rows = record.records, record.object_rows
        labels = [self._labels[identity] for identity in records.category_ids[rows].tolist()]
        target = {
            "boxes": torch.from_numpy(records.boxes[rows].astype(np.float32)),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "masks": record.object_masks(),
            "image_id": record.id,
        }
        has_mask = records.form[rows] != NO_MASK
        if not has_mask.all():
            target["has_mask"] = torch.from_numpy(has_mask)
        if self.crowds == "ignore":
            crowds = record.rows.start + np.nonzero(records.crowds[record.rows.start : record.rows.stop])[0]
            target["ignore_boxes"] = torch.from_numpy(records.boxes[crowds].astype(np.float32))
        return target


def collate(samples: list[Sample | InputError]) -> tuple[list[Tensor], list[Target]] | InputError:
    """Make a batch of lists, as torchvision's detection models take it, or pass on the first error."""
    images, targets = [], []
    for sample in samples:
        if isinstance(sample, InputError):
            return sample
        images.append(sample[0])
        targets.append(sample[1])
    return images, targets
