"""The mask predictor that computes only the channel that counts."""

from __future__ import annotations

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor

from maskloss.losses.mask_classes import select_class_masks


class ClassSelectedMaskPredictor(MaskRCNNPredictor):
    """torchvision's `MaskRCNNPredictor`, with one channel per RoI where the class is known.

    The last layer is a 1 x 1 convolution to `num_classes` channels, of which the loss and the detections read
    one per RoI. Given the labels, each RoI takes the dot product with its own class's weights instead: the
    same number, at a cost that does not grow with the classes. Parameters and `state_dict` are torchvision's.

    Args:
        in_channels: of the mask head's features.
        dim_reduced: channels after the transposed convolution.
        num_classes: C, background included.
    """

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """Compute mask logits.

        Args:
            features: (N, in_channels, M / 2, M / 2).
            labels: (N,) int64 in [0, C), the class of each RoI; None computes every class.

        Returns:
            (N, C, M, M) without labels, (N, 1, M, M) with.
        """
        features = self.relu(self.conv5_mask(features))  # (N, dim_reduced, M, M)
        # torch.fx.symbolic_trace fills every argument; what it is to record is torchvision's function of the features.
        if labels is None or isinstance(labels, torch.fx.Proxy):
            logits: Tensor = self.mask_fcn_logits(features)
            return logits
        layer = self.mask_fcn_logits
        if getattr(layer, "out_channels", None) == 1:
            # A class-agnostic head, whose channel serves all.
            agnostic: Tensor = layer(features)
            return agnostic
        if not _is_plain_pointwise(layer):
            return select_class_masks(layer(features), labels)[:, None]
        # An embedding lookup, because its backward adds up rows of the same class much faster than indexing's.
        weights = F.embedding(labels, layer.weight.flatten(1))  # (N, dim_reduced)
        selected = torch.bmm(weights[:, None, :], features.flatten(2)).unflatten(2, features.shape[2:])
        if layer.bias is None:
            return selected
        # The bias last, so that what is returned is no view: fully_shard warns of a module that returns one.
        return selected + F.embedding(labels, layer.bias[:, None])[:, :, None, None].to(selected.dtype)


def _is_plain_pointwise(layer: nn.Module) -> bool:
    """Whether a layer is the 1 x 1 convolution that torchvision puts there, and nothing of a user's besides.

    Another layer in its place, a hook or a parametrisation is the user's, so it is called, not read.
    """
    return (
        type(layer) is nn.Conv2d
        and (layer.kernel_size, layer.stride, layer.padding, layer.groups) == ((1, 1), (1, 1), (0, 0), 1)
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and not (layer._backward_hooks or layer._backward_pre_hooks)
        and "forward" not in vars(layer)
    )
