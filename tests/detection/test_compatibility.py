"""Patched code raises an error instead of being ignored; errors suggest a way out; torch's other tools work."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.fx
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel
from torchvision.models.detection import _utils as torchvision_utils
from torchvision.models.detection import roi_heads as torchvision_roi_heads
from torchvision.models.detection import rpn as torchvision_rpn
from torchvision.models.detection import transform as torchvision_transform
from torchvision.models.detection.mask_rcnn import MaskRCNN, MaskRCNNPredictor, maskrcnn_resnet50_fpn
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import boxes as torchvision_boxes
from torchvision.ops import poolers as torchvision_poolers

import maskloss
from maskloss import LossWeights, MaskRCNNLoss
from maskloss.detection import ClassSelectedMaskPredictor, RegionProposalNetwork, RoIHeads
from maskloss.losses import BoxGIoULoss, MatterportL2Loss, per_location

from .small_models import CHANNELS, NUM_CLASSES, batch, tiny_keypoint_rcnn, tiny_mask_rcnn, training_pass


def mine(*arguments: Any, **more: Any) -> Any:
    raise AssertionError("was called")


# Patches after convert.


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("rpn.compute_loss", r"model\.rpn\.compute_loss has been patched.*objectness and rpn_box terms"),
        ("roi_heads.maskrcnn_loss", r"model\.roi_heads\.maskrcnn_loss has been patched.*pass the mask term"),
        (
            "roi_heads.fastrcnn_loss",
            r"model\.roi_heads\.fastrcnn_loss has been patched.*classification and box",
        ),
        ("roi_heads.box_coder.decode", r"would not call decode of model\.roi_heads\.box_coder"),
        ("rpn.box_coder.encode", r"would not call encode of model\.rpn\.box_coder"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_patches_on_a_converted_model_raise_at_the_next_pass(path, message, training):
    model = maskloss.convert(tiny_mask_rcnn())
    images, targets = batch()
    model.train(training)(images, targets)
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner) if "coder" not in owner else _attribute(model, owner), name, mine)
    with pytest.raises(TypeError, match=message):
        model(images, targets)
    with pytest.raises(TypeError, match=message):
        maskloss.losses_and_detections(model, images, targets)


def _attribute(thing: Any, path: str) -> Any:
    for name in path.split("."):
        thing = getattr(thing, name)
    return thing


@pytest.mark.parametrize(
    "name",
    ["maskrcnn_loss", "fastrcnn_loss", "keypointrcnn_loss", "project_masks_on_boxes", "maskrcnn_inference"],
)
def test_torchvisions_functions_replaced_after_convert_are_refused(name, monkeypatch):
    model = maskloss.convert(tiny_mask_rcnn(), "aligned").train()
    monkeypatch.setattr(torchvision_roi_heads, name, mine)
    with pytest.raises(
        TypeError, match=rf"roi_heads\.{name} has been replaced, and a converted model does not call"
    ):
        model(*batch())


def test_a_method_of_torchvisions_class_replaced_after_convert_is_refused(monkeypatch):
    model = maskloss.convert(tiny_mask_rcnn(), "aligned").train()
    monkeypatch.setattr(torchvision_rpn.RegionProposalNetwork, "compute_loss", mine)
    with pytest.raises(TypeError, match=r"rpn\.compute_loss has been replaced.*objectness and rpn_box terms"):
        model(*batch())


def test_a_function_replaced_before_an_explicit_loss_is_passed_stays_allowed(monkeypatch):
    monkeypatch.setattr(torchvision_roi_heads, "maskrcnn_loss", mine)
    model = maskloss.convert(tiny_mask_rcnn(), "torchvision").train()
    model(*batch())


#: Code of torchvision's that a converted model does not call, and the way out that the message names.
UNCALLED: list[tuple[Any, str, str]] = [
    (torchvision_roi_heads.RoIHeads, "forward", "from maskloss.detection.RoIHeads"),
    (torchvision_roi_heads.RoIHeads, "postprocess_detections", "from maskloss.detection.RoIHeads"),
    (torchvision_rpn.RegionProposalNetwork, "forward", "from maskloss.detection.RegionProposalNetwork"),
    (torchvision_rpn.RegionProposalNetwork, "filter_proposals", "RegionProposalNetwork"),
    (torchvision_rpn.RegionProposalNetwork, "assign_targets_to_anchors", "RegionProposalNetwork"),
    (torchvision_utils.BoxCoder, "encode", "subclass of BoxCoder that overrides encode_single"),
    (torchvision_utils.BoxCoder, "encode_single", "subclass of BoxCoder that overrides encode_single"),
    (torchvision_utils.BoxCoder, "decode", "subclass of BoxCoder that overrides decode_single"),
    (torchvision_utils.BoxCoder, "decode_single", "subclass of BoxCoder that overrides decode_single"),
    (torchvision_utils, "encode_boxes", "subclass of BoxCoder that overrides encode_single"),
    (torchvision_poolers.MultiScaleRoIAlign, "forward", "subclass of MultiScaleRoIAlign"),
    (torchvision_poolers, "roi_align", "subclass of MultiScaleRoIAlign"),
    (MaskRCNNPredictor, "forward", "subclass of MaskRCNNPredictor"),
    (GeneralizedRCNNTransform, "resize", "patch model.transform.resize of this model"),
    (GeneralizedRCNNTransform, "normalize", "patch model.transform.normalize of this model"),
    (GeneralizedRCNNTransform, "postprocess", "patch model.transform.postprocess of this model"),
    (torchvision_transform, "resize_boxes", "patch model.transform.resize of this model"),
    (torchvision_transform, "resize_keypoints", "patch model.transform.resize of this model"),
    (torchvision_transform, "_resize_image_and_masks", "patch model.transform.resize of this model"),
]
UNCALLED_IDS = [f"{owner.__name__.rpartition('.')[2]}.{name}" for owner, name, _ in UNCALLED]


def wrapped(function: Any) -> Any:
    """Return a function around another one that calls it, with its name and module, as decorators make it."""

    @functools.wraps(function)
    def outer(*arguments: Any, **more: Any) -> Any:
        return function(*arguments, **more)

    return outer


@pytest.mark.parametrize(("owner", "name", "way_out"), UNCALLED, ids=UNCALLED_IDS)
def test_code_of_torchvision_that_is_not_called_may_not_be_replaced(owner, name, way_out, monkeypatch):
    model, stock = maskloss.convert(tiny_mask_rcnn()), tiny_mask_rcnn()
    monkeypatch.setattr(owner, name, wrapped(getattr(owner, name)))
    message = rf"^torchvision\.\S*{name} has been replaced, and a converted model would not call .*{way_out}"
    for training in (True, False):
        with pytest.raises(TypeError, match=message):
            model.train(training)(*batch())
    with pytest.raises(TypeError, match=message):
        maskloss.convert(stock, "torchvision")
    monkeypatch.undo()
    training_pass(model, *batch())


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (torchvision_roi_heads.RoIHeads, "select_training_samples"),
        (torchvision_roi_heads.RoIHeads, "subsample"),
        (torchvision_utils.BalancedPositiveNegativeSampler, "__call__"),
        (torchvision_boxes, "batched_nms"),
        (torchvision_boxes, "remove_small_boxes"),
    ],
)
def test_with_sync_free_less_code_of_torchvision_is_called(owner, name, monkeypatch):
    model, other = maskloss.convert(tiny_mask_rcnn(), sync_free=True), maskloss.convert(tiny_mask_rcnn())
    calls: list[Any] = []
    original = getattr(owner, name)
    monkeypatch.setattr(
        owner, name, lambda *arguments, **more: calls.append(1) or original(*arguments, **more)
    )
    with pytest.raises(TypeError, match=rf"{name} has been replaced, .*; leave sync_free out"):
        training_pass(model, *batch())
    with pytest.raises(TypeError, match=rf"{name} has been replaced, .*; leave sync_free out"):
        maskloss.convert(tiny_mask_rcnn(), sync_free=True)
    training_pass(other, *batch())
    assert calls


def test_with_sync_free_a_patched_subsample_raises():
    model = tiny_mask_rcnn()
    model.roi_heads.subsample = model.roi_heads.subsample
    with pytest.raises(
        TypeError, match=r"sync_free would drop model\.roi_heads\.subsample.* on the instance$"
    ):
        maskloss.convert(model, sync_free=True)


@pytest.mark.parametrize("method", ["subsample", "select_training_samples"])
def test_with_sync_free_an_overridden_method_raises(method):
    model = tiny_mask_rcnn()
    model.roi_heads.__class__ = type("Own", (RoIHeads,), {method: getattr(RoIHeads, method)})
    maskloss.convert(model, sync_free=True)  # the same function
    model.roi_heads.__class__ = type("Own", (RoIHeads,), {method: mine})
    with pytest.raises(
        TypeError, match=rf"sync_free would drop model\.roi_heads\.{method}.* overridden in .*Own$"
    ):
        maskloss.convert(model, sync_free=True)


def first_three(function: Any) -> Any:
    """Return a function with the first three entries of another one's result."""
    return lambda *arguments, **more: function(*arguments, **more)[:3]


