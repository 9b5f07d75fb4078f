"""A converted model has the stock model's losses, gradients and detections on real images."""

from __future__ import annotations

import copy
import json
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, KeypointRCNN, MaskRCNN, maskrcnn_resnet50_fpn_v2
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor

import maskloss
from maskloss import MaskRCNNLoss
from maskloss.losses import MatterportL2Loss, SeesawLoss, matterport_l2_loss
from tests.photos import CROWDED, FEW, UPRIGHT, WITHOUT, read_photo, read_photos

from .small_models import batch, tiny_keypoint_rcnn, tiny_mask_rcnn, training_pass, without_objects

Batch = tuple[list[Tensor], list[dict[str, Any]]]

NUM_CLASSES, NUM_KEYPOINTS = 91, 17


# Models: torchvision's, small, and scaled up where all outputs of an untrained model would be similar.


def _spread(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.rpn.head.cls_logits.weight.mul_(10)
        model.roi_heads.box_predictor.cls_score.weight.mul_(10)
    return model


def _resnet18(kind: type[FasterRCNN], num_classes: int, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    # With ImageNet's frozen statistics and random weights activations would explode; BatchNorm keeps them.
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    return _spread(
        kind(
            backbone,
            num_classes,
            min_size=(96, 128, 160),
            max_size=192,
            rpn_post_nms_top_n_train=300,
            rpn_post_nms_top_n_test=40,
            box_batch_size_per_image=64,
            box_score_thresh=0.0,
            box_detections_per_img=20,
            **settings,
        )
    )


def mask_rcnn() -> nn.Module:
    return _resnet18(MaskRCNN, NUM_CLASSES)


def faster_rcnn() -> nn.Module:
    return _resnet18(FasterRCNN, NUM_CLASSES)


def keypoint_rcnn() -> nn.Module:
    return _resnet18(
        KeypointRCNN,
        2,
        keypoint_head=KeypointRCNNHeads(256, (32, 32)),
        keypoint_predictor=KeypointRCNNPredictor(32, NUM_KEYPOINTS),
    )


def mask_rcnn_v2() -> nn.Module:
    torch.manual_seed(0)
    model = _spread(
        maskrcnn_resnet50_fpn_v2(
            weights=None,
            weights_backbone=None,
            min_size=128,
            max_size=192,
            rpn_post_nms_top_n_train=200,
            rpn_post_nms_top_n_test=20,
            box_batch_size_per_image=32,
            box_score_thresh=0.0,
            box_detections_per_img=10,
        )
    )
    # Its untrained mask logits reach 170, where neighboring float32 values are 1.5e-5 apart. Scaled to the other
    # models' range, about 15, they can agree to 1e-6.
    with torch.no_grad():
        model.roi_heads.mask_predictor.mask_fcn_logits.weight.mul_(0.1)
    return model


# Batches.


@pytest.fixture(scope="module")
def photos() -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Real photographs, by the names of `tests.photos`, with keypoints."""
    photos = read_photos()
    assert len(photos[CROWDED][1]["boxes"]) > 10
    assert len(photos[WITHOUT][1]["boxes"]) == 0
    for _, target in photos:
        boxes = target["boxes"]
        generator = torch.Generator().manual_seed(target["image_id"])
        places = torch.rand((len(boxes), NUM_KEYPOINTS, 2), generator=generator)
        visible = torch.randint(0, 3, (len(boxes), NUM_KEYPOINTS, 1), generator=generator)
        # COCO's instances have no keypoints, so keypoints are random points in the boxes, a third of them unlabeled.
        target["keypoints"] = torch.cat(
            [boxes[:, None, :2] + places * (boxes[:, None, 2:] - boxes[:, None, :2]), visible.float()], dim=2
        )
    return photos


def choose(photos: list[tuple[Tensor, dict[str, Tensor]]], *names: int) -> Batch:
    return [photos[name][0] for name in names], [photos[name][1] for name in names]


def hundred_objects(photos: list[tuple[Tensor, dict[str, Tensor]]]) -> Batch:
    """A real image with a 10 x 10 grid of objects, each an ellipse."""
    image, _ = photos[FEW]
    height, width = image.shape[1:]
    row, column = torch.meshgrid(torch.arange(10), torch.arange(10), indexing="ij")
    low = torch.stack([column * width / 10 + 1, row * height / 10 + 1], dim=2).reshape(100, 2)
    boxes = torch.cat([low, low + torch.tensor([width / 10 - 3, height / 10 - 3])], dim=1)
    center, radius = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    y, x = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
    masks = torch.stack(
        [
            ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1
            for (cx, cy), (rx, ry) in zip(center.tolist(), radius.tolist(), strict=True)
        ]
    )
    target = {"boxes": boxes, "labels": torch.arange(100) % 90 + 1, "masks": masks.to(torch.uint8)}
    return [image], [target]


# Comparisons.


def assert_same_training(
    stock: nn.Module, images: list[Tensor], targets: list[dict[str, Any]], seed: int = 1
) -> None:
    converted = maskloss.convert(copy.deepcopy(stock))
    expected, expected_gradients = training_pass(stock, images, targets, seed)
    expected_state = torch.get_rng_state()
    losses, gradients = training_pass(converted, images, targets, seed)
    assert torch.equal(torch.get_rng_state(), expected_state), "other random numbers were drawn"
    assert losses.keys() == expected.keys()
    for key in expected:
        assert losses[key].shape == ()
        assert losses[key].dtype == expected[key].dtype
        torch.testing.assert_close(losses[key], expected[key], rtol=1e-6, atol=0, msg=key)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        expected_gradient = expected_gradients[name]
        assert (gradient is None) == (expected_gradient is None), name
        if gradient is not None:
            assert (gradient - expected_gradient).norm() <= 1e-5 * expected_gradient.norm(), name


def assert_same_detections(stock: nn.Module, images: list[Tensor]) -> None:
    converted = maskloss.convert(copy.deepcopy(stock)).eval()
    stock.eval()
    with torch.no_grad():
        expected, detections = stock(images), converted(images)
    assert len(detections) == len(expected) == len(images)
    for detection, other in zip(detections, expected, strict=True):
        assert detection.keys() == other.keys()
        assert len(other["boxes"]) >= 5, "hardly anything was detected, so hardly anything was compared"
        for field in other:
            if field == "masks":
                assert other["masks"].max() > 0.5 > other["masks"][other["masks"] > 0].min()
                assert (detection["masks"] - other["masks"]).abs().max() <= 1e-6
            else:
                assert torch.equal(detection[field], other[field]), field


@pytest.mark.parametrize(
    "seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_mask_rcnn_trains_alike_on_images_of_random_sizes(photos, seed):
    assert_same_training(mask_rcnn(), *choose(photos, CROWDED, UPRIGHT), seed)


def test_the_seeds_above_select_different_sizes(photos):
    sizes = set()
    model = mask_rcnn().train()
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        images, _ = model.transform(*choose(photos, CROWDED, UPRIGHT))
        sizes.add(tuple(images.image_sizes))
    assert len(sizes) > 1


def test_mask_rcnn_trains_alike_with_an_empty_image_in_the_batch(photos):
    assert_same_training(mask_rcnn(), *choose(photos, WITHOUT, FEW))


def test_mask_rcnn_trains_alike_without_any_positive(photos):
    assert_same_training(mask_rcnn(), *choose(photos, WITHOUT))


def test_mask_rcnn_trains_alike_on_a_hundred_objects(photos):
    assert_same_training(mask_rcnn(), *hundred_objects(photos))


def test_mask_rcnn_trains_alike_on_bool_masks(photos):
    # torchvision converts them to uint8; here they stay bool.
    images, targets = choose(photos, FEW)
    assert_same_training(mask_rcnn(), images, [{**targets[0], "masks": targets[0]["masks"].bool()}])


@pytest.mark.slow
@pytest.mark.parametrize("condition", ["many objects", "one object", "wide", "high"])
def test_mask_rcnn_trains_and_detects_alike_on_photographs_outside_the_repository(condition, shared):
    # These photographs are not in the repository, because most of them may not be redistributed.
    folder = shared / "coco_mini"
    data = json.loads((folder / "annotations.json").read_text())
    counts = Counter(a["image_id"] for a in data["annotations"] if not a["iscrowd"])
    key = {
        "many objects": lambda image: counts[image["id"]],
        "one object": lambda image: counts[image["id"]] == 1,
        "wide": lambda image: image["width"] / image["height"],
        "high": lambda image: image["height"] / image["width"],
    }[condition]
    images, targets = zip(
        *(
            read_photo(folder / "images", image, data["annotations"])
            for image in sorted(data["images"], key=key, reverse=True)[:2]
        ),
        strict=True,
    )
    assert_same_training(mask_rcnn(), list(images), list(targets))
    assert_same_detections(mask_rcnn(), list(images))


@pytest.mark.parametrize("build", [faster_rcnn, keypoint_rcnn])
@pytest.mark.parametrize("names", [(UPRIGHT, FEW), (WITHOUT,)], ids=["objects", "without any positive"])
def test_other_models_train_alike(build, names, photos):
    images, targets = choose(photos, *names)
    if build is keypoint_rcnn:
        targets = [{**target, "labels": torch.ones_like(target["labels"])} for target in targets]
    assert_same_training(build(), images, targets)


@pytest.mark.parametrize("build", [mask_rcnn, faster_rcnn, keypoint_rcnn])
def test_detections_are_alike(build, photos):
    assert_same_detections(build(), choose(photos, CROWDED, UPRIGHT)[0])


def test_detections_are_alike_where_nothing_is_detected(photos):
    stock = mask_rcnn()
    stock.roi_heads.score_thresh = 1.1
    images, _ = choose(photos, FEW)
    [expected] = copy.deepcopy(stock).eval()(images)
    [detection] = maskloss.convert(stock).eval()(images)
    assert detection.keys() == expected.keys()
    for field in expected:
        assert detection[field].shape == expected[field].shape
        assert detection[field].numel() == 0


@pytest.mark.parametrize(
    ("dtype", "stock_dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float16, torch.float16),
        # torchvision refuses these. The boxes are whole numbers below 64, exact in every dtype.
        (torch.bfloat16, torch.float32),
    ],
)
def test_boxes_of_another_float_dtype_train_alike(dtype, stock_dtype):
    images, targets = batch()
    stock = tiny_mask_rcnn()
    converted = maskloss.convert(copy.deepcopy(stock))
    expected, _ = training_pass(
        stock, images, [{**target, "boxes": target["boxes"].to(stock_dtype)} for target in targets]
    )
    losses, _ = training_pass(
        converted, images, [{**target, "boxes": target["boxes"].to(dtype)} for target in targets]
    )
    for key in expected:
        assert float(losses[key]) == pytest.approx(float(expected[key]), rel=1e-6), key


@pytest.mark.slow
def test_torchvisions_v2_builder_trains_and_detects_alike(photos):
    assert_same_training(mask_rcnn_v2(), *choose(photos, UPRIGHT, FEW))
    assert_same_detections(mask_rcnn_v2(), choose(photos, FEW)[0])


# losses_and_detections.


@pytest.fixture
def trained_mode_mix() -> nn.Module:
    """A converted model in training mode with parts frozen in evaluation mode, as fine-tuning leaves it."""
    model = maskloss.convert(tiny_mask_rcnn()).train()
    model.backbone.norm.eval()
    model.roi_heads.mask_head.eval()
    return model


def test_detections_with_losses_equal_evaluation(photos):
    model = maskloss.convert(mask_rcnn())
    images, targets = choose(photos, UPRIGHT, WITHOUT)
    with torch.no_grad():
        _, detections = maskloss.losses_and_detections(model.train(), images, targets)
        expected = model.eval()(images)
    for detection, other in zip(detections, expected, strict=True):
        assert len(other["boxes"]) >= 5
        assert detection.keys() == other.keys()
        assert all(torch.equal(detection[field], other[field]) for field in other)


@pytest.mark.parametrize("build", [tiny_mask_rcnn, tiny_keypoint_rcnn])
def test_losses_with_detections_are_torchvisions_on_the_proposals_of_evaluation(build):
    images, targets = batch()
    stock = build().eval()
    model = maskloss.convert(copy.deepcopy(stock))
    torch.manual_seed(3)
    losses, _ = maskloss.losses_and_detections(model, images, targets)

    # The stock model's own parts, with only the RPN and the heads in training mode, and with the number of proposals
    # of evaluation.
    stock.rpn._pre_nms_top_n["training"] = stock.rpn._pre_nms_top_n["testing"]
    stock.rpn._post_nms_top_n["training"] = stock.rpn._post_nms_top_n["testing"]
    by_image = []
    for image, target in zip(images, targets, strict=True):
        torch.manual_seed(3)
        resized, resized_targets = stock.transform([image], [target])
        features = {"0": stock.backbone(resized.tensors)}
        stock.rpn.train()
        proposals, rpn_losses = stock.rpn(resized, features, resized_targets)
        stock.roi_heads.train()
        _, roi_losses = stock.roi_heads(features, proposals, resized.image_sizes, resized_targets)
        by_image.append({**rpn_losses, **roi_losses})
    assert losses.keys() == by_image[0].keys()
    for key in losses:
        expected = sum(float(of_image[key].detach()) for of_image in by_image) / len(by_image)
        assert float(losses[key].detach()) == pytest.approx(expected, rel=1e-6), key


@pytest.mark.slow
def test_losses_do_not_depend_on_how_images_are_grouped(photos):
    model = maskloss.convert(mask_rcnn(), MaskRCNNLoss(regularization=MatterportL2Loss()))
    images, targets = choose(photos, CROWDED, FEW, UPRIGHT, WITHOUT)
    images, targets = [*images, images[1].flip(2)], [*targets, targets[1]]

    def mean_over(groups: list[list[int]]) -> dict[str, float]:
        totals: dict[str, float] = {}
        for group in groups:
            torch.manual_seed(5)
            with torch.no_grad():
                losses, detections = maskloss.losses_and_detections(
                    model, [images[i] for i in group], [targets[i] for i in group]
                )
            assert len(detections) == len(group)
            for key, value in losses.items():
                totals[key] = totals.get(key, 0.0) + float(value) * len(group) / len(images)
        return totals

    expected = mean_over([[0], [1], [2], [3], [4]])
    assert len({round(value, 6) for value in expected.values()}) == len(expected)
    for groups in ([[0, 1, 2, 3, 4]], [[4, 2], [1, 0], [3]], [[1, 4], [3, 0, 2]]):
        found = mean_over(groups)
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=1e-6), (groups, key)


def test_the_mode_of_each_module_is_restored(trained_mode_mix):
    before = [module.training for module in trained_mode_mix.modules()]
    assert len(set(before)) == 2
    maskloss.losses_and_detections(trained_mode_mix, *batch())
    assert [module.training for module in trained_mode_mix.modules()] == before


def test_after_an_error_the_model_is_as_it_was(trained_mode_mix):
    before = [module.training for module in trained_mode_mix.modules()]
    images, targets = batch()
    targets[0]["labels"][0] = 0
    with pytest.raises(ValueError, match="labels"):
        maskloss.losses_and_detections(trained_mode_mix, images, targets)
    assert [module.training for module in trained_mode_mix.modules()] == before
    # Evaluation needs no targets again, and the failed call has left no hook that collects losses.
    assert len(trained_mode_mix.eval()(images)) == 2
    assert not trained_mode_mix.rpn._forward_hooks
    assert not trained_mode_mix.roi_heads._forward_hooks


def test_running_statistics_do_not_change():
    model = maskloss.convert(tiny_mask_rcnn()).train()
    before = copy.deepcopy(model.state_dict())
    maskloss.losses_and_detections(model, *batch())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model(*batch())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {
        f"backbone.norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    }


def test_losses_update_class_statistics_only_in_training():
    loss = MaskRCNNLoss(classification=SeesawLoss(4))
    model = maskloss.convert(tiny_mask_rcnn(), loss).train()
    maskloss.losses_and_detections(model, *batch())
    assert not loss.classification.class_counts.any()
    assert loss.training
    model(*batch())
    assert loss.classification.class_counts.any()


def test_the_callers_random_generators_do_not_change():
    model = maskloss.convert(tiny_mask_rcnn())
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first, _ = maskloss.losses_and_detections(model, *batch())
    assert torch.equal(torch.get_rng_state(), before)
    # Sampling still depends on the caller's generators: another state gives other samples.
    torch.manual_seed(12)
    second, _ = maskloss.losses_and_detections(model, *batch())
    assert first["loss_objectness"] != second["loss_objectness"]


def test_losses_have_gradients_by_default():
    model = maskloss.convert(tiny_mask_rcnn()).eval()
    losses, _ = maskloss.losses_and_detections(model, *batch())
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_losses_have_no_gradients_in_a_no_grad_context(context):
    model = maskloss.convert(tiny_mask_rcnn())
    with context():
        losses, detections = maskloss.losses_and_detections(model, *batch())
        assert not torch.is_grad_enabled()
    assert not any(value.requires_grad for value in losses.values())
    assert not any(value.requires_grad for detection in detections for value in detection.values())


def test_the_losses_include_the_penalty_if_there_is_one():
    model = maskloss.convert(tiny_mask_rcnn(), MaskRCNNLoss(regularization=MatterportL2Loss(0.1)))
    losses, detections = maskloss.losses_and_detections(model, *batch())
    assert float(losses["loss_regularization"].detach()) == pytest.approx(
        float(matterport_l2_loss(model, weight_decay=0.1).detach()), rel=1e-6
    )
    assert detections[0].keys() == {"boxes", "labels", "scores", "masks"}
    training = model.train()(*batch())
    assert losses.keys() == training.keys()


def test_images_without_objects_have_every_loss():
    model = maskloss.convert(tiny_mask_rcnn())
    images, _ = batch()
    losses, _ = maskloss.losses_and_detections(model, images, without_objects(images))
    values = {key: float(value.detach()) for key, value in losses.items()}
    assert values.keys() == {
        "loss_objectness",
        "loss_rpn_box_reg",
        "loss_classifier",
        "loss_box_reg",
        "loss_mask",
    }
    assert values["loss_rpn_box_reg"] == values["loss_box_reg"] == values["loss_mask"] == 0
    assert values["loss_objectness"] > 0
    assert values["loss_classifier"] > 0


@pytest.mark.parametrize(
    "wrap", [lambda model: model, lambda model: nn.Sequential(model)], ids=["stock", "wrapped"]
)
def test_an_unconverted_model_raises(wrap):
    model = wrap(tiny_mask_rcnn())
    with pytest.raises(
        TypeError, match=f"takes a model from maskloss.convert, not .*{type(model).__name__}[:;]"
    ):
        maskloss.losses_and_detections(model, *batch())
