"""Invalid targets raise before anything is computed from them, and the error names the image and the field."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import maskloss
from maskloss import EncodedMasks

from .small_models import (
    NUM_CLASSES,
    batch,
    tiny_keypoint_rcnn,
    tiny_mask_rcnn,
    training_pass,
    without_objects,
)

Target = dict[str, Any]

#: Image 1 of `batch()` is 72 px high and 72 px wide, and its image_id is 41.
HEIGHT, WIDTH = 72, 72
NAME = r"image 1 of the batch \(image_id 41\)"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return maskloss.convert(tiny_mask_rcnn())


class NotReached(Exception):
    """The transform ran although the targets are bad."""


@pytest.fixture
def guarded_model(model: nn.Module) -> Any:
    """The model, with a transform that must not be reached."""

    def refuse(*_: Any) -> None:
        raise NotReached

    handle = model.transform.register_forward_pre_hook(refuse)
    yield model
    handle.remove()


def box(index: int, *corners: float) -> Callable[[Target], None]:
    def change(target: Target) -> None:
        target["boxes"][index] = torch.tensor(corners)

    return change


def label(value: int) -> Callable[[Target], None]:
    def change(target: Target) -> None:
        target["labels"][1] = value

    return change


def field(name: str, make: Callable[[Any], Any]) -> Callable[[Target], None]:
    def change(target: Target) -> None:
        target[name] = make(target[name])

    return change


def mask_value(value: int) -> Callable[[Target], None]:
    def change(target: Target) -> None:
        target["masks"][1, 3, 5] = value

    return change


SQUARE = [[5.0, 5.0, 20.0, 5.0, 20.0, 20.0]]
BAD: dict[str, tuple[Callable[[Target], None], type[Exception], str]] = {
    "label of background": (label(0), ValueError, "labels: a label is below 1"),
    "negative label": (label(-1), ValueError, "labels: a label is below 1"),
    "label of num_classes": (
        label(NUM_CLASSES),
        ValueError,
        "labels: a label is not less than num_classes = 4",
    ),
    "labels int32": (field("labels", lambda v: v.int()), TypeError, r"labels: expected torch\.int64.*int32"),
    "labels float": (
        field("labels", lambda v: v.float()),
        TypeError,
        r"labels: expected torch\.int64.*float32",
    ),
    "labels a list": (
        field("labels", lambda v: v.tolist()),
        TypeError,
        "labels: expected a tensor, got list",
    ),
    "labels with an axis more": (
        field("labels", lambda v: v[:, None]),
        ValueError,
        r"labels: expected shape \(2,\).*\(2, 1\)",
    ),
    "a label too few": (
        field("labels", lambda v: v[:1]),
        ValueError,
        r"labels: expected shape \(2,\).*\(1,\)",
    ),
    "a label too many": (
        field("labels", lambda v: torch.cat([v, v])),
        ValueError,
        r"labels: expected shape \(2,\).*\(4,\)",
    ),
    "boxes bool": (
        field("boxes", lambda v: v.bool()),
        TypeError,
        "boxes: expected a floating-point or integer",
    ),
    "boxes a list": (field("boxes", lambda v: v.tolist()), TypeError, "boxes: expected a tensor, got list"),
    "boxes of five numbers": (
        field("boxes", lambda v: torch.cat([v, v[:, :1]], dim=1)),
        ValueError,
        r"boxes: expected shape \(G, 4\), got \(2, 5\)",
    ),
    "one box without its axis": (
        field("boxes", lambda v: v[0]),
        ValueError,
        r"boxes: expected shape \(G, 4\), got \(4,\)",
    ),
    "box without width": (box(1, 9, 5, 9, 20), ValueError, "boxes: a box has no area"),
    "box without height": (box(1, 5, 9, 20, 9), ValueError, "boxes: a box has no area"),
    "box upside down": (box(1, 5, 20, 20, 5), ValueError, "boxes: a box has no area"),
    "box with NaN": (box(1, 5, float("nan"), 20, 20), ValueError, "boxes: a box is not finite"),
    "box with infinity": (box(1, 5, 5, float("inf"), 20), ValueError, "boxes: a box is not finite"),
    "masks of another height": (
        field("masks", lambda v: v[:, :-1]),
        ValueError,
        r"masks: expected shape \(2, 72, 72\).*\(2, 71, 72\)",
    ),
    "masks of another width": (
        field("masks", lambda v: v[:, :, :-1]),
        ValueError,
        r"masks: expected shape \(2, 72, 72\).*\(2, 72, 71\)",
    ),
    "masks with a channel axis": (
        field("masks", lambda v: v[:, None]),
        ValueError,
        r"masks: expected shape \(2, 72, 72\).*\(2, 1, 72, 72\); masks\.squeeze\(1\)",
    ),
    "a mask too few": (
        field("masks", lambda v: v[:1]),
        ValueError,
        r"masks: expected shape \(2, 72, 72\).*\(1, 72, 72\)",
    ),
    "mask of 0 and 255": (mask_value(255), ValueError, "masks: a mask has values other than 0 and 1"),
    "mask with a 2": (mask_value(2), ValueError, "masks: a mask has values other than 0 and 1"),
    "masks of fractions": (
        field("masks", lambda v: v * 0.5),
        ValueError,
        "masks: a mask has values other than 0 and 1",
    ),
    "masks with NaN": (
        field("masks", lambda v: v.float().masked_fill(v > 0, torch.nan)),
        ValueError,
        "masks: a mask has values other than 0 and 1",
    ),
    "masks of -1": (
        field("masks", lambda v: -v.long()),
        ValueError,
        "masks: a mask has values other than 0 and 1",
    ),
    "masks complex": (field("masks", lambda v: v + 0j), TypeError, "masks: expected a tensor of 0 and 1"),
    "masks a list": (
        field("masks", lambda v: list(v)),
        TypeError,
        r"masks: expected a tensor or EncodedMasks, got list; torch\.stack\(masks\) makes a tensor",
    ),
    "masks of numpy": (
        field("masks", lambda v: v.numpy()),
        TypeError,
        r"masks: expected a tensor or EncodedMasks, got ndarray; torch\.from_numpy\(masks\) makes a tensor",
    ),
    "masks with the objects last": (
        field("masks", lambda v: v.permute(1, 2, 0)),
        ValueError,
        r"masks: expected shape \(2, 72, 72\).*\(72, 72, 2\); masks\.permute\(2, 0, 1\) puts",
    ),
    "masks as numbers of objects": (
        field("masks", lambda v: v[0] + 2 * v[1]),
        ValueError,
        r"masks: expected shape \(2, 72, 72\).*\(72, 72\); if its pixels are numbers of objects",
    ),
    "a placeholder of label 0": (
        lambda target: target["labels"].zero_(),
        ValueError,
        r"labels: a label is below 1; 0 is background; an image without objects has empty fields: boxes torch\.zeros",
    ),
    "a placeholder of label 0 and a box of zeros": (
        lambda target: (target["labels"].zero_(), target["boxes"].zero_()),
        ValueError,
        r"boxes: a box has no area; .*; an image without objects has empty fields: boxes torch\.zeros",
    ),
    "encoded masks of another size": (
        field("masks", lambda _: EncodedMasks([SQUARE, SQUARE], HEIGHT, WIDTH + 1)),
        ValueError,
        r"masks: expected shape \(2, 72, 72\).*\(2, 72, 73\)",
    ),
    "an encoded mask too many": (
        field("masks", lambda _: EncodedMasks([SQUARE] * 3, HEIGHT, WIDTH)),
        ValueError,
        r"masks: expected shape \(2, 72, 72\).*\(3, 72, 72\)",
    ),
    "no boxes": (lambda target: target.pop("boxes"), ValueError, "the target has no boxes"),
    "no labels": (lambda target: target.pop("labels"), ValueError, "the target has no labels"),
    "no masks": (
        lambda target: target.pop("masks"),
        ValueError,
        r"the target has no masks; for objects without masks, pass has_mask=",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_raises_before_the_transform_naming_image_and_field(bad, guarded_model):
    change, error, message = BAD[bad]
    images, targets = batch()
    change(targets[1])
    with pytest.raises(error, match=f"^{NAME}(, |: ){message}"):
        guarded_model.train()(images, targets)


@pytest.mark.parametrize("bad", ["label of background", "box with NaN", "mask of 0 and 255", "no masks"])
def test_losses_and_detections_raises_the_same_errors(bad, guarded_model):
    change, error, message = BAD[bad]
    images, targets = batch()
    change(targets[1])
    with pytest.raises(error, match=f"^{NAME}(, |: ){message}"):
        maskloss.losses_and_detections(guarded_model, images, targets)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (0.0, "boxes: expected a tensor, got float"),
        (torch.rand(4), r"boxes: expected shape \(G, 4\), got \(4,\)"),
        (torch.rand(1, 5), r"boxes: expected shape \(G, 4\), got \(1, 5\)"),
        (torch.tensor([[1, 3, 1, 4]]), "the target has no labels"),
    ],
)
def test_wrong_boxes_alone_raise_the_assertion_error_of_torchvision(boxes, message, guarded_model):
    # torchvision's `test_detection_model_validation`: targets with nothing but wrong boxes.
    images, _ = batch(num_images=1)
    with pytest.raises(AssertionError, match=message):
        guarded_model.train()(images, [{"boxes": boxes}])
    with pytest.raises(AssertionError):
        tiny_mask_rcnn().train()(images, [{"boxes": boxes}])


def test_good_input_reaches_the_transform(guarded_model):
    # Without this, a check that rejects every input would pass the tests above.
    with pytest.raises(NotReached):
        guarded_model.train()(*batch())


def test_the_message_names_the_instance_with_its_box_and_label(guarded_model):
    images, targets = batch()
    targets[1]["labels"][1] = 9
    with pytest.raises(ValueError, match=r"\(instance 1: box \[26\.0, 21\.0, 61\.0, 56\.0\], label 9\)$"):
        guarded_model.train()(images, targets)


def test_an_image_without_image_id_is_named_by_its_index(guarded_model):
    images, targets = batch()
    del targets[1]["image_id"]
    targets[1]["labels"][0] = 0
    with pytest.raises(ValueError, match=r"^image 1 of the batch, labels: "):
        guarded_model.train()(images, targets)


def test_different_numbers_of_targets_and_images_raise(guarded_model):
    images, targets = batch()
    with pytest.raises(ValueError, match=r"^got 2 images but 1 targets$"):
        guarded_model.train()(images, targets[:1])


def test_training_without_targets_raises(guarded_model):
    images, _ = batch()
    with pytest.raises(ValueError, match=r"^targets are needed to compute losses, got None$"):
        guarded_model.train()(images)


def test_targets_given_by_keyword_are_checked_too(guarded_model):
    images, targets = batch()
    targets[1]["labels"][1] = 0
    with pytest.raises(ValueError, match=f"^{NAME}, labels"):
        guarded_model.train()(images=images, targets=targets)


def test_evaluation_without_targets_checks_nothing(model):
    images, _ = batch()
    assert len(model.eval()(images)) == 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            field("keypoints", lambda v: v[:1]),
            ValueError,
            r"keypoints: expected shape \(2, .*3\), got \(1, 5, 3\)",
        ),
        (
            field("keypoints", lambda v: v[..., :2]),
            ValueError,
            r"keypoints: expected shape \(2, .*\(2, 5, 2\)",
        ),
        (
            field("keypoints", lambda v: v.flatten(1)),
            ValueError,
            r"keypoints: expected shape \(2, .*\(2, 15\)",
        ),
        (field("keypoints", lambda v: v.long()), TypeError, "keypoints: expected a floating-point tensor"),
        (field("keypoints", lambda v: v.tolist()), TypeError, "keypoints: expected a floating-point tensor"),
        (lambda target: target.pop("keypoints"), ValueError, "the target has no keypoints"),
    ],
    ids=["too few", "without visibility", "flat", "int64", "list", "missing"],
)
def test_bad_keypoints_raise(change, error, message):
    keypoint_model = maskloss.convert(tiny_keypoint_rcnn()).train()
    images, targets = batch()
    change(targets[1])
    with pytest.raises(error, match=f"^{NAME}(, |: ){message}"):
        keypoint_model(images, targets)


# Unusual but valid inputs.


ODD_EMPTY: dict[str, Target] = {
    "as data sets give them": {},
    "labels (0, 1)": {"labels": torch.zeros((0, 1), dtype=torch.int64)},
    "masks (0,)": {"masks": torch.zeros(0, dtype=torch.uint8)},
    "masks of no size": {"masks": torch.zeros((0, 0, 0), dtype=torch.bool)},
    "masks of another size": {"masks": torch.zeros((0, 5, 9), dtype=torch.uint8)},
    "masks with a channel axis": {"masks": torch.zeros((0, 1, 64, 80), dtype=torch.uint8)},
    "masks float": {"masks": torch.zeros((0, 64, 80))},
    "masks encoded": {"masks": EncodedMasks([], 64, 80)},
    "masks encoded of another size": {"masks": EncodedMasks([], 7, 3)},
    "masks in a list": {"masks": []},
    "masks sparse": {"masks": torch.zeros((0, 64, 80), dtype=torch.uint8).to_sparse()},
    "optional fields in lists": {"points": [], "weights": [], "has_mask": [], "keypoints": []},
}


@pytest.mark.parametrize("odd", ODD_EMPTY)
def test_empty_targets_are_accepted_in_odd_shapes(odd, model):
    images, targets = batch()
    targets[0] = {**without_objects(images)[0], **ODD_EMPTY[odd]}
    expected, _ = training_pass(model, images, [without_objects(images)[0], targets[1]])
    losses, _ = training_pass(model, images, targets)
    assert losses.keys() == expected.keys()
    for key in losses:
        assert losses[key].isfinite(), key
        assert torch.equal(losses[key], expected[key]), key


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("labels", torch.tensor([1, 2])),
        ("masks", torch.ones(2, HEIGHT, WIDTH, dtype=torch.uint8)),
        ("masks", EncodedMasks([[[0.0, 0, 9, 0, 9, 9]]], HEIGHT, WIDTH)),
        ("masks", [torch.ones(HEIGHT, WIDTH)]),
        ("weights", torch.ones(2)),
        ("has_mask", torch.tensor([True])),
        ("points", torch.ones(1, 2, 3)),
    ],
)
def test_objects_without_boxes_are_refused(field, value, guarded_model):
    images, targets = batch()
    targets[1] = {**without_objects(images)[1], field: value, "image_id": torch.tensor(41)}
    with pytest.raises(ValueError, match=rf"^{NAME}, {field}: got shape .*, but the target has no boxes"):
        guarded_model.train()(images, targets)


def test_sparse_masks_are_refused(guarded_model):
    images, targets = batch()
    targets[1]["masks"] = targets[1]["masks"].to_sparse()
    with pytest.raises(TypeError, match=rf"^{NAME}, masks: expected a dense tensor, got torch\.sparse_coo"):
        guarded_model.train()(images, targets)


def set_keypoint(column: int, value: float, visible: float = 1.0) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that changes a coordinate or the visibility of one keypoint."""

    def change(keypoints: torch.Tensor) -> torch.Tensor:
        changed = keypoints.clone()
        changed[1, 2, 2] = visible
        changed[1, 2, column] = value
        return changed

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda keypoints: keypoints[:, :3], r"expected shape \(2, 5, 3\), as many .*, got \(2, 3, 3\)"),
        (lambda keypoints: keypoints.repeat(1, 2, 1), r"expected shape \(2, 5, 3\), .*got \(2, 10, 3\)"),
        (set_keypoint(0, torch.nan), r"a visible keypoint.* is not finite \(instance 1: "),
        (set_keypoint(1, torch.inf), r"a visible keypoint.* is not finite \(instance 1: "),
        (set_keypoint(0, -torch.inf, visible=2.0), r"a visible keypoint.* is not finite \(instance 1: "),
        (set_keypoint(2, torch.nan), r"a visible keypoint.* is not finite \(instance 1: "),
        (set_keypoint(2, torch.inf), r"a visible keypoint.* is not finite \(instance 1: "),
    ],
)
def test_keypoints_that_would_train_wrongly_are_refused(change, message):
    images, targets = batch()
    targets[1]["keypoints"] = change(targets[1]["keypoints"])
    model = maskloss.convert(tiny_keypoint_rcnn()).train()
    with pytest.raises(ValueError, match=rf"^{NAME}, keypoints: {message}"):
        model(images, targets)
    with pytest.raises(ValueError, match=rf"^{NAME}, keypoints: {message}"):
        maskloss.losses_and_detections(model, images, targets)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e6])
