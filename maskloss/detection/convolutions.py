"""Cheaper convolutions: frozen norms folded into their weights, and features with channels last on a CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops.misc import FrozenBatchNorm2d

#: Names of convolutions in a block of torchvision's ResNets, and of the norms that follow them.
_IN_BLOCKS = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))
_Constants = tuple[Tensor, Tensor]


class FoldedNorm(FrozenBatchNorm2d):
    """A frozen batch norm that the convolution before it applies. It returns its input."""

    _constants: _Constants | None = None
    #: What the constants were computed from: eps, and the buffers with the number of their changes so far.
    _computed_from: tuple[float, list[Tensor], list[int]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the input, which is already normalized."""
        return x

    def scale_and_shift(self) -> _Constants:
        """Return the norm's scale and shift of each channel, (C,) each, (C,) each.

        They are computed again only after a buffer has been changed, replaced or moved.
        """
        # Changes of inference tensors are not counted, and constants that a graph reads must be part of the graph.
        if self.weight.is_inference() or torch.compiler.is_compiling() or _is_captured(self.weight):
            return self._computed()
        buffers = [self.weight, self.bias, self.running_mean, self.running_var]
        versions = [buffer._version for buffer in buffers]
        if self._constants is None or not self._is_computed_from(buffers, versions):
            # Constants made in inference mode could not be used in training.
            with torch.inference_mode(False):
                self._constants = self._computed()
            self._computed_from = self.eps, buffers, versions
        return self._constants

    def _is_computed_from(self, buffers: list[Tensor], versions: list[int]) -> bool:
        if self._computed_from is None:
            return False
        eps, old, old_versions = self._computed_from
        is_same = all(a is b for a, b in zip(buffers, old, strict=True))
        return is_same and (eps, old_versions) == (self.eps, versions)

    def _computed(self) -> _Constants:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to copy or pickle, without the constants, which copies compute themselves."""
        state: dict[str, Any] = super().__getstate__()
        return {key: value for key, value in state.items() if key not in ("_constants", "_computed_from")}


class FoldedConv2d(nn.Conv2d):
    """A convolution that also applies the frozen batch norm after it, by scaling its own weights and adding a bias."""

    #: Not a submodule, which would change the keys of the state_dict.
    _norm: FoldedNorm

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized convolution of images or features (N, C, H, W)."""
        scale, shift = self._norm.scale_and_shift()
        bias = shift if self.bias is None else shift + self.bias * scale
        return self._conv_forward(x, self.weight * scale[:, None, None, None], bias)


def fold_frozen_norms(model: nn.Module) -> nn.Module:
    """Let convolutions apply the frozen batch norms that directly follow them, in place.

    The results are the same up to rounding. Each forward pass scales the convolution's weights instead of making two
    passes over the features, and the weights can still be trained. This saves time on large images and six launches
    per norm on a GPU. Under mixed precision, it avoids features in float32. Parameters stay the same objects, and
    `state_dict` keys and values do not change.

    It folds torchvision's `FrozenBatchNorm2d` in torchvision's ResNet blocks, in the layers that torchvision's
    detection backbones take from a classification network, and in `nn.Sequential`. Norms that train, convolutions of
    other classes, layers that are used twice, and layers with hooks or their own `forward` are left as they are.

    Args:
        model: any model, before or after `maskloss.convert`.

    Returns:
        The model.

    Example:
        >>> from maskloss.detection.builders import ModelSettings, build_model
        >>> model = build_model(ModelSettings("resnet18", num_classes=2, frozen_normalization=True))
        >>> fold_frozen_norms(model).backbone.body.conv1.__class__.__name__
        'FoldedConv2d'
    """
    uses = Counter(layer for module in model.modules() for layer in module._modules.values())
    for module in model.modules():
        for conv, norm in _pairs(module):
            is_shared = uses[conv] > 1 or uses[norm] > 1
            if _is_plain(conv, nn.Conv2d) and _is_plain(norm, FrozenBatchNorm2d) and not is_shared:
                conv.__class__ = FoldedConv2d
                norm.__class__ = FoldedNorm
                conv.__dict__["_norm"] = norm
    return model


def _is_captured(tensor: Tensor) -> bool:
    """Return whether the next operation on a tensor becomes part of a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _pairs(module: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield pairs of a module's layers in which the second is the only consumer of the first one's output."""
    forward = type(module).forward
    if forward in (BasicBlock.forward, Bottleneck.forward):
        layers = dict(module.named_children())
        for conv, norm in _IN_BLOCKS:
            if conv in layers and norm in layers:
                yield layers[conv], layers[norm]
    elif isinstance(module, IntermediateLayerGetter) and forward is IntermediateLayerGetter.forward:
        for conv, norm in pairwise(module):
            if conv not in module.return_layers:
                yield module[conv], module[norm]
    elif isinstance(module, nn.Sequential) and forward is nn.Sequential.forward:
        yield from pairwise(module)


def _is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a layer is of exactly this class, with its own `forward`, and without hooks."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return type(layer) is kind and "forward" not in vars(layer) and not any(hooks)


def use_channels_last(model: Any) -> Any:
    """Convert the inputs of a detector's convolutions to channels last on a CPU, where they then take less time.

    These are the images of the backbone, and the pooled features of the heads for boxes and masks if these have
    convolutions. Nothing changes on a GPU, where the gain depends on the precision.

    Args:
        model: a detector of torchvision, before or after `maskloss.convert`.

    Returns:
        The model.

    Example:
        >>> from maskloss.detection.builders import ModelSettings, build_model
        >>> model = use_channels_last(build_model(ModelSettings("resnet18", num_classes=2)))
        >>> model.backbone(torch.rand(1, 3, 64, 64))["0"].is_contiguous(memory_format=torch.channels_last)
        True
    """
    heads = model.roi_heads
    for part in (model.backbone, heads.box_head, getattr(heads, "mask_head", None)):
        if part is None or _with_channels_last in part._forward_pre_hooks.values():
            continue
        if any(isinstance(layer, nn.Conv2d) for layer in part.modules()):
            part.register_forward_pre_hook(_with_channels_last)
    return model


def _with_channels_last(part: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Change the layout of the input of a model's part, as a forward pre-hook."""
    if not inputs or torch.compiler.is_exporting():
        return None
    features, *others = inputs
    if not isinstance(features, Tensor) or features.dim() != 4 or features.device.type != "cpu":
        return None
    return (features.contiguous(memory_format=torch.channels_last), *others)
