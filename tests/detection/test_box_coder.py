"""BoxCoder equals torchvision's bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder as TorchvisionBoxCoder

from maskloss.detection.box_coder import BoxCoder

WEIGHTS = [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0), (3.3, 0.7, 1 / 3, 0.1)]


def boxes(count: int, seed: int, dtype: torch.dtype) -> Tensor:
    values = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed)) * 500
    return torch.cat([values[:, :2], values[:, :2] + values[:, 2:]], dim=1).to(dtype)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_deltas_and_boxes_equal_torchvisions(weights, dtype):
    ours, stock = BoxCoder(weights), TorchvisionBoxCoder(weights)
    proposals, gt_boxes = boxes(2000, 0, dtype), boxes(2000, 1, dtype)
    assert torch.equal(ours.encode_single(gt_boxes, proposals), stock.encode_single(gt_boxes, proposals))
    # Some deltas exceed the clipping limit.
    deltas = 20 * torch.randn(2000, 12, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert torch.equal(ours.decode_single(deltas, proposals), stock.decode_single(deltas, proposals))


def test_no_boxes_give_no_boxes():
    coder, none = BoxCoder(WEIGHTS[1]), torch.zeros(0, 4)
    assert coder.encode_single(none, none).shape == (0, 4)
    assert coder.decode_single(torch.zeros(0, 12), none).shape == (0, 12)
