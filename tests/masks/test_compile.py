"""Batched bitmap targets under torch.compile: one graph without a break, for boxes of any number and size."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torchvision.ops import roi_align

from maskloss.masks.roi_align import AxisSampling, align_crops

HEIGHT, WIDTH, M = 60, 80, 7


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def crops(count: int, largest_side: float) -> tuple[Tensor, Tensor, Tensor]:
    """Masks, boxes, and the index of each box's mask."""
    generator = torch.Generator().manual_seed(count)
    masks = torch.rand(3, HEIGHT, WIDTH, generator=generator) < 0.5
    low = torch.rand(count, 2, generator=generator) * 20
    boxes = torch.cat([low, low + 4 + largest_side * torch.rand(count, 2, generator=generator)], dim=1)
    return masks, boxes, torch.randint(3, (count,), generator=generator)


@pytest.mark.parametrize("aligned", [False, True])
def test_targets_are_one_graph_compiled_once_for_any_boxes(aligned: bool) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(align_crops, backend=counter, fullgraph=True, dynamic=True)
    compilations = []
    for count, largest_side in ((9, 20.0), (30, 35.0), (5, 12.0), (17, 40.0)):
        masks, boxes, instances = crops(count, largest_side)
        x1, y1, x2, y2 = boxes.unbind(1)
        rows = AxisSampling.of(y1, y2, HEIGHT, M, aligned=aligned)
        columns = AxisSampling.of(x1, x2, WIDTH, M, aligned=aligned)
        targets, _ = compiled(masks, instances, rows, columns, rows.sizes(), columns.sizes())
        rois = torch.cat([instances[:, None].float(), boxes], dim=1)
        expected = roi_align(masks[:, None].float(), rois, (M, M), 1.0, -1, aligned)[:, 0]
        torch.testing.assert_close(targets, expected, rtol=0, atol=2e-6)
        compilations.append(counter.frame_count)
    assert compilations == [1, 1, 1, 1]
