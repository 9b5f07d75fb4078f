"""MultiScaleRoIAlign equals torchvision's, forward and backward."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign as TorchvisionMultiScaleRoIAlign
from torchvision.ops import roi_align

import maskloss
from maskloss.detection.pooling import MultiScaleRoIAlign, _RoIAlign

from .small_models import tiny_mask_rcnn

IMAGE = (96, 128)
STRIDES = {"0": 4, "1": 8, "2": 16, "unused": 32}


def feature_maps(names: list[str], channels: int = 3, images: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(
            images, channels, IMAGE[0] // STRIDES[name], IMAGE[1] // STRIDES[name], generator=generator
        ).requires_grad_()
        for name in names
    }


def boxes_of_all_sizes(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    side = torch.exp(torch.rand(count, 2, generator=generator) * 5.5)  # 1 to 245 px
    low = torch.rand(count, 2, generator=generator) * torch.tensor([128.0, 96.0])
    return torch.cat([low, low + side], dim=1)


def gradients(pooler: torch.nn.Module, names: list[str], boxes: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    features = feature_maps(names)
    pooled = pooler(features, boxes, [IMAGE] * 2)
    weights = torch.rand(pooled.shape, generator=torch.Generator().manual_seed(1))
    (pooled * weights).sum().backward()
    return pooled.detach(), [feature.grad for feature in features.values()]


@pytest.mark.parametrize("names", [["0"], ["0", "1", "2"]])
@pytest.mark.parametrize("output_size", [7, (3, 5)])
@pytest.mark.parametrize("sampling_ratio", [2, 3, -1])
def test_pooled_features_and_gradients_equal_torchvisions(
    names: list[str], output_size: Any, sampling_ratio: int
) -> None:
    boxes = [boxes_of_all_sizes(90, 2), boxes_of_all_sizes(5, 3)]
    stock = TorchvisionMultiScaleRoIAlign(names, output_size, sampling_ratio, canonical_scale=56)
    ours = MultiScaleRoIAlign(names, output_size, sampling_ratio, canonical_scale=56)
    expected, expected_gradients = gradients(stock, [*names, "unused"], boxes)
    pooled, found = gradients(ours, [*names, "unused"], boxes)
    assert torch.equal(pooled, expected)
    for gradient, other in zip(found[:-1], expected_gradients[:-1], strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())
    assert found[-1] is None


@pytest.mark.parametrize("names", [["0"], ["0", "1", "2"]])
def test_bfloat16_features_under_autocast_equal_torchvisions(
    names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes = [boxes_of_all_sizes(40, 2), boxes_of_all_sizes(5, 3)]
    found = []
    calls: list[int] = []
    apply = _RoIAlign.apply
    monkeypatch.setattr(_RoIAlign, "apply", lambda *given: calls.append(1) or apply(*given))
    for pooler in (TorchvisionMultiScaleRoIAlign(names, 7, 2), MultiScaleRoIAlign(names, 7, 2)):
        features = {
            name: feature.detach().bfloat16().requires_grad_()
            for name, feature in feature_maps(names).items()
        }
        with torch.autocast("cpu", torch.bfloat16):
            pooled = pooler(features, boxes, [IMAGE] * 2)
        weights = torch.rand(pooled.shape, generator=torch.Generator().manual_seed(1))
        (pooled * weights).sum().backward()
        found.append((pooled, [feature.grad for feature in features.values()]))
    (expected, expected_gradients), (pooled, found_gradients) = found
    assert len(calls) == len(names)
    assert pooled.dtype == torch.bfloat16
    assert torch.equal(pooled, expected)
    for gradient, other in zip(found_gradients, expected_gradients, strict=True):
        assert gradient.dtype == torch.bfloat16
        # Both are float32 sums, rounded at the end: at most one step of bfloat16 apart.
        torch.testing.assert_close(gradient, other, rtol=2**-7, atol=1e-5 * other.abs().max().item())


@given(
    box=st.tuples(st.floats(-30, 60), st.floats(-30, 60), st.floats(-2, 90), st.floats(-2, 90)),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    output_size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    scale=st.sampled_from([1.0, 0.25]),
    sampling_ratio=st.sampled_from([1, 2, -1]),
)
def test_gradients_of_any_box_on_any_map_equal_torchvisions(
    box: Any, size: Any, output_size: Any, scale: float, sampling_ratio: int
) -> None:
    x, y, w, h = box
    rois = torch.tensor([[0.0, x, y, x + w, y + h]])
    features = torch.rand(1, 2, *size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = roi_align(features, rois, output_size, scale, sampling_ratio)
    weights = torch.rand(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), features)
    pooled = _RoIAlign.apply(features, rois, output_size, scale, sampling_ratio)
    (gradient,) = torch.autograd.grad((pooled * weights).sum(), features)
    assert torch.equal(pooled, expected)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


def test_no_boxes_give_no_features_and_zero_gradients() -> None:
    pooler = MultiScaleRoIAlign(["0", "1"], 7, 2)
    pooled, found = gradients(pooler, ["0", "1"], [torch.zeros(0, 4), torch.zeros(0, 4)])
    assert pooled.shape == (0, 3, 7, 7)
    assert all(gradient is not None and gradient.count_nonzero() == 0 for gradient in found)


@pytest.mark.parametrize("change", ["no gradient", "float64", "no_grad"])
def test_without_float32_gradients_torchvisions_code_is_used(
    monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(_RoIAlign, "apply", refuse)
    features = feature_maps(["0"])
    if change == "no gradient":
        features = {"0": features["0"].detach()}
    if change == "float64":
        features = {"0": features["0"].detach().double().requires_grad_()}
    with torch.set_grad_enabled(change != "no_grad"):
        boxes = [boxes_of_all_sizes(5, 3).to(features["0"].dtype)] * 2
        pooled = MultiScaleRoIAlign(["0"], 7, 2)(features, boxes, [IMAGE] * 2)
    assert pooled.shape == (10, 3, 7, 7)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda pooler: pickle.loads(pickle.dumps(pooler))])
def test_a_copy_pools_alike(make_copy: Any) -> None:
    pooler = MultiScaleRoIAlign(["0", "1"], 7, 2)
    boxes = [boxes_of_all_sizes(9, 2)] * 2
    expected, _ = gradients(pooler, ["0", "1"], boxes)
    pooled, _ = gradients(make_copy(pooler), ["0", "1"], boxes)
    assert torch.equal(pooled, expected)


def test_a_backward_pass_under_autocast_is_not_rounded() -> None:
    generator = torch.Generator().manual_seed(0)
    features = {"0": torch.randn(1, 8, 16, 16, generator=generator, requires_grad=True)}
    boxes = [torch.tensor([[3.0, 4.0, 40.0, 50.0], [10.0, 2.0, 60.0, 33.0]])]
    pool = maskloss.convert(tiny_mask_rcnn()).roi_heads.box_roi_pool
    gradients = []
    for enabled in (False, True):
        pooled = pool(features, boxes, [(64, 64)])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            gradients.append(torch.autograd.grad(pooled.square().sum(), features["0"])[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
