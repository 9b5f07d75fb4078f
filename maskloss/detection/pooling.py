"""RoI pooling with a faster backward pass on CPUs, and without waiting for a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchvision.ops import MultiScaleRoIAlign as TorchvisionMultiScaleRoIAlign
from torchvision.ops import roi_align
from torchvision.ops.poolers import _filter_input, _setup_scales

from maskloss.masks.roi_align import AxisSampling

#: RoIs whose sampling weights are held at once.
_ROIS_AT_ONCE = 64


class MultiScaleRoIAlign(TorchvisionMultiScaleRoIAlign):
    """torchvision's pooler: the same pooled features, with gradients by matrix products on CPUs.

    torchvision's backward pass on a CPU adds every sample of every channel to the feature map by itself, in one
    thread, which is a seventh of the RoI heads' training time. On other devices, and where no gradient is
    wanted, everything is torchvision's.

    Attributes:
        sync_free: in training on another device, do not ask it which boxes belong to which level; see `convert`.
    """

    scales: list[float] | None
    map_levels: Any
    sync_free: bool = False

    def forward(
        self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        """Pool each box from the level of its size.

        Args:
            x: feature maps (N, channels, H_l, W_l), by level.
            boxes: N tensors (R_i, 4), xyxy in px of the images.
            image_shapes: N sizes (H, W) of the images.

        Returns:
            (R, channels, *output_size), image by image.
        """
        features: list[Tensor] = _filter_input(x, self.featmap_names)
        ours = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        our_backward = ours and all(_takes_our_backward(feature) for feature in features)
        without_waiting = self.training and self.sync_free and features[0].device.type != "cpu"
        if not (our_backward or without_waiting):
            return super().forward(x, boxes, image_shapes)
        if self.scales is None or self.map_levels is None:
            self.scales, self.map_levels = _setup_scales(
                features, image_shapes, self.canonical_scale, self.canonical_level
            )
        rois = torch.cat(
            [torch.cat([torch.full_like(b[:, :1], image), b], dim=1) for image, b in enumerate(boxes)]
        )
        size, ratio = self.output_size, self.sampling_ratio
        dtype = features[0].dtype
        if our_backward:
            # As torchvision's does under autocast, which has no CPU kernel for less.
            features, rois = [feature.float() for feature in features], rois.float()
        if len(features) == 1:
            align = _RoIAlign.apply if our_backward else roi_align
            pooled: Tensor = align(features[0], rois, size, self.scales[0], ratio)
            return pooled.to(dtype)
        levels = self.map_levels(boxes)
        if not our_backward:
            return pooled_from_every_level(features, rois, levels, size, self.scales, ratio)
        pooled = features[0].new_zeros((len(rois), features[0].shape[1], *size))
        for level, (feature, scale) in enumerate(zip(features, self.scales, strict=True)):
            chosen = torch.where(levels == level)[0]
            pooled[chosen] = _RoIAlign.apply(feature, rois[chosen], size, scale, ratio)
        return pooled.to(dtype)


def pooled_from_every_level(
    features: list[Tensor],
    rois: Tensor,
    levels: Tensor,
    size: tuple[int, int],
    scales: list[float],
    sampling_ratio: int,
) -> Tensor:
    """Pool all RoIs from each level, those of other levels from outside of it, where all is 0, and add up.

    A sample outside reads nothing, so the levels that do not count cost the writing of their zeros, and in turn no
    device is asked how many RoIs each level has.

    Args:
        features: maps (N, channels, H_l, W_l).
        rois: (R, 5), the image's index and xyxy in px of the image.
        levels: (R,) int64, each RoI's own.
        size: cells (down, across).
        scales: of the features to the image, by level.
        sampling_ratio: samples per cell along each axis; adaptive where not positive.

    Returns:
        (R, channels, *size).
    """
    pooled: Any = 0.0
    for level, (feature, scale) in enumerate(zip(features, scales, strict=True)):
        # RoIAlign still reads the border up to a pixel outside, and makes a box without an area one pixel long.
        elsewhere = (levels != level)[:, None]
        boxes = rois[:, 1:].masked_fill(elsewhere, -4.0 / scale)
        pooled = pooled + roi_align(
            feature, torch.cat([rois[:, :1], boxes], dim=1), size, scale, sampling_ratio
        )
    summed: Tensor = pooled
    return summed


def _takes_our_backward(feature: Tensor) -> bool:
    known = (torch.float32, torch.bfloat16, torch.float16)
    return feature.requires_grad and feature.device.type == "cpu" and feature.dtype in known


class _RoIAlign(torch.autograd.Function):
    """torchvision's unaligned RoIAlign forward, its transpose by matrix products backward."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        rois: Tensor,
        output_size: tuple[int, int],
        scale: float,
        sampling_ratio: int,
    ) -> Tensor:
        ctx.save_for_backward(rois)
        ctx.settings = (features.shape, output_size, scale, sampling_ratio)
        pooled: Tensor = roi_align(features, rois, output_size, scale, sampling_ratio)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (rois,) = ctx.saved_tensors
        # A backward pass that is called under autocast would round the products.
        with torch.autocast("cpu", enabled=False):
            return _spread(gradient, rois, *ctx.settings), None, None, None, None


def _spread(
    gradient: Tensor,
    rois: Tensor,
    shape: tuple[int, int, int, int],
    output_size: tuple[int, int],
    scale: float,
    sampling_ratio: int,
) -> Tensor:
    """Add each RoI's gradient to the pixels that its cells were sampled from.

    A pixel's weight in a cell is that of its row times that of its column, so two products per RoI give its whole
    window: of the rows' weights with the gradient, a stripe of the window's height for each column of cells, and of
    the columns' weights with the stripes. Channels come last in memory, where a window's row is one stretch.

    Args:
        gradient: (R, channels, *output_size).
        rois: (R, 5), the image's index and xyxy in px of the image.
        shape: (N, channels, H, W) of the features.
        output_size: cells (down, across).
        scale: of the features to the image.
        sampling_ratio: samples per cell along each axis; adaptive where not positive.

    Returns:
        (N, channels, H, W).
    """
    num_images, channels, height, width = shape
    gradient = gradient.permute(0, 2, 3, 1).contiguous()
    spread = gradient.new_zeros((num_images, height, width, channels))
    x1, y1, x2, y2 = (rois[:, 1:] * scale).unbind(1)
    rows = AxisSampling.of(y1, y2, height, output_size[0], aligned=False, sampling_ratio=sampling_ratio)
    columns = AxisSampling.of(x1, x2, width, output_size[1], aligned=False, sampling_ratio=sampling_ratio)
    windows = torch.stack([rois[:, 0].long(), rows.start, rows.stop, columns.start, columns.stop], dim=1)
    for first in range(0, len(rois), _ROIS_AT_ONCE):
        chunk = slice(first, first + _ROIS_AT_ONCE)
        row_weights, column_weights = (
            axis.weights(*axis.sizes()) for axis in (rows.of_boxes(chunk), columns.of_boxes(chunk))
        )
        for index, (image, top, bottom, left, right) in enumerate(windows[chunk].tolist()):
            down = row_weights[index, :, : bottom - top]  # (m, h)
            across = column_weights[index, :, : right - left]  # (n, w)
            cells = gradient[first + index].flatten(1)  # (m, n channels)
            stripes = (down.T @ cells).view(bottom - top, len(across), channels)  # (h, n, channels)
            spread[image, top:bottom, left:right] += across.T @ stripes
    return spread.permute(0, 3, 1, 2)
