"""Mask Scoring R-CNN: a mask branch that also predicts the IoU of each mask, so that masks are ranked by their quality.

Shapes: see `maskloss.losses`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import MultiScaleRoIAlign

from maskloss.detection.mask_branch import (
    DetectedBoxes,
    Features,
    MaskBranch,
    Positives,
    Target,
    TorchvisionMaskBranch,
    check_values,
    grids_of,
    num_classes_of,
)
from maskloss.losses.arithmetic import at_least_float32
from maskloss.losses.checks import check_in_range
from maskloss.losses.criterion import MaskRCNNLoss, zero_of
from maskloss.losses.term_checks import check_callable, check_unreduced, register_parts
from maskloss.masks.coverage import union_area
from maskloss.masks.encoded import EncodedMasks

#: Key of the loss of the predicted IoU.
IOU_KEY = "loss_mask_iou"


class MaskIoUHead(nn.Module):
    """Head that predicts the IoU of each mask with its object, from the pooled features and the predicted mask.

    Args:
        in_channels: number of channels of the features.
        num_classes: C, background included.
        side: side S of the pooled features in cells.
        hidden_channels: number of channels of the four convolutions.
        hidden_features: number of features of the two fully connected layers.

    Example:
        >>> head = MaskIoUHead(8, 3, side=14)
        >>> head(torch.rand(2, 8, 14, 14), torch.rand(2, 1, 28, 28), torch.tensor([1, 2])).shape
        torch.Size([2])
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        side: int,
        hidden_channels: int = 256,
        hidden_features: int = 1024,
    ) -> None:
        super().__init__()
        sizes = [in_channels + 1, *[hidden_channels] * 3]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(size, hidden_channels, 3, stride=2 if index == 3 else 1, padding=1)
            for index, size in enumerate(sizes)
        )
        self.fc1 = nn.Linear(hidden_channels * ((side + 1) // 2) ** 2, hidden_features)
        self.fc2 = nn.Linear(hidden_features, hidden_features)
        self.prediction = nn.Linear(hidden_features, num_classes)
        convolutions: list[Any] = list(self.convolutions)
        for layer in convolutions:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        for layer in (self.fc1, self.fc2):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.prediction.weight, std=0.01)
        nn.init.zeros_(self.prediction.bias)

    def forward(self, features: Tensor, mask_probs: Tensor, labels: Tensor) -> Tensor:
        """Predict the IoU of each RoI's mask of its own class, (P,), about in [0, 1].

        Args:
            features: (P, channels, S, S).
            mask_probs: (P, 1, 2 S, 2 S) in [0, 1].
            labels: (P,) int64.
        """
        hidden = torch.cat([features, F.max_pool2d(mask_probs, 2).to(features.dtype)], dim=1)
        for convolution in self.convolutions:
            hidden = F.relu(convolution(hidden))
        hidden = F.relu(self.fc2(F.relu(self.fc1(hidden.flatten(1)))))
        weight = F.embedding(labels, self.prediction.weight).to(hidden.dtype)
        bias = F.embedding(labels, self.prediction.bias[:, None])[:, 0].to(hidden.dtype)
        return (weight * hidden).sum(dim=1) + bias


class MaskIoUBranch(MaskBranch):
    """Mask branch of Mask Scoring R-CNN. It wraps another mask branch, which predicts the masks.

    `loss_mask_iou` compares the predicted IoU of each positive with the IoU of its object and its mask, thresholded at
    0.5. In inference, the score of a mask is the class score times the predicted IoU. Boxes keep the class score.

    Args:
        inner: the branch that predicts the masks: torchvision's, or another one with `losses_and_probs`.
        pool: module that pools the features of RoIs to S x S cells, or a function that returns it, so that it can be
            replaced at any time. Its parameters belong to another module.
        in_channels: number of channels of the features.
        num_classes: C, background included.
        iou_loss: the term, (predicted (P,), IoU (P,)) -> (P,).
        iou_weight: factor of `loss_mask_iou`, in addition to the loss's weight of the mask term.

    Raises:
        TypeError: `iou_loss` is a class or not callable.
        ValueError: `iou_weight` is negative or not finite, or `iou_loss` sums or averages its values.

    Source: Huang et al., Mask Scoring R-CNN, 2019, arXiv:1903.00241; layers as in mmdetection 3.3.0's `MaskIoUHead`.
    mmdetection estimates an object's area outside the RoI from the fraction inside it; here areas are exact.
    """

    def __init__(
        self,
        inner: MaskBranch,
        pool: nn.Module | Callable[[], nn.Module],
        in_channels: int,
        num_classes: int,
        *,
        iou_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        iou_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.inner = inner
        self.uses_stock_layers = inner.uses_stock_layers
        # The RoI heads own it.
        self.__dict__["pool"] = pool
        size: Any = self._pool().output_size
        self.side: int = size if isinstance(size, int) else size[0]
        self.iou_head = MaskIoUHead(in_channels, num_classes, self.side)
        if iou_loss is not None:
            check_callable("iou_loss", iou_loss)
            check_unreduced("iou_loss", iou_loss)
        check_in_range(0, iou_weight=iou_weight)
        self.iou_loss = nn.MSELoss(reduction="none") if iou_loss is None else iou_loss
        register_parts(self, [self.iou_loss])
        self.num_classes = min(num_classes, inner.num_classes or num_classes)
        self.iou_weight = iou_weight

    @classmethod
    def of(cls, model: nn.Module, inner: MaskBranch | None = None, **options: Any) -> MaskIoUBranch:
        """Make the branch for a torchvision model.

        Args:
            model: a `MaskRCNN`; or a `FasterRCNN`, if the inner branch has its own layers.
            inner: the branch that predicts the masks; None for torchvision's layers.
            options: keyword arguments of the class.

        Raises:
            TypeError: `inner` is None, and the model has no mask layers.

        Example:
            >>> import torchvision
            >>> model = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
            >>> MaskIoUBranch.of(model).side
            14
        """
        parts: Any = model
        heads = parts.roi_heads
        if inner is None:
            if heads.mask_predictor is None:
                raise TypeError(
                    "the model has no mask layers whose masks mask_iou could score; pass an inner branch"
                )
            inner = TorchvisionMaskBranch(heads)
        pool: Any = _PoolOf(heads)
        if heads.mask_roi_pool is None:
            pool = MultiScaleRoIAlign(heads.box_roi_pool.featmap_names, output_size=14, sampling_ratio=2)
        num_classes = num_classes_of(model)
        return cls(inner, pool, parts.backbone.out_channels, num_classes, **options)

    def hold(self, loss: MaskRCNNLoss) -> None:
        """Set the loss of this branch and of the inner branch."""
        self.inner.hold(loss)  # first, because it may refuse the loss
        super().hold(loss)

    def losses(self, features: Features, positives: Positives, targets: list[Target]) -> dict[str, Tensor]:
        """Compute the losses of the inner branch and `loss_mask_iou`."""
        if self.loss.weights.mask == 0:
            zero = zero_of(self.iou_head.parameters())
            return {**self.inner(features, positives, targets), IOU_KEY: zero}
        losses, probs = self.inner(features, positives, targets, with_probs=True)
        if positives.supervision is not None:
            positives, rows = positives.with_masks()
            probs = probs[rows]
        predicted = self._predicted_iou(features, positives, probs)
        with torch.no_grad():
            wanted = self._mask_iou(positives, targets, probs)
            # As in the source, masks that do not overlap their objects are excluded.
            is_counted = (wanted > 0).to(wanted.dtype)
        with torch.autocast(predicted.device.type, enabled=False):
            values = self.iou_loss(at_least_float32(predicted), wanted)
            check_values("iou_loss", values, len(predicted))
            values = values * is_counted
            if positives.weights is not None:
                values = values * torch.cat(positives.weights).to(values.dtype)
            counts = replace(positives.counts, weight_sum=is_counted.sum())
            counted: Any = self.loss.synchronize(counts, values.device).weight_sum
            # Without any, the sum is 0. The mean count of several processes may lie between 0 and 1.
            loss = values.sum() / counted.clamp(min=1e-6)
        losses[IOU_KEY] = self.loss.weights.mask * self.iou_weight * loss
        return losses

    def predict(
        self, features: Features, detections: DetectedBoxes
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Return the inner branch's masks, and the class scores times the predicted IoUs."""
        masks, _ = self.inner(features, detections)
        side = 2 * self.side
        probs = torch.cat([_resized(of_image, side) for of_image in masks])
        quality = at_least_float32(self._predicted_iou(features, detections, probs)).clamp(0, 1)
        scores = torch.cat(detections.scores) * quality
        return masks, list(scores.split([boxes.shape[0] for boxes in detections.boxes]))

    def _pool(self) -> Any:
        """Return the module that pools features."""
        pool = self.__dict__["pool"]
        return pool if isinstance(pool, nn.Module) else pool()

    def _predicted_iou(self, features: Features, rois: Positives | DetectedBoxes, probs: Tensor) -> Tensor:
        pooled = self._pool()(features, rois.boxes, rois.image_sizes)
        return self.iou_head(pooled, _resized(probs, 2 * self.side), torch.cat(rois.labels))

    def _mask_iou(self, positives: Positives, targets: list[Target], probs: Tensor) -> Tensor:
        """Return the IoU of each thresholded mask with its object, (P,), counting the object's area outside the RoI."""
        side = probs.shape[-1]
        settings = self.loss.mask_targets
        grids = grids_of(positives, targets, side, aligned=settings.aligned, binary=False)
        is_set = (probs[:, 0] >= 0.5).to(grids.dtype)
        overlap, predicted = (is_set * grids).sum(dim=(1, 2)), is_set.sum(dim=(1, 2))
        areas = []
        for target, boxes, idxs in zip(targets, positives.boxes, positives.matched_idxs, strict=True):
            cells = at_least_float32(boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-6).prod(dim=1) / side**2
            areas.append(mask_areas(target["masks"], idxs).to(cells) / cells)
        # The grid contains only the object's part inside the RoI. By rounding, its area may exceed the whole.
        whole = torch.maximum(torch.cat(areas), grids.sum(dim=(1, 2)))
        return overlap / (predicted + whole - overlap).clamp(min=1e-6)


class _PoolOf:
    """Return the mask pooling of RoI heads at each call, also in copies of the heads."""

    def __init__(self, heads: Any) -> None:
        self.heads = heads

    def __call__(self) -> Any:
        return self.heads.mask_roi_pool


def mask_areas(masks: Tensor | EncodedMasks, matched_idxs: Tensor) -> Tensor:
    """Return the area in px² of the object that each RoI is matched to.

    Args:
        masks: one image's masks (G, H, W), or `EncodedMasks`.
        matched_idxs: (P,) int64, index of the object matched to each RoI.

    Returns:
        (P,) float32: for polygons the exact area of their union, for bitmaps and RLEs the number of pixels.

    Example:
        >>> masks = EncodedMasks([[[1.0, 1.0, 3.0, 1.0, 3.0, 3.5, 1.0, 3.5]]], height=4, width=4)
        >>> mask_areas(masks, torch.tensor([0, 0]))
        tensor([5., 5.])
    """
    if isinstance(masks, Tensor):
        return masks.flatten(1).sum(dim=1, dtype=torch.float32)[matched_idxs.to(masks.device)]
    areas = {}
    for index in sorted(set(matched_idxs.tolist())):
        if masks.is_rle(index):
            runs = masks.runs(index)
            areas[index] = float((runs.bottom - runs.top).sum()) * abs(masks.x_map.scale * masks.y_map.scale)
        else:
            areas[index] = union_area(masks.polygons(index))
    return torch.tensor([areas[index] for index in matched_idxs.tolist()], dtype=torch.float32, device="cpu")


def _resized(probs: Tensor, side: int) -> Tensor:
    """Resize masks (P, 1, M, M) to (P, 1, side, side)."""
    if probs.shape[-1] == side:
        return probs
    # interpolate refuses an empty batch; torch.export does not know yet whether it is empty.
    if not torch.compiler.is_exporting() and len(probs) == 0:
        return probs.new_zeros((0, 1, side, side))
    return F.interpolate(probs, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
