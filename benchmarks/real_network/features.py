r"""Cache the RoI features that the mask branch of a trained network receives, with all layers before it frozen.

    python -m benchmarks.real_network.features --network maskrcnn2go.py --images photos --train train.json \
        --val val.json --cache cache.pt

The RoIs are, for training images, the positives that a converted network samples in training, and for validation
images, the network's own detections. The file contains only tensors and plain values.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import roi_align
from tqdm import tqdm

import maskloss
from benchmarks.real_network.network import read_network
from maskloss.data.coco import CocoData, ImageRecord, read_coco
from maskloss.data.dataset import CocoDataset
from maskloss.detection.mask_branch import DetectedBoxes, MaskBranch, Positives
from maskloss.masks.encoded import EncodedMasks
from maskloss.masks.paste import unaligned_offset

VERSION = 2
DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class RoIs:
    """The R RoIs of N images, with the features that the mask head receives.

    Attributes:
        features: (R, C, S, S), in the cache's dtype.
        boxes: (R, 4) float32, xyxy in px of the resized image.
        labels: (R,) int64, the network's labels.
        image_index: (R,) int64 in [0, N), ascending.
        image_ids: (N,) int64, the ids in the annotation file.
        sizes: (N, 2) int64, (H, W) of the images in px.
        network_sizes: (N, 2) int64, (H, W) of the resized images in px, without padding.
    """

    features: Tensor
    boxes: Tensor
    labels: Tensor
    image_index: Tensor
    image_ids: Tensor
    sizes: Tensor
    network_sizes: Tensor

    def rows_of(self, image: int) -> Tensor:
        """Return the rows of an image's RoIs, (R_i,) int64."""
        return torch.where(self.image_index == image)[0]

    def size_of(self, image: int) -> tuple[int, int]:
        """Return an image's (H, W) in px."""
        height, width = self.sizes[image].tolist()
        return height, width

    def network_size_of(self, image: int) -> tuple[int, int]:
        """Return a resized image's (H, W) in px."""
        height, width = self.network_sizes[image].tolist()
        return height, width

    def boxes_in_image(self, image: int, rows: Tensor) -> Tensor:
        """Return the boxes (R_i, 4) of some of an image's RoIs, in px of the original image."""
        return resize_boxes(self.boxes[rows], list(self.network_size_of(image)), list(self.size_of(image)))


@dataclass(frozen=True)
class PositiveRoIs(RoIs):
    """The positives of the training images, of which there may be several views.

    View v of training image i is image number i + v * (number of training images) here.

    Attributes:
        matched_idxs: (R,) int64, index of the object in the image that each RoI is matched to, without crowds.
        object_boxes: (R, 4) float32, the box of that object, xyxy in px of the resized image.
        pixels: N resized images, (3, H, W) uint8.
        flipped: (N,) bool, whether the view is the mirror image.
    """

    matched_idxs: Tensor
    object_boxes: Tensor
    pixels: list[Tensor]
    flipped: Tensor

    def crops(self, rows: Tensor, size: int) -> Tensor:
        """Crop the resized images to RoIs.

        Args:
            rows: (P,) int64, the RoIs to crop.
            size: M, side of the grid in cells.

        Returns:
            (P, 3, M, M) float32 in [0, 1]; each cell covers the same area as in aligned mask targets.
        """
        crops = torch.empty((len(rows), 3, size, size))
        for image in self.image_index[rows].unique().tolist():
            here = torch.where(self.image_index[rows] == image)[0]
            pixels = self.pixels[image][None].float() / 255
            crops[here] = roi_align(pixels, [self.boxes[rows[here]]], size, aligned=True)
        return crops


@dataclass(frozen=True)
class DetectedRoIs(RoIs):
    """The detections of the validation images.

    Attributes:
        scores: (R,) float32, in descending order within each image.
    """

    scores: Tensor


