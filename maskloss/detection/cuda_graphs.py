"""CUDA graphs of the convolutions of a training step: backbone, FPN and RPN head replayed as one launch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from maskloss.detection.transform import RCNNTransform

_Graph = Callable[[Tensor], tuple[Tensor, ...]]


def graph_convolutions(model: Any, batch_size: int, *, autocast: torch.dtype | None = None) -> None:
    """Replay the backbone, the FPN and the RPN head of training steps as CUDA graphs, in place.

    A graph has a fixed input size. Training batches are therefore padded to one of two sizes, landscape or portrait,
    with the largest sides that the transform allows, and the losses are those of the padded batches. Batches with
    another number of images or with both orientations, and evaluation, run without graphs.

    Call it after choosing which parameters are trained and which layers are in training mode, and before wrapping the
    model in DistributedDataParallel. Call `zero_grad` before each backward pass: gradients must not be accumulated
    over several passes, because a graph writes them to the same memory each time. The model can no longer be copied.

    Args:
        model: a converted model in training mode, on a GPU.
        batch_size: number of images per training step.
        autocast: dtype of mixed precision, torch.bfloat16 or torch.float16; None without.

    Raises:
        ValueError: the model's transform has been replaced, or resizes to a fixed size.

    Source: https://pytorch.org/docs/stable/notes/cuda.html#partial-network-capture
    """
    transform = model.transform
    if not isinstance(transform, RCNNTransform) or transform.fixed_size is not None:
        raise ValueError("CUDA graphs need torchvision's own transform, without fixed_size")
    shorter, longer = (-(-side // 32) * 32 for side in (max(transform.min_size), transform.max_size))
    transform.padded_sizes = ((shorter, longer), (longer, shorter))
    # Captures run the layers, which changes running statistics.
    buffers = [
        (buffer, buffer.clone()) for part in (model.backbone, model.rpn.head) for buffer in part.buffers()
    ]
    device = next(model.parameters()).device
    pool = torch.cuda.graph_pool_handle()
    graphs: dict[torch.Size, _Graph] = {}
    levels: list[str] = []
    for height, width in transform.padded_sizes:
        images = torch.rand(batch_size, 3, height, width, device=device)
        layers = _Convolutions(model.backbone, model.rpn.head)
        with torch.autocast(device.type, autocast, enabled=autocast is not None, cache_enabled=False):
            graph = torch.cuda.make_graphed_callables(layers, (images,), allow_unused_input=True, pool=pool)
        graphs[images.shape] = cast(_Graph, graph)
        levels = layers.levels
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
    replayed = _Replayed(model, graphs, levels)
    model.backbone.forward = replayed.backbone
    model.rpn.head.forward = replayed.head


class _Convolutions(nn.Module):
    """The layers of a graph, as a module with tensors as input and output.

    Attributes:
        levels: names of the feature levels, known after the first pass.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.layers, self.head = backbone, head
        self.levels: list[str] = []

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the features, the objectness and the box deltas of each level."""
        features = self.layers(images)
        if isinstance(features, Tensor):
            features = {"0": features}
        self.levels = list(features)
        objectness, deltas = self.head(list(features.values()))
        return (*features.values(), *objectness, *deltas)


class _Replayed:
    """The `forward` methods of a backbone and an RPN head that replay graphs.

    Args:
        model: the model, whose mode decides whether a pass is one of training.
        graphs: the graphs of `_Convolutions` by the shape (N, 3, H, W) of the images.
        levels: names of the feature levels.
    """

    def __init__(
        self,
        model: nn.Module,
        graphs: dict[torch.Size, _Graph],
        levels: list[str],
    ) -> None:
        self._model, self._graphs, self._levels = model, graphs, levels
        parts = cast(Any, model)
        self._own_backbone, self._own_head = parts.backbone.forward, parts.rpn.head.forward
        #: Outputs of the last replay.
        self._outputs: tuple[Tensor, ...] = ()

    def backbone(self, images: Tensor) -> Any:
        """Return the features of each level, and keep the RPN head's outputs, which the same graph computes."""
        graph = self._graphs.get(images.shape)
        if graph is None or not self._model.training or not torch.is_grad_enabled():
            self._outputs = ()
            return self._own_backbone(images)
        self._outputs = graph(images)
        return OrderedDict(zip(self._levels, self._outputs, strict=False))

    def head(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the objectness and the box deltas of each level, from the graph if it computed these features."""
        outputs, count = self._outputs, len(self._levels)
        if not outputs or not all(a is b for a, b in zip(features, outputs, strict=False)):
            found: tuple[list[Tensor], list[Tensor]] = self._own_head(features)
            return found
        self._outputs = ()
        return list(outputs[count : 2 * count]), list(outputs[2 * count :])
