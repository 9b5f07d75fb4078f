"""The losses under torch.compile: one graph without a break, one compilation for any number of RoIs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from maskloss.losses import BoxRegression, MaskRCNNLoss
from maskloss.losses.normalizers import BatchCounts
from maskloss.losses.presets import PRESETS
from maskloss.losses.terms import MaskBatch, RoIBatch, RPNBatch

pytestmark = pytest.mark.slow

C, M = 5, 7
#: Sampled anchors, positives among them, sampled RoIs, positives among them. torch.compile specializes on 0 and 1.
SIZES = [(512, 30, 1024, 60), (511, 31, 1000, 61), (300, 2, 900, 9), (7, 3, 5, 2)]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch(anchors: int, positive_anchors: int, rois: int, positives: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(anchors)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, requires_grad=True)

    return [
        values(anchors),
        (values(anchors) > 0).float(),
        values(positive_anchors, 4),
        values(positive_anchors, 4).detach(),
        values(rois, C),
        torch.randint(C, (rois,), generator=generator),
        values(positives, 4),
        values(positives, 4).detach(),
        values(positives, 1, M, M),
        values(positives, M, M).detach().sigmoid(),
        torch.randint(1, C, (positives,), generator=generator),
    ]


def total(loss: MaskRCNNLoss, tensors: list[Tensor]) -> Tensor:
    objectness, labels, deltas, target_deltas, class_logits, classes, *masks = tensors
    box_deltas, target_box_deltas, mask_logits, mask_targets, mask_labels = masks
    anchors = BatchCounts(
        num_images=2,
        sampled=objectness.shape[0],
        positives=deltas.shape[0],
        batch_size_per_image=256,
        locations=1000,
    )
    rois = BatchCounts(
        num_images=2,
        sampled=class_logits.shape[0],
        positives=box_deltas.shape[0],
        batch_size_per_image=512,
    )
    losses = loss.rpn_losses(RPNBatch(objectness, labels, BoxRegression(deltas, target_deltas), anchors))
    losses |= loss.roi_losses(
        RoIBatch(class_logits, classes, BoxRegression(box_deltas, target_box_deltas), rois)
    )
    losses |= loss.mask_losses(MaskBatch(mask_logits, mask_targets, mask_labels, rois))
    return torch.stack(list(losses.values())).sum()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_one_graph_for_any_number_of_rois(preset: str) -> None:
    loss = MaskRCNNLoss.preset(preset)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(total, backend=counter, fullgraph=True, dynamic=True)
    compiled(loss, batch(*SIZES[0]))
    compilations = counter.frame_count
    for sizes in SIZES:
        tensors, others = batch(*sizes), batch(*sizes)
        value, expected = compiled(loss, tensors), total(loss, others)
        torch.testing.assert_close(value, expected)
        value.backward()
        expected.backward()
        for tensor, other in zip(tensors, others, strict=True):
            if tensor.is_leaf and tensor.requires_grad:
                torch.testing.assert_close(tensor.grad, other.grad)
    assert counter.frame_count == compilations


@pytest.mark.parametrize("preset", PRESETS)
def test_a_batch_without_positives_compiles_too(preset: str) -> None:
    loss = MaskRCNNLoss.preset(preset)
    compiled = torch.compile(total, backend="aot_eager", fullgraph=True, dynamic=True)
    tensors = batch(8, 0, 8, 0)
    torch.testing.assert_close(compiled(loss, tensors), total(loss, tensors))
