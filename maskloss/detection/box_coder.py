"""Box deltas as torchvision encodes and decodes them, without its constants on the device."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder as TorchvisionBoxCoder


class BoxCoder(TorchvisionBoxCoder):
    """torchvision's `BoxCoder`, bit for bit.

    torchvision makes a tensor of 0.5, or of the weights, on the device in each call, and so waits for the device
    in each. Here they are the numbers that they are.

    Source: Girshick et al., "Rich feature hierarchies", 2014, appendix C; the weights are those of
    Faster R-CNN's code, one over the deltas' standard deviations.
    """

    def encode_single(self, reference_boxes: Tensor, proposals: Tensor) -> Tensor:
        """Give the deltas (P, 4) that move each of the proposals (P, 4) to its reference box (P, 4), xyxy."""
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
        """Move boxes (R, 4), xyxy, by deltas (R, 4 C) of each class, in the deltas' dtype: (R, 4 C)."""
        boxes = boxes.to(rel_codes.dtype)
        size = boxes[:, 2:] - boxes[:, :2]
        center = boxes[:, :2] + 0.5 * size
        dx, dy, dw, dh = (rel_codes[:, place::4] / weight for place, weight in enumerate(self.weights))
        # exp of an untrained network's delta could be infinite.
        dw, dh = dw.clamp(max=self.bbox_xform_clip), dh.clamp(max=self.bbox_xform_clip)
        x, y = dx * size[:, :1] + center[:, :1], dy * size[:, 1:] + center[:, 1:]
        half_width, half_height = 0.5 * (dw.exp() * size[:, :1]), 0.5 * (dh.exp() * size[:, 1:])
        corners = (x - half_width, y - half_height, x + half_width, y + half_height)
        return torch.stack(corners, dim=2).flatten(1)
