"""Train the mask branch of a trained network from scratch with weak labels, and compare it with full supervision.

    python -m benchmarks.real_network.weak_labels --network maskrcnn2go.py --images photos --train train.json \
        --val val.json --cache cache.pt --results weak.jsonl --seeds 0 1 2 3 4

Uses the cache made by `features.py`. Each case weakens the labels of the training objects: it removes the masks of most
objects at random, replaces all masks by ten labeled points each, keeps only the boxes, or gives random objects the mask
of another object. With the same seed, cases that are compared choose the same objects. The validation set keeps its
masks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.real_network.features import Cache
from benchmarks.real_network.mask_losses import (
    RunFile,
    Setting,
    add_training_arguments,
    evaluate,
    read_cache,
    table,
    train_branch,
)
from maskloss import MaskRCNNLoss, MaskTargets
from maskloss.detection.mask_branch import box_grids_of
from maskloss.losses import MaskBoxLoss, MaskBySupervision, MaskLabels, MaskProjectionLoss, Supervision
from maskloss.losses.terms import MaskBatch
from maskloss.masks.points import points_in_boxes

#: Number of labeled points per object, as in PointSup.
POINTS = 10
#: Fraction of the objects that keep their mask, and fraction of the masks that are replaced.
KEPT, REPLACED = 0.2, 0.3


@dataclass(frozen=True)
class Labels:
    """The labels of the O training objects.

    Attributes:
        has_mask: (O,) bool.
        points: (O, K, 3), x and y in px of the image, and the label: 1 inside the object, 0 outside.
        weights: (O,).
        mask_of: (O,) int64, index of the object whose mask each object has: itself, unless its mask was replaced.
    """

    has_mask: Tensor
    points: Tensor
    weights: Tensor
    mask_of: Tensor


def objects_of(cache: Cache) -> Tensor:
    """Return the index of each positive's object, (R,) int64, counted over all images."""
    counts = torch.tensor([len(image.objects) for image in cache.train_data.images])
    first = counts.cumsum(0) - counts
    return first[cache.train_images()] + cache.train.matched_idxs


def full_labels(cache: Cache) -> Labels:
    """Return the labels for full supervision: all masks, no points, weights of 1."""
    count = sum(len(image.objects) for image in cache.train_data.images)
    return Labels(
        torch.ones(count, dtype=torch.bool),
        torch.zeros(count, 0, 3),
        torch.ones(count),
        torch.arange(count),
    )


def random_points(cache: Cache, generator: torch.Generator) -> Tensor:
    """Draw `POINTS` points uniformly in each object's box, and label them by its mask: (O, K, 3)."""
    points = []
    for record in cache.train_data.images:
        bitmaps = record.object_masks().bitmaps()
        for annotation, bitmap in zip(record.objects, bitmaps, strict=True):
            box = torch.tensor(annotation.box)
            xy = box[:2] + torch.rand(POINTS, 2, generator=generator) * (box[2:] - box[:2])
            column = xy[:, 0].long().clamp(max=record.width - 1)
            row = xy[:, 1].long().clamp(max=record.height - 1)
            points.append(torch.cat([xy, bitmap[row, column].float()[:, None]], dim=1))
    return torch.stack(points)


def points_in_view(cache: Cache, points: Tensor, rows: Tensor) -> Tensor:
    """Return the points (P, K, 2) of positives' objects, given in px of the image, in px of the view."""
    train = cache.train
    images = train.image_index[rows]
    sizes, network_sizes = (of.flip(1)[images, None].float() for of in (train.sizes, train.network_sizes))
    xy = points[..., :2]
    mirrored = torch.stack([sizes[..., 0] - xy[..., 0], xy[..., 1]], dim=-1)
    return torch.where(train.flipped[images, None, None], mirrored, xy) * network_sizes / sizes


