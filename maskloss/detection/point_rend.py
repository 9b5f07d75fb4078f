"""PointRend: a mask branch that predicts a coarse mask and refines it at uncertain points.

Shapes: see `maskloss.losses`; K is the number of points per RoI.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from maskloss.detection.mask_branch import (
    DetectedBoxes,
    Features,
    MaskBranch,
    Positives,
    Target,
    check_values,
    mask_batch_of,
    num_classes_of,
)
from maskloss.losses.arithmetic import at_least_float32
from maskloss.losses.checks import check_in_range
from maskloss.losses.criterion import MaskRCNNLoss, divisor_of, zero_of
from maskloss.losses.mask_weak import sample_at_points
from maskloss.losses.term_checks import check_callable, check_unreduced, register_parts
from maskloss.losses.terms import TERMS
from maskloss.masks.encoded import EncodedMasks
from maskloss.masks.point_targets import point_targets
from maskloss.masks.targets import on_host

#: Key of the point loss.
POINT_KEY = "loss_mask_point"
#: Side of the coarse head's input grid, and of the mask that it predicts, in cells.
_COARSE_INPUT, _COARSE_OUTPUT = 14, 7
#: Number of detections refined at once. Each needs a float32 grid of 224 x 224, 0.2 MB, and the features of its points.
_DETECTIONS_AT_ONCE = 64


class CoarseMaskHead(nn.Module):
    """Head that predicts a 7 x 7 mask from a 14 x 14 grid of features, with two fully connected layers.

    Args:
        in_channels: number of channels of the features.
        num_classes: C, background included.
        hidden_channels: number of channels after the convolutions.
        hidden_features: number of features of the fully connected layers.

    Example:
        >>> CoarseMaskHead(8, 3)(torch.rand(2, 8, 14, 14), torch.tensor([1, 2])).shape
        torch.Size([2, 1, 7, 7])
    """

    def __init__(
        self, in_channels: int, num_classes: int, hidden_channels: int = 256, hidden_features: int = 1024
    ) -> None:
        super().__init__()
        self.reduce_channels: nn.Module = nn.Identity()
        if in_channels > hidden_channels:
            self.reduce_channels = nn.Sequential(nn.Conv2d(in_channels, hidden_channels, 1), nn.ReLU())
            in_channels = hidden_channels
        self.reduce_side = nn.Conv2d(in_channels, hidden_channels, 2, stride=2)
        cells = _COARSE_OUTPUT**2
        self.fc1 = nn.Linear(hidden_channels * cells, hidden_features)
        self.fc2 = nn.Linear(hidden_features, hidden_features)
        self.prediction = nn.Linear(hidden_features, num_classes * cells)
        layers: list[Any] = [part for part in self.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
        for layer in layers:
            # As in Detectron2: MSRAFill for convolutions, Caffe2's XavierFill for fully connected layers.
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            else:
                nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.prediction.weight, std=0.001)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Compute the logits (P, 1, 7, 7) of each RoI's own class from features (P, channels, 14, 14)."""
        hidden = F.relu(self.reduce_side(self.reduce_channels(features))).flatten(1)
        hidden = F.relu(self.fc2(F.relu(self.fc1(hidden))))
        return _own_class(self.prediction, hidden[..., None], labels, (1, _COARSE_OUTPUT, _COARSE_OUTPUT))


