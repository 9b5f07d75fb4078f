"""maskloss/detection/nms.py: in an export, NMS keeps the boxes that torchvision's keeps."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import batched_nms as torchvision_batched_nms

from maskloss.detection.nms import batched_nms


@pytest.mark.parametrize("exporting", [False, True])
@pytest.mark.parametrize("count", [0, 1, 2, 300, 2000])
def test_it_keeps_what_torchvision_keeps(
    exporting: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(count)
    corners = torch.rand((count, 2), generator=generator) * 100
    boxes = torch.cat([corners, corners + torch.rand((count, 2), generator=generator) * 40], dim=1)
    scores, groups = torch.rand(count, generator=generator), torch.randint(5, (count,), generator=generator)
    expected = torchvision_batched_nms(boxes, scores, groups, 0.5)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: exporting)
    assert torch.equal(batched_nms(boxes, scores, groups, 0.5), expected)
    assert len(expected) < count or count < 3
