"""The resolution of torchvision's mask layers."""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import torch
from torch import nn
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from maskloss.detection.mask_predictor import SECOND_UPSAMPLING, STOCK_LAYERS

MaskSize = Literal[14, 28, 56]
MASK_SIZES: tuple[MaskSize, ...] = get_args(MaskSize)


def set_mask_size(model: nn.Module, size: MaskSize) -> None:
    """Change the number of cells of the masks that a model's mask layers predict, in place.

    Targets and pasting follow from the size of the logits. Call it before the optimizer is made. The parameters are
    torchvision's, except for 56 cells:

    - 14: RoIs are pooled to 7 x 7 instead of 14 x 14 cells, which takes a quarter of the multiplications.
    - 28: torchvision's own size.
    - 56: a second transposed convolution, `roi_heads.mask_predictor.conv6_mask`. With 256 channels, the mask layers of
      a converted model then take 1.4 times as many multiplications. At first it repeats each cell, so that a trained
      model predicts the same masks in four times as many cells.

    Args:
        model: torchvision's `MaskRCNN`, before or after `maskloss.convert`, whose mask predictor and pooling are
            torchvision's.
        size: M, side of the masks in cells.

    Raises:
        TypeError: the mask predictor or its pooling is not torchvision's.
        ValueError: the size is not 14, 28 or 56.

    Example:
        >>> import torchvision
        >>> model = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
        >>> set_mask_size(model, 56)
        >>> model.roi_heads.mask_predictor(torch.rand(1, 256, 14, 14)).shape
        torch.Size([1, 91, 56, 56])

    Source: 28 cells and 14 (its variant C4): He et al., Mask R-CNN, 2017, arXiv:1703.06870. The start values: Chen et
    al., Net2Net, 2016, arXiv:1511.05641.
    """
    if size not in MASK_SIZES:
        raise ValueError(f"the size of masks must be 14, 28 or 56 cells, not {size!r}")
    heads: Any = getattr(model, "roi_heads", None)
    predictor, pool = getattr(heads, "mask_predictor", None), getattr(heads, "mask_roi_pool", None)
    if not isinstance(predictor, MaskRCNNPredictor) or not isinstance(pool, MultiScaleRoIAlign):
        raise TypeError(
            "the size of masks can be set only for torchvision's mask layers, a MaskRCNNPredictor and its pooling; "
            f"the model has {type(predictor).__name__} and {type(pool).__name__}"
        )
    own = {name: layer for name, layer in predictor._modules.items() if name not in SECOND_UPSAMPLING}
    if tuple(own) != STOCK_LAYERS:
        raise TypeError(
            f"the size of masks can be set only for the layers {', '.join(STOCK_LAYERS)}, not {', '.join(own)}"
        )
    upsample, relu, classify = cast("list[nn.Module]", list(own.values()))
    pool.output_size = (7, 7) if size == 14 else (14, 14)
    layers = {STOCK_LAYERS[0]: upsample, STOCK_LAYERS[1]: relu}
    if size == 56:
        second = predictor._modules.get(SECOND_UPSAMPLING[0]) or _repeating(upsample)
        layers |= {SECOND_UPSAMPLING[0]: second, SECOND_UPSAMPLING[1]: nn.ReLU(inplace=True)}
    layers[STOCK_LAYERS[2]] = classify
    # A Sequential applies its layers in this order.
    predictor._modules.clear()
    for name, layer in layers.items():
        predictor.add_module(name, layer)


def _repeating(layer: nn.Module) -> nn.ConvTranspose2d:
    """Make a transposed convolution that follows another one, and repeats each of its cells 2 x 2 times."""
    first: Any = layer
    channels = first.out_channels
    new = nn.ConvTranspose2d(channels, channels, 2, 2).to(first.weight)
    with torch.no_grad():
        new.weight.copy_(
            torch.eye(channels, device=new.weight.device)[:, :, None, None].expand_as(new.weight)
        )
        nn.init.zeros_(cast("nn.Parameter", new.bias))
    return new