def chosen(cache: Cache, share: float, generator: torch.Generator) -> Tensor:
    """Choose a fraction of the objects at random, and return which, (O,) bool."""
    count = len(full_labels(cache).weights)
    is_chosen = torch.zeros(count, dtype=torch.bool)
    is_chosen[torch.randperm(count, generator=generator)[: round(share * count)]] = True
    return is_chosen


def replaced(cache: Cache, generator: torch.Generator) -> Labels:
    """Return full labels in which some objects have the mask of another object."""
    labels = full_labels(cache)
    wrong = torch.where(chosen(cache, REPLACED, generator))[0]
    mask_of = labels.mask_of.clone()
    mask_of[wrong] = wrong.roll(1)  # the masks rotate among these objects, which are in random order
    return replace(labels, mask_of=mask_of)


def weak_loss(boxes: Any = None) -> MaskRCNNLoss:
    """Make a loss with aligned soft targets for masks, points and, if `boxes` is a term for them, boxes."""
    return MaskRCNNLoss(
        mask=MaskBySupervision(boxes=boxes), mask_targets=MaskTargets(aligned=True, binary=False)
    )


def projection_and_pairwise() -> MaskBoxLoss:
    """Make BoxInst's loss for boxes, whose warm-up takes a quarter of the default number of steps."""
    return MaskBoxLoss(warmup_steps=100)


@dataclass(frozen=True)
class Case:
    """One way to supervise the training objects.

    Attributes:
        labels: function (cache, generator) that returns the labels.
        loss: function that makes the loss.
    """

    labels: Callable[[Cache, torch.Generator], Labels]
    loss: Callable[[], MaskRCNNLoss] = weak_loss


def _kept(cache: Cache, generator: torch.Generator, *, points: bool) -> Labels:
    labels = replace(full_labels(cache), has_mask=chosen(cache, KEPT, generator))
    return replace(labels, points=random_points(cache, generator)) if points else labels


def _without_masks(cache: Cache, generator: torch.Generator, *, points: bool) -> Labels:
    labels = full_labels(cache)
    labels = replace(labels, has_mask=torch.zeros_like(labels.has_mask))
    return replace(labels, points=random_points(cache, generator)) if points else labels


def _with_weights(cache: Cache, generator: torch.Generator) -> Labels:
    labels = replaced(cache, generator)
    return replace(labels, weights=(labels.mask_of == torch.arange(len(labels.mask_of))).float())


CASES: dict[str, Case] = {
    "all masks": Case(lambda cache, _: full_labels(cache)),
    "10 points each": Case(lambda cache, g: _without_masks(cache, g, points=True)),
    "20 % masks": Case(lambda cache, g: _kept(cache, g, points=False)),
    "20 % masks, others boxes": Case(
        lambda cache, g: _kept(cache, g, points=False), lambda: weak_loss(projection_and_pairwise())
    ),
    "20 % masks, others points": Case(lambda cache, g: _kept(cache, g, points=True)),
    "boxes: projection": Case(
        lambda cache, g: _without_masks(cache, g, points=False), lambda: weak_loss(MaskProjectionLoss())
    ),
    "boxes: projection + pairwise": Case(
        lambda cache, g: _without_masks(cache, g, points=False), lambda: weak_loss(projection_and_pairwise())
    ),
    "30 % masks wrong": Case(lambda cache, g: replaced(cache, g)),
    "30 % masks wrong, weights 0": Case(_with_weights),
}


