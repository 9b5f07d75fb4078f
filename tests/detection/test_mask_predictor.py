"""ClassSelectedMaskPredictor equals torchvision's layer followed by a gather."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor

import maskloss
from maskloss.detection.mask_predictor import ClassSelectedMaskPredictor
from maskloss.losses import ClassAgnosticMaskLoss, MaskBCELoss, MaskSoftmaxLoss

from .small_models import CHANNELS, batch, tiny_mask_rcnn, training_pass

IN_CHANNELS, HIDDEN, NUM_CLASSES, SIDE = 5, 7, 6, 3
#: Class 4 occurs twice, so that its gradient is a sum; some classes do not occur.
LABELS = torch.tensor([4, 2, 4])


@pytest.fixture
def stock() -> MaskRCNNPredictor:
    torch.manual_seed(0)
    return MaskRCNNPredictor(IN_CHANNELS, HIDDEN, NUM_CLASSES)


@pytest.fixture
def ours(stock: MaskRCNNPredictor) -> ClassSelectedMaskPredictor:
    predictor = ClassSelectedMaskPredictor(IN_CHANNELS, HIDDEN, NUM_CLASSES)
    predictor.load_state_dict(stock.state_dict(), strict=True)
    return predictor


@pytest.fixture
def features() -> Tensor:
    return torch.randn((3, IN_CHANNELS, SIDE, SIDE), generator=torch.Generator().manual_seed(1))


def gathered(predictor: MaskRCNNPredictor, features: Tensor, labels: Tensor) -> Tensor:
    """Compute the logits of all classes and select one channel per RoI: (P, 1, M, M)."""
    logits = predictor(features)
    return torch.stack([logits[roi, label] for roi, label in enumerate(labels.tolist())])[:, None]


def test_without_labels_it_equals_torchvisions_layer(stock, ours, features):
    assert torch.equal(ours(features), stock(features))


def test_with_labels_it_returns_each_rois_own_channel(stock, ours, features):
    selected = ours(features, LABELS)
    assert selected.shape == (3, 1, 2 * SIDE, 2 * SIDE)
    torch.testing.assert_close(selected, gathered(stock, features, LABELS), rtol=1e-5, atol=1e-6)


def test_its_gradients_equal_those_of_layer_and_gather(stock, ours, features):
    upstream = torch.randn((3, 1, 2 * SIDE, 2 * SIDE), generator=torch.Generator().manual_seed(2))
    stock_input, our_input = features.clone().requires_grad_(), features.clone().requires_grad_()
    gathered(stock, stock_input, LABELS).backward(upstream)
    ours(our_input, LABELS).backward(upstream)
    torch.testing.assert_close(our_input.grad, stock_input.grad, rtol=1e-5, atol=1e-6)
    expected = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-5, atol=1e-5, msg=name)


def test_gradient_is_exactly_zero_on_the_weights_of_every_other_class(ours, features):
    ours(features, LABELS).square().sum().backward()
    layer = ours.mask_fcn_logits
    for label in range(NUM_CLASSES):
        in_batch = label in LABELS.tolist()
        assert bool(layer.weight.grad[label].any()) == in_batch, f"weights of class {label}"
        assert bool(layer.bias.grad[label].any()) == in_batch, f"bias of class {label}"


def test_each_roi_gets_the_bias_of_its_own_class(ours, features):
    with torch.no_grad():
        ours.mask_fcn_logits.weight.zero_()
        ours.mask_fcn_logits.bias.copy_(torch.arange(NUM_CLASSES) * 10.0)
    # With weights of 0 the logits are the bias alone: 10 times the class.
    expected = (LABELS * 10.0)[:, None, None, None].expand(3, 1, 2 * SIDE, 2 * SIDE)
    assert torch.equal(ours(features, LABELS), expected)


def test_a_layer_without_bias_works(stock, ours, features):
    stock.mask_fcn_logits.bias = ours.mask_fcn_logits.bias = None
    torch.testing.assert_close(
        ours(features, LABELS), gathered(stock, features, LABELS), rtol=1e-5, atol=1e-6
    )


def test_state_dict_has_torchvisions_keys_and_shapes(stock, ours):
    shapes = {name: value.shape for name, value in stock.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == shapes


def test_zero_rois_give_zero_rows_and_gradients_of_zero(ours):
    selected = ours(torch.zeros((0, IN_CHANNELS, SIDE, SIDE)), torch.zeros(0, dtype=torch.int64))
    assert selected.shape == (0, 1, 2 * SIDE, 2 * SIDE)
    selected.sum().backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_a_label_out_of_range_raises(ours, features):
    with pytest.raises(IndexError):
        ours(features, torch.tensor([0, 1, NUM_CLASSES]))


def test_under_autocast_it_computes_in_half_like_the_layer(stock, ours, features):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        selected = ours(features, LABELS)
        expected = gathered(stock, features, LABELS)
    assert selected.dtype == expected.dtype == torch.bfloat16
    # 8 bits of mantissa: each number is rounded by up to 1 / 256.
    torch.testing.assert_close(selected, expected, rtol=2**-7, atol=2**-7)


def test_in_float64_it_agrees_to_rounding(stock, ours, features):
    stock, ours, features = copy.deepcopy(stock).double(), copy.deepcopy(ours).double(), features.double()
    torch.testing.assert_close(
        ours(features, LABELS), gathered(stock, features, LABELS), rtol=1e-13, atol=1e-13
    )


def test_it_compiles_once_without_a_break_for_any_number_of_rois(stock, ours):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, backend=counter, fullgraph=True, dynamic=True)
    for count in (30, 60, 7, 2):
        features = torch.rand(count, IN_CHANNELS, SIDE, SIDE)
        labels = torch.randint(NUM_CLASSES, (count,))
        torch.testing.assert_close(compiled(features, labels), gathered(stock, features, labels))
        compiled(features, labels).sum().backward()
    assert counter.frame_count == 1
    torch._dynamo.reset()


# Class-agnostic heads: one channel for all classes.


def class_agnostic(plain: bool) -> nn.Module:
    model = tiny_mask_rcnn()
    torch.manual_seed(4)
    predictor = MaskRCNNPredictor(CHANNELS, CHANNELS, 1)
    model.roi_heads.mask_predictor = nn.Sequential(*predictor.children()) if plain else predictor
    return model


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("preset", ["torchvision", "detectron2"])
def test_a_class_agnostic_head_trains_and_detects(plain, preset):
    # Labels go up to NUM_CLASSES - 1, channels to 0.
    model = maskloss.convert(class_agnostic(plain), preset, paste=None)
    losses, gradients = training_pass(model, *batch())
    assert losses["loss_mask"].isfinite()
    weight = next(
        name for name in gradients if name.endswith(("mask_fcn_logits.weight", "mask_predictor.2.weight"))
    )
    assert gradients[weight].abs().max() > 0
    detections = model.eval()(batch()[0])
    assert all(detection["masks"].shape[1:] == (1, 8, 8) for detection in detections)
    assert {label for detection in detections for label in detection["labels"].tolist()} - {1}


def test_a_class_agnostic_head_has_the_same_loss_in_every_form():
    values = [
        training_pass(maskloss.convert(class_agnostic(plain)), *batch())[0]["loss_mask"]
        for plain in (False, True)
    ]
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-6)


def test_a_softmax_over_one_channel_raises():
    model = maskloss.convert(class_agnostic(False), maskloss.MaskRCNNLoss(mask=MaskSoftmaxLoss())).train()
    with pytest.raises(ValueError, match="a softmax over classes needs a mask head with a channel per class"):
        model(*batch())


def test_a_class_agnostic_term_computes_one_channel_and_the_same_value():
    loss = maskloss.MaskRCNNLoss(mask=ClassAgnosticMaskLoss(MaskBCELoss()))
    model = maskloss.convert(tiny_mask_rcnn(), loss)
    shapes: list[torch.Size] = []
    own = model.roi_heads.mask_predictor.forward

    def watched(*args: torch.Tensor) -> torch.Tensor:
        shapes.append(own(*args).shape)
        return own(*args)

    model.roi_heads.mask_predictor.forward = watched
    losses, gradients = training_pass(model, *batch())
    model.eval()(batch()[0])
    assert [shape[1] for shape in shapes] == [1, 1]
    # A custom predictor computes all channels; the term reads the first.
    other = tiny_mask_rcnn()
    other.roi_heads.mask_predictor = nn.Sequential(*other.roi_heads.mask_predictor.children())
    expected, _ = training_pass(maskloss.convert(other, loss), *batch())
    assert losses["loss_mask"].item() == pytest.approx(expected["loss_mask"].item(), rel=1e-6)
    weight = gradients["roi_heads.mask_predictor.mask_fcn_logits.weight"]
    assert weight[0].abs().max() > 0
    assert weight[1:].abs().max() == 0


def test_one_channel_learns_from_weak_labels_as_equal_channels_of_all_classes_do() -> None:
    images, targets = batch()
    for target in targets:
        corners, far = target["boxes"][:, :2], target["boxes"][:, 2:]
        points = torch.stack([0.75 * corners + 0.25 * far, 0.5 * (corners + far)], dim=1)  # (G, 2, 2)
        target["points"] = torch.cat([points, torch.tensor([0.0, 1.0]).expand(2, 2)[..., None]], dim=2)
        target["has_mask"] = torch.tensor([False, True])
    found = []
    for channels in (1, None):
        model = tiny_mask_rcnn()
        predictor = model.roi_heads.mask_predictor
        with torch.no_grad():
            for parameter in predictor.mask_fcn_logits.parameters():
                parameter.copy_(parameter[:1].expand_as(parameter))
        if channels == 1:
            only = MaskRCNNPredictor(CHANNELS, CHANNELS, 1)
            state = predictor.state_dict()
            only.load_state_dict(
                {name: state[name][: len(value)] for name, value in only.state_dict().items()}
            )
            model.roi_heads.mask_predictor = only
        maskloss.convert(model, "weak")
        values, _ = training_pass(model, images, targets)
        found.append(values)
    assert found[0]["loss_mask"] > 0
    for key, value in found[1].items():
        torch.testing.assert_close(found[0][key], value, rtol=1e-5, atol=1e-6, msg=key)


def test_a_mask_predictor_may_be_a_function():
    # It need not be a module; public code sets `lambda x: x` where the mask head has the predictor's layers already.
    losses = []
    for build in (tiny_mask_rcnn, lambda: maskloss.convert(tiny_mask_rcnn())):
        model = build()
        predictor = model.roi_heads.mask_predictor
        del model.roi_heads.mask_predictor
        model.roi_heads.mask_predictor = lambda features, layers=predictor: MaskRCNNPredictor.forward(
            layers, features
        )
        losses.append(training_pass(model, *batch())[0])
    for key, value in losses[0].items():
        torch.testing.assert_close(losses[1][key], value, rtol=1e-5, atol=1e-7)