@dataclass
class Cache:
    """The cached RoIs, and everything else that training and evaluating a mask branch needs.

    Attributes:
        train: positives of the training images.
        val: detections of the validation images.
        train_data: annotations of the training images.
        val_data: annotations of the validation images.
        network: the published network.
        category_ids: the category of each label from 1 on.
        fingerprint: hash of the RoIs; equal in caches with the same RoIs.
        class_agnostic: whether all classes share one channel of the masks, which helps with few training images.
    """

    train: PositiveRoIs
    val: DetectedRoIs
    train_data: CocoData
    val_data: CocoData
    network: MaskRCNN
    category_ids: list[int]
    fingerprint: str
    class_agnostic: bool = False
    _targets: dict[tuple[int, maskloss.MaskTargets], Tensor] = field(default_factory=dict)

    def train_record(self, image: int) -> ImageRecord:
        """Return the annotations of a training image, given the number of any of its views."""
        return self.train_data.images[image % len(self.train_data.images)]

    def train_images(self) -> Tensor:
        """Return the index of each positive's training image, (R,) int64, without counting views."""
        return self.train.image_index % len(self.train_data.images)

    def mask_labels(self, labels: Tensor) -> Tensor:
        """Return the labels (P,) whose channels are the masks of RoIs with these labels."""
        return torch.ones_like(labels) if self.class_agnostic else labels

    def mask_targets(self, size: int, settings: maskloss.MaskTargets) -> Tensor:
        """Return the mask targets (P, size, size) of all positives, computed once per size and settings."""
        key = (size, settings)
        if key not in self._targets:
            train = self.train
            targets = [train.boxes.new_zeros((0, size, size))]
            for image in range(len(train.sizes)):
                rows = train.rows_of(image)
                masks = self.train_record(image).object_masks()
                if train.flipped[image]:
                    masks = masks.horizontal_flip()
                masks = resized_masks(masks, train.network_size_of(image), aligned=settings.aligned)
                targets.append(
                    maskloss.mask_targets(
                        masks,
                        train.boxes[rows],
                        train.matched_idxs[rows],
                        size,
                        aligned=settings.aligned,
                        binary=settings.binary,
                    )
                )
            self._targets[key] = torch.cat(targets)
        return self._targets[key]


def resized_masks(masks: EncodedMasks, size: tuple[int, int], *, aligned: bool) -> EncodedMasks:
    """Resize masks as a converted network's transform does, including its shift for unaligned targets."""
    own_size = (masks.height, masks.width)
    masks = masks.resize(*size)
    if aligned:
        return masks
    y, x = unaligned_offset(own_size, size)
    return masks.translate(0.5 - y * size[0] / own_size[0], 0.5 - x * size[1] / own_size[1])