def test_the_place_of_an_invisible_keypoint_does_not_matter(value):
    images, targets = batch()
    targets[1]["keypoints"] = set_keypoint(0, value, visible=0.0)(targets[1]["keypoints"])
    expected, _ = training_pass(tiny_keypoint_rcnn(), images, targets)
    losses, _ = training_pass(maskloss.convert(tiny_keypoint_rcnn()), images, targets)
    torch.testing.assert_close(losses["loss_keypoint"], expected["loss_keypoint"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("encoded", [False, True])
def test_targets_are_not_modified(encoded, model):
    images, targets = batch()
    if encoded:
        for image, target in zip(images, targets, strict=True):
            target["masks"] = EncodedMasks([SQUARE, SQUARE], *image.shape[-2:])
    before_images, before = copy.deepcopy((images, [dict(target) for target in targets]))
    objects = [dict(target) for target in targets]
    training_pass(model, images, targets)
    maskloss.losses_and_detections(model, images, targets)
    for image, before_image in zip(images, before_images, strict=True):
        assert torch.equal(image, before_image)
    for target, same, copied in zip(targets, objects, before, strict=True):
        assert target.keys() == same.keys()
        for name, value in target.items():
            assert value is same[name], name
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, copied[name]), name
            else:
                assert value.shape == copied[name].shape
                assert value.x_map == copied[name].x_map


def test_a_batch_without_images_raises():
    with pytest.raises(ValueError, match="images is empty"):
        maskloss.convert(tiny_mask_rcnn()).train()([], [])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_masks_may_stay_on_the_host():
    model = maskloss.convert(tiny_mask_rcnn()).cuda()
    images, targets = batch()
    there = [{**t, "boxes": t["boxes"].cuda(), "labels": t["labels"].cuda()} for t in targets]
    losses, _ = training_pass(model, [image.cuda() for image in images], there)
    assert all(value.isfinite() for value in losses.values())
