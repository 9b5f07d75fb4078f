"""Encode and decode box deltas as torchvision does, without synchronizing with the device."""

from __future__ import annotations

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
        wx, wy, ww, wh = self.weights
        return torch.stack(
            [
                wx * offset[:, 0] / size[:, 0],
                wy * offset[:, 1] / size[:, 1],
                ww * growth[:, 0],
                wh * growth[:, 1],
            ],
            dim=1,
        )

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Return boxes (R, 4), xyxy, moved by each class's deltas (R, 4 C): (R, 4 C), in the deltas' dtype."""
        boxes = boxes.to(rel_codes.dtype)
        size = boxes[:, 2:] - boxes[:, :2]
        center = boxes[:, :2] + 0.5 * size
        dx, dy, dw, dh = (rel_codes[:, place::4] / weight for place, weight in enumerate(self.weights))
        # exp of an untrained network's delta can overflow.
        dw, dh = dw.clamp(max=self.bbox_xform_clip), dh.clamp(max=self.bbox_xform_clip)
        x, y = dx * size[:, :1] + center[:, :1], dy * size[:, 1:] + center[:, 1:]
        half_width, half_height = 0.5 * (dw.exp() * size[:, :1]), 0.5 * (dh.exp() * size[:, 1:])
        corners = (x - half_width, y - half_height, x + half_width, y + half_height)
        return torch.stack(corners, dim=2).flatten(1)