def nothing_matches(self: Any, quality: Tensor) -> Tensor:
    return torch.full_like(quality[0], -1, dtype=torch.int64)


#: Replacements in torchvision that change the losses or the detections.
CALLED: dict[str, tuple[Any, str, Any]] = {
    "batched_nms": (torchvision_boxes, "batched_nms", first_three),
    "remove_small_boxes": (torchvision_boxes, "remove_small_boxes", first_three),
    "clip_boxes_to_image": (
        torchvision_boxes,
        "clip_boxes_to_image",
        lambda function: lambda boxes, size: boxes.clamp(5, 40),
    ),
    "concat_box_prediction_layers": (
        torchvision_rpn,
        "concat_box_prediction_layers",
        lambda function: lambda *maps: [values * 2 for values in function(*maps)],
    ),
    "matcher": (torchvision_utils.Matcher, "__call__", lambda function: nothing_matches),
    "low-quality matches": (
        torchvision_utils.Matcher,
        "set_low_quality_matches_",
        lambda function: lambda *arguments: None,
    ),
    "has_mask": (torchvision_roi_heads.RoIHeads, "has_mask", lambda function: lambda self: False),
}


@pytest.mark.parametrize("case", CALLED)
def test_replacements_of_other_code_of_torchvision_are_called_as_in_torchvision(case, monkeypatch):
    owner, name, replacement = CALLED[case]
    unchanged, _ = training_pass(maskloss.convert(tiny_mask_rcnn()), *batch())
    model, stock = maskloss.convert(tiny_mask_rcnn()), tiny_mask_rcnn()
    monkeypatch.setattr(owner, name, replacement(getattr(owner, name)))
    losses, _ = training_pass(model, *batch())
    expected, _ = training_pass(stock, *batch())
    assert losses.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value, rtol=1e-5, atol=1e-7)
    assert losses.keys() != unchanged.keys() or any(losses[key] != unchanged[key] for key in losses)
    for detection, wanted in zip(model.eval()(batch()[0]), stock.eval()(batch()[0]), strict=True):
        assert detection.keys() == wanted.keys()
        assert torch.equal(detection["boxes"], wanted["boxes"])


