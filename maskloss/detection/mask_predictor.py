"""Mask predictor that computes only the channel of each RoI's class."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor

from maskloss.losses.mask_classes import select_class_masks

#: Names of the layers of torchvision's `MaskRCNNPredictor`.
STOCK_LAYERS = ("conv5_mask", "relu", "mask_fcn_logits")
#: Names of the layers that follow "relu" in masks of 56 x 56 cells.
SECOND_UPSAMPLING = ("conv6_mask", "second_relu")


class ClassSelectedMaskPredictor(MaskRCNNPredictor):
    """torchvision's `MaskRCNNPredictor` that computes only one channel per RoI if labels are given.

    The last layer is a 1 x 1 convolution to `num_classes` channels, of which the loss and the detections use one per
    RoI. Given labels, each RoI uses only its own class's weights. The result is the same, and its cost does not grow
    with the number of classes. Parameters and `state_dict` are torchvision's.

    Args:
        in_channels: number of channels of the mask head's features.
        dim_reduced: number of channels after the transposed convolution.
        num_classes: C, background included.

    Example:
        >>> predictor, features = ClassSelectedMaskPredictor(8, 8, num_classes=3), torch.rand(2, 8, 14, 14)
        >>> predictor(features).shape, predictor(features, torch.tensor([1, 2])).shape
        (torch.Size([2, 3, 28, 28]), torch.Size([2, 1, 28, 28]))
    """

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """Compute mask logits.

        Args:
            features: (N, in_channels, S, S). M is 2 S, or 4 S after `set_mask_size(model, 56)`.
            labels: (N,) int64 in [0, C), class of each RoI; None for the logits of all classes.

        Returns:
            (N, C, M, M) without labels, (N, 1, M, M) with labels.
        """
        *upsampling, layer = cast("Iterable[Any]", self._modules.values())
        for module in upsampling:
            features = module(features)
        # Now (N, dim_reduced, M, M).
        # torch.fx.symbolic_trace passes a proxy for every argument. It should record torchvision's forward pass.
        if labels is None or isinstance(labels, torch.fx.Proxy):
            logits: Tensor = layer(features)
            return logits
        if getattr(layer, "out_channels", None) == 1:
            # A class-agnostic head has one channel for all classes.
            agnostic: Tensor = layer(features)
            return agnostic
        if not _is_plain_pointwise(layer):
            return select_class_masks(layer(features), labels)[:, None]
        # The backward pass of an embedding lookup sums rows of the same class much faster than that of indexing.
        weights = F.embedding(labels, layer.weight.flatten(1))  # (N, dim_reduced)
        selected = torch.bmm(weights[:, None, :], features.flatten(2)).unflatten(2, features.shape[2:])
        if layer.bias is None:
            return selected
        # Add the bias last, so that the result is not a view: fully_shard warns about modules that return views.
        return selected + F.embedding(labels, layer.bias[:, None])[:, :, None, None].to(selected.dtype)


def selects_channels(predictor: Any) -> bool:
    """Return whether a mask predictor takes labels, and no user code expects torchvision's arguments and all classes.

    Such code is a hook, or a `forward` that has been patched on the instance and does not pass on all arguments.
    torch's own hooks, such as those of `fully_shard`, do not depend on the classes.

    Example:
        >>> predictor = ClassSelectedMaskPredictor(8, 8, num_classes=3)
        >>> handle = predictor.register_forward_hook(lambda module, args, logits: print(logits.shape))
        >>> selects_channels(predictor)
        False
    """
    if not isinstance(predictor, ClassSelectedMaskPredictor):
        return False
    hooks = (
        *predictor._forward_hooks.values(),
        *predictor._forward_pre_hooks.values(),
        *predictor._backward_hooks.values(),
        *predictor._backward_pre_hooks.values(),
    )
    return _takes_labels(vars(predictor).get("forward")) and all(
        str(getattr(hook, "__module__", "")).startswith("torch.") for hook in hooks
    )


def _takes_labels(forward: Any) -> bool:
    """Return whether a patched `forward`, or None, takes `labels` or any arguments, as wrappers around methods do."""
    if forward is None:
        return True
    parameters = inspect.signature(forward).parameters.values()
    return any(p.name == "labels" or p.kind is p.VAR_POSITIONAL for p in parameters)


def _is_plain_pointwise(layer: nn.Module) -> bool:
    """Return whether a layer is torchvision's plain 1 x 1 convolution, without any user code.

    If a user has replaced or parametrized the layer, or added hooks, it must be called, not replaced by its weights.
    """
    return (
        type(layer) is nn.Conv2d
        and (layer.kernel_size, layer.stride, layer.padding, layer.groups) == ((1, 1), (1, 1), (0, 0), 1)
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and not (layer._backward_hooks or layer._backward_pre_hooks)
        and "forward" not in vars(layer)
    )
