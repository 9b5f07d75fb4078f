"""The mask branch: what predicts masks inside of boxes, and computes the losses of that.

`RoIHeads` samples, matches and detects; how a mask comes about is this object's business alone. torchvision's own
layers are one such branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from maskloss.detection.loss_holder import LossHolder
from maskloss.detection.mask_predictor import ClassSelectedMaskPredictor
from maskloss.detection.transfer import send
from maskloss.losses.arithmetic import at_least_float32
from maskloss.losses.criterion import zero_of
from maskloss.losses.mask_classes import select_class_masks
from maskloss.losses.normalizers import BatchCounts
from maskloss.losses.terms import TERMS, MaskBatch
from maskloss.masks.targets import mask_targets, targets_of_host_boxes

Features = dict[str, Tensor]
Target = dict[str, Any]


@dataclass(frozen=True)
class Positives:
    """The positive RoIs of N images whose objects have a mask.

    Attributes:
        boxes: per image, (P_i, 4), xyxy in px of the resized image.
        labels: per image, (P_i,) int64.
        matched_idxs: per image, (P_i,) int64, the objects that they are matched to.
        image_sizes: N sizes (H, W) of the resized images, without padding.
        counts: of the RoI batch; its `positives` is P, the number of these.
        on_host: boxes and matched_idxs again, where the host knows them already.
    """

    boxes: list[Tensor]
    labels: list[Tensor]
    matched_idxs: list[Tensor]
    image_sizes: list[tuple[int, int]]
    counts: BatchCounts
    on_host: list[tuple[Tensor, Tensor]] | None = None

    def select(self, kept: Sequence[Tensor]) -> Positives:
        """Return some of them.

        Args:
            kept: per image, int64 indices of those to keep, on their device or on the host.
        """
        on_device = [send(indices, boxes.device) for indices, boxes in zip(kept, self.boxes, strict=True)]
        boxes, labels, matched_idxs = (
            [values[indices] for values, indices in zip(of_images, on_device, strict=True)]
            for of_images in (self.boxes, self.labels, self.matched_idxs)
        )
        on_host = None
        if self.on_host is not None:
            on_host = [(b[i.cpu()], idxs[i.cpu()]) for (b, idxs), i in zip(self.on_host, kept, strict=True)]
        counts = replace(self.counts, positives=sum(len(of_image) for of_image in boxes))
        return Positives(boxes, labels, matched_idxs, self.image_sizes, counts, on_host)


@dataclass(frozen=True)
class DetectedBoxes:
    """The detections of N images before they have masks.

    Attributes:
        boxes: per image, (D_i, 4), xyxy in px of the resized image.
        labels: per image, (D_i,) int64.
        scores: per image, (D_i,).
        image_sizes: N sizes (H, W) of the resized images, without padding.
    """

    boxes: list[Tensor]
    labels: list[Tensor]
    scores: list[Tensor]
    image_sizes: list[tuple[int, int]]


class MaskBranch(LossHolder, nn.Module):
    """Base of a mask branch. Override `losses` and `predict`; parameters of its own are trained and saved.

    `maskloss.convert(model, mask_branch=branch)` puts it into the place of torchvision's layers, which stay in the
    model, unused, so that published weights still load.

    Attributes:
        loss: the model's `MaskRCNNLoss`, from `convert`: `loss.mask_losses` evaluates its mask term, with its weight
            and its divisor, `loss.mask_targets` says how targets are to be made.

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

    def losses(self, features: Features, positives: Positives, targets: list[Target]) -> dict[str, Tensor]:
        """Compute the losses of the positives.

        Args:
            features: feature maps (N, channels, H_l, W_l), by level.
            positives: of the batch; there may be none.
            targets: per image, as the transform leaves them: masks (G, H, W) or `EncodedMasks`, and whatever else.

        Returns:
            Weighted scalars by key, the same keys in every batch, each connected to the graph also without positives.
        """
        raise NotImplementedError(f"{type(self).__name__} has no losses")

    def predict(
        self, features: Features, detections: DetectedBoxes
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Predict the masks of detections.

        Args:
            features: feature maps (N, channels, H_l, W_l), by level.
            detections: of the batch; there may be none.

        Returns:
            Per image, probabilities (D_i, 1, M, M) on the grid of each box; and per image how good each mask is,
            (D_i,), or None where the branch does not say.
        """
        raise NotImplementedError(f"{type(self).__name__} predicts no masks")


class TorchvisionMaskBranch(MaskBranch):
    """torchvision's mask layers: `mask_roi_pool`, `mask_head` and `mask_predictor` of the RoI heads.

    They stay where torchvision has them, so that `state_dict` keeps its keys; this object only reads them, at each
    call, so that a layer may be replaced at any time.

    Args:
        heads: the RoI heads that own the layers.
    """

    def __init__(self, heads: nn.Module) -> None:
        super().__init__()
        # Past nn.Module.__setattr__, which would register the owner as a part of what it owns.
        self.__dict__["heads"] = heads

    def losses(self, features: Features, positives: Positives, targets: list[Target]) -> dict[str, Tensor]:
        """Return `loss_mask`, the mask term on the channel of each positive's own class."""
        if self.loss.weights.mask == 0:
            # The layers are not run, but their parameters still get a gradient, of zeros: without one,
            # DistributedDataParallel would wait for it.
            heads: Any = self.heads
            return {
                TERMS["mask"].key: zero_of(
                    [*heads.mask_head.parameters(), *heads.mask_predictor.parameters()]
                )
            }
        labels = torch.cat(positives.labels)
        channels = self.loss.mask_channels(labels)
        mask_logits = self._logits(features, positives.boxes, positives.image_sizes, channels)
        grids = grids_of(
            positives,
            targets,
            mask_logits.shape[-1],
            aligned=self.loss.mask_targets.aligned,
            binary=self.loss.mask_targets.binary,
        )
        return self.loss.mask_losses(MaskBatch(mask_logits, grids, labels, positives.counts))

    def predict(
        self, features: Features, detections: DetectedBoxes
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Return the sigmoid of each detection's own channel, or what the mask term makes of the logits."""
        labels = torch.cat(detections.labels)
        own_probs = self.loss.own_mask_probs
        channels = labels if own_probs is None else self.loss.mask_channels(labels)
        logits = self._logits(features, detections.boxes, detections.image_sizes, channels)
        if own_probs is None:
            probs = at_least_float32(select_class_masks(logits, labels)).sigmoid()[:, None]
        else:
            probs = own_probs(logits, labels)[:, None]
        return list(probs.split([len(boxes) for boxes in detections.boxes])), None

    def _logits(
        self,
        features: Features,
        boxes: list[Tensor],
        image_sizes: list[tuple[int, int]],
        channels: Tensor | None,
    ) -> Tensor:
        """Compute (P, 1, M, M) logits of these channels if the predictor can select, else (P, C, M, M)."""
        heads: Any = self.heads
        hidden = heads.mask_head(heads.mask_roi_pool(features, boxes, image_sizes))
        if channels is not None and isinstance(heads.mask_predictor, ClassSelectedMaskPredictor):
            return heads.mask_predictor(hidden, channels)
        logits: Tensor = heads.mask_predictor(hidden)
        return logits


def grids_of(
    positives: Positives, targets: list[Target], size: int, *, aligned: bool, binary: bool
) -> Tensor:
    """Make the mask targets (P, M, M) of the positives of all images; see `maskloss.mask_targets`."""
    if positives.on_host is None:
        of_images = zip(targets, positives.boxes, positives.matched_idxs, strict=True)
        return torch.cat(
            [
                mask_targets(_as_bits(target["masks"]), boxes, idxs, size, aligned=aligned, binary=binary)
                for target, boxes, idxs in of_images
            ]
        )
    grids = []
    for target, boxes, (host_boxes, host_idxs) in zip(
        targets, positives.boxes, positives.on_host, strict=True
    ):
        masks = _as_bits(target["masks"])
        if isinstance(masks, Tensor) and masks.dtype == torch.uint8:
            # `check_inputs` has seen that they hold 0 and 1; the values of bool masks are not checked again.
            masks = masks.view(torch.bool)
        if len(boxes):
            grid = targets_of_host_boxes(
                masks, host_boxes.double(), host_idxs, size, aligned=aligned, binary=binary
            )
            grids.append(send(grid, boxes.device))
    return torch.cat(grids) if grids else positives.boxes[0].new_zeros((0, size, size), dtype=torch.float32)


def _as_bits(masks: Any) -> Any:
    """Return masks of any dtype that hold 0 and 1 as bytes; a user's own transform may leave them so.

    Raises:
        ValueError: they hold other values.
    """
    if not isinstance(masks, Tensor) or masks.dtype in (torch.bool, torch.uint8):
        return masks
    as_bytes = masks.to(torch.uint8)
    if not torch.equal(as_bytes.to(masks.dtype), masks):
        raise ValueError(
            f"masks of {masks.dtype} must hold 0 and 1 only when the transform returns them; use `masks >= 0.5`"
        )
    return as_bytes
