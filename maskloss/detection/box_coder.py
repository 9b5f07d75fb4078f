"""Encode and decode box deltas as torchvision does, without synchronizing with the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder as TorchvisionBoxCoder


class BoxCoder(TorchvisionBoxCoder):
    """torchvision's `BoxCoder` without synchronization, equal bit for bit.

    Each call of torchvision's methods copies a constant (0.5, or the weights) to a tensor on the device, and thereby
    synchronizes. Here the constants are Python numbers.

    Example:
        >>> coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
        >>> coder.encode_single(torch.tensor([[1.0, 0.0, 3.0, 2.0]]), torch.tensor([[0.0, 0.0, 2.0, 2.0]]))
        tensor([[5., 0., 0., 0.]])

    Source: Girshick et al., "Rich feature hierarchies", 2014, appendix C. The weights are those of Faster R-CNN's
    code: one over the standard deviations of the deltas.
    """

    def encode_single(self, reference_boxes: Tensor, proposals: Tensor) -> Tensor:
        """Return the deltas (P, 4) that move each proposal (P, 4) to its reference box (P, 4), both xyxy."""
        low, size = proposals[:, :2], proposals[:, 2:] - proposals[:, :2]
        gt_low, gt_size = reference_boxes[:, :2], reference_boxes[:, 2:] - reference_boxes[:, :2]
        offset = (gt_low + 0.5 * gt_size) - (low + 0.5 * size)
        growth = (gt_size / size).log()
        of_offset, of_growth = self.weights[:2], self.weights[2:]
        return torch.cat(
            [_each(torch.mul, offset, of_offset) / size, _each(torch.mul, growth, of_growth)], dim=1
        )

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Return boxes (R, 4), xyxy, moved by each class's deltas (R, 4 C): (R, 4 C), in the deltas' dtype."""
        boxes = boxes.to(rel_codes.dtype)[:, None]  # (R, 1, 4)
        size = boxes[..., 2:] - boxes[..., :2]
        center = boxes[..., :2] + 0.5 * size
        deltas = rel_codes.unflatten(1, (-1, 4))  # (R, C, 4)
        of_offset, of_growth = self.weights[:2], self.weights[2:]
        offset = _each(torch.div, deltas[..., :2], of_offset)
        # exp of an untrained network's delta can overflow.
        growth = _each(torch.div, deltas[..., 2:], of_growth).clamp(max=self.bbox_xform_clip)
        center, half = offset * size + center, 0.5 * (growth.exp() * size)
        return torch.cat([center - half, center + half], dim=2).flatten(1)


def _each(operation: Any, values: Tensor, weights: tuple[float, float]) -> Tensor:
    """Apply an operation with a weight of its own to x and to y, (..., 2); usually both weights are equal."""
    if weights[0] == weights[1]:
        return operation(values, weights[0])
    return torch.stack([operation(values[..., axis], weight) for axis, weight in enumerate(weights)], dim=-1)
