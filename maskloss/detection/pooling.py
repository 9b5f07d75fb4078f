"""RoI pooling with a faster backward pass on CPUs, and without synchronization on GPUs."""

from __future__ import annotations

from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchvision.ops import MultiScaleRoIAlign as TorchvisionMultiScaleRoIAlign
from torchvision.ops import roi_align
from torchvision.ops.poolers import _filter_input, _setup_scales

from maskloss.masks.roi_align import AxisSampling

#: Chunk size: RoIs whose sampling weights are computed together.
_ROIS_AT_ONCE = 64


class MultiScaleRoIAlign(TorchvisionMultiScaleRoIAlign):
    """torchvision's pooler with gradients computed by matrix products on CPUs; pooled features are equal.

    On a CPU, torchvision's backward pass adds every sample of every channel to the feature map separately, in one
    thread, which takes a seventh of the RoI heads' training time. On other devices, and without gradients, this class
    uses torchvision's code.

    Attributes:
        sync_free: in training on a GPU, do not synchronize to find out which boxes belong to which level; see
            `convert`.

    Example:
        >>> pool = MultiScaleRoIAlign(["0"], output_size=7, sampling_ratio=2)
        >>> pool({"0": torch.rand(1, 8, 16, 16)}, [torch.tensor([[0.0, 0.0, 32.0, 32.0]])], [(64, 64)]).shape
        torch.Size([1, 8, 7, 7])
    """

    scales: list[float] | None
    map_levels: Any
    sync_free: bool = False

    def forward(
        self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        """Pool each box from the feature level that its size belongs to.

        Args:
            x: feature maps (N, channels, H_l, W_l), by level.
            boxes: N tensors (R_i, 4), xyxy in px of the images.
            image_shapes: N sizes (H, W) of the images.

        Returns:
            (R, channels, *output_size), in the order of the images and their boxes.
        """
        features: list[Tensor] = _filter_input(x, self.featmap_names)
        # torch.jit.trace, and so torch.onnx.export(dynamo=False), would record the number of RoIs of each level.
        recorded = torch.compiler.is_compiling() or torchvision._is_tracing()
        ours = torch.is_grad_enabled() and not recorded
        our_backward = ours and all(_takes_our_backward(feature) for feature in features)
        without_sync = self.training and self.sync_free and features[0].device.type != "cpu"
        # torch.export cannot trace torchvision's code, which depends on the number of RoIs of each level.
        exporting = torch.compiler.is_exporting()
        if not (our_backward or without_sync or exporting):
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
            # As torchvision does under autocast: the CPU kernel does not support lower precision.
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
    """Pool every RoI from all levels and sum; on other levels, a RoI is moved outside the map, where samples are 0.

    Samples outside the map read no features, so each extra level costs only writing zeros. In return, the host does not
    synchronize to count the RoIs of each level.

    Args:
        features: per level, maps (N, channels, H_l, W_l).
        rois: (R, 5), index of the image and xyxy in px of the image.
        levels: (R,) int64, level of each RoI.
        size: number of cells (down, across).
        scales: per level, features' size divided by the image's size.
        sampling_ratio: samples per cell along each axis; adaptive if not positive.

    Returns:
        (R, channels, *size).

    Example:
        >>> features, rois = [torch.ones(1, 1, 8, 8), 2 * torch.ones(1, 1, 4, 4)], torch.tensor([[0.0, 0, 0, 4, 4]])
        >>> pooled_from_every_level(features, rois, torch.tensor([1]), (1, 1), [1.0, 0.5], 2)
        tensor([[[[2.]]]])
    """
    pooled: Any = 0.0
    for level, (feature, scale) in enumerate(zip(features, scales, strict=True)):
        # -4: RoIAlign reads the border up to one pixel outside the map, and makes boxes at least one pixel long.
        elsewhere = (levels != level)[:, None]
        boxes = rois[:, 1:].masked_fill(elsewhere, -4.0 / scale)
        pooled = pooled + roi_align(
            feature, torch.cat([rois[:, :1], boxes], dim=1), size, scale, sampling_ratio
        )
    summed: Tensor = pooled
    return summed


def _takes_our_backward(feature: Tensor) -> bool:
    supported = (torch.float32, torch.bfloat16, torch.float16)
    return feature.requires_grad and feature.device.type == "cpu" and feature.dtype in supported


class _RoIAlign(torch.autograd.Function):
    """torchvision's unaligned RoIAlign as forward pass, with a backward pass by matrix products."""

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
        # If the backward pass runs under autocast, it would round the products to half precision.
        with torch.autocast("cpu", enabled=False):
            return _spread_gradient(gradient, rois, *ctx.settings), None, None, None, None


def _spread_gradient(
    gradient: Tensor,
    rois: Tensor,
    shape: tuple[int, int, int, int],
    output_size: tuple[int, int],
    scale: float,
    sampling_ratio: int,
) -> Tensor:
    """Add each RoI's gradient to the pixels from which its cells were sampled.

    A pixel's weight in a cell is its row's weight times its column's weight, so two matrix products per RoI compute its
    whole window. The first multiplies the row weights with the gradient, and yields one stripe as high as the window
    per column of cells. The second multiplies the column weights with the stripes. Channels are last in memory, so
    that each row of a window is contiguous.

    Args:
        gradient: (R, channels, *output_size).
        rois: (R, 5), index of the image and xyxy in px of the image.
        shape: (N, channels, H, W) of the features.
        output_size: number of cells (down, across).
        scale: features' size divided by the image's size.
        sampling_ratio: samples per cell along each axis; adaptive if not positive.

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