def train_case(
    cache: Cache, case: Case, *, seed: int, learning_rate: float, setting: Setting
) -> dict[str, Any]:
    """Train a mask branch with the labels of a case, and evaluate it."""
    labels, loss = case.labels(cache, torch.Generator().manual_seed(seed)), case.loss()
    objects, train = objects_of(cache), cache.train
    generator = torch.Generator().manual_seed(seed)
    # A positive whose object has another one's mask gets the targets of a random positive of that other object.
    target_rows = torch.arange(len(objects))
    views = train.image_index // len(cache.train_data.images)
    for row in torch.where(labels.mask_of[objects] != objects)[0].tolist():
        others = torch.where((objects == labels.mask_of[objects[row]]) & (views == views[row]))[0]
        if len(others):
            target_rows[row] = others[torch.randint(len(others), (1,), generator=generator)]
    crops: dict[int, Tensor] = {}
    kinds = torch.where(labels.has_mask, int(Supervision.MASK), -1)
    if Supervision.BOX in loss.mask_supervision:
        kinds = kinds.clamp(min=int(Supervision.BOX))
    if labels.points.shape[1]:
        kinds = kinds.clamp(min=int(Supervision.POINTS))

    def supervision(cache: Cache, rows: Tensor, batch: MaskBatch) -> MaskBatch:
        size, kind = batch.mask_logits.shape[-1], kinds[objects[rows]]
        targets = cache.mask_targets(size, loss.mask_targets)[target_rows[rows]]
        targets = torch.where((kind == Supervision.MASK)[:, None, None], targets, 0.0)
        boxes = train.boxes[rows]
        points = labels.points[objects[rows]]
        coords, point_labels = points_in_boxes(points_in_view(cache, points, rows), points[..., 2], boxes)
        if loss.uses_image and size not in crops:
            crops[size] = train.crops(torch.arange(len(objects)), size)
        mask_labels = MaskLabels(
            mask_targets=targets,
            rows={k: torch.where(kind == k)[0] for k in sorted(loss.mask_supervision)},
            gt_box_grids=box_grids_of(train.object_boxes[rows], boxes, size),
            point_coords=coords,
            point_labels=point_labels,
            image_crops=crops[size][rows] if loss.uses_image else None,
        )
        return replace(
            batch, mask_targets=targets, weights=labels.weights[objects[rows]], mask_labels=mask_labels
        )

    losses: list[float] = []
    branch = train_branch(
        cache,
        loss,
        seed=seed,
        learning_rate=learning_rate,
        supervision=supervision,
        rows=torch.where(kinds[objects] >= 0)[0],
        losses=losses,
        **asdict(setting),
    )
    return {"metrics": evaluate(cache, branch, loss), "last loss": sum(losses[-50:]) / len(losses[-50:])}


class WholeBox(nn.Module):
    """A mask branch without training, whose masks fill their boxes: what box supervision must beat."""

    def forward(self, features: Tensor, channels: Tensor | None = None) -> Tensor:
        """Return logits (P, 1, 24, 24) of 10."""
        return torch.full((len(features), 1, 24, 24), 10.0)


def main() -> None:
    """Run the cases that are not yet in the results, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_training_arguments(parser)
    parser.add_argument("--names", nargs="+", choices=list(CASES), default=list(CASES), help="cases to run")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    arguments = parser.parse_args()
    cache, runs = read_cache(arguments), RunFile(arguments.results)
    setting = Setting(
        arguments.steps,
        batch_size=arguments.batch_size,
        weight_decay=arguments.weight_decay,
        warm_up=arguments.warm_up,
    )
    whole: Any = WholeBox()
    aligned = MaskRCNNLoss.preset("aligned")
    runs.of(
        {"kind": "whole boxes", "cache": cache.fingerprint},
        lambda: {"metrics": evaluate(cache, whole, aligned)},
    )
    found: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in arguments.names}
    for seed in arguments.seeds:
        for name in arguments.names:
            key = {
                "kind": "weak labels",
                "variant": name,
                "seed": seed,
                "learning_rate": arguments.learning_rate,
                **asdict(setting),
                "cache": cache.fingerprint,
            }
            found[name][seed] = runs.of(
                key,
                lambda n=name, s=seed: train_case(
                    cache, CASES[n], seed=s, learning_rate=arguments.learning_rate, setting=setting
                ),
            )
    print("\n" + table(found, arguments.names[0]), end="")


if __name__ == "__main__":
    main()
