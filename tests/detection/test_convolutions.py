"""Folded frozen norms: torchvision's outputs and gradients up to rounding, with unchanged parameters and keys."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops.misc import Conv2dNormActivation, FrozenBatchNorm2d

import maskloss
from maskloss.detection import convolutions
from maskloss.detection.builders import ModelSettings, build_model
from maskloss.detection.convolutions import FoldedConv2d, FoldedNorm, fold_frozen_norms, use_channels_last
from tests.detection.small_models import NUM_CLASSES, batch, tiny_mask_rcnn


def randomized(module: nn.Module) -> nn.Module:
    """Set the statistics and weights of frozen norms to values as after training, and return the module."""
    generator = torch.Generator().manual_seed(1)
    for norm in module.modules():
        if isinstance(norm, FrozenBatchNorm2d):
            norm.weight.uniform_(0.5, 1.5, generator=generator)
            norm.bias.normal_(std=0.1, generator=generator)
            norm.running_mean.normal_(std=0.1, generator=generator)
            norm.running_var.uniform_(0.5, 2.0, generator=generator)
    return module


def body(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "resnet50":
        return torchvision.models.resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
    if name == "resnet18":
        return torchvision.models.resnet18(weights=None, norm_layer=FrozenBatchNorm2d)
    if name == "mobilenet_v2":
        return torchvision.models.mobilenet_v2(weights=None, norm_layer=FrozenBatchNorm2d).features
    return build_model(ModelSettings(name, num_classes=3, frozen_normalization=True)).backbone


#: Number of norms in a network: torchvision's ResNet-18, -50 and MobileNet V2 have 20, 53 and 52. ResNets outside a
#: detection backbone apply `bn1` in their own `forward`, so theirs is not folded.
FOLDED = {"resnet18": 19, "resnet50": 52, "mobilenet_v2": 52, "maskrcnn_resnet50_fpn": 53}


@pytest.mark.parametrize(("name", "number"), FOLDED.items())
def test_outputs_and_gradients_are_those_of_torchvision(name: str, number: int) -> None:
    plain = randomized(body(name)).double()
    folded = copy.deepcopy(plain)
    parameters, keys = list(folded.parameters()), list(folded.state_dict())
    assert fold_frozen_norms(folded) is folded
    assert sum(isinstance(layer, FoldedConv2d) for layer in folded.modules()) == number
    assert all(new is old for new, old in zip(folded.parameters(), parameters, strict=True))
    assert list(folded.state_dict()) == keys
    images = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    outputs = [outputs_of(network, images) for network in (plain, folded)]
    for expected, found in zip(*outputs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for of_network in outputs:
        sum(output.square().mean() for output in of_network).backward()
    for expected, found in zip(plain.parameters(), folded.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-7, atol=1e-12)


def outputs_of(network: nn.Module, images: Tensor) -> list[Tensor]:
    outputs = network(images)
    return list(outputs.values()) if isinstance(outputs, dict) else [outputs]


def block() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4), nn.ReLU())


@pytest.mark.parametrize(
    "change",
    [
        lambda layers: layers[1].running_var.mul_(4),
        lambda layers: layers.load_state_dict({k: v + 1 for k, v in layers.state_dict().items()}),
        lambda layers: layers.double(),
        lambda layers: setattr(layers[1], "bias", layers[1].bias + 1),
        lambda layers: setattr(layers[1], "eps", 0.5),
    ],
    ids=["in place", "loaded", "converted", "assigned", "eps"],
)
def test_a_change_of_the_norm_counts_from_the_next_pass_on(change: Callable[[nn.Module], object]) -> None:
    plain, folded = block(), fold_frozen_norms(block())
    image = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(folded(image), plain(image))
    for layers in (plain, folded):
        change(layers)
    image = image.to(plain[0].weight.dtype)
    torch.testing.assert_close(folded(image), plain(image))


def test_constants_made_in_inference_mode_are_used_in_training() -> None:
    folded = fold_frozen_norms(block())
    with torch.inference_mode():
        folded(torch.rand(1, 3, 8, 8))
    folded(torch.rand(1, 3, 8, 8)).sum().backward()
    assert folded[0].weight.grad is not None


def test_a_graph_computes_the_constants_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    folded = fold_frozen_norms(block())
    folded(torch.rand(1, 3, 8, 8))
    kept = folded[1].scale_and_shift()
    assert folded[1].scale_and_shift() is kept
    monkeypatch.setattr(convolutions, "_is_captured", lambda tensor: True)
    own = folded[1].scale_and_shift()
    # A tensor from outside the graph would be freed when the norm is changed, and the graph would read its memory.
    assert all(new is not old and torch.equal(new, old) for new, old in zip(own, kept, strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_uses_its_own_norm(copied: Callable[[nn.Module], nn.Module]) -> None:
    folded = fold_frozen_norms(block())
    image = torch.rand(1, 3, 8, 8)
    expected = folded(image)
    other = copied(folded)
    folded[1].bias += 1
    assert torch.equal(other(image), expected)
    other[1].bias += 1
    assert torch.equal(other(image), folded(image))


def test_layers_that_do_not_only_follow_each_other_are_left_alone() -> None:
    hooked, patched, shared, trained = block(), block(), block(), block()
    hooked[0].register_forward_hook(lambda *_: None)
    patched[1].forward = patched[1].forward
    trained[1] = nn.BatchNorm2d(4)
    apart = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), FrozenBatchNorm2d(4))
    twice = nn.Sequential(shared, nn.Sequential(shared[0], FrozenBatchNorm2d(4)))

    class Skipping(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            features = self[0](x)
            return self[1](features) + features

    own_order = Skipping(*block())
    for layers in (hooked, patched, trained, apart, twice, own_order):
        image = torch.rand(1, 3, 8, 8)
        expected = layers.eval()(image) if layers is not twice else shared(image)
        fold_frozen_norms(layers)
        assert not any(isinstance(layer, FoldedConv2d | FoldedNorm) for layer in layers.modules())
        assert torch.equal(shared(image) if layers is twice else layers(image), expected)


def test_a_bias_of_the_convolution_is_scaled_too() -> None:
    plain = Conv2dNormActivation(3, 4, norm_layer=FrozenBatchNorm2d, bias=True)
    randomized(plain)
    folded = fold_frozen_norms(copy.deepcopy(plain))
    image = torch.rand(1, 3, 8, 8)
    assert plain[0].bias is not None
    torch.testing.assert_close(folded(image), plain(image), rtol=1e-5, atol=1e-6)


def test_losses_and_detections_of_a_converted_model_stay_the_same() -> None:
    torch.manual_seed(0)
    model = build_model(ModelSettings("resnet18", num_classes=NUM_CLASSES, frozen_normalization=True))
    randomized(model)
    folded = maskloss.convert(use_channels_last(fold_frozen_norms(copy.deepcopy(model))))
    maskloss.convert(model)
    images, targets = batch()
    losses = []
    for one in (model, folded):
        torch.manual_seed(2)
        losses.append(one.train()(images, targets))
    for key, value in losses[0].items():
        torch.testing.assert_close(losses[1][key], value, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        for expected, found in zip(model.eval()(images), folded.eval()(images), strict=True):
            torch.testing.assert_close(found["boxes"], expected["boxes"], rtol=1e-4, atol=1e-3)


def test_channels_last_keeps_the_features() -> None:
    model = build_model(ModelSettings("mobilenet_v2", num_classes=2))
    images = torch.rand(2, 3, 64, 96)
    expected = model.eval().backbone(images)
    features = use_channels_last(model).backbone(images)
    for level, values in expected.items():
        assert features[level].is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(features[level], values, rtol=1e-4, atol=1e-5)


def test_the_mask_head_gets_channels_last_and_the_box_head_without_convolutions_does_not() -> None:
    model = use_channels_last(maskloss.convert(tiny_mask_rcnn())).eval()
    layouts = {}

    def record(name: str) -> None:
        def hook(head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            layouts[name] = inputs[0].is_contiguous(memory_format=torch.channels_last)

        getattr(model.roi_heads, name).register_forward_pre_hook(hook)

    record("mask_head")
    record("box_head")
    images, _ = batch()
    with torch.no_grad():
        assert sum(len(detection["boxes"]) for detection in model(images)) > 0
    assert layouts == {"mask_head": True, "box_head": False}


def test_other_inputs_pass_the_hook_unchanged() -> None:
    layers = nn.Sequential(nn.Identity())
    layers.register_forward_pre_hook(convolutions._with_channels_last)
    pair = torch.rand(2, 3)
    assert layers(pair) is pair
    assert layers("text") == "text"


def test_using_channels_last_twice_registers_its_hooks_once() -> None:
    model = use_channels_last(use_channels_last(tiny_mask_rcnn()))
    parts = (model.backbone, model.roi_heads.mask_head)
    assert [len(part._forward_pre_hooks) for part in parts] == [1, 1]
