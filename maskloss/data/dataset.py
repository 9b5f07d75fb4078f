"""The torch `Dataset` of a COCO-format file: images and targets, augmented reproducibly."""

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
from maskloss.data.copy_paste import paste_objects
from maskloss.data.images import read_image
from maskloss.data.records import NO_MASK, Records
from maskloss.data.sampler import mixed_seed
from maskloss.errors import InputError
from maskloss.masks.encoded import IntArray

Sample = tuple[Tensor, Target]

#: How training treats crowds, "leave_out" or "ignore"; see `CocoDataset`.
Crowds = Literal["leave_out", "ignore"]


class CocoDataset(Dataset[Sample | InputError]):
    """Images and targets of a COCO-format file.

    A target has boxes (G, 4) float32, xyxy in px, labels (G,) int64 from 1, masks and image_id. Some data sets add:

    - has_mask (G,) bool, if an object of the image has a box and no mask.
    - weights (G,) float32, if an annotation of the file has a weight.
    - points (G, K, 3) float32, if an annotation of the file has labeled points: x and y in px, and 1 inside the object,
      0 outside, -1 for no point. K is the largest number of points of an annotation of the file.

    Crowds are never positives. For an image that cannot be read, the `InputError` is returned instead of raised,
    because a worker process would bury its message in a traceback.

    Args:
        data: the validated data set.
        transforms: a torchvision.transforms.v2 transform of the image and its boxes, labels and masks. Its random
            numbers depend only on the sample's seed. Masks stay encoded if `data.augmentation` can transform them
            exactly, and become (G, H, W) uint8 otherwise. Objects outside the transformed image are dropped.
        crowds: "leave_out" omits crowds from the targets, so that regions inside a crowd train as background.
            "ignore" adds their boxes as ignore_boxes (I, 4): anchors and proposals that match no object and lie mostly
            inside one are not trained on.
        copy_paste: probability in [0, 1] that objects of another, random image are pasted; see `paste_objects`. Both
            images are transformed first.
        scaled: True gives images (3, H, W) float32 in [0, 1]. False leaves the pixels as read and transformed, usually
            uint8, a quarter of the bytes: for loops that scale them on the device.
    """

    def __init__(
        self,
        data: CocoData,
        transforms: Transforms | None = None,
        *,
        crowds: Crowds = "leave_out",
        copy_paste: float = 0.0,
        scaled: bool = True,
    ) -> None:
        self.data = data
        self.transforms = transforms
        self.crowds = crowds
        self.copy_paste = copy_paste
        self.scaled = scaled
        self._labels = data.labels
        # K of all images, so that a point weighs the same in each of them.
        self._most_points = int(np.diff(data.records.first_point).max(initial=0))
        self._is_frozen = False

    def __len__(self) -> int:
        return len(self.data.images)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample | InputError:
        """Return a sample by its index, or by its index and the seed of its augmentation."""
        if not self._is_frozen:
            self._freeze_memory()
        index, seed = key if isinstance(key, tuple) else (key, 0)
        try:
            pixels, target = self._transformed(index, seed)
            generator = torch.Generator().manual_seed(mixed_seed(seed, 1))
            if self.copy_paste and float(torch.rand((), generator=generator)) < self.copy_paste:
                other = int(torch.randint(len(self), (), generator=generator))
                source = self._transformed(other, mixed_seed(seed, 2))
                pixels, target = paste_objects(pixels, target, *source, seed=mixed_seed(seed, 3))
        except InputError as error:
            return error
        if self.scaled:
            pixels = v2.functional.to_dtype(pixels, torch.float32, scale=True)
        return pixels, target

    def _transformed(self, index: int, seed: int) -> Sample:
        """Return an image, uint8, and its target after the transforms."""
        record = self.data.images[index]
        try:
            image = read_image(self.data.image_path(record), (record.width, record.height))
        except InputError as error:
            way_out = "" if "git lfs" in str(error) else "; `maskloss repair` leaves it out"
            raise InputError(
                f"{error} (image {record.id} of {self.data.annotation_file}){way_out}"
            ) from error
        pixels, target = v2.functional.pil_to_tensor(image), self._target(record)
        if self.transforms is None:
            return pixels, target
        return augmented(self.transforms, pixels, target, seed)

    def _freeze_memory(self) -> None:
        """Keep the memory that a worker process shares with its parent from being copied.

        A garbage collection writes to every object that it visits, which copies some 80 MiB for torch alone.
        """
        if get_worker_info() is not None:
            gc.freeze()
        self._is_frozen = True

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
        if len(records.weights):
            target["weights"] = torch.from_numpy(records.weights[rows].astype(np.float32))
        if len(records.points):
            target["points"] = self._points(records, rows)
        if self.crowds == "ignore":
            crowds = record.rows.start + np.nonzero(records.crowds[record.rows.start : record.rows.stop])[0]
            target["ignore_boxes"] = torch.from_numpy(records.boxes[crowds].astype(np.float32))
        return target

    def _points(self, records: Records, rows: IntArray) -> Tensor:
        points = np.zeros((len(rows), self._most_points, 3), dtype=np.float32)
        points[..., 2] = -1
        for index, row in enumerate(rows.tolist()):
            own = records.points_of(row)
            points[index, : len(own)] = own
        return torch.from_numpy(points)


def collate(samples: list[Sample | InputError]) -> tuple[list[Tensor], list[Target]] | InputError:
    """Collate samples into lists of images and targets, as torchvision's detection models take them.

    If a sample is an `InputError`, return the first one instead.
    """
    images, targets = [], []
    for sample in samples:
        if isinstance(sample, InputError):
            return sample
        images.append(sample[0])
        targets.append(sample[1])
    return images, targets
