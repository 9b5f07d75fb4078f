"""CUDA graphs, on a stand-in for torch's capture: the losses, gradients and statistics of the same padded batches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import maskloss
from maskloss.detection.builders import ModelSettings, build_model
from maskloss.detection.cuda_graphs import graph_convolutions

from .small_models import NUM_CLASSES, batch, training_pass


class Captured:
    """Stands for `torch.cuda.make_graphed_callables`: a fixed input, which each call overwrites, and warm-up passes."""

    def __init__(self) -> None:
        self.replays: list[torch.Size] = []
        self.autocast: list[torch.dtype | None] = []

    def __call__(self, layers: nn.Module, sample: tuple[Tensor, ...], **options: Any) -> nn.Module:
        assert not layers._forward_hooks
        assert not layers._forward_pre_hooks
        assert layers.training
        (images,) = sample
        own = layers.forward
        enabled = torch.is_autocast_enabled("cpu")
        assert not (enabled and torch.is_autocast_cache_enabled())
        self.autocast.append(torch.get_autocast_dtype("cpu") if enabled else None)
        fixed = images.clone()
        for _ in range(3):
            outputs = own(fixed)
            assert all(isinstance(output, Tensor) for output in outputs)

        def replayed(images: Tensor) -> Any:
            assert images.shape == fixed.shape
            fixed.copy_(images)
            self.replays.append(images.shape)
            # A real graph has kernels only, so it does not call the layers' replaced `forward`.
            parts = (layers.layers, layers.head)
            replaced = [vars(part).pop("forward") for part in parts]
            outputs = own(fixed)
            for part, forward in zip(parts, replaced, strict=True):
                part.forward = forward
            return outputs

        layers.forward = replayed
        return layers


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Captured:
    captured = Captured()
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", captured)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    return captured


def model_of(seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(seed)
    model = build_model(ModelSettings("resnet18", NUM_CLASSES, min_size=(48, 64), max_size=90, **settings))
    return maskloss.convert(model).train()


def padded(model: Any) -> Any:
    """A copy of a model that pads as graphs need, without graphs."""
    other = copy.deepcopy(model)
    other.transform.padded_sizes = ((64, 96), (96, 64))
    return other


@pytest.mark.parametrize("frozen", [False, True])
def test_losses_gradients_and_statistics_are_those_without_graphs(frozen: bool, captured: Captured) -> None:
    model = model_of()
    model.backbone.body.conv1.requires_grad_(not frozen)
    expected = padded(model)
    keys = list(model.state_dict())
    before = copy.deepcopy(model.state_dict())
    graph_convolutions(model, batch_size=2)
    assert list(model.state_dict()) == keys
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    images, targets = batch()  # 64 x 80 and 72 x 72: each is resized to at most 90 x 64 or 64 x 80
    for step in range(2):
        losses, gradients = training_pass(model, images, targets, seed=step)
        losses_without, gradients_without = training_pass(expected, images, targets, seed=step)
        for key, value in losses_without.items():
            torch.testing.assert_close(losses[key], value)
        for name, gradient in gradients_without.items():
            assert (gradient is None) == (gradients[name] is None)
            if gradient is not None:
                torch.testing.assert_close(gradients[name], gradient)
    assert captured.replays == [(2, 3, 64, 96)] * 2
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value)


def test_portraits_have_their_own_graph(captured: Captured) -> None:
    model = model_of()
    graph_convolutions(model, batch_size=2)
    images, targets = batch()
    sides = [
        ([image.transpose(-1, -2) for image in images], [transposed(target) for target in targets]),
        (images, targets),
    ]
    for turned, of_turned in sides:
        model(turned, of_turned)
    assert captured.replays == [(2, 3, 96, 64), (2, 3, 64, 96)]


def transposed(target: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "boxes": target["boxes"][:, [1, 0, 3, 2]],
        "labels": target["labels"],
        "masks": target["masks"].transpose(-1, -2),
    }


def test_other_batches_and_evaluation_run_without_graphs(captured: Captured) -> None:
    model = model_of()
    model.transform.min_size = (64,)
    plain = copy.deepcopy(model)
    graph_convolutions(model, batch_size=2)
    images, targets = batch()
    model(images[:1], targets[:1])
    mixed = [images[0], images[0].transpose(-1, -2)]
    model(mixed, [targets[0], transposed(targets[0])])
    with torch.no_grad():
        model(images, targets)
    assert captured.replays == []
    model.load_state_dict(plain.state_dict())
    with torch.no_grad():
        for found, expected in zip(model.eval()(images), plain.eval()(images), strict=True):
            assert torch.equal(found["boxes"], expected["boxes"])
    assert captured.replays == []


def test_mixed_precision_is_captured_without_a_cache_of_weights(captured: Captured) -> None:
    graph_convolutions(model_of(), batch_size=1, autocast=torch.bfloat16)
    graph_convolutions(model_of(), batch_size=1)
    assert captured.autocast == [torch.bfloat16, torch.bfloat16, None, None]


def test_a_transform_with_a_fixed_size_is_refused(captured: Captured) -> None:
    model = model_of()
    model.transform.fixed_size = (64, 64)
    with pytest.raises(ValueError, match="without fixed_size"):
        graph_convolutions(model, batch_size=1)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("frozen_normalization", [False, True])
def test_graphs_on_a_gpu(frozen_normalization: bool) -> None:
    model = model_of(frozen_normalization=frozen_normalization).to("cuda")
    expected = padded(model)
    graph_convolutions(model, batch_size=2)
    images, targets = batch()
    images = [image.cuda() for image in images]
    targets = [{key: value.cuda() for key, value in target.items()} for target in targets]
    for step in range(3):
        losses, gradients = training_pass(model, images, targets, seed=step)
        losses_without, gradients_without = training_pass(expected, images, targets, seed=step)
        for key, value in losses_without.items():
            torch.testing.assert_close(losses[key], value, rtol=5e-4, atol=1e-4)
        for name, gradient in gradients_without.items():
            if gradient is not None:
                torch.testing.assert_close(gradients[name], gradient, rtol=5e-3, atol=1e-3)