class PointHead(nn.Module):
    """Head that predicts the logit of each point from its fine features and coarse logit; all points share the layers.

    Args:
        in_channels: number of channels of the fine features.
        num_classes: C, background included.
        hidden_channels: number of channels of the layers.
        num_layers: number of layers before the prediction. Each layer also receives the coarse logit.

    Example:
        >>> head = PointHead(8, 3)
        >>> head(torch.rand(2, 8, 5), torch.rand(2, 1, 5), torch.tensor([1, 2])).shape
        torch.Size([2, 1, 5])
    """

    def __init__(
        self, in_channels: int, num_classes: int, hidden_channels: int = 256, num_layers: int = 3
    ) -> None:
        super().__init__()
        sizes = [in_channels, *[hidden_channels] * num_layers]
        self.layers = nn.ModuleList(nn.Conv1d(size + 1, hidden_channels, 1) for size in sizes[:-1])
        self.prediction = nn.Conv1d(hidden_channels + 1, num_classes, 1)
        layer: Any
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        layer = self.prediction
        nn.init.normal_(layer.weight, std=0.001)
        nn.init.zeros_(layer.bias)

    def forward(self, fine_features: Tensor, coarse_logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the logits (P, 1, K) of each RoI's own class.

        Args:
            fine_features: (P, channels, K).
            coarse_logits: (P, 1, K), the coarse logit at each point.
            labels: (P,) int64.
        """
        hidden = fine_features
        count = labels.shape[0]  # in torch.export, len() would have to be a number
        layer: Any
        for layer in self.layers:
            # One product for all RoIs, and changes in place, take a third of the time of a convolution on a CPU.
            weight, bias = layer.weight[:, :-1, 0].to(hidden.dtype), layer.bias.to(hidden.dtype)
            hidden = torch.baddbmm(
                bias[:, None].expand(count, -1, hidden.shape[2]),
                weight.expand(count, -1, -1),
                hidden,
            )
            hidden = hidden.addcmul_(
                layer.weight[None, :, -1].to(hidden.dtype), coarse_logits.to(hidden.dtype)
            ).relu_()
        return _own_class(self.prediction, torch.cat([hidden, coarse_logits], dim=1), labels, (1,))


def _own_class(layer: Any, hidden: Tensor, labels: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the outputs of a linear layer for each RoI's own class only.

    Args:
        layer: linear or 1 x 1 convolutional layer.
        hidden: (P, channels, K); K is 1 if the layer is linear.
        labels: (P,) int64.
        shape: shape of the outputs of one class.

    Returns:
        (P, *shape) of a linear layer, (P, *shape, K) of a convolutional one.
    """
    inputs, per_class = hidden.shape[1], math.prod(shape)
    weight = F.embedding(labels, layer.weight.reshape(-1, per_class * inputs)).unflatten(
        1, (per_class, inputs)
    )
    bias = F.embedding(labels, layer.bias.reshape(-1, per_class))
    products, bias = torch.bmm(weight.to(hidden.dtype), hidden), bias.to(hidden.dtype)
    # Add the bias last, so that the result is not a view: fully_shard warns about modules that return views.
    if isinstance(layer, nn.Linear):
        return products[..., 0].unflatten(1, shape) + bias.unflatten(1, shape)
    return products + bias[..., None]


class PointRendBranch(MaskBranch):
    """Mask branch of PointRend that predicts only the channel of each object's own class.

    In training, `loss_mask` is the model's mask term on the coarse 7 x 7 mask, and `loss_mask_point` is the point
    loss, mostly at points whose coarse logits are close to 0. In inference, the mask is enlarged to 224 x 224 in steps:
    double its side, then let the point head predict the cells whose logits are closest to 0.

    Args:
        in_channels: number of channels of each feature map that is read.
        num_classes: C, background included.
        levels: names of the feature maps to read, the finest first.
        point_loss: the term for points, (logits (P, K), targets (P, K)) -> (P, K) or (P,), averaged over the points.
        point_weight: factor of `loss_mask_point`, in addition to the loss's weight of the mask term.
        num_points: K in training, the number of points per RoI.
        oversample: number of random candidates, in multiples of K, from which the most uncertain points are chosen.
        importance: share of the K points that are chosen by their uncertainty; the others are random.
        steps: number of times that the mask's side is doubled in inference.
        points_per_step: maximum number of cells that the point head predicts per mask and step.

    Raises:
        TypeError: `point_loss` is a class or not callable.
        ValueError: a number is out of its range, or `point_loss` sums or averages its values.

    Source: Kirillov et al., PointRend, 2019, arXiv:1912.08193. The constants are Detectron2's. Its point head reads the
    coarse logits of all classes; this one reads only that of the RoI's own class.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        levels: Sequence[str] = ("0",),
        point_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        point_weight: float = 1.0,
        num_points: int = 196,
        oversample: float = 3.0,
        importance: float = 0.75,
        steps: int = 5,
        points_per_step: int = 784,
    ) -> None:
        super().__init__()
        if not (num_points >= 1 and oversample >= 1 and 0 <= importance <= 1 and steps >= 0):
            raise ValueError(
                "num_points and oversample must be at least 1, importance in [0, 1] and steps at least 0, got "
                f"{num_points}, {oversample:g}, {importance:g} and {steps}"
            )
        if points_per_step < 1:
            raise ValueError(f"points_per_step must be at least 1, got {points_per_step}")
        check_in_range(0, point_weight=point_weight)
        if point_loss is not None:
            check_callable("point_loss", point_loss)
            check_unreduced("point_loss", point_loss)
        self.levels = tuple(levels)
        self.coarse_head = CoarseMaskHead(in_channels, num_classes)
        self.point_head = PointHead(in_channels * len(self.levels), num_classes)
        self.point_loss = nn.BCEWithLogitsLoss(reduction="none") if point_loss is None else point_loss
        register_parts(self, [self.point_loss])
        self.point_weight = point_weight
        self.num_classes = num_classes
        self.num_points, self.oversample, self.importance = num_points, oversample, importance
        self.steps, self.points_per_step = steps, points_per_step
        self._strides: list[int] = []

    @classmethod
    def of(cls, model: nn.Module, **options: Any) -> PointRendBranch:
        """Make the branch for a torchvision model. It reads the finest feature map of the RoI heads.

        Args:
            model: a `FasterRCNN` or `MaskRCNN`.
            options: keyword arguments of the class.

        Example:
            >>> import torchvision
            >>> model = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
            >>> PointRendBranch.of(model).levels
            ('0',)
        """
        parts: Any = model
        pooler = parts.roi_heads.mask_roi_pool or parts.roi_heads.box_roi_pool
        levels = getattr(pooler, "featmap_names", ["0"])[:1]
        num_classes = num_classes_of(model)
        return cls(parts.backbone.out_channels, num_classes, **{"levels": levels, **options})

    def hold(self, loss: MaskRCNNLoss) -> None:
        """Set the loss.

        Raises:
            TypeError: the loss's mask term reads the logits of all classes.
        """
        if loss.needs_all_mask_classes:
            raise TypeError(
                "point_rend computes the logits of each object's own class only, but the loss's mask term reads those "
                "of all classes"
            )
        super().hold(loss)

    def losses(self, features: Features, positives: Positives, targets: list[Target]) -> dict[str, Tensor]:
        """Compute `loss_mask`, from the coarse masks, and `loss_mask_point`."""
        return self._losses(features, positives, targets)[0]

    def losses_and_probs(
        self, features: Features, positives: Positives, targets: list[Target]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Compute the losses, and the masks of the positives at 28 x 28, with the point head applied to every cell."""
        losses, coarse_logits = self._losses(features, positives, targets)
        with torch.no_grad():
            logits = F.interpolate(
                at_least_float32(coarse_logits), size=(28, 28), mode="bilinear", align_corners=False
            )
            logits = self._predict_points(features, positives, logits, coarse_logits, 28 * 28)
        return losses, logits.sigmoid()

    def _losses(
        self, features: Features, positives: Positives, targets: list[Target]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Compute the losses and the coarse logits (P, 1, 7, 7) of all positives, the latter without a gradient."""
        if self.loss.weights.mask == 0:
            zero = zero_of(self.parameters())
            return {TERMS["mask"].key: zero, POINT_KEY: zero.clone()}, zero
        coarse_logits = self._coarse_logits(features, positives)
        losses = self.loss.mask_losses(mask_batch_of(self.loss, coarse_logits, positives, targets))
        all_coarse_logits = coarse_logits.detach()
        # Point targets are sampled from masks, so positives without a mask only train the coarse mask.
        if positives.supervision is not None:
            positives, rows = positives.with_masks()
            coarse_logits = coarse_logits[rows]
        coords = self._training_points(coarse_logits.detach())
        logits = self._point_logits(features, positives, coords, coarse_logits)[:, 0]  # (P, K)
        with torch.no_grad():
            wanted = self._point_targets(positives, targets, coords)
        with torch.autocast(logits.device.type, enabled=False):
            values = self.point_loss(at_least_float32(logits), wanted)
            if getattr(values, "shape", None) == logits.shape:
                values = values.mean(dim=1)
            check_values("point_loss", values, len(logits))
            if positives.weights is not None:
                values = values * torch.cat(positives.weights).to(values.dtype)
            counts = self.loss.synchronize(positives.counts, values.device)
            loss = values.sum() / divisor_of(counts.positives)
        losses[POINT_KEY] = self.loss.weights.mask * self.point_weight * loss
        return losses, all_coarse_logits

    def predict(
        self, features: Features, detections: DetectedBoxes
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Return the probabilities (D_i, 1, 224, 224) of each detection's own class."""
        if torchvision._is_tracing():
            raise RuntimeError(
                "torch.jit.trace and torch.onnx.export(dynamo=False) cannot record PointRend, whose points depend on "
                "the masks; use maskloss export"
            )
        probs = []
        of_images = zip(detections.boxes, detections.labels, detections.scores, strict=True)
        for image, of_image in enumerate(of_images):
            own = {level: features[level][image : image + 1] for level in self.levels}
            chunks = [of_image]
            if not torch.compiler.is_exporting():  # there, the number of chunks is unknown
                chunks = list(zip(*(values.split(_DETECTIONS_AT_ONCE) for values in of_image), strict=True))
            parts = [
                self._refined(own, DetectedBoxes([boxes], [labels], [scores], detections.image_sizes))
                for boxes, labels, scores in chunks
            ]
            probs.append(torch.cat(parts))
        return probs, None

    def _refined(self, features: Features, rois: DetectedBoxes) -> Tensor:
        """Predict the masks of some detections of one image by subdivision."""
        coarse_logits = self._coarse_logits(features, rois)
        logits = at_least_float32(coarse_logits)
        for step in range(self.steps):
            logits = F.interpolate(logits, scale_factor=2.0, mode="bilinear", align_corners=False)
            cells = logits.shape[-1] ** 2
            # As in Detectron2, skip the point head if the next step predicts all cells and discards these.
            if self.points_per_step >= 4 * cells and step < self.steps - 1:
                continue
            logits = self._predict_points(features, rois, logits, coarse_logits, self.points_per_step)
        return logits.sigmoid()

    def _predict_points(
        self,
        features: Features,
        rois: Positives | DetectedBoxes,
        logits: Tensor,
        coarse_logits: Tensor,
        count: int,
    ) -> Tensor:
        """Replace the `count` logits (P, 1, H, W) of each mask that are closest to 0 by those of the point head."""
        indices, coords = most_uncertain_cells(logits, count)
        predicted = at_least_float32(self._point_logits(features, rois, coords, coarse_logits))
        return logits.flatten(2).scatter(2, indices[:, None], predicted).view_as(logits)

    def _coarse_logits(self, features: Features, rois: Positives | DetectedBoxes) -> Tensor:
        """Compute the coarse logits (P, 1, 7, 7) of each RoI's own class."""
        count = sum(boxes.shape[0] for boxes in rois.boxes)
        cells = torch.arange(_COARSE_INPUT, device=rois.boxes[0].device, dtype=torch.float32)
        steps = (cells + 0.5) / _COARSE_INPUT
        grid = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1).flatten(0, 1)  # (196, 2)
        strides = self._strides_of(features, rois.image_sizes)
        fine = fine_features(
            features, self.levels[:1], rois.boxes, grid.expand(count, -1, -1), rois.image_sizes, strides
        )
        return self.coarse_head(fine.unflatten(2, (_COARSE_INPUT, _COARSE_INPUT)), torch.cat(rois.labels))

    def _strides_of(self, features: Features, image_sizes: list[tuple[int, int]]) -> list[int]:
        """Return the stride of each level; in an export, whose sizes are unknown, those of the pass before it."""
        if not torch.compiler.is_exporting():
            self._strides = [stride_of(features[level], image_sizes) for level in self.levels]
        return self._strides

    def _point_logits(
        self,
        features: Features,
        rois: Positives | DetectedBoxes,
        coords: Tensor,
        coarse_logits: Tensor,
    ) -> Tensor:
        """Compute the logits (P, 1, K) of points (P, K, 2) in [0, 1] of each RoI."""
        strides = self._strides_of(features, rois.image_sizes)
        fine = fine_features(features, self.levels, rois.boxes, coords, rois.image_sizes, strides)
        coarse = sample_at_points(at_least_float32(coarse_logits), coords)
        return self.point_head(fine, coarse.to(fine.dtype), torch.cat(rois.labels))

    def _training_points(self, coarse_logits: Tensor) -> Tensor:
        """Choose the K training points of each RoI, (P, K, 2) in [0, 1], most where the coarse mask is uncertain."""
        count, device = len(coarse_logits), coarse_logits.device
        num_uncertain = int(self.importance * self.num_points)
        uniform = partial(torch.rand, device=device, dtype=torch.float32)  # not the default dtype
        candidates = uniform(count, int(self.oversample * self.num_points), 2)
        logits = sample_at_points(at_least_float32(coarse_logits), candidates)[:, 0]
        best = logits.abs().topk(num_uncertain, dim=1, largest=False).indices
        chosen = candidates.gather(1, best[..., None].expand(-1, -1, 2))
        others = uniform(count, self.num_points - num_uncertain, 2)
        return torch.cat([chosen, others], dim=1)

    def _point_targets(self, positives: Positives, targets: list[Target], coords: Tensor) -> Tensor:
        """Return the targets (P, K) of points, sampled with the offset of the loss's mask targets."""
        shift = 0.0 if self.loss.mask_targets.aligned else 0.5
        found = []
        by_image = coords.split([len(boxes) for boxes in positives.boxes])
        for target, boxes, idxs, points in zip(
            targets, positives.boxes, positives.matched_idxs, by_image, strict=True
        ):
            boxes = at_least_float32(boxes)
            in_px = boxes[:, None, :2] + points * (boxes[:, None, 2:] - boxes[:, None, :2]) + shift
            masks: Tensor | EncodedMasks = target["masks"]
            with on_host():  # the encoded masks' coordinates
                found.append(point_targets(masks, in_px, idxs))
        return torch.cat(found)


def fine_features(
    features: Features,
    levels: Sequence[str],
    boxes: list[Tensor],
    coords: Tensor,
    image_sizes: list[tuple[int, int]],
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Sample feature maps bilinearly at points of RoIs.

    Args:
        features: feature maps (N, channels, H_l, W_l), by level.
        levels: names of the maps to sample; their channels are concatenated.
        boxes: per image, (P_i, 4), xyxy in px of the resized image.
        coords: (P, K, 2), x and y in [0, 1] of each RoI, over all images.
        image_sizes: N sizes (H, W) of the resized images, without padding.
        strides: stride of each level in px; None to infer it from the sizes.

    Returns:
        (P, channels of all levels, K), at least float32.

    Example:
        >>> boxes = [torch.tensor([[0.0, 0.0, 8.0, 8.0]])]
        >>> maps = {"0": torch.arange(4.0).reshape(1, 1, 2, 2)}
        >>> fine_features(maps, ["0"], boxes, torch.tensor([[[0.5, 0.5]]]), [(8, 8)])  # between all four cells
        tensor([[[1.5000]]])

    Source: Kirillov et al., PointRend, 2019, arXiv:1912.08193, section 3.2.
    """
    sampled = []
    for place, level in enumerate(levels):
        maps = at_least_float32(features[level])
        stride = stride_of(maps, image_sizes) if strides is None else strides[place]
        width, height = maps.shape[-1] * stride, maps.shape[-2] * stride
        by_image = []
        for image, (image_boxes, points) in enumerate(
            zip(boxes, coords.split([of_image.shape[0] for of_image in boxes]), strict=True)
        ):
            own = image_boxes.to(maps.dtype)
            in_px = own[:, None, :2] + points.to(maps.dtype) * (own[:, None, 2:] - own[:, None, :2])
            relative = torch.stack([in_px[..., 0] / width, in_px[..., 1] / height], dim=-1)
            values = sample_at_points(maps[image : image + 1], relative.flatten(0, 1)[None])
            by_image.append(values[0].unflatten(1, (own.shape[0], points.shape[1])).transpose(0, 1))
        sampled.append(torch.cat(by_image))
    return torch.cat(sampled, dim=1)


def stride_of(maps: Tensor, image_sizes: list[tuple[int, int]]) -> int:
    """Return the stride of feature maps in px, a power of 2, as torchvision's `MultiScaleRoIAlign` infers it.

    Example:
        >>> stride_of(torch.zeros(1, 8, 25, 34), [(200, 267)])
        8
    """
    height = max(size[0] for size in image_sizes)
    return int(2 ** round(math.log2(height / maps.shape[-2])))


def most_uncertain_cells(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the cells of masks whose logits are closest to 0.

    Args:
        logits: (P, 1, H, W).
        count: K, number of cells per mask; limited to H W.

    Returns:
        Indices (P, K) int64 of the cells, counted row by row, and the cells' centers (P, K, 2), x and y in [0, 1].

    Example:
        >>> most_uncertain_cells(torch.tensor([[[[3.0, -0.5], [2.0, -4.0]]]]), 1)
        (tensor([[1]]), tensor([[[0.7500, 0.2500]]]))
    """
    height, width = logits.shape[-2:]
    count = min(count, height * width)
    indices = logits.flatten(1).abs().topk(count, dim=1, largest=False).indices
    half = logits.new_full((), 0.5)  # a number would give the default dtype
    x = (indices % width + half) / width
    y = (indices.div(width, rounding_mode="floor") + half) / height
    return indices, torch.stack([x, y], dim=-1)