def test_a_matchers_own_method_is_called(monkeypatch):
    losses = []
    for model in (maskloss.convert(tiny_mask_rcnn()), tiny_mask_rcnn()):
        model.rpn.proposal_matcher.set_low_quality_matches_ = lambda *arguments: None
        losses.append(training_pass(model, *batch())[0])
    unchanged, _ = training_pass(tiny_mask_rcnn(), *batch())
    for key, value in losses[1].items():
        torch.testing.assert_close(losses[0][key], value, rtol=1e-5, atol=1e-7)
    assert losses[0]["loss_objectness"] != unchanged["loss_objectness"]


def test_torchvisions_keypoint_functions_are_looked_up_when_they_are_called(monkeypatch):
    model = maskloss.convert(tiny_keypoint_rcnn()).train()
    # Nothing is visible, so there is nothing to learn.
    monkeypatch.setattr(
        torchvision_roi_heads,
        "keypoints_to_heatmap",
        lambda keypoints, *_: (keypoints[..., 0].long() * 0,) * 2,
    )
    assert model(*batch())["loss_keypoint"].item() == 0.0


def stock_transform(model: nn.Module) -> GeneralizedRCNNTransform:
    own = model.transform
    return GeneralizedRCNNTransform(own.min_size, own.max_size, own.image_mean, own.image_std)


