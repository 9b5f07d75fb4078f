"""Matching in chunks equals torchvision's Matcher on the whole matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection._utils import Matcher, SSDMatcher
from torchvision.ops import box_iou

from benchmarks.pretended_device import counted, pretended_device, sent
from maskloss.detection import matching
from maskloss.detection.matching import match

# On a lattice, so that equal IoUs, boxes that touch, and equal boxes are common.
boxes_on_a_lattice = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 5), st.integers(1, 5)),
    min_size=1,
    max_size=30,
).map(lambda rows: torch.tensor([[x, y, x + w, y + h] for x, y, w, h in rows], dtype=torch.float32))


@pytest.fixture(autouse=True)
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use chunks of a few boxes each."""
    monkeypatch.setattr(matching, "_PAIRS_AT_ONCE", {"cpu": 20})
    monkeypatch.setattr(matching, "_CHUNKS_NOT_WORTH_IT", 1)
    monkeypatch.setattr(matching, "_LEAST_BOXES", 4)


@pytest.mark.parametrize("remembered", [2**28, 0], ids=["one pass", "two passes"])
def test_a_gpu_matches_as_torchvision_without_waiting(
    remembered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matching, "_PAIRS_AT_ONCE", {"cuda": 20})
    monkeypatch.setattr(matching, "_PAIRS_REMEMBERED", remembered)
    generator = torch.Generator().manual_seed(0)
    for seed in range(20):
        # Small whole numbers, so that equal IoUs and objects without an overlap are common.
        low = torch.randint(0, 9, (53, 2), generator=generator)
        lattice = torch.cat([low, low + torch.randint(1, 5, (53, 2), generator=generator)], dim=1).float()
        gt_boxes, boxes = lattice[:3], lattice[3:]
        if seed == 0:
            gt_boxes[1] += 100
        matcher = Matcher(0.7, 0.3, allow_low_quality_matches=True)
        with pretended_device():
            there = sent(gt_boxes), sent(boxes)
            with counted() as counts:
                found = match(*there, matcher, box_iou)
        assert counts.waits.total() == 0
        assert torch.equal(found.values, matcher(box_iou(gt_boxes, boxes)))


@settings(max_examples=300)
@given(
    gt_boxes=boxes_on_a_lattice,
    boxes=boxes_on_a_lattice,
    thresholds=st.sampled_from([(0.7, 0.3), (0.5, 0.5), (0.9, 0.0), (0.3, 0.1)]),
    allow_low_quality=st.booleans(),
)
def test_matches_equal_torchvisions(
    gt_boxes: Tensor, boxes: Tensor, thresholds: tuple[float, float], allow_low_quality: bool
) -> None:
    matcher = Matcher(*thresholds, allow_low_quality_matches=allow_low_quality)
    assert torch.equal(match(gt_boxes, boxes, matcher, box_iou), matcher(box_iou(gt_boxes, boxes)))


def test_an_object_that_overlaps_no_box_matches_every_box_as_in_torchvision() -> None:
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [1.0, 0.0, 5.0, 4.0], [20.0, 20.0, 24.0, 24.0]]).repeat(20, 1)
    gt_boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [50.0, 50.0, 60.0, 60.0]])
    matcher = Matcher(0.7, 0.3, allow_low_quality_matches=True)
    matches = match(gt_boxes, boxes, matcher, box_iou)
    assert (matches >= 0).all()
    assert torch.equal(matches, matcher(box_iou(gt_boxes, boxes)))


def test_the_best_box_below_the_threshold_is_found_across_chunks() -> None:
    # The best box of the only object has IoU 1/3 and is the last of 50.
    boxes = torch.tensor([[9.0, 0.0, 13.0, 4.0]]).repeat(50, 1)
    boxes[-1] = torch.tensor([2.0, 0.0, 6.0, 4.0])
    gt_boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0]])
    matches = match(gt_boxes, boxes, Matcher(0.7, 0.3, allow_low_quality_matches=True), box_iou)
    assert matches.tolist() == [Matcher.BELOW_LOW_THRESHOLD] * 49 + [0]


def test_similarities_are_computed_for_a_few_pairs_at_a_time() -> None:
    sizes = []

    def similarity(gt_boxes: Tensor, boxes: Tensor) -> Tensor:
        sizes.append(len(gt_boxes) * len(boxes))
        return box_iou(gt_boxes, boxes)

    gt_boxes, boxes = torch.rand(3, 4).cumsum(1), torch.rand(100, 4).cumsum(1)
    match(gt_boxes, boxes, Matcher(0.7, 0.3, allow_low_quality_matches=True), similarity)
    assert max(sizes) <= 20
    # Each pair once, and each object's best boxes once more, in the one chunk of 6 that contains them.
    assert 300 < sum(sizes) <= 300 + 3 * 6 + 1


def test_ious_are_computed_only_with_objects_near_a_few_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    # 10 objects of 2 px along a line, and 1,000 boxes in the same order: each box overlaps one object.
    low = torch.arange(1000.0)[:, None].expand(1000, 2)
    boxes = torch.cat([low, low + 1], dim=1)
    gt_boxes = torch.cat([low[::100] + 0.25, low[::100] + 2.25], dim=1)
    pairs = []

    def counting(one: Tensor, other: Tensor) -> Tensor:
        pairs.append(len(one) * len(other))
        return box_iou(one, other)

    monkeypatch.setattr(matching, "box_iou", counting)
    matcher = Matcher(0.7, 0.3, allow_low_quality_matches=True)
    found = match(gt_boxes, boxes, matcher, counting)
    assert torch.equal(found, matcher(box_iou(gt_boxes, boxes)))
    assert (found >= 0).sum() > 0
    # Of 10,000 pairs; a best box is computed twice, and one more pair tells the dtype.
    assert sum(pairs) < 200


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_boxes_of_other_dtypes_match_as_in_torchvision(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    gt_boxes, boxes = (9 * torch.rand(n, 4, generator=generator).cumsum(1) for n in (4, 100))
    gt_boxes = gt_boxes.to(dtype)
    matcher = Matcher(0.7, 0.3, allow_low_quality_matches=True)
    assert torch.equal(match(gt_boxes, boxes, matcher, box_iou), matcher(box_iou(gt_boxes, boxes)))


def test_a_custom_matcher_is_called_with_the_whole_matrix() -> None:
    gt_boxes, boxes = torch.rand(3, 4).cumsum(1), torch.rand(100, 4).cumsum(1)
    matcher = SSDMatcher(0.5)
    assert torch.equal(match(gt_boxes, boxes, matcher, box_iou), matcher(box_iou(gt_boxes, boxes)))


def test_no_boxes_raise_as_in_torchvision() -> None:
    with pytest.raises(ValueError, match="No proposal boxes available"):
        match(torch.rand(2, 4), torch.zeros(0, 4), Matcher(0.7, 0.3, True), box_iou)
