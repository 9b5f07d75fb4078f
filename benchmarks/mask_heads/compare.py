r"""Train mask branches on the frozen trunk of one network, and compare their masks.

    python -m benchmarks.mask_heads.compare --network shapes_network.py --images photos --train train.json \
        --val val.json --results runs.jsonl --seeds 0 1 2 3 4

The trunk (backbone, RPN and box branch) runs once over all images. Its feature maps, the positives that its RoI heads
sample, and its detections are kept in memory. Each branch is then trained from random weights on the same batches. With
the same seed, "stock" and "mask_iou" start with the same mask layers. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import MultiScaleRoIAlign

import maskloss
from benchmarks.real_network.features import detect, sample_positives, views_of
from benchmarks.real_network.mask_losses import RunFile, table, tenths
from benchmarks.real_network.network import read_network
from maskloss.data.coco import CocoData, read_coco
from maskloss.detection.mask_branch import (
    DetectedBoxes,
    MaskBranch,
    Positives,
    TorchvisionMaskBranch,
    num_classes_of,
)
from maskloss.detection.mask_iou import MaskIoUBranch, MaskIoUHead
from maskloss.detection.mask_predictor import ClassSelectedMaskPredictor
from maskloss.detection.point_rend import PointRendBranch
from maskloss.masks.results import image_results
from maskloss.training.metrics import average_precision

Features = dict[str, Tensor]
#: Columns of the table, and the key of each in a run's metrics.
COLUMNS = {
    "mask AP": "AP",
    "AP50": "AP50",
    "AP75": "AP75",
    "small": "APs",
    "medium": "APm",
    "large": "APl",
    "boundary AP": "boundary AP",
}
COMPARED = ("AP", "boundary AP")
#: Name of the map that joins the captured maps of `--stages`.
JOINED = "joined"


@dataclass(frozen=True)
class TrainingImage:
    """What a mask branch receives of one view of a training image."""

    features: Features
    positives: Positives
    target: dict[str, Any]


@dataclass(frozen=True)
class ValidationImage:
    """What a mask branch receives of a validation image; its boxes are also kept in px of the original image."""

    features: Features
    detections: DetectedBoxes
    boxes: Tensor


class Recorder(MaskBranch):
    """Mask branch that records what it receives."""

    received: tuple[Any, ...] = ()

    def losses(
        self, features: Features, positives: Positives, targets: list[dict[str, Any]]
    ) -> dict[str, Tensor]:
        """Record the positives of one image."""
        self.received = (features, positives, targets[0])
        return {}

    def predict(
        self, features: Features, detections: DetectedBoxes
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Record the detections of one image, and return empty masks."""
        self.received = (features, detections)
        return [boxes.new_zeros((len(boxes), 1, 1, 1)) for boxes in detections.boxes], None


@dataclass(frozen=True)
class Trunk:
    """The frozen part of a network, run over all images.

    Attributes:
        training: all views of the training images that have positives.
        validation: the validation images.
        val_data: the annotations of the validation images.
        category_ids: the category of each label from 1 on.
        channels: number of channels of the feature maps that the stock branch pools from.
        levels: names of these maps.
        fine_levels: names of the maps that PointRend reads.
        num_classes: number of classes, background included.
    """

    training: list[TrainingImage]
    validation: list[ValidationImage]
    val_data: CocoData
    category_ids: list[int]
    channels: int
    levels: list[str]
    fine_levels: list[str]
    num_classes: int

    def fine_channels(self) -> int:
        """Return the number of channels of each map that PointRend reads."""
        if self.fine_levels != [JOINED]:
            return self.channels
        return sum(maps.shape[1] for maps in self.training[0].features.values())


