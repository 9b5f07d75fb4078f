"""convert: accepted models, parts that it does not change, and the state of the loss in a model."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection._utils import BoxCoder as TorchvisionBoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads as TorchvisionRoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork as TorchvisionRPN
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import roi_align

import maskloss
from maskloss import EncodedMasks, LossWeights, MaskRCNNLoss, MaskTargets
from maskloss.detection import ClassSelectedMaskPredictor, RCNNTransform, RegionProposalNetwork, RoIHeads
from maskloss.detection.mask_iou import MaskIoUBranch
from maskloss.detection.point_rend import PointRendBranch
from maskloss.detection.target_checks import check_inputs
from maskloss.losses import (
    ClassAgnosticMaskLoss,
    MaskBCELoss,
    MaskSoftmaxLoss,
    MatterportL2Loss,
    select_class_masks,
)
from maskloss.masks.paste import paste_masks

from .small_models import (
    CHANNELS,
    NUM_CLASSES,
    MyMaskRCNN,
    TinyBackbone,
    batch,
    class_weighted,
    tiny_faster_rcnn,
    tiny_keypoint_rcnn,
    tiny_mask_rcnn,
    training_pass,
    without_objects,
)

BUILDERS = {
    "FasterRCNN": tiny_faster_rcnn,
    "MaskRCNN": tiny_mask_rcnn,
    "KeypointRCNN": tiny_keypoint_rcnn,
    "a subclass": lambda: tiny_mask_rcnn(kind=MyMaskRCNN),
}
ALWAYS = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}


def same_losses(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# Accepted models.


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("FasterRCNN", set()),
        ("MaskRCNN", {"loss_mask"}),
        ("KeypointRCNN", {"loss_keypoint"}),
        ("a subclass", {"loss_mask"}),
    ],
)
def test_a_converted_model_has_torchvisions_keys(kind, extra):
    stock = BUILDERS[kind]()
    expected, _ = training_pass(stock, *batch())
    losses, _ = training_pass(maskloss.convert(stock), *batch())
    assert losses.keys() == expected.keys() == ALWAYS | extra


@pytest.mark.parametrize("kind", BUILDERS)
def test_convert_returns_the_same_model_with_the_same_parameter_objects(kind):
    model = BUILDERS[kind]()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    converted = maskloss.convert(model)
    assert converted is model
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is parameters[name] for name in parameters)
    assert all(value is buffers[name] for name, value in model.named_buffers())


def test_a_subclass_keeps_its_class():
    assert type(maskloss.convert(tiny_mask_rcnn(kind=MyMaskRCNN))) is MyMaskRCNN


def test_an_optimizer_made_before_trains_the_converted_model():
    model = tiny_mask_rcnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = copy.deepcopy(model.state_dict())
    training_pass(maskloss.convert(model), *batch())
    optimizer.step()
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert "roi_heads.mask_predictor.mask_fcn_logits.weight" in changed
    assert "rpn.head.cls_logits.weight" in changed


@pytest.mark.parametrize("kind", BUILDERS)
def test_state_dicts_load_strictly_both_ways(kind):
    stock, converted = BUILDERS[kind](seed=1) if kind != "a subclass" else BUILDERS[kind](), BUILDERS[kind]()
    maskloss.convert(converted, class_weighted())
    stock_state = copy.deepcopy(stock.state_dict())
    assert list(converted.state_dict()) == list(stock_state)
    converted.load_state_dict(stock_state, strict=True)
    assert all(torch.equal(value, stock_state[name]) for name, value in converted.state_dict().items())
    fresh = BUILDERS[kind]()
    fresh.load_state_dict(converted.state_dict(), strict=True)
    assert all(torch.equal(value, stock_state[name]) for name, value in fresh.state_dict().items())


def test_hooks_and_attributes_that_a_user_has_set_stay():
    model = tiny_mask_rcnn()
    calls: list[str] = []
    model.roi_heads.register_forward_hook(lambda *_: calls.append("roi_heads"))
    model.rpn.note = "mine"
    model.roi_heads.detections_per_img = 3
    maskloss.convert(model)
    detections = model.eval()(batch()[0])
    assert calls == ["roi_heads"]
    assert model.rpn.note == "mine"
    assert [len(detection["boxes"]) for detection in detections] == [3, 3]


# Rejected models.


class MyRPN(TorchvisionRPN):
    pass


class MyHeads(TorchvisionRoIHeads):
    pass


class MyTransform(GeneralizedRCNNTransform):
    """Darkens the images."""

    def normalize(self, image: Tensor) -> Tensor:
        return super().normalize(image.square())


class Wrapper(nn.Module):
    """A wrapper like DistributedDataParallel: the model is its `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def retinanet() -> nn.Module:
    generator = AnchorGenerator(sizes=((16,),), aspect_ratios=((1.0,),))
    return RetinaNet(TinyBackbone(), NUM_CLASSES, anchor_generator=generator, min_size=64, max_size=64)


def with_custom_rpn() -> nn.Module:
    model = tiny_mask_rcnn()
    model.rpn.__class__ = MyRPN
    return model


def with_custom_heads() -> nn.Module:
    model = tiny_mask_rcnn()
    model.roi_heads.__class__ = MyHeads
    return model


def with_patched(part: str) -> nn.Module:
    model = tiny_mask_rcnn()
    module = getattr(model, part)
    module.forward = module.forward
    return model


def with_custom_transform() -> MaskRCNN:
    model = tiny_mask_rcnn()
    old = model.transform
    model.transform = MyTransform(old.min_size, old.max_size, old.image_mean, old.image_std)
    return model


REFUSED = {
    "RetinaNet": (retinanet, r"not torchvision\.models\.detection\.retinanet\.RetinaNet"),
    "a wrapper": (lambda: Wrapper(tiny_mask_rcnn()), r"not .*test_conversion\.Wrapper"),
    "another module": (lambda: nn.Linear(1, 1), r"not torch\.nn\.modules\.linear\.Linear"),
    "a custom rpn": (with_custom_rpn, r"model\.rpn, which is not .*RegionProposalNetwork but .*\.MyRPN"),
    "custom roi_heads": (with_custom_heads, r"model\.roi_heads, which is not .*RoIHeads but .*\.MyHeads"),
    "a patched rpn": (lambda: with_patched("rpn"), r"model\.rpn\.forward, which has been patched"),
    "patched roi_heads": (
        lambda: with_patched("roi_heads"),
        r"model\.roi_heads\.forward, which has been patched",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_and_parts_that_are_not_torchvisions_raise_and_are_named(case):
    build, message = REFUSED[case]
    with pytest.raises(TypeError, match=message):
        maskloss.convert(build())


@pytest.mark.parametrize("paste", ["matched", None])
def test_other_pastes_need_torchvisions_transform(paste):
    with pytest.raises(TypeError, match=rf"paste={paste!r} .* model\.transform, .* but .*\.MyTransform"):
        maskloss.convert(with_custom_transform(), paste=paste)


def with_patched_loss() -> nn.Module:
    """A model whose user patched the `compute_loss` of torchvision's RPN."""
    model = tiny_mask_rcnn()
    stock = model.rpn.compute_loss
    model.rpn.compute_loss = lambda *args: tuple(10 * loss for loss in stock(*args))
    return model


def test_a_patched_compute_loss_of_the_rpn_raises():
    with pytest.raises(TypeError, match=r"model\.rpn\.compute_loss"):
        maskloss.convert(with_patched_loss())


@pytest.mark.parametrize(
    ("build", "arguments"),
    [
        (with_custom_rpn, {}),
        (with_custom_heads, {}),
        (lambda: with_patched("roi_heads"), {}),
        (with_custom_transform, {"paste": "matched"}),
        (tiny_mask_rcnn, {"paste": "sideways"}),
        (tiny_mask_rcnn, {"loss": "no such preset"}),
        (tiny_mask_rcnn, {"loss": nn.MSELoss()}),
    ],
    ids=["rpn", "roi_heads", "patched", "transform", "paste", "preset", "loss"],
)
def test_after_an_error_the_model_is_unchanged(build, arguments):
    model = build()
    types = [type(module) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    expected, _ = training_pass(model, *batch())
    with pytest.raises((TypeError, ValueError)):
        maskloss.convert(model, **arguments)
    assert [type(module) for module in model.modules()] == types
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert same_losses(training_pass(model, *batch())[0], expected)


def test_an_unknown_preset_raises():
    with pytest.raises(ValueError, match=r"no preset is named 'torchvison'; available: torchvision, "):
        maskloss.convert(tiny_mask_rcnn(), "torchvison")


def test_an_unknown_paste_raises():
    with pytest.raises(ValueError, match=r"^paste must be .* not 'sideways'$"):
        maskloss.convert(tiny_mask_rcnn(), paste="sideways")


def test_a_loss_that_is_not_a_mask_rcnn_loss_raises():
    message = r"^loss must be a MaskRCNNLoss or a preset's name, not a MSELoss; a single term is given as in"
    with pytest.raises(TypeError, match=message):
        maskloss.convert(tiny_mask_rcnn(), nn.MSELoss())


def test_a_custom_transform_is_kept_and_its_losses_equal_torchvisions():
    stock, converted = with_custom_transform(), with_custom_transform()
    maskloss.convert(converted)
    assert type(converted.transform) is MyTransform
    expected, _ = training_pass(stock, *batch())
    losses, _ = training_pass(converted, *batch())
    for key in expected:
        torch.testing.assert_close(losses[key], expected[key], rtol=1e-6, atol=0, msg=key)
    plain, _ = training_pass(maskloss.convert(tiny_mask_rcnn()), *batch())
    assert losses["loss_objectness"] != plain["loss_objectness"], "the transform did not matter"


def test_encoded_masks_under_a_custom_transform_raise_naming_both():
    model = maskloss.convert(with_custom_transform()).train()
    images, targets = batch()
    targets[1]["masks"] = EncodedMasks([[[5.0, 5, 20, 5, 20, 20]]] * 2, 72, 72)
    with pytest.raises(TypeError, match=r"^image 1 of the batch, masks: EncodedMasks .*MyTransform"):
        model(images, targets)


# The loss and the paste.


def test_the_default_is_the_preset_torchvision():
    default, _ = training_pass(maskloss.convert(tiny_mask_rcnn()), *batch())
    named, _ = training_pass(maskloss.convert(tiny_mask_rcnn(), "torchvision"), *batch())
    given, _ = training_pass(maskloss.convert(tiny_mask_rcnn(), MaskRCNNLoss()), *batch())
    assert same_losses(default, named)
    assert same_losses(default, given)


def test_a_presets_name_selects_its_loss():
    by_name, _ = training_pass(maskloss.convert(tiny_mask_rcnn(), "detectron2"), *batch())
    by_loss, _ = training_pass(
        maskloss.convert(tiny_mask_rcnn(), MaskRCNNLoss.preset("detectron2")), *batch()
    )
    default, _ = training_pass(maskloss.convert(tiny_mask_rcnn()), *batch())
    assert same_losses(by_name, by_loss)
    assert all(by_name[key] != default[key] for key in ("loss_rpn_box_reg", "loss_box_reg", "loss_mask"))


@pytest.mark.parametrize("name", ["torchvision", "detectron2", "matterport", "paper", "aligned"])
def test_every_preset_gives_finite_losses_and_every_gradient_with_and_without_objects(name):
    model = maskloss.convert(tiny_mask_rcnn(), name)
    images, targets = batch()
    for given in (targets, without_objects(images)):
        losses, gradients = training_pass(model, images, given)
        assert all(value.isfinite() for value in losses.values())
        for parameter, gradient in gradients.items():
            assert gradient is not None, parameter
            assert gradient.isfinite().all(), parameter


def test_weights_multiply_the_terms():
    plain, _ = training_pass(maskloss.convert(tiny_mask_rcnn()), *batch())
    weights = LossWeights(objectness=2.0, rpn_box=3.0, classification=4.0, box=5.0, mask=6.0)
    weighted, _ = training_pass(maskloss.convert(tiny_mask_rcnn(), MaskRCNNLoss(weights=weights)), *batch())
    ratios = {key: float(weighted[key] / plain[key]) for key in plain}
    assert ratios == pytest.approx(
        {
            "loss_objectness": 2.0,
            "loss_rpn_box_reg": 3.0,
            "loss_classifier": 4.0,
            "loss_box_reg": 5.0,
            "loss_mask": 6.0,
        },
        rel=1e-6,
    )


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("binary", [False, True])
def test_mask_targets_settings_reach_the_mask_term(aligned, binary):
    seen: list[Tensor] = []

    class Recorder(MaskBCELoss):
        def forward(self, mask_logits: Tensor, mask_targets: Tensor) -> Tensor:
            seen.append(mask_targets)
            return super().forward(mask_logits, mask_targets)

    loss = MaskRCNNLoss(mask=Recorder(), mask_targets=MaskTargets(aligned=aligned, binary=binary))
    model = maskloss.convert(tiny_mask_rcnn(), loss)
    pooled: list[list[Tensor]] = []
    model.roi_heads.mask_roi_pool.register_forward_pre_hook(lambda _, inputs: pooled.append(inputs[1]))
    # One image of the network's input size with one object, to which all positives are matched.
    images, targets = batch(1)
    training_pass(
        model, images, [{name: value[:1] for name, value in targets[0].items() if name != "image_id"}]
    )
    [[boxes]], [given] = pooled, seen
    mask = targets[0]["masks"][None, :1].float()
    expected = roi_align(mask, [boxes], (8, 8), aligned=aligned)[:, 0]
    assert len(expected) > 0
    if binary:
        expected = (expected >= 0.5).float()
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-5)


def test_encoded_masks_train_as_their_bitmaps_do():
    images, targets = batch()
    encoded = copy.deepcopy(targets)
    for image, target in zip(images, encoded, strict=True):
        size = list(image.shape[-2:])
        runs = []
        for mask in target["masks"]:
            # Uncompressed RLE: lengths of runs down the columns, beginning with zeros.
            pixels = mask.T.flatten().tolist()
            counts, value = [0], 0
            for pixel in pixels:
                if pixel != value:
                    counts.append(0)
                    value = pixel
                counts[-1] += 1
            runs.append({"size": size, "counts": counts})
        target["masks"] = EncodedMasks(runs, *size)
    model = maskloss.convert(tiny_mask_rcnn(), "aligned")
    # Image 0 has the network's size and is not resized; in image 1, resized from 72 to 64 px, bitmaps lose
    # pixels that RLEs keep.
    expected, _ = training_pass(model, images[:1], targets[:1])
    losses, _ = training_pass(model, images[:1], encoded[:1])
    assert float(losses["loss_mask"]) == pytest.approx(float(expected["loss_mask"]), rel=1e-6)
    expected, _ = training_pass(model, images, targets)
    losses, _ = training_pass(model, images, encoded)
    assert float(losses["loss_mask"]) == pytest.approx(float(expected["loss_mask"]), rel=0.02)


def test_paste_none_leaves_probabilities_and_changes_no_box():
    images, _ = batch()
    expected = maskloss.convert(tiny_mask_rcnn()).eval()(images)
    detections = maskloss.convert(tiny_mask_rcnn(), paste=None).eval()(images)
    for detection, other, image in zip(detections, expected, images, strict=True):
        assert len(detection["boxes"]) > 0
        assert detection["masks"].shape == (len(detection["boxes"]), 1, 8, 8)
        assert other["masks"].shape == (len(detection["boxes"]), 1, *image.shape[-2:])
        for field in ("boxes", "labels", "scores"):
            assert torch.equal(detection[field], other[field]), field


@pytest.mark.parametrize("preset", ["torchvision", "aligned"])
@pytest.mark.parametrize("own_size", [False, True])
def test_matched_paste_uses_the_offset_of_the_losss_targets(preset, own_size):
    images, _ = batch()
    raw = maskloss.convert(tiny_mask_rcnn(), preset, paste=None).eval()
    matched = maskloss.convert(tiny_mask_rcnn(), preset, paste="matched").eval()
    for image in images:
        # Images go in as they are, or a pixel larger.
        for model in (raw, matched):
            model.transform.min_size = (min(image.shape[-2:]) + (0 if own_size else 1),)
        (probabilities,), (detection,) = raw([image]), matched([image])
        size = tuple(image.shape[-2:])
        offset = (0.0, 0.0)
        if preset == "torchvision":
            offset = raw.transform.mask_offset(size)
            assert (offset == (0.5, 0.5)) == own_size
        expected = paste_masks(
            probabilities["masks"][:, 0], probabilities["boxes"], size, offset=offset, output="float"
        )
        assert len(expected) > 0
        assert torch.equal(detection["masks"][:, 0], expected)


# Copies of a model.


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copied, pickled])
def test_a_copy_returns_the_same_losses_and_detections(duplicate):
    model = maskloss.convert(tiny_mask_rcnn(), class_weighted(), paste="matched")
    expected, _ = training_pass(model, *batch())
    copy_of_it = duplicate(model)
    assert same_losses(training_pass(copy_of_it, *batch())[0], expected)
    images, _ = batch()
    model.load_state_dict(copy_of_it.state_dict())
    for ours, theirs in zip(copy_of_it.eval()(images), model.eval()(images), strict=True):
        assert all(torch.equal(ours[field], theirs[field]) for field in theirs)


@pytest.mark.parametrize("duplicate", [copied, pickled])
def test_a_copied_model_penalizes_its_own_parameters(duplicate):
    model = maskloss.convert(tiny_mask_rcnn(), MaskRCNNLoss(regularization=MatterportL2Loss(1.0)))
    twin = duplicate(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    penalty, gradients = training_pass(model, *batch())
    twin_penalty, twin_gradients = training_pass(twin, *batch())
    # The penalty is quadratic: doubled weights have four times the penalty.
    assert float(twin_penalty["loss_regularization"]) == pytest.approx(
        4 * float(penalty["loss_regularization"]), rel=1e-6
    )
    assert all(gradient is not None for gradient in gradients.values())
    assert all(gradient is not None for gradient in twin_gradients.values())


# Converting twice.


def test_converting_again_replaces_the_loss_and_the_paste():
    model = maskloss.convert(tiny_mask_rcnn(), "detectron2", paste="matched")
    maskloss.convert(model, "aligned", paste=None)
    expected, _ = training_pass(maskloss.convert(tiny_mask_rcnn(), "aligned"), *batch())
    assert same_losses(training_pass(model, *batch())[0], expected)
    assert model.eval()(batch()[0])[0]["masks"].shape[1:] == (1, 8, 8)


def test_converting_again_does_not_double_the_hooks(monkeypatch):
    checked, penalized = [], []

    def penalty(model: nn.Module) -> Tensor:
        penalized.append(model)
        return torch.zeros(())

    model = maskloss.convert(tiny_mask_rcnn())
    maskloss.convert(model, MaskRCNNLoss(regularization=penalty))

    def watched(*given: Any, **options: Any) -> Any:
        checked.append(1)
        return check_inputs(*given, **options)

    monkeypatch.setattr("maskloss.detection.forward_hooks.check_inputs", watched)
    training_pass(model, *batch())
    assert len(checked) == 1
    assert penalized == [model]


def test_a_copy_converted_again_does_not_double_the_hooks():
    penalized = []

    def penalty(model: nn.Module) -> Tensor:
        penalized.append(model)
        return torch.zeros(())

    twin = pickled(maskloss.convert(tiny_mask_rcnn()))
    training_pass(maskloss.convert(twin, MaskRCNNLoss(regularization=penalty)), *batch())
    assert penalized == [twin]


# Custom mask predictors, and terms that need more than torchvision's.


class MyMaskPredictor(nn.Module):
    """A predictor that takes only the features, like every predictor written for torchvision."""

    def __init__(self, stock: MaskRCNNPredictor) -> None:
        super().__init__()
        self.up, self.logits = stock.conv5_mask, stock.mask_fcn_logits

    def forward(self, features: Tensor) -> Tensor:
        return self.logits(self.up(features).relu())


def with_my_predictor() -> nn.Module:
    model = tiny_mask_rcnn()
    model.roi_heads.mask_predictor = MyMaskPredictor(model.roi_heads.mask_predictor)
    return model


def with_patched_predictor() -> nn.Module:
    model = tiny_mask_rcnn()
    predictor = model.roi_heads.mask_predictor
    stock_forward = predictor.forward
    predictor.forward = lambda features: 2 * stock_forward(features)
    return model


def with_another_last_layer() -> nn.Module:
    """torchvision's predictor with a last layer that a user has made wider."""
    model = tiny_mask_rcnn()
    torch.manual_seed(5)
    model.roi_heads.mask_predictor.mask_fcn_logits = nn.Conv2d(CHANNELS, NUM_CLASSES, 3, padding=1)
    return model


@pytest.mark.parametrize("build", [with_my_predictor, with_patched_predictor, with_another_last_layer])
def test_a_custom_mask_predictor_without_labels_keeps_working(build):
    stock, converted = build(), maskloss.convert(build())
    expected, expected_gradients = training_pass(stock, *batch())
    losses, gradients = training_pass(converted, *batch())
    assert float(losses["loss_mask"]) == pytest.approx(float(expected["loss_mask"]), rel=1e-6)
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    images, _ = batch()
    for ours, theirs in zip(converted.eval()(images), stock.eval()(images), strict=True):
        assert len(theirs["boxes"]) > 0
        torch.testing.assert_close(ours["masks"], theirs["masks"], rtol=0, atol=1e-6)


def test_torchvisions_own_predictor_becomes_the_class_selected_one():
    model = maskloss.convert(tiny_mask_rcnn())
    assert type(model.roi_heads.mask_predictor) is ClassSelectedMaskPredictor
    assert type(model.roi_heads) is RoIHeads
    assert type(model.rpn) is RegionProposalNetwork
    assert type(model.transform) is RCNNTransform


def test_a_mask_term_that_needs_all_classes_gets_all_channels_and_the_labels():
    class AllClasses(nn.Module):
        all_classes = True

        def forward(self, mask_logits: Tensor, mask_targets: Tensor, labels: Tensor) -> Tensor:
            positives = len(labels)
            assert mask_logits.shape == (positives, NUM_CLASSES, 8, 8)
            assert mask_targets.shape == (positives, 8, 8)
            assert labels.min() >= 1
            return MaskBCELoss()(select_class_masks(mask_logits, labels), mask_targets)

    expected, _ = training_pass(maskloss.convert(tiny_mask_rcnn()), *batch())
    losses, _ = training_pass(maskloss.convert(tiny_mask_rcnn(), MaskRCNNLoss(mask=AllClasses())), *batch())
    assert float(losses["loss_mask"]) == pytest.approx(float(expected["loss_mask"]), rel=1e-6)


@pytest.mark.parametrize(
    ("term", "probs", "channels"),
    [
        (MaskSoftmaxLoss(), MaskSoftmaxLoss().mask_probs, NUM_CLASSES),
        # For the class-agnostic term, only the channel that it reads is computed.
        (ClassAgnosticMaskLoss(MaskBCELoss()), lambda logits, labels: logits[:, 0].sigmoid(), 1),
    ],
)
def test_a_mask_term_with_its_own_probabilities_determines_the_detections_masks(term, probs, channels):
    model = maskloss.convert(tiny_mask_rcnn(), MaskRCNNLoss(mask=term), paste=None)
    seen: list[Tensor] = []
    own = model.roi_heads.mask_predictor.forward

    def watched(*args: Tensor) -> Tensor:
        seen.append(own(*args))
        return seen[-1]

    model.roi_heads.mask_predictor.forward = watched
    images, targets = batch()
    model.eval()
    detections = model(images)
    (logits,) = seen
    assert logits.shape[1] == channels
    labels = torch.cat([detection["labels"] for detection in detections])
    masks = torch.cat([detection["masks"] for detection in detections])
    torch.testing.assert_close(masks[:, 0], probs(logits, labels))
    losses, _ = training_pass(model, images, targets)
    assert losses["loss_mask"].isfinite()


def test_a_mask_term_of_all_classes_without_its_own_probabilities_uses_sigmoids():
    class AllClasses(MaskSoftmaxLoss):
        mask_probs = None

    stock = tiny_mask_rcnn().eval()
    model = maskloss.convert(copy.deepcopy(stock), MaskRCNNLoss(mask=AllClasses()))
    images, _ = batch()
    for found, expected in zip(model.eval()(images), stock(images), strict=True):
        torch.testing.assert_close(found["masks"], expected["masks"], rtol=0, atol=1e-6)


def test_mask_gradient_is_zero_on_every_other_class_channel():
    model = maskloss.convert(tiny_mask_rcnn())
    images, targets = batch()
    for target in targets:
        target["labels"] = torch.tensor([2, 2])
    _, gradients = training_pass(model, images, targets)
    rows = gradients["roi_heads.mask_predictor.mask_fcn_logits.weight"].flatten(1).any(dim=1)
    assert rows.tolist() == [False, False, True, False]


def test_weight_zero_on_the_mask_term_runs_no_mask_branch_and_leaves_zero_gradients():
    model = maskloss.convert(tiny_mask_rcnn(), MaskRCNNLoss(weights=LossWeights(mask=0.0)))
    calls: list[nn.Module] = []
    for part in (model.roi_heads.mask_roi_pool, model.roi_heads.mask_head, model.roi_heads.mask_predictor):
        part.register_forward_hook(lambda module, *_: calls.append(module))
    losses, gradients = training_pass(model, *batch())
    assert calls == []
    assert losses["loss_mask"] == 0
    mask_gradients = {name: g for name, g in gradients.items() if ".mask_" in name}
    assert len(mask_gradients) == 6
    for name, gradient in mask_gradients.items():
        assert gradient is not None, name
        assert not gradient.any(), name
    model.eval()(batch()[0])
    assert len(calls) == 3, "detections still need the mask branch"


@pytest.mark.parametrize("term", ["objectness", "rpn_box", "classification", "box"])
def test_weight_zero_on_another_term_does_not_evaluate_it(term):
    def never(*_: Any) -> Tensor:
        raise AssertionError(f"{term} was evaluated")

    loss = MaskRCNNLoss(**{term: never}, weights=LossWeights(**{term: 0.0}))
    losses, gradients = training_pass(maskloss.convert(tiny_mask_rcnn(), loss), *batch())
    assert losses.keys() == ALWAYS | {"loss_mask"}
    assert sum(bool(value == 0) for value in losses.values()) == 1
    assert all(gradient is not None for gradient in gradients.values())


class MyBoxPredictor(nn.Module):
    """Two layers with other names than torchvision's, so that the number of classes is unknown."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.classes, self.deltas = stock.cls_score, stock.bbox_pred

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.classes(features), self.deltas(features)


def test_a_custom_box_predictor_keeps_working():
    stock, converted = tiny_mask_rcnn(), tiny_mask_rcnn()
    converted.roi_heads.box_predictor = MyBoxPredictor(converted.roi_heads.box_predictor)
    expected, _ = training_pass(stock, *batch())
    losses, _ = training_pass(maskloss.convert(converted), *batch())
    for key in expected:
        assert float(losses[key]) == pytest.approx(float(expected[key]), rel=1e-6), key


# Precision.


def test_under_autocast_losses_are_float32_and_every_parameter_has_a_gradient():
    model = maskloss.convert(tiny_mask_rcnn(), class_weighted())
    exact, _ = training_pass(model, *batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, gradients = training_pass(model, *batch())
    assert {value.dtype for value in losses.values()} == {torch.float32}
    # Rounding to bfloat16 changes the proposals and thus the samples, but the losses stay in their range.
    assert all(float(losses[key]) == pytest.approx(float(exact[key]), rel=0.2) for key in exact)
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        assert gradient.any(), name


# Custom losses.


def test_a_torch_loss_works_as_a_term():
    expected, _ = training_pass(maskloss.convert(tiny_mask_rcnn()), *batch())
    loss = MaskRCNNLoss(
        mask=nn.BCEWithLogitsLoss(reduction="none"),
        classification=nn.CrossEntropyLoss(reduction="none"),
        objectness=nn.BCEWithLogitsLoss(reduction="none"),
    )
    losses, _ = training_pass(maskloss.convert(tiny_mask_rcnn(), loss), *batch())
    for key in expected:
        assert float(losses[key]) == pytest.approx(float(expected[key]), rel=1e-6), key


def test_a_custom_term_is_called_with_the_documented_arguments():
    class BoxDistance(nn.Module):
        """Distance of the box centers in px, over the target's width."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.tensor(2.0))

        def forward(self, regression: maskloss.BoxRegression) -> Tensor:
            boxes, targets = regression.boxes, regression.target_boxes
            assert boxes.shape == targets.shape == regression.deltas.shape
            # Each target is one of the ground-truth boxes, in px, regardless of the anchor or proposal that decoded it.
            assert len(targets) > 0
            assert torch.cdist(targets, ground_truth).amin(dim=1).max() < 1e-3
            distance = (boxes[:, :2] + boxes[:, 2:] - targets[:, :2] - targets[:, 2:]).norm(dim=1) / 2
            return self.scale * distance / (targets[:, 2] - targets[:, 0])

    model = maskloss.convert(tiny_mask_rcnn(), MaskRCNNLoss(rpn_box=BoxDistance(), box=BoxDistance()))
    images, targets = batch(1)
    ground_truth = targets[0]["boxes"]
    losses, gradients = training_pass(model, images, targets)
    assert losses["loss_box_reg"] > 0
    assert losses["loss_rpn_box_reg"] > 0
    assert gradients["roi_heads.box_predictor.bbox_pred.weight"].any()
    assert gradients["rpn.head.bbox_pred.weight"].any()


@pytest.mark.parametrize(
    ("term", "loss"),
    [
        ("objectness", lambda logits, labels: nn.functional.binary_cross_entropy_with_logits(logits, labels)),
        ("classification", lambda logits, labels: nn.functional.cross_entropy(logits, labels)),
        ("mask", lambda logits, targets: nn.functional.binary_cross_entropy_with_logits(logits, targets)),
        ("box", lambda regression: regression.deltas.sum()),
        ("rpn_box", lambda regression: regression.deltas[:, 0:2]),
    ],
)
def test_a_term_that_returns_another_shape_raises_and_is_named(term, loss):
    model = maskloss.convert(tiny_mask_rcnn(), MaskRCNNLoss(**{term: loss})).train()
    with pytest.raises(
        ValueError, match=rf"^the {term} term must return one value per .* shape \(\d+,\).*, not shape"
    ):
        model(*batch())


def test_a_keypoint_models_loss_equals_torchvisions():
    stock = tiny_keypoint_rcnn()
    assert isinstance(stock, KeypointRCNN)
    expected, _ = training_pass(stock, *batch())
    losses, _ = training_pass(maskloss.convert(tiny_keypoint_rcnn(), "detectron2"), *batch())
    assert float(losses["loss_keypoint"]) == pytest.approx(float(expected["loss_keypoint"]), rel=1e-6)


# Custom parts in torchvision's models


def trains_alike(model: nn.Module, loss: MaskRCNNLoss | None = None) -> None:
    """Assert that the converted model's losses and gradients equal the stock model's."""
    expected, expected_gradients = training_pass(copy.deepcopy(model), *batch())
    found, gradients = training_pass(maskloss.convert(model, loss), *batch())
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].item() == pytest.approx(value.item(), rel=1e-5), key
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_a_layer_added_to_torchvisions_mask_predictor_is_called():
    model = tiny_mask_rcnn()
    model.roi_heads.mask_predictor.add_module("scale", nn.Conv2d(NUM_CLASSES, NUM_CLASSES, 1))
    trains_alike(model)


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_backward_hook_on_the_last_layer_is_called(register):
    model = maskloss.convert(tiny_mask_rcnn())
    calls = []
    getattr(model.roi_heads.mask_predictor.mask_fcn_logits, register)(lambda *_: calls.append(1))
    training_pass(model, *batch())
    assert calls


class MySampler:
    """A sampler that takes the first positives and negatives."""

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        def first(chosen: Tensor) -> Tensor:
            return chosen & (chosen.cumsum(0) <= 5)

        return [first(image >= 1) for image in labels], [first(image == 0) for image in labels]


@pytest.mark.parametrize("part", ["rpn", "roi_heads"])
def test_a_sampler_may_be_any_callable(part):
    model = tiny_mask_rcnn()
    getattr(model, part).fg_bg_sampler = MySampler()
    trains_alike(model)


def test_a_divisor_that_the_sampler_does_not_provide_raises():
    model = tiny_mask_rcnn()
    model.rpn.fg_bg_sampler = MySampler()
    with pytest.raises(ValueError, match="per_full_batch needs a sampler with `batch_size_per_image`"):
        training_pass(maskloss.convert(model, "detectron2"), *batch())


class MyBoxCoder(TorchvisionBoxCoder):
    def encode(self, reference_boxes: list[Tensor], proposals: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(2 * deltas for deltas in super().encode(reference_boxes, proposals))


@pytest.mark.parametrize("part", ["rpn", "roi_heads"])
def test_a_box_coder_whose_code_would_not_be_called_raises(part):
    model = tiny_mask_rcnn()
    getattr(model, part).box_coder = MyBoxCoder((1.0, 1.0, 1.0, 1.0))
    with pytest.raises(TypeError, match=rf"would not call encode of model\.{part}\.box_coder.*MyBoxCoder"):
        maskloss.convert(model)
    assert type(model.rpn) is TorchvisionRPN


class MyBoxCoderOfOne(TorchvisionBoxCoder):
    def encode_single(self, reference_boxes: Tensor, proposals: Tensor) -> Tensor:
        return 2 * super().encode_single(reference_boxes, proposals)


def test_a_box_coder_that_overrides_the_single_methods_is_called():
    model = tiny_mask_rcnn()
    model.rpn.box_coder = MyBoxCoderOfOne((1.0, 1.0, 1.0, 1.0))
    trains_alike(model)


class TwoLayerBoxPredictor(nn.Module):
    """A predictor whose layer `cls_score` is not the last."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_score = nn.Linear(16, 2)
        self.last = nn.Linear(2, NUM_CLASSES)
        self.bbox_pred = nn.Linear(16, 4 * NUM_CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.last(self.cls_score(x).relu()), self.bbox_pred(x)


def test_the_number_of_classes_is_not_read_from_custom_box_predictors():
    torch.manual_seed(0)
    model = tiny_mask_rcnn()
    model.roi_heads.box_predictor = TwoLayerBoxPredictor()
    trains_alike(model)


def test_a_patched_assignment_of_anchors_sees_the_whole_target():
    seen = []
    model = maskloss.convert(tiny_mask_rcnn())
    own = model.rpn.assign_targets_to_anchors

    def watched(anchors: list[Tensor], targets: list[dict[str, Any]]) -> Any:
        seen.extend(target["labels"] for target in targets)
        return own(anchors, targets)

    model.rpn.assign_targets_to_anchors = watched
    training_pass(model, *batch())
    assert len(seen) == 2


def test_a_patched_postprocess_raises():
    model = tiny_mask_rcnn()
    model.transform.postprocess = model.transform.postprocess
    with pytest.raises(TypeError, match=r"would drop model\.transform\.postprocess"):
        maskloss.convert(model, paste="matched")
    maskloss.convert(model)


def test_a_replaced_loss_function_of_torchvision_raises(monkeypatch):
    def mine(*arguments: Any) -> Tensor:
        return torch.zeros(())

    monkeypatch.setattr("torchvision.models.detection.roi_heads.maskrcnn_loss", mine)
    with pytest.raises(
        TypeError, match="maskrcnn_loss has been replaced, and a converted model does not call it"
    ):
        maskloss.convert(tiny_mask_rcnn())
    maskloss.convert(tiny_mask_rcnn(), "torchvision")


def test_the_mask_offset_does_not_depend_on_the_models_mode():
    model = maskloss.convert(tiny_mask_rcnn())
    model.transform.min_size = (64, 96, 128)
    expected = model.eval().transform.mask_offset((50, 70))
    before = torch.get_rng_state()
    assert model.train().transform.mask_offset((50, 70)) == expected
    assert torch.equal(torch.get_rng_state(), before)
    assert model.transform.training


def test_losses_and_detections_of_no_image_raise() -> None:
    with pytest.raises(ValueError, match="images is empty"):
        maskloss.losses_and_detections(maskloss.convert(tiny_mask_rcnn()), [], [])


def loss_of_its_own() -> tuple[dict[str, Any], str]:
    return {"loss": class_weighted()}, "the loss belongs to another converted model.*copy.deepcopy"


def branch_of_its_own() -> tuple[dict[str, Any], str]:
    return {
        "mask_branch": PointRendBranch.of(tiny_mask_rcnn())
    }, "the mask branch belongs to another converted"


@pytest.mark.parametrize("make", [loss_of_its_own, branch_of_its_own])
def test_what_belongs_to_one_model_may_not_be_given_to_another(make) -> None:
    arguments, message = make()
    model = maskloss.convert(tiny_mask_rcnn(), **arguments)
    expected, _ = training_pass(model, *batch())
    for other in (tiny_mask_rcnn().double(), copy.deepcopy(model)):
        before = type(other.roi_heads)
        with pytest.raises(ValueError, match=message):
            maskloss.convert(other, **arguments)
        assert type(other.roi_heads) is before
    losses, _ = training_pass(model, *batch())
    assert all(torch.equal(losses[key], value) for key, value in expected.items())
    # The same model, and copies of the object, are fine; and another model, after the first one is gone.
    maskloss.convert(model, **arguments)
    maskloss.convert(tiny_mask_rcnn(), **copy.deepcopy(arguments))
    twin = copy.deepcopy(model)
    maskloss.convert(twin, twin.roi_heads.loss)
    del model
    maskloss.convert(tiny_mask_rcnn(), **arguments)


@pytest.mark.parametrize("make", [loss_of_its_own, branch_of_its_own])
def test_after_the_error_the_model_can_still_be_deleted(make) -> None:
    # A notebook keeps the last error, and with it the variables of the functions that it came from.
    arguments, message = make()
    model = maskloss.convert(tiny_mask_rcnn(), **arguments)
    with pytest.raises(ValueError, match=message) as raised:
        maskloss.convert(tiny_mask_rcnn(), **arguments)
    del model
    gc.collect()
    maskloss.convert(tiny_mask_rcnn(), **arguments)
    assert raised.value.__traceback__ is not None


@pytest.mark.parametrize("make", [loss_of_its_own, branch_of_its_own])
def test_what_a_model_no_longer_uses_may_be_given_to_another(make) -> None:
    arguments, _ = make()
    model = maskloss.convert(tiny_mask_rcnn(), **arguments)
    maskloss.convert(model)
    maskloss.convert(tiny_mask_rcnn(), **arguments)


def test_a_wrapped_branch_may_not_be_given_to_another_model() -> None:
    model = tiny_mask_rcnn()
    inner = PointRendBranch.of(model)
    maskloss.convert(model, mask_branch=MaskIoUBranch.of(model, inner))
    with pytest.raises(ValueError, match="the mask branch belongs to another converted model"):
        maskloss.convert(tiny_mask_rcnn(), mask_branch=inner)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": ""}, "no preset is named ''"),
        ({"loss": MaskBCELoss}, "not the class MaskBCELoss; a single term is given as in MaskRCNNLoss"),
        ({"sync_free": "no"}, "sync_free must be True or False, got 'no'"),
    ],
)
def test_arguments_of_another_kind_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        maskloss.convert(tiny_mask_rcnn(), **options)
