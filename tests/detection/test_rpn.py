"""RegionProposalNetwork: proposals, labels and matched boxes equal torchvision's."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork as TorchvisionRPN

import maskloss
from maskloss.detection import RegionProposalNetwork
from tests.detection.small_models import CHANNELS, batch, tiny_mask_rcnn, training_pass

SIZES = [(40, 56), (48, 64)]


def inputs() -> tuple[ImageList, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 48, 64, generator=generator)
    return ImageList(images, SIZES), {"0": torch.rand(2, CHANNELS, 24, 32, generator=generator)}


def pair(**settings: Any) -> tuple[Any, Any]:
    """The stock and the converted RPN, with the same weights."""
    stock, ours = tiny_mask_rcnn().rpn, maskloss.convert(tiny_mask_rcnn()).rpn
    for rpn in (stock, ours):
        for name, value in settings.items():
            setattr(rpn, name, value)
    return stock, ours


SETTINGS: dict[str, dict[str, Any]] = {
    "as they are": {},
    "a score threshold": {"score_thresh": 0.5},
    "no box is small enough to drop": {"min_size": 0.0},
    "small boxes dropped": {"min_size": 6.0},
    "few before NMS": {"_pre_nms_top_n": {"training": 7, "testing": 5}},
    "few after NMS": {"_post_nms_top_n": {"training": 3, "testing": 2}},
    "more than there are": {"_pre_nms_top_n": {"training": 10**6, "testing": 10**6}},
    "hardly any NMS": {"nms_thresh": 0.95},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("ties", [False, True])
def test_proposals_equal_torchvisions_bit_for_bit(name: str, training: bool, ties: bool) -> None:
    images, features = inputs()
    if ties:
        # Constant features, so that many anchors have the same objectness.
        features = {"0": features["0"][:, :, :1, :1].expand_as(features["0"]).contiguous()}
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 30.0, 30.0]])}] * 2
    found = []
    for rpn in pair(**SETTINGS[name]):
        rpn.train(training)
        torch.manual_seed(0)
        boxes, losses = rpn(images, features, targets if training else None)
        found.append((boxes, losses))
    (expected, expected_losses), (proposals, losses) = found
    assert sum(len(boxes) for boxes in expected) > 0
    for boxes, others in zip(proposals, expected, strict=True):
        assert torch.equal(boxes, others)
    assert losses.keys() == expected_losses.keys()
    for key, value in expected_losses.items():
        torch.testing.assert_close(losses[key], value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("count", [0, 1, 6])
def test_labels_and_matched_boxes_equal_torchvisions(count: int) -> None:
    stock, ours = pair()
    generator = torch.Generator().manual_seed(1)
    anchors = [9 * torch.rand(500, 4, generator=generator).cumsum(1) for _ in range(2)]
    targets = [{"boxes": anchors[0][:count] + 0.5}, {"boxes": anchors[1][: 2 * count]}]
    expected_labels, expected_boxes = stock.assign_targets_to_anchors(anchors, targets)
    labels, boxes = ours.assign_targets_to_anchors(anchors, targets)
    for found, expected in zip([*labels, *boxes], [*expected_labels, *expected_boxes], strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def thinned(rpn: Any, *arguments: Any) -> Any:
    """A user's filter that keeps every second proposal, and uses random numbers as the sampler does."""
    boxes, scores = TorchvisionRPN.filter_proposals(rpn, *arguments)
    start = int(torch.randint(2, ()))
    return [of_image[start::2] for of_image in boxes], scores


class ThinningRPN(RegionProposalNetwork):
    def filter_proposals(self, *arguments: Any) -> Any:
        return thinned(self, *arguments)


class StockThinningRPN(TorchvisionRPN):
    def filter_proposals(self, *arguments: Any) -> Any:
        return thinned(self, *arguments)


@pytest.mark.parametrize("way", ["patched before", "patched after", "overridden"])
def test_a_filter_of_the_users_own_is_called_as_in_torchvision(way: str) -> None:
    stock, ours = tiny_mask_rcnn(), tiny_mask_rcnn()
    stock.rpn.__class__ = StockThinningRPN
    if way == "overridden":
        ours.rpn.__class__ = ThinningRPN
    if way == "patched before":
        ours.rpn.filter_proposals = partial(thinned, ours.rpn)
    maskloss.convert(ours)
    if way == "patched after":
        ours.rpn.filter_proposals = partial(thinned, ours.rpn)
    expected, _ = training_pass(stock, *batch())
    losses, _ = training_pass(ours, *batch())
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value, rtol=1e-6, atol=0)
    images, _ = batch()
    found = []
    for model in (stock, ours):
        torch.manual_seed(0)
        found.append(model.eval()(images))
    for detections, others in zip(*found, strict=True):
        assert torch.equal(detections["boxes"], others["boxes"])


class OwnLossRPN(RegionProposalNetwork):
    def compute_loss(self, *arguments: Any) -> Any:
        raise AssertionError("was called")


class OwnForwardRPN(OwnLossRPN):
    def forward(self, *arguments: Any) -> Any:
        return RegionProposalNetwork.forward(self, *arguments)


def test_a_subclass_whose_loss_would_not_be_called_raises() -> None:
    model = tiny_mask_rcnn()
    model.rpn.__class__ = OwnLossRPN
    message = (
        r"model\.rpn\.compute_loss has been overridden in .*OwnLossRPN.*pass the objectness and rpn_box terms"
    )
    with pytest.raises(TypeError, match=message):
        maskloss.convert(model)
    model.rpn.__class__ = OwnForwardRPN  # which may call it
    maskloss.convert(model)