def run_trunk(
    model: MaskRCNN,
    category_ids: list[int],
    train_data: CocoData,
    val_data: CocoData,
    *,
    stages: Sequence[str] = (),
    shorter_sides: Sequence[int] | None = None,
    flips: bool = False,
    positives: int = 8,
) -> Trunk:
    """Run a network over all images, and keep what a mask branch needs.

    Args:
        model: a network in evaluation mode; it is converted.
        category_ids: the category of each label from 1 on.
        train_data: the training images.
        val_data: the validation images.
        stages: names of submodules whose outputs are feature maps for PointRend, besides the backbone's output.
        shorter_sides: see `make_cache`.
        flips: see `make_cache`.
        positives: maximum number of positives per view of a training image.
    """
    recorder, captured = Recorder(), {}
    maskloss.convert(model, "aligned", paste=None, mask_branch=recorder)
    for name in stages:
        model.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: captured.__setitem__(name, output)
        )

    def maps(features: Features) -> Features:
        levels = model.roi_heads.box_roi_pool.featmap_names
        kept = {level: features[level] for level in levels} | captured
        return {name: of_level.half() for name, of_level in kept.items()}

    training, validation = [], []
    views = views_of(model, shorter_sides, flips=flips)
    for _ in sample_positives(model, train_data, category_ids, views, positives=positives):
        features, of_image, target = recorder.received
        if of_image.counts.positives:
            masks = {"boxes": target["boxes"], "masks": target["masks"]}
            training.append(TrainingImage(maps(features), of_image, masks))
    for image in detect(model, val_data):
        features, detections = recorder.received
        size = list(image.shape[-2:])
        boxes = resize_boxes(detections.boxes[0], list(detections.image_sizes[0]), size)
        validation.append(ValidationImage(maps(features), detections, boxes))
    levels = list(model.roi_heads.box_roi_pool.featmap_names)
    return Trunk(
        training,
        validation,
        val_data,
        category_ids,
        model.backbone.out_channels,
        levels,
        [JOINED] if stages else levels[:1],
        num_classes_of(model),
    )


def without_classes(trunk: Trunk) -> Trunk:
    """Return the trunk with one class of objects for the mask branch, so that all objects train the same masks."""

    def ones(labels: list[Tensor]) -> list[Tensor]:
        return [torch.ones_like(of_image) for of_image in labels]

    training = [
        replace(image, positives=replace(image.positives, labels=ones(image.positives.labels)))
        for image in trunk.training
    ]
    return replace(trunk, training=training, num_classes=2)


def stock_layers(trunk: Trunk) -> nn.Module:
    """Make torchvision's mask layers, four convolutions and a predictor, with random weights."""
    layers = nn.Module()
    layers.mask_roi_pool = MultiScaleRoIAlign(trunk.levels, 14, 2)
    layers.mask_head = MaskRCNNHeads(trunk.channels, (trunk.channels,) * 4, 1)
    layers.mask_predictor = ClassSelectedMaskPredictor(trunk.channels, trunk.channels, trunk.num_classes)
    return layers


def _scored(trunk: Trunk, inner: MaskBranch, pool: nn.Module) -> MaskIoUBranch:
    """Wrap a branch by one that scores its masks, with a head as narrow as the stock layers."""
    branch = MaskIoUBranch(inner, pool, trunk.channels, trunk.num_classes)
    branch.iou_head = MaskIoUHead(
        trunk.channels, trunk.num_classes, branch.side, hidden_channels=trunk.channels, hidden_features=256
    )
    return branch


def _stock(trunk: Trunk) -> tuple[MaskBranch, nn.Module]:
    layers = stock_layers(trunk)
    return TorchvisionMaskBranch(layers), layers


def _point_rend(trunk: Trunk) -> tuple[MaskBranch, nn.Module]:
    branch = PointRendBranch(trunk.fine_channels(), trunk.num_classes, levels=trunk.fine_levels)
    return branch, branch


def _mask_iou(trunk: Trunk) -> tuple[MaskBranch, nn.Module]:
    inner, layers = _stock(trunk)
    branch = _scored(trunk, inner, layers.get_submodule("mask_roi_pool"))
    return branch, nn.ModuleList([layers, branch])


def _both(trunk: Trunk) -> tuple[MaskBranch, nn.Module]:
    inner, _ = _point_rend(trunk)
    branch = _scored(trunk, inner, MultiScaleRoIAlign(trunk.levels, 14, 2))
    return branch, branch


#: Functions that make a branch and the module with all its parameters.
BRANCHES: dict[str, Callable[[Trunk], tuple[MaskBranch, nn.Module]]] = {
    "stock": _stock,
    "mask_iou": _mask_iou,
    "point_rend": _point_rend,
    "point_rend + mask_iou": _both,
}


def joined(images: Sequence[Features], fine_levels: Sequence[str]) -> Features:
    """Return a batch of the feature maps of images, padded with zeros to one size."""
    batch: Features = {}
    for name in images[0]:
        maps = [features[name].float() for features in images]
        height, width = (max(one.shape[axis] for one in maps) for axis in (-2, -1))
        padded = [F.pad(one, (0, width - one.shape[-1], 0, height - one.shape[-2])) for one in maps]
        batch[name] = torch.cat(padded)
    if list(fine_levels) == [JOINED]:
        finest = max((maps.shape[-2:] for maps in batch.values()), key=math.prod)
        batch[JOINED] = torch.cat(
            [F.interpolate(maps, finest, mode="bilinear", align_corners=False) for maps in batch.values()],
            dim=1,
        )
    return batch


