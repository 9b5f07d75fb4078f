"""Mask branches: modules that predict masks inside boxes and compute the mask losses.

`RoIHeads` samples, matches and detects. It delegates masks entirely to its mask branch. `TorchvisionMaskBranch` uses
torchvision's own layers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from maskloss.detection.loss_holder import LossHolder
from maskloss.detection.mask_predictor import selects_channels
from maskloss.losses.arithmetic import at_least_float32
from maskloss.losses.criterion import MaskRCNNLoss, zero_of
from maskloss.losses.mask_classes import select_class_masks
from maskloss.losses.normalizers import BatchCounts
from maskloss.losses.terms import TERMS, MaskBatch, MaskLabels, Supervision
from maskloss.masks.points import points_in_boxes
from maskloss.masks.targets import targets_of_bitmaps, targets_of_host_boxes
from maskloss.masks.transfer import send, to_host

Features = dict[str, Tensor]
Target = dict[str, Any]


@dataclass(frozen=True)
class Positives:
    """The positive RoIs of N images whose matched objects have labels that the mask term learns from.

    Attributes:
        boxes: per image, (P_i, 4), xyxy in px of the resized image.
        labels: per image, (P_i,) int64.
        matched_idxs: per image, (P_i,) int64, index of the object matched to each RoI.
        image_sizes: N sizes (H, W) of the resized images, without padding.
        counts: counts of the RoI batch; its `positives` is P, the total number of RoIs here.
        on_host: per image, copies of boxes and matched_idxs on the host; None if there are no copies.
        weights: per image, (P_i,), weight of the object matched to each RoI; None for 1.
        supervision: per image, (P_i,) int8 on the host, the `Supervision` of each RoI's mask; None if all objects have
            masks.

    Example:
        >>> boxes, labels, idxs = torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.tensor([1]), torch.tensor([0])
        >>> positives = Positives([boxes], [labels], [idxs], [(8, 8)], BatchCounts(1, 2, 1, 512))
        >>> positives.select([torch.tensor([], dtype=torch.int64)]).counts.positives
        0
    """

    boxes: list[Tensor]
    labels: list[Tensor]
    matched_idxs: list[Tensor]
    image_sizes: list[tuple[int, int]]
    counts: BatchCounts
    on_host: list[tuple[Tensor, Tensor]] | None = None
    weights: list[Tensor] | None = None
    supervision: list[Tensor] | None = None

    def select(self, kept: Sequence[Tensor]) -> Positives:
        """Return a subset of the RoIs.

        Args:
            kept: per image, int64 indices of the RoIs to keep, on the RoIs' device or on the host.
        """
        on_device = [send(indices, boxes.device) for indices, boxes in zip(kept, self.boxes, strict=True)]
        boxes, labels, matched_idxs = (
            [values[indices] for values, indices in zip(of_images, on_device, strict=True)]
            for of_images in (self.boxes, self.labels, self.matched_idxs)
        )
        on_host = None
        if self.on_host is not None:
            on_host = [(b[i.cpu()], idxs[i.cpu()]) for (b, idxs), i in zip(self.on_host, kept, strict=True)]
        weights, supervision = self.weights, self.supervision
        if weights is not None:
            weights = [values[indices] for values, indices in zip(weights, on_device, strict=True)]
        if supervision is not None:
            supervision = [kinds[indices.cpu()] for kinds, indices in zip(supervision, kept, strict=True)]
        counts = replace(self.counts, positives=sum(len(of_image) for of_image in boxes))
        return Positives(boxes, labels, matched_idxs, self.image_sizes, counts, on_host, weights, supervision)

    def with_masks(self) -> tuple[Positives, Tensor]:
        """Return the RoIs that are supervised by masks, and their rows among all RoIs, (P',) int64 on the device."""
        device = self.boxes[0].device
        if self.supervision is None:
            return self, torch.arange(self.counts.positives, device=device)
        is_masked = [kinds == Supervision.MASK for kinds in self.supervision]
        rows = torch.where(torch.cat(is_masked))[0]
        return self.select([torch.where(of_image)[0] for of_image in is_masked]), send(rows, device)


@dataclass(frozen=True)
class DetectedBoxes:
    """The detections of N images, before masks are predicted.

    Attributes:
        boxes: per image, (D_i, 4), xyxy in px of the resized image.
        labels: per image, (D_i,) int64.
        scores: per image, (D_i,).
        image_sizes: N sizes (H, W) of the resized images, without padding.

    Example:
        >>> boxes, labels, scores = torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.tensor([1]), torch.tensor([0.9])
        >>> detections = DetectedBoxes([boxes], [labels], [scores], [(8, 8)])
    """

    boxes: list[Tensor]
    labels: list[Tensor]
    scores: list[Tensor]
    image_sizes: list[tuple[int, int]]


class MaskBranch(LossHolder, nn.Module):
    """Base class of mask branches. Subclasses override `losses` and `predict`.

    `maskloss.convert(model, mask_branch=branch)` uses the branch instead of torchvision's mask layers. The branch's
    parameters are trained and saved with the model. torchvision's layers stay in the model, unused, so that published
    weights still load.

    Attributes:
        uses_stock_layers: whether the branch calls torchvision's mask layers. If so, the model has no masks while one
            of these is None, as in torchvision. If not, `convert` excludes them from training, because
            DistributedDataParallel would wait for their gradients.
        num_classes: C, the number of classes whose masks the branch can predict, background included; None if any.
        loss: the model's `MaskRCNNLoss`, set by `convert`. `loss.mask_losses` evaluates its mask term, with weight and
            divisor; `loss.mask_targets` has the options for making mask targets.

    Example:
        >>> class Whole(MaskBranch):  # every mask fills its box
        ...     def losses(self, features, positives, targets):
        ...         return {}
        ...
        ...     def predict(self, features, detections):
        ...         return [torch.ones(len(boxes), 1, 28, 28) for boxes in detections.boxes], None
        >>> import torchvision, maskloss
        >>> model = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
        >>> model = maskloss.convert(model, mask_branch=Whole())
    """

    uses_stock_layers: bool = False
    num_classes: int | None = None

    def forward(
        self,
        features: Features,
        rois: Positives | DetectedBoxes,
        targets: list[Target] | None = None,
        *,
        with_probs: bool = False,
    ) -> Any:
        """Return `losses` if there are targets, and otherwise `predict`; both with the same arguments.

        Everything enters the branch here, so that hooks run, such as those of `fully_shard`.

        Args:
            features: feature maps (N, channels, H_l, W_l), by level.
            rois: the positives if there are targets, otherwise the detections.
            targets: per image, the target after the transform.
            with_probs: return `losses_and_probs` instead of `losses`.

        Raises:
            TypeError: `losses` does not return a dict of scalar tensors, or `predict` no pair of lists.
            ValueError: a loss has the key of another term, or predicted masks or scores do not fit the detections.
        """
        if targets is None:
            detections: Any = rois
            predicted = self.predict(features, detections)
            self._check_predicted(predicted, detections)
            return predicted
        positives: Any = rois
        if with_probs:
            losses, probs = self.losses_and_probs(features, positives, targets)
            self._check_losses(losses)
            return losses, probs
        losses = self.losses(features, positives, targets)
        self._check_losses(losses)
        return losses

    def _check_losses(self, found: Any) -> None:
        name = f"{type(self).__name__}.losses"
        if not isinstance(found, dict):
            raise TypeError(f"{name} must return a dict of losses, not a {type(found).__name__}")
        taken = [entry.key for term, entry in TERMS.items() if term != "mask"]
        for key, value in found.items():
            if key in taken:
                raise ValueError(f"{name} returns {key!r}, which is the key of another term")
            if not isinstance(value, Tensor) or value.dim() > 0:
                shape = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"{name}: {key!r} must be a scalar tensor, not {shape}")

    def _check_predicted(self, found: Any, detections: DetectedBoxes) -> None:
        name = f"{type(self).__name__}.predict"
        if not isinstance(found, tuple) or len(found) != 2:
            raise TypeError(f"{name} must return a pair: masks per image, and scores per image or None")
        for kind, by_image, dims, expected in (
            ("masks", found[0], 4, "(D, 1, M, M)"),
            ("scores", found[1], 1, "(D,)"),
        ):
            if kind == "scores" and by_image is None:
                continue
            if not isinstance(by_image, list | tuple) or len(by_image) != len(detections.boxes):
                raise TypeError(f"{name}: {kind} must be a list with a tensor for each image")
            for values, boxes in zip(by_image, detections.boxes, strict=True):
                if (
                    values.dim() != dims
                    or values.shape[0] != boxes.shape[0]
                    or values.shape[1:2] not in ((), (1,))
                ):
                    raise ValueError(
                        f"{name}: {kind} of an image with D = {boxes.shape[0]} detections must be {expected}, not "
                        f"{tuple(values.shape)}"
                    )

    def losses(self, features: Features, positives: Positives, targets: list[Target]) -> dict[str, Tensor]:
        """Compute the mask losses of a batch.

        Args:
            features: feature maps (N, channels, H_l, W_l), by level.
            positives: the batch's positive RoIs; may be empty.
            targets: per image, the target after the transform: masks (G, H, W) or `EncodedMasks`, and all other fields.

        Returns:
            Weighted scalar losses by key. Return the same keys for every batch, and losses connected to the graph even
            without positives.
        """
        raise NotImplementedError(f"{type(self).__name__} has no losses")

    def losses_and_probs(
        self, features: Features, positives: Positives, targets: list[Target]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Compute `losses` and also return the masks of the positives; only `MaskIoUBranch` needs it.

        Returns:
            The losses, and the probabilities (P, 1, M, M) of each RoI's own class, without a gradient.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no losses_and_probs, so its masks cannot be scored"
        )

    def predict(
        self, features: Features, detections: DetectedBoxes
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Predict the masks of a batch's detections.

        Args:
            features: feature maps (N, channels, H_l, W_l), by level.
            detections: the batch's detections; may be empty.

        Returns:
            Per image, probabilities (D_i, 1, M, M) on the grid of each box; and per image, mask scores (D_i,), or None
            if the branch does not score masks.
        """
        raise NotImplementedError(f"{type(self).__name__} predicts no masks")


class TorchvisionMaskBranch(MaskBranch):
    """Mask branch that calls torchvision's layers: `mask_roi_pool`, `mask_head` and `mask_predictor` of the RoI heads.

    The RoI heads own the layers, so that `state_dict` keeps its keys. This object looks them up at each call, so that
    users may replace a layer at any time.

    Args:
        heads: the RoI heads that own the layers.

    Example:
        >>> import torchvision
        >>> model = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
        >>> list(TorchvisionMaskBranch(model.roi_heads).parameters())
        []
    """

    uses_stock_layers = True

    def __init__(self, heads: nn.Module) -> None:
        super().__init__()
        # nn.Module.__setattr__ would register the heads as a submodule of their own branch.
        self.__dict__["heads"] = heads

    def losses(self, features: Features, positives: Positives, targets: list[Target]) -> dict[str, Tensor]:
        """Compute `loss_mask`, the mask term on each positive's channel of its own class."""
        if self.loss.weights.mask == 0:
            # Skip the layers, but give their parameters zero gradients: DistributedDataParallel would wait for
            # missing gradients.
            heads: Any = self.heads
            return {
                TERMS["mask"].key: zero_of(
                    [*heads.mask_head.parameters(), *heads.mask_predictor.parameters()]
                )
            }
        return self._losses(features, positives, targets)[0]

    def losses_and_probs(
        self, features: Features, positives: Positives, targets: list[Target]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Compute `loss_mask` and the masks of the positives."""
        losses, mask_logits = self._losses(features, positives, targets)
        return losses, self._probs(mask_logits.detach(), torch.cat(positives.labels))

    def _losses(
        self, features: Features, positives: Positives, targets: list[Target]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Compute `loss_mask` and the mask logits of the positives."""
        channels = self.loss.mask_channels(torch.cat(positives.labels))
        mask_logits = self._logits(features, positives.boxes, positives.image_sizes, channels)
        return self.loss.mask_losses(mask_batch_of(self.loss, mask_logits, positives, targets)), mask_logits

    def predict(
        self, features: Features, detections: DetectedBoxes
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Return the sigmoid of each detection's own channel, or the mask term's own probabilities if it has any."""
        labels = torch.cat(detections.labels)
        own_probs = self.loss.own_mask_probs
        channels = labels if own_probs is None else self.loss.mask_channels(labels)
        logits = self._logits(features, detections.boxes, detections.image_sizes, channels)
        probs = self._probs(logits, labels)
        return list(probs.split([boxes.shape[0] for boxes in detections.boxes])), None

    def _probs(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the probabilities (P, 1, M, M) of each label's class."""
        own_probs = self.loss.own_mask_probs
        if own_probs is not None:
            return own_probs(logits, labels)[:, None]
        return at_least_float32(select_class_masks(logits, labels)).sigmoid()[:, None]

    def _logits(
        self,
        features: Features,
        boxes: list[Tensor],
        image_sizes: list[tuple[int, int]],
        channels: Tensor | None,
    ) -> Tensor:
        """Compute logits (P, 1, M, M) of the given channels if the predictor can select them, else (P, C, M, M)."""
        heads: Any = self.heads
        hidden = heads.mask_head(heads.mask_roi_pool(features, boxes, image_sizes))
        if channels is not None and selects_channels(heads.mask_predictor):
            return heads.mask_predictor(hidden, channels)
        logits: Tensor = heads.mask_predictor(hidden)
        return logits


def mask_batch_of(
    loss: MaskRCNNLoss, mask_logits: Tensor, positives: Positives, targets: list[Target]
) -> MaskBatch:
    """Return the batch for `loss.mask_losses`, with the targets and labels that the mask term needs.

    Args:
        loss: the model's loss.
        mask_logits: (P, 1, M, M), the channel of each RoI's own class; or (P, C, M, M).
        positives: the positives of all images.
        targets: per image, the target after the transform.
    """
    size, settings = mask_logits.shape[-1], loss.mask_targets
    mask_labels = None
    if loss.uses_mask_labels or loss.uses_image:
        mask_labels = mask_labels_of(
            positives,
            targets,
            size,
            kinds=loss.mask_supervision,
            aligned=settings.aligned,
            binary=settings.binary,
        )
        grids = mask_labels.mask_targets
    else:
        grids = grids_of(positives, targets, size, aligned=settings.aligned, binary=settings.binary)
    weights = None if positives.weights is None else torch.cat(positives.weights)
    return MaskBatch(mask_logits, grids, torch.cat(positives.labels), positives.counts, weights, mask_labels)


def check_values(name: str, values: Any, count: int) -> None:
    """Check that a branch's own term has returned one value per RoI.

    Args:
        name: name of the term, for the message.
        values: what it has returned.
        count: P, number of RoIs.

    Raises:
        ValueError: the values are not a tensor (P,).

    Example:
        >>> check_values("point_loss", torch.zeros(2), 3)
        Traceback (most recent call last):
        ValueError: point_loss must return one value per RoI, shape (3,), not shape (2,)
    """
    if not isinstance(values, Tensor) or values.shape != (count,):
        found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"{name} must return one value per RoI, shape ({count},), not {found}")


def num_classes_of(model: Any) -> int:
    """Return the number of classes of a torchvision model, background included.

    Raises:
        TypeError: its box predictor is a custom one without a linear layer `cls_score`.

    Example:
        >>> import torchvision
        >>> model = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
        >>> num_classes_of(model)
        91
    """
    scores = getattr(model.roi_heads.box_predictor, "cls_score", None)
    if not isinstance(scores, nn.Linear):
        raise TypeError(
            "the model's box predictor has no linear layer cls_score, so its number of classes is unknown; make the "
            "mask branch with in_channels and num_classes instead of by its name"
        )
    return scores.out_features


def grids_of(
    positives: Positives, targets: list[Target], size: int, *, aligned: bool, binary: bool
) -> Tensor:
    """Make the mask targets (P, M, M) of the positives of all images; see `maskloss.mask_targets`.

    Example:
        >>> boxes, labels, idxs = torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.tensor([1]), torch.tensor([0])
        >>> positives = Positives([boxes], [labels], [idxs], [(4, 4)], BatchCounts(1, 2, 1, 512))
        >>> grids_of(positives, [{"masks": torch.eye(4, dtype=torch.bool)[None]}], 2, aligned=True, binary=False)
        tensor([[[0.5000, 0.0000],
                 [0.0000, 0.5000]]])
    """
    device = positives.boxes[0].device
    masks = [_as_bits(target["masks"]) for target in targets]
    # `check_inputs` has checked the values of uint8 masks, so that sampling them on a GPU needs nothing from the host.
    sampled_there = [
        isinstance(of_image, Tensor) and of_image.device == device and device.type != "cpu"
        for of_image in masks
    ]
    on_host = positives.on_host or []
    if not on_host and not all(sampled_there):
        copies = to_host([*positives.boxes, *positives.matched_idxs])
        on_host = list(zip(copies[: len(masks)], copies[len(masks) :], strict=True))
    grids = []
    for image, (boxes, idxs) in enumerate(zip(positives.boxes, positives.matched_idxs, strict=True)):
        if len(boxes) == 0:
            continue
        if sampled_there[image]:
            grid = targets_of_bitmaps(masks[image], boxes, idxs, size, aligned=aligned, binary=binary)
        else:
            host_boxes, host_idxs = on_host[image]
            grid = targets_of_host_boxes(
                masks[image], host_boxes.double(), host_idxs, size, aligned=aligned, binary=binary
            )
        grids.append(send(grid, device))
    return torch.cat(grids) if grids else positives.boxes[0].new_zeros((0, size, size), dtype=torch.float32)


def mask_labels_of(
    positives: Positives,
    targets: list[Target],
    size: int,
    *,
    kinds: Collection[Supervision],
    aligned: bool,
    binary: bool,
) -> MaskLabels:
    """Collect all labels for the masks of the positives of all images, in the grids of their RoIs.

    Args:
        positives: the positives of all images.
        targets: per image, boxes (G, 4), masks, and optionally points (G, K, 3) and resized_image (3, H, W), RGB in
            [0, 1], all at the resized image's scale.
        size: M, side of the grid in cells.
        kinds: the kinds of labels that the mask term learns from.
        aligned: see `maskloss.MaskTargets`; points, boxes and images get the same offset as the mask targets.
        binary: see `maskloss.MaskTargets`.
    """
    device = positives.boxes[0].device
    count = positives.counts.positives
    if positives.supervision is None:
        supervision = torch.full((count,), Supervision.MASK, dtype=torch.int8, device="cpu")
    else:
        supervision = torch.cat(positives.supervision)
    rows = {kind: send(torch.where(supervision == kind)[0], device) for kind in sorted(kinds, reverse=True)}
    masked, mask_rows = positives.with_masks()
    grids = grids_of(masked, targets, size, aligned=aligned, binary=binary)
    mask_targets = grids.new_zeros((count, size, size)).index_copy(0, mask_rows, grids)
    # Unaligned mask targets are sampled half a pixel down and to the right, so all other labels are too.
    shift = 0.0 if aligned else 0.5
    most = max((target["points"].shape[1] for target in targets if "points" in target), default=0)
    box_grids, point_coords, point_labels, crops = [], [], [], []
    for target, boxes, idxs in zip(targets, positives.boxes, positives.matched_idxs, strict=True):
        boxes = at_least_float32(boxes)
        box_grids.append(box_grids_of(send(target["boxes"], device)[idxs].to(boxes) - shift, boxes, size))
        points = target.get("points")
        if points is None:
            points = boxes.new_zeros((len(target["boxes"]), 0, 3))
        points = send(points, device)[idxs].to(boxes)  # (P_i, K_i, 3)
        points = F.pad(points, (0, 0, 0, most - points.shape[1]), value=-1.0)
        coords, labels = points_in_boxes(points[..., :2] - shift, points[..., 2], boxes)
        point_coords.append(coords)
        point_labels.append(labels)
        if "resized_image" in target:
            image = at_least_float32(target["resized_image"])[None]
            crops.append(roi_align(image, [boxes], size, sampling_ratio=2, aligned=aligned))
    return MaskLabels(
        mask_targets=mask_targets,
        rows=rows,
        gt_box_grids=torch.cat(box_grids),
        point_coords=torch.cat(point_coords),
        point_labels=torch.cat(point_labels),
        image_crops=torch.cat(crops) if crops else None,
    )


def box_grids_of(gt_boxes: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Return the share of each cell of a RoI's grid that lies inside a ground-truth box.

    Args:
        gt_boxes: (P, 4) xyxy.
        boxes: (P, 4) xyxy, the RoIs, in the same px.
        size: M, side of the grid in cells.

    Returns:
        (P, M, M) in [0, 1].

    Example:
        >>> box_grids_of(torch.tensor([[0.0, 0.0, 3.0, 4.0]]), torch.tensor([[0.0, 0.0, 4.0, 4.0]]), 2)
        tensor([[[1.0000, 0.5000],
                 [1.0000, 0.5000]]])
    """
    cells = torch.arange(size, device=boxes.device, dtype=boxes.dtype)
    shares = []
    for axis in (1, 0):
        low, high = boxes[:, axis, None], boxes[:, axis + 2, None]
        side = (high - low) / size
        first = low + cells * side  # (P, M)
        covered = torch.minimum(first + side, gt_boxes[:, axis + 2, None]) - torch.maximum(
            first, gt_boxes[:, axis, None]
        )
        shares.append((covered / side).clamp(0, 1))
    return shares[0][:, :, None] * shares[1][:, None, :]


def _as_bits(masks: Any) -> Any:
    """Convert masks that are neither bool nor uint8, as a custom transform may return them, to uint8.

    Raises:
        ValueError: the masks hold values other than 0 and 1.
    """
    if not isinstance(masks, Tensor) or masks.dtype in (torch.bool, torch.uint8):
        return masks
    as_bytes = masks.to(torch.uint8)
    if not torch.equal(as_bytes.to(masks.dtype), masks):
        raise ValueError(
            f"the transform returned masks of {masks.dtype} with values other than 0 and 1; return `masks >= 0.5`"
        )
    return as_bytes