@pytest.mark.parametrize("paste", ["matched", None])
def test_another_transform_that_drops_the_paste_is_refused(paste):
    model = maskloss.convert(tiny_mask_rcnn(), paste=paste).eval()
    model.transform = stock_transform(model)
    with pytest.raises(TypeError, match=r"model\.transform has been replaced by torchvision.*drops paste"):
        model(batch()[0])


def test_another_transform_is_allowed_with_torchvisions_paste():
    model = maskloss.convert(tiny_mask_rcnn()).eval()
    expected = model(batch()[0])
    model.transform = stock_transform(model).eval()
    assert torch.equal(model(batch()[0])[0]["masks"], expected[0]["masks"])


def test_a_postprocess_patched_after_convert_raises_if_it_drops_the_paste():
    model = maskloss.convert(tiny_mask_rcnn(), paste="matched").eval()
    model.transform.postprocess = mine
    with pytest.raises(TypeError, match=r"would drop model\.transform\.postprocess"):
        model(batch()[0])


@pytest.mark.parametrize("part", ["rpn", "roi_heads"])
def test_restoring_a_part_of_torchvisions_raises(part):
    model = maskloss.convert(tiny_mask_rcnn()).train()
    setattr(model, part, getattr(tiny_mask_rcnn(), part))
    with pytest.raises(
        TypeError, match=rf"model\.{part} has been replaced by torchvision.*call maskloss\.convert"
    ):
        model(*batch())
    training_pass(maskloss.convert(model), *batch())


def test_a_new_predictor_after_convert_keeps_working():
    # torchvision's fine-tuning tutorial replaces the predictor, and some users convert before.
    model, stock = maskloss.convert(tiny_mask_rcnn()), tiny_mask_rcnn()
    for one in (model, stock):
        torch.manual_seed(3)
        one.roi_heads.mask_predictor = MaskRCNNPredictor(CHANNELS, CHANNELS, NUM_CLASSES)
    expected, _ = training_pass(stock, *batch())
    losses, _ = training_pass(model, *batch())
    assert losses["loss_mask"].item() == pytest.approx(expected["loss_mask"].item(), rel=1e-6)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_checked_like_its_original(duplicate):
    model = duplicate(maskloss.convert(tiny_mask_rcnn())).train()
    model(*batch())
    model.rpn.compute_loss = mine
    with pytest.raises(TypeError, match="has been patched"):
        model(*batch())


# Code that reimplements torchvision's forward pass, as a well-known recipe for validation losses does.