class _Recorder(MaskBranch):
    """Mask branch that records the features, boxes and labels that it receives.

    Args:
        pool: the network's pooling for masks.
        dtype: dtype of the recorded features.
    """

    def __init__(self, pool: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        # Bypass nn.Module.__setattr__: the pooling is already a submodule of the network.
        self.__dict__["pool"] = pool
        self.dtype = dtype
        self.recorded: dict[str, Tensor] = {}

    def losses(
        self, features: dict[str, Tensor], positives: Positives, targets: list[dict[str, Any]]
    ) -> dict[str, Tensor]:
        """Record the positives of one image, and return no losses."""
        self._record(features, positives)
        (matched_idxs,), (target,) = positives.matched_idxs, targets
        self.recorded["matched_idxs"] = matched_idxs
        self.recorded["object_boxes"] = target["boxes"][matched_idxs].float()
        return {}

    def predict(
        self, features: dict[str, Tensor], detections: DetectedBoxes
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Record the detections of one image, and return empty masks."""
        self._record(features, detections)
        (self.recorded["scores"],) = detections.scores
        return [boxes.new_zeros((len(boxes), 1, 1, 1)) for boxes in detections.boxes], None

    def _record(self, features: dict[str, Tensor], rois: Positives | DetectedBoxes) -> None:
        pooled = self.__dict__["pool"](features, rois.boxes, rois.image_sizes)
        (boxes,), (labels,) = rois.boxes, rois.labels
        self.recorded = {
            "features": pooled.to(self.dtype),
            "boxes": boxes,
            "labels": labels,
            "network_size": torch.tensor(rois.image_sizes[0]),
        }


@contextmanager
def _sampling_positives(model: MaskRCNN, most: int) -> Iterator[None]:
    """Make a network in evaluation mode sample RoIs as in training, but only up to `most` positives per image."""
    parts = [model, model.transform, model.rpn, model.roi_heads]
    sampler = model.roi_heads.fg_bg_sampler
    # Negatives would only cost time: the mask branch never receives them.
    model.roi_heads.fg_bg_sampler = BalancedPositiveNegativeSampler(most, 1.0)
    for part in parts:
        part.training = True  # only the part itself; its layers stay in evaluation mode
    try:
        yield
    finally:
        model.roi_heads.fg_bg_sampler = sampler
        for part in parts:
            part.training = False


def make_cache(
    build: Any,
    category_ids: list[int],
    train_data: CocoData,
    val_data: CocoData,
    *,
    positives: int = 64,
    shorter_sides: Sequence[int] | None = None,
    flips: bool = False,
    seed: int = 0,
    dtype: str = "float16",
) -> dict[str, Any]:
    """Run a network over training and validation images, and return the inputs of its mask branch.

    Args:
        build: function that returns the network.
        category_ids: the category of each label from 1 on.
        train_data: training images; the network's own RoI heads match proposals and objects.
        val_data: validation images.
        positives: maximum number of positives sampled per view of a training image.
        shorter_sides: lengths in px to which the shorter side of training images is resized, one view for each; by
            default, only the network's own.
        flips: also view the mirror image of each.
        seed: random seed of the sampling; the samples of an image do not depend on the other images.
        dtype: dtype of the features, a key of `DTYPES`.
    """
    model = build().eval()
    recorder = _Recorder(model.roi_heads.mask_roi_pool, DTYPES[dtype])
    maskloss.convert(model, "aligned", paste=None, mask_branch=recorder)
    seen: list[Tensor] = []
    handle = model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    views = views_of(model, shorter_sides, flips=flips)
    records: list[dict[str, Tensor]] = []
    pixels = []
    for image in sample_positives(model, train_data, category_ids, views, positives=positives, seed=seed):
        pixels.append(_as_bytes(model, seen[-1], recorder.recorded["network_size"].tolist()))
        seen.clear()
        records.append(_numbered(recorder.recorded, len(records), image))
    train = _joined(records) | {
        "image_ids": torch.tensor([image.id for image in train_data.images]).repeat(len(views)),
        "pixels": pixels,
        "flipped": torch.tensor([view.flipped for view in views]).repeat_interleave(len(train_data.images)),
    }
    handle.remove()
    records = []
    for image in detect(model, val_data):
        records.append(_numbered(recorder.recorded, len(records), image))
    val = _joined(records) | {"image_ids": torch.tensor([image.id for image in val_data.images])}
    return {
        "version": VERSION,
        "positives": positives,
        "seed": seed,
        "dtype": dtype,
        "train": train,
        "val": val,
    }


@dataclass(frozen=True)
class View:
    """A size of the training images, and whether they are mirrored."""

    shorter_side: int
    flipped: bool


def views_of(
    model: MaskRCNN, shorter_sides: Sequence[int] | None = None, *, flips: bool = False
) -> list[View]:
    """Return the views of the training images: each size, by default only the model's own, without and with a flip."""
    sides = shorter_sides or model.transform.min_size[-1:]
    return [View(side, flipped) for side in sides for flipped in ((False, True) if flips else (False,))]


def sample_positives(
    model: MaskRCNN,
    data: CocoData,
    category_ids: list[int],
    views: Sequence[View],
    *,
    positives: int,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Run a converted model over all views of the training images, so that its mask branch receives the positives.

    Layers are in evaluation mode, and nothing records gradients. Images are yielded, (3, H, W), after their pass.
    """
    own_sides, longest = model.transform.min_size, model.transform.max_size
    labels = _network_labels(data, category_ids)
    images = 0
    for number, view in enumerate(views, start=1):
        model.transform.min_size = (view.shorter_side,)
        model.transform.max_size = round(longest * view.shorter_side / own_sides[-1])
        samples = tqdm(_samples(data), total=len(data.images), desc=f"train {number}/{len(views)}")
        for image, target in samples:
            target = {**target, "labels": labels[target["labels"]]}
            if view.flipped:
                image, target = _mirrored(image, target)
            with torch.no_grad(), torch.random.fork_rng(devices=[]), _sampling_positives(model, positives):
                torch.manual_seed(1_000_003 * seed + images)
                model([image], [target])
            images += 1
            yield image
    model.transform.min_size, model.transform.max_size = own_sides, longest


def detect(model: MaskRCNN, data: CocoData) -> Iterator[Tensor]:
    """Run a converted model over images, so that its mask branch receives the detections."""
    for image, _ in tqdm(_samples(data), total=len(data.images), desc="val"):
        with torch.no_grad():
            model([image])
        yield image


def _mirrored(image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Return the mirror image of a sample, with what a mask branch reads of its target."""
    width = image.shape[-1]
    x1, y1, x2, y2 = target["boxes"].unbind(dim=1)
    boxes = torch.stack([width - x2, y1, width - x1, y2], dim=1)
    return image.flip(-1), {
        "boxes": boxes,
        "labels": target["labels"],
        "masks": target["masks"].horizontal_flip(),
    }


def _numbered(recorded: dict[str, Tensor], index: int, image: Tensor) -> dict[str, Tensor]:
    """Return what was recorded of an image, with its number and size."""
    size = torch.tensor(image.shape[-2:])
    return {**recorded, "image_index": torch.full_like(recorded["labels"], index), "size": size}


def open_cache(path: Path, network: Any, train_data: CocoData, val_data: CocoData) -> Cache:
    """Load a cache from its file.

    Args:
        path: file with the result of `make_cache`.
        network: the module that `read_network` returned.
        train_data: the training images that the cache was made from.
        val_data: the validation images that it was made from.

    Raises:
        ValueError: the cache was made from other images, or by another version of this script.
    """
    content = torch.load(path, weights_only=True)
    if content["version"] != VERSION:
        raise ValueError(f"{path}: has version {content['version']}, not {VERSION}; make the cache again")
    for name, data in (("train", train_data), ("val", val_data)):
        ids = content[name]["image_ids"]
        if ids[: len(data.images)].tolist() != [image.id for image in data.images]:
            raise ValueError(f"{path}: its {name} images are not those of {data.annotation_file}")
    digest = hashlib.sha256()
    for name in ("train", "val"):
        for key in ("boxes", "features"):
            digest.update(content[name][key].numpy().tobytes())
    return Cache(
        PositiveRoIs(**{f.name: content["train"][f.name] for f in fields(PositiveRoIs)}),
        DetectedRoIs(**{f.name: content["val"][f.name] for f in fields(DetectedRoIs)}),
        train_data,
        val_data,
        network.build().eval(),
        list(network.CATEGORY_IDS),
        digest.hexdigest()[:12],
    )


def _samples(data: CocoData) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    dataset = CocoDataset(data)
    for index in range(len(dataset)):
        sample = dataset[index]
        if isinstance(sample, Exception):
            raise sample
        yield sample


def _network_labels(data: CocoData, category_ids: list[int]) -> Tensor:
    """Return the network's label for each label of the annotation file, background included."""
    return torch.tensor([0, *(category_ids.index(category.id) + 1 for category in data.categories)])


def _as_bytes(model: MaskRCNN, images: Tensor, size: list[int]) -> Tensor:
    """Undo the normalization and padding of a batch of one image, and return it as (3, H, W) uint8."""
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (model.transform.image_mean, model.transform.image_std)
    )
    image = images[0, :, : size[0], : size[1]] * std + mean
    return (image * 255).round().clamp(0, 255).to(torch.uint8)


def _joined(records: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Join the records of all images."""
    of_images = {"size": "sizes", "network_size": "network_sizes"}
    return {
        of_images.get(key, key): (torch.stack if key in of_images else torch.cat)([r[key] for r in records])
        for key in records[0]
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that locate the network, the photographs and the cache."""
    parser.add_argument(
        "--network",
        type=Path,
        required=True,
        help="Python file with build(), which returns a torchvision Mask R-CNN, and CATEGORY_IDS, per label from 1 on",
    )
    parser.add_argument("--images", type=Path, required=True, help="folder of the photographs")
    parser.add_argument("--train", type=Path, required=True, help="annotations of the training images")
    parser.add_argument("--val", type=Path, required=True, help="annotations of the validation images")
    parser.add_argument("--cache", type=Path, required=True, help="file of the cached features")


def main() -> None:
    """Make a cache and print its contents."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument(
        "--positives", type=int, default=64, help="maximum number per view of a training image"
    )
    parser.add_argument(
        "--shorter-sides",
        type=int,
        nargs="+",
        help="sizes in px at which the training images are viewed; by default, the network's own",
    )
    parser.add_argument("--flips", action="store_true", help="also view the mirror images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float16", help="dtype of the features")
    arguments = parser.parse_args()
    network = read_network(arguments.network)
    began = time.perf_counter()
    content = make_cache(
        network.build,
        list(network.CATEGORY_IDS),
        read_coco(arguments.images, arguments.train),
        read_coco(arguments.images, arguments.val),
        positives=arguments.positives,
        shorter_sides=arguments.shorter_sides,
        flips=arguments.flips,
        seed=arguments.seed,
        dtype=arguments.dtype,
    )
    arguments.cache.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, arguments.cache)
    for name in ("train", "val"):
        of_set = content[name]
        shape = " x ".join(map(str, of_set["features"].shape))
        print(f"{name}: {len(of_set['sizes'])} images, features {shape} {arguments.dtype}")
    print(f"{time.perf_counter() - began:.0f} s, {arguments.cache.stat().st_size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