def together(positives: Sequence[Positives]) -> Positives:
    """Return the positives of several images as those of one batch."""
    counts = [of_image.counts for of_image in positives]
    total = replace(
        counts[0],
        num_images=len(counts),
        sampled=sum(one.sampled for one in counts),
        positives=sum(one.positives for one in counts),
    )
    return Positives(
        [boxes for one in positives for boxes in one.boxes],
        [labels for one in positives for labels in one.labels],
        [idxs for one in positives for idxs in one.matched_idxs],
        [size for one in positives for size in one.image_sizes],
        total,
    )


def train_branch(
    trunk: Trunk,
    name: str,
    *,
    seed: int,
    steps: int,
    learning_rate: float,
    batch_size: int = 4,
    weight_decay: float = 1e-3,
    losses: list[float] | None = None,
) -> MaskBranch:
    """Train a branch from random weights with AdamW and a cosine schedule."""
    torch.manual_seed(seed)
    branch, module = BRANCHES[name](trunk)
    branch.hold(maskloss.MaskRCNNLoss.preset("aligned"))
    optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 1) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        if len(order) < batch_size:
            order += torch.randperm(len(trunk.training), generator=generator).tolist()
        images, order = [trunk.training[i] for i in order[:batch_size]], order[batch_size:]
        features = joined([image.features for image in images], trunk.fine_levels)
        positives = together([image.positives for image in images])
        value = sum(branch.losses(features, positives, [image.target for image in images]).values())
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        if losses is not None:
            losses.append(value.item())
    return branch.eval()


def evaluate(trunk: Trunk, branch: MaskBranch) -> dict[str, float | None]:
    """Return the metrics of a branch's masks in the trunk's detections, and its boundary AP, in [0, 1]."""
    found: list[dict[str, Any]] = []
    for image, record in zip(trunk.validation, trunk.val_data.images, strict=True):
        seen = image.detections
        if trunk.num_classes == 2:
            seen = replace(seen, labels=[torch.ones_like(labels) for labels in seen.labels])
        with torch.inference_mode():
            (masks,), scores = branch.predict(joined([image.features], trunk.fine_levels), seen)
        detection = {
            "boxes": image.boxes,
            "labels": image.detections.labels[0],
            "scores": image.detections.scores[0],
            "masks": masks,
        }
        if scores is not None:
            detection["mask_scores"] = scores[0]
        found += image_results(
            detection, record.id, (record.height, record.width), category_ids=trunk.category_ids
        )
    metrics = average_precision(trunk.val_data, found)
    return {**metrics["segm"], "boundary AP": metrics["boundary"]["AP"]}


def main() -> None:
    """Run the branches and seeds that are not yet in the results, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", type=Path, required=True, help="see benchmarks/real_network")
    for name in ("images", "train", "val", "results"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--val-images", type=Path, help="folder of the validation images, if it is another")
    parser.add_argument("--stages", nargs="+", default=[], help="submodules with fine feature maps")
    parser.add_argument("--shorter-sides", type=int, nargs="+", help="sizes in px of the training images")
    parser.add_argument("--flips", action="store_true", help="also train on the mirror images")
    parser.add_argument("--class-agnostic", action="store_true", help="train one mask for all classes")
    parser.add_argument("--branches", nargs="+", choices=list(BRANCHES), default=list(BRANCHES)[:3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    arguments = parser.parse_args()
    network = read_network(arguments.network)
    runs = RunFile(arguments.results)
    trunk = run_trunk(
        network.build().eval(),
        list(network.CATEGORY_IDS),
        read_coco(arguments.images, arguments.train),
        read_coco(arguments.val_images or arguments.images, arguments.val),
        stages=arguments.stages,
        shorter_sides=arguments.shorter_sides,
        flips=arguments.flips,
    )
    if arguments.class_agnostic:
        trunk = without_classes(trunk)

    def compute(name: str, seed: int) -> dict[str, Any]:
        losses: list[float] = []
        branch = train_branch(
            trunk,
            name,
            seed=seed,
            steps=arguments.steps,
            learning_rate=arguments.learning_rate,
            losses=losses,
        )
        return {"metrics": evaluate(trunk, branch), "losses": tenths(losses)}

    found: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in arguments.branches}
    for seed in arguments.seeds:
        for name in arguments.branches:
            key = {
                "kind": "mask branch",
                "variant": name,
                "seed": seed,
                "steps": arguments.steps,
                "learning_rate": arguments.learning_rate,
                "class_agnostic": arguments.class_agnostic,
            }
            found[name][seed] = runs.of(key, lambda n=name, s=seed: compute(n, s))
    print("\n" + table(found, arguments.branches[0], COLUMNS, COMPARED), end="")


if __name__ == "__main__":
    main()