def recipe(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Compute the RPN's losses by the steps of torchvision's own RegionProposalNetwork.forward."""
    images, targets = model.transform(*batch())
    features = {"0": model.backbone(images.tensors)}
    maps = list(features.values())
    objectness, deltas = model.rpn.head(maps)
    anchors = model.rpn.anchor_generator(images, maps)
    objectness, deltas = concat_box_prediction_layers(objectness, deltas)
    labels, matched_boxes = model.rpn.assign_targets_to_anchors(anchors, targets)
    encoded = model.rpn.box_coder.encode(matched_boxes, anchors)
    torch.manual_seed(5)
    return model.rpn.compute_loss(objectness, deltas, labels, encoded)


def test_the_inherited_compute_loss_evaluates_the_criterion():
    stock = recipe(tiny_mask_rcnn().train())
    own = recipe(maskloss.convert(tiny_mask_rcnn().train()))
    assert [value.item() for value in own] == pytest.approx([value.item() for value in stock], rel=1e-6)
    loss = MaskRCNNLoss(weights=LossWeights(objectness=2.0, rpn_box=5.0))
    weighted = recipe(maskloss.convert(tiny_mask_rcnn().train(), loss))
    assert [value.item() for value in weighted] == pytest.approx(
        [2 * stock[0].item(), 5 * stock[1].item()], rel=1e-6
    )


def test_the_inherited_compute_loss_counts_the_anchor_locations():
    # 16 x 16 positions of the one map of 128 x 128 px, stride 8, 2 images; see `small_models`.
    model = maskloss.convert(tiny_mask_rcnn().train(), MaskRCNNLoss(normalizers={"objectness": per_location}))
    torch.manual_seed(5)
    per_anchor = recipe(maskloss.convert(tiny_mask_rcnn().train()))[0].item()
    images, _ = model.transform(*batch())
    locations = 2 * (images.tensors.shape[-1] // 8) * (images.tensors.shape[-2] // 8)
    sampled = 64
    assert recipe(model)[0].item() == pytest.approx(per_anchor * sampled / locations, rel=1e-5)


def test_the_inherited_compute_loss_raises_for_terms_that_need_boxes():
    model = maskloss.convert(tiny_mask_rcnn().train(), MaskRCNNLoss(rpn_box=BoxGIoULoss()))
    with pytest.raises(ValueError, match="has no boxes"):
        recipe(model)


# Subclasses of our own parts.


class CountingHeads(RoIHeads):
    """A user's subclass of our heads."""

    passes = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.passes += 1
        return super().forward(*args, **kwargs)


class CountingRPN(RegionProposalNetwork):
    """A user's subclass of our RPN."""


def test_subclasses_of_our_parts_keep_their_class():
    expected, _ = training_pass(maskloss.convert(tiny_mask_rcnn()), *batch())
    model = tiny_mask_rcnn()
    model.roi_heads.__class__ = CountingHeads
    model.rpn.__class__ = CountingRPN
    model.to("cpu").double().float()
    maskloss.convert(model)
    assert type(model.roi_heads) is CountingHeads
    assert type(model.rpn) is CountingRPN
    losses, _ = training_pass(model, *batch())
    assert {key: value.item() for key, value in losses.items()} == {k: v.item() for k, v in expected.items()}
    assert model.roi_heads.passes == 1


def test_the_model_shows_its_loss():
    model = maskloss.convert(tiny_mask_rcnn(), MaskRCNNLoss(regularization=MatterportL2Loss(0.25)))
    assert "MatterportL2Loss(weight_decay=0.25)" in repr(model)


# Wrappers.


class Detector(nn.Module):
    """A module around a detector, as Lightning's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.detector = model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("wrap", "inside"),
    [
        (nn.DataParallel, "module"),
        (AveragedModel, "module"),
        (torch.compile, "_orig_mod"),
        (Detector, "detector"),
        (lambda model: Detector(nn.DataParallel(model)), r"detector\.module"),
    ],
    ids=["DataParallel", "AveragedModel", "compile", "a module", "a module of a wrapper"],
)
def test_the_error_for_a_wrapper_names_the_detector_inside(wrap, inside):
    wrapped = wrap(tiny_mask_rcnn())
    with pytest.raises(
        TypeError, match=rf"^convert takes torchvision's .*the detector inside is model\.{inside}: "
    ):
        maskloss.convert(wrapped)
    converted = wrap(maskloss.convert(tiny_mask_rcnn()))
    with pytest.raises(TypeError, match=rf"^losses_and_detections takes .* is model\.{inside}: "):
        maskloss.losses_and_detections(converted, *batch())


@pytest.mark.parametrize("thing", [MaskRCNN, maskrcnn_resnet50_fpn], ids=["class", "function"])
def test_the_error_for_what_makes_a_model_says_to_call_it(thing):
    with pytest.raises(TypeError, match=rf"not {thing.__name__} itself; call it to make a model$"):
        maskloss.convert(thing)


class Checkpointed(nn.Module):
    """A wrapper, as that of activation checkpointing."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module


@pytest.mark.parametrize("part", ["rpn", "roi_heads"])
@pytest.mark.parametrize(
    ("wrap", "way_out"),
    [
        (torch.compile, r"{0}\._orig_mod, and use {0}\.compile\(\) instead"),
        (Checkpointed, r"{0}\.inner, and use layers of {0} instead"),
    ],
)
def test_the_error_for_a_wrapped_part_says_how_to_unwrap_it(part, wrap, way_out):
    model, stock = maskloss.convert(tiny_mask_rcnn()), tiny_mask_rcnn()
    for one in (model, stock):
        setattr(one, part, wrap(getattr(one, part)))
    message = rf"model\.{part} is a .* around the R.*: set model\.{part} = " + way_out.format(
        rf"model\.{part}"
    )
    for call in (lambda: model(*batch()), lambda: maskloss.convert(stock), lambda: maskloss.convert(model)):
        with pytest.raises(TypeError, match=message):
            call()


def test_a_forward_patched_on_the_mask_predictor_is_called_with_torchvisions_arguments():
    results, calls = [], []
    for model in (tiny_mask_rcnn(), maskloss.convert(tiny_mask_rcnn())):
        own = model.roi_heads.mask_predictor.forward

        def patched(features: Tensor, own: Any = own) -> Tensor:
            calls.append(features)
            return own(features)

        model.roi_heads.mask_predictor.forward = patched
        results.append((training_pass(model, *batch())[0], model.eval()(batch()[0])))
    assert len(calls) == 4
    for key, expected in results[0][0].items():
        assert results[1][0][key].item() == pytest.approx(expected.item(), rel=1e-6)
    for found, expected in zip(results[1][1], results[0][1], strict=True):
        torch.testing.assert_close(found["masks"], expected["masks"], rtol=0, atol=1e-5)


def test_a_wrapper_of_the_mask_predictors_forward_does_not_make_it_compute_all_classes():
    # Wrappers for timing, activation checkpointing or offloading pass on all arguments.
    for wrap in (
        lambda own: lambda *args, **more: own(*args, **more),
        lambda own: functools.wraps(own)(lambda features, labels: own(features, labels)),
    ):
        model = maskloss.convert(tiny_mask_rcnn())
        own = model.roi_heads.mask_predictor.forward
        shapes = []

        def watched(*args: Any, own: Any = own, to: Any = shapes) -> Tensor:
            to.append(len(args))
            return own(*args)

        model.roi_heads.mask_predictor.forward = wrap(watched)
        training_pass(model, *batch())
        assert shapes == [2]


@pytest.mark.parametrize("kind", ["forward", "forward pre", "full backward"])
def test_a_hook_on_the_mask_predictor_sees_all_classes(kind):
    seen: list[list[Any]] = []
    results = []
    for model in (tiny_mask_rcnn(), maskloss.convert(tiny_mask_rcnn())):
        shapes: list[Any] = []
        seen.append(shapes)
        predictor = model.roi_heads.mask_predictor
        if kind == "forward":
            predictor.register_forward_hook(lambda _, args, out, to=shapes: to.append((len(args), out.shape)))
        elif kind == "forward pre":
            predictor.register_forward_pre_hook(lambda _, args, to=shapes: to.append(len(args)))
        else:
            predictor.register_full_backward_hook(lambda _, grads, outs, to=shapes: to.append(outs[0].shape))
        results.append(training_pass(model, *batch())[0])
        model.eval()(batch()[0])
    assert seen[0] == seen[1]
    assert seen[0]
    assert results[1]["loss_mask"].item() == pytest.approx(results[0]["loss_mask"].item(), rel=1e-6)


class Adapted(nn.Module):
    """A layer with an adapter of low rank, as LoRA's: it has no `out_features`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale


@pytest.mark.parametrize(
    ("build", "path"),
    [
        (tiny_mask_rcnn, "box_predictor.cls_score"),
        (tiny_mask_rcnn, "box_predictor.bbox_pred"),
        (tiny_mask_rcnn, "mask_predictor.mask_fcn_logits"),
        (tiny_keypoint_rcnn, "keypoint_predictor.kps_score_lowres"),
    ],
)
def test_layers_may_be_replaced_by_wrappers_of_them(build, path):
    results = []
    for model in (build(), maskloss.convert(build())):
        owner, _, name = path.rpartition(".")
        owner = model.roi_heads.get_submodule(owner)
        setattr(owner, name, Adapted(getattr(owner, name)))
        results.append(training_pass(model, *batch()))
    for key, expected in results[0][0].items():
        assert results[1][0][key].item() == pytest.approx(expected.item(), rel=1e-6)
    assert results[1][1][f"roi_heads.{path}.scale"].item() == pytest.approx(
        results[0][1][f"roi_heads.{path}.scale"].item(), rel=1e-4
    )


def test_the_error_for_a_stock_model_says_to_convert():
    with pytest.raises(
        TypeError, match=r"not a stock torchvision.*MaskRCNN: call maskloss\.convert\(model\) first"
    ):
        maskloss.losses_and_detections(tiny_mask_rcnn(), *batch())


# torch's tools.


@pytest.mark.slow
def test_a_compiled_model_trains_without_warnings():
    expected, _ = training_pass(tiny_mask_rcnn(), *batch())
    with warnings.catch_warnings(record=True) as issued:
        warnings.simplefilter("always")
        losses, _ = training_pass(
            torch.compile(maskloss.convert(tiny_mask_rcnn()), backend="eager"), *batch()
        )
    for key, value in expected.items():
        assert losses[key].item() == pytest.approx(value.item(), rel=1e-5)
    # torch's own warnings come for stock models, too.
    assert not [text for warning in issued if "functools.lru_cache" in (text := str(warning.message))]


def test_symbolic_tracing_of_the_mask_predictor_equals_torchvisions():
    torch.manual_seed(0)
    stock = MaskRCNNPredictor(CHANNELS, CHANNELS, NUM_CLASSES)
    own = ClassSelectedMaskPredictor(CHANNELS, CHANNELS, NUM_CLASSES)
    own.load_state_dict(stock.state_dict())
    features = torch.rand(3, CHANNELS, 4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traced = torch.fx.symbolic_trace(own)
    assert torch.equal(traced(features), stock(features))


@pytest.fixture
def one_process(tmp_path) -> Any:
    """A process group that contains only this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sharded_parameters_train_like_unsharded_ones(one_process):
    def built() -> nn.Module:
        return maskloss.convert(tiny_mask_rcnn(), MaskRCNNLoss(regularization=MatterportL2Loss(1e-2)))

    expected, gradients = training_pass(built(), *batch())
    model = built()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for part in (model.backbone, model.rpn.head, model.roi_heads.mask_predictor, model):
            fully_shard(part, mesh=mesh)
        losses, sharded = training_pass(model, *batch())
    assert losses.keys() == expected.keys()
    for key, value in expected.items():
        assert losses[key].item() == pytest.approx(value.item(), rel=1e-6), key
    for name, gradient in gradients.items():
        assert torch.allclose(sharded[name].full_tensor(), gradient, rtol=1e-5, atol=1e-7), name
    with torch.no_grad():
        found, _ = maskloss.losses_and_detections(model, *batch())
    assert found.keys() == expected.keys()


#: Losses and branches of which some layers do not run in a step.
SHARDED: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "mask": (tiny_mask_rcnn, {}, ("mask_head", "mask_predictor")),
    "keypoint": (tiny_keypoint_rcnn, {}, ("keypoint_head", "keypoint_predictor")),
    "point_rend": (tiny_mask_rcnn, {"mask_branch": "point_rend"}, ("mask_branch.coarse_head", "mask_branch")),
    "mask_iou": (tiny_mask_rcnn, {"mask_branch": "mask_iou"}, ("mask_branch.iou_head", "mask_head")),
}


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("case", SHARDED)
def test_layers_sharded_one_by_one_train_like_unsharded_ones(case, weight, one_process):
    make, options, parts = SHARDED[case]

    def built() -> nn.Module:
        weights = LossWeights(mask=weight, keypoint=weight, regularization=weight)
        loss = MaskRCNNLoss(regularization=MatterportL2Loss(1e-2), weights=weights)
        return maskloss.convert(make(), loss, **options)

    expected, gradients = training_pass(built(), *batch())
    model = built()
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    for part in (model.backbone, *map(model.roi_heads.get_submodule, parts), model):
        fully_shard(part, mesh=mesh)
    losses, sharded = training_pass(model, *batch())
    assert losses.keys() == expected.keys()
    for key, value in expected.items():
        assert losses[key].item() == pytest.approx(value.item(), rel=1e-6), key
    for name, gradient in gradients.items():
        if gradient is None:
            assert sharded[name] is None, name
        else:
            assert torch.allclose(sharded[name].full_tensor(), gradient, rtol=1e-5, atol=1e-7), name
    with torch.no_grad():
        assert "boxes" in model.eval()(batch()[0])[0]


def test_converting_a_sharded_model_raises(one_process):
    model = tiny_mask_rcnn()
    fully_shard(model.roi_heads, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    with pytest.raises(
        TypeError, match=r"model\.roi_heads is sharded already: call convert before fully_shard"
    ):
        maskloss.convert(model)
