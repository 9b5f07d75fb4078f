"""Training with sync_free=True: the losses of the parity mode, without synchronization."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn_v2
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign, batched_nms

from benchmarks.pretended_device import Counts, counted, moved, pretended_device, sent
from maskloss import EncodedMasks, convert, losses_and_detections
from maskloss.detection import rpn
from maskloss.detection.pooling import pooled_from_every_level
from maskloss.detection.sampling import SampleCounts
from maskloss.masks.transfer import AsyncHostCopy

from .small_models import batch, tiny_keypoint_rcnn, tiny_mask_rcnn, training_pass, without_objects

# Losses. A sampler that takes all candidates is not random, so both modes must agree.


def taking_all(model: nn.Module, positive_fraction: float = 0.5) -> nn.Module:
    model.rpn.fg_bg_sampler = BalancedPositiveNegativeSampler(10_000, positive_fraction)
    model.roi_heads.fg_bg_sampler = BalancedPositiveNegativeSampler(10_000, positive_fraction)
    # Keep all proposals that NMS keeps, so that images have different numbers of proposals.
    model.rpn._post_nms_top_n["training"] = 10_000
    return model


def assert_equal_passes(
    one: nn.Module, other: nn.Module, images: list[Tensor], targets: list[dict[str, Any]]
) -> None:
    losses, gradients = training_pass(one, images, targets)
    expected, expected_gradients = training_pass(other, images, targets)
    assert losses.keys() == expected.keys()
    for key, loss in expected.items():
        torch.testing.assert_close(losses[key], loss, rtol=1e-5, atol=0)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8, name


@pytest.mark.parametrize("make", [tiny_mask_rcnn, tiny_keypoint_rcnn])
@pytest.mark.parametrize("preset", ["torchvision", "detectron2", "matterport"])
def test_when_everything_is_sampled_losses_and_gradients_equal_the_parity_mode(make, preset):
    model = taking_all(make())
    assert_equal_passes(
        convert(copy.deepcopy(model), preset, sync_free=True), convert(model, preset), *batch()
    )


def test_the_comparison_includes_padding():
    model = convert(taking_all(tiny_mask_rcnn()), sync_free=True)
    seen: list[SampleCounts] = []
    result = AsyncHostCopy.result

    def watched(copy_: AsyncHostCopy) -> list[Tensor]:
        tensors = result(copy_)
        seen.append(SampleCounts.of(*tensors[:2]))
        return tensors

    with patch.object(AsyncHostCopy, "result", watched):
        training_pass(model, *batch())
    assert len(set(seen[1].num_sampled)) == 2


def test_encoded_masks_train_as_in_the_parity_mode():
    images, targets = batch()
    for image, target in zip(images, targets, strict=True):
        squares = [[[x1, y1, x2, y1, x2, y2, x1, y2]] for x1, y1, x2, y2 in target["boxes"].tolist()]
        target["masks"] = EncodedMasks(squares, *image.shape[-2:])
    model = taking_all(tiny_mask_rcnn())
    assert_equal_passes(convert(copy.deepcopy(model), sync_free=True), convert(model), images, targets)


@pytest.mark.parametrize("empty", [[0], [1], [0, 1]])
def test_images_without_objects_train_as_in_the_parity_mode(empty):
    images, targets = batch()
    for index in empty:
        targets[index] = without_objects(images)[index]
    model = taking_all(tiny_mask_rcnn())
    assert_equal_passes(convert(copy.deepcopy(model), sync_free=True), convert(model), images, targets)


def test_without_positives_every_loss_is_finite():
    model = convert(taking_all(tiny_mask_rcnn(), positive_fraction=0.0), sync_free=True)
    losses, gradients = training_pass(model, *batch())
    assert set(losses) == {
        "loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"
    }  # fmt: skip
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["loss_mask"] == 0
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())


def test_mean_losses_equal_those_of_the_parity_mode():
    # Small samples differ between the modes, but their mean over seeds agrees within its error.
    def losses_of(model: nn.Module) -> Tensor:
        runs = [training_pass(model, *batch(), seed=seed)[0] for seed in range(60)]
        return torch.stack([torch.stack(list(losses.values())) for losses in runs])

    model = tiny_mask_rcnn()
    model.backbone.norm.momentum = 0.0
    ours, parity = losses_of(convert(copy.deepcopy(model), sync_free=True)), losses_of(convert(model))
    error = (ours.var(0) / len(ours) + parity.var(0) / len(parity)).sqrt()
    assert ((ours.mean(0) - parity.mean(0)).abs() <= 4 * error + 1e-6).all()
    assert (ours.std(0) <= 2 * parity.std(0) + 1e-6).all()


def test_replacing_invalid_boxes_keeps_the_proposals_of_dropping_them():
    generator = torch.Generator().manual_seed(0)
    model = convert(tiny_mask_rcnn(), sync_free=True).rpn
    model.min_size, model.score_thresh = 20.0, 0.3
    low = torch.rand(200, 2, generator=generator) * 200
    boxes = torch.cat([low, low + 60 * torch.rand(200, 2, generator=generator)], dim=1)
    scores, levels = torch.rand(200, generator=generator), torch.randint(3, (200,), generator=generator)
    kept = (boxes[:, 2:] - boxes[:, :2] >= 20.0).all(1) & (scores >= 0.3)
    assert 20 < kept.sum() < 180
    expected = boxes[kept][batched_nms(boxes[kept], scores[kept], levels[kept], 0.5)]
    copied = model._replace_invalid_boxes(boxes, scores, levels, (64, 64))
    assert torch.equal(copied[0][batched_nms(*copied, 0.5)], expected)


@pytest.mark.parametrize("rows", [slice(5, 9), slice(None)])
def test_boxes_of_a_diverged_network_are_never_pooled(rows):
    model = convert(tiny_mask_rcnn(), sync_free=True).rpn
    low = torch.rand(40, 2, generator=torch.Generator().manual_seed(0)) * 30
    boxes = torch.cat([low, low + 20], dim=1)
    boxes[rows] = torch.nan
    scores, levels = torch.linspace(0, 1, 40), torch.zeros(40, dtype=torch.int64)
    copied, _, _ = model._replace_invalid_boxes(boxes, scores, levels, (50, 60))
    assert copied.isfinite().all()
    if rows == slice(None):
        assert copied.unique(dim=0).tolist() == [[0, 0, 60, 50]]


def test_a_diverged_network_gives_a_loss_that_is_not_finite_and_no_crash():
    model = tiny_mask_rcnn()
    with torch.no_grad():
        model.rpn.head.bbox_pred.weight.fill_(torch.nan)
    losses, _ = training_pass(convert(model, sync_free=True), *batch())
    assert losses["loss_rpn_box_reg"].isnan()
    assert losses["loss_classifier"].isfinite()


class FloatMasks(GeneralizedRCNNTransform):
    """A custom transform that returns float masks."""

    factor = 1.0

    def forward(self, images: Any, targets: Any = None) -> Any:
        images, targets = super().forward(images, targets)
        return images, [{**target, "masks": self.factor * target["masks"].float()} for target in targets]


@pytest.mark.parametrize("sync_free", [False, True])
def test_float_masks_from_a_custom_transform_are_converted(sync_free):
    def built() -> nn.Module:
        model = tiny_mask_rcnn()
        model.transform = FloatMasks(64, 128, [0.5] * 3, [0.2] * 3)
        return model

    losses, _ = training_pass(convert(built(), sync_free=sync_free), *batch())
    if not sync_free:
        expected, _ = training_pass(built(), *batch())
        assert losses["loss_mask"].item() == pytest.approx(expected["loss_mask"].item(), rel=1e-6)
    model = built()
    model.transform.factor = 0.5
    with pytest.raises(
        ValueError, match=r"the transform returned masks of torch\.float32 with values other than 0 and 1"
    ):
        training_pass(convert(model, sync_free=sync_free), *batch())


def test_a_patched_selection_raises_and_the_model_is_unchanged():
    model = tiny_mask_rcnn()
    model.roi_heads.select_training_samples = model.roi_heads.select_training_samples
    with pytest.raises(TypeError, match=r"would drop model\.roi_heads\.select_training_samples"):
        convert(model, sync_free=True)
    assert type(model.rpn) is not rpn.RegionProposalNetwork


def proposals_of(model: nn.Module) -> list[Tensor]:
    model.train()
    images, targets = batch()
    proposals: list[Tensor] = []
    handle = model.rpn.register_forward_hook(lambda module, args, output: proposals.extend(output[0]))
    torch.manual_seed(0)
    model(images, targets)
    handle.remove()
    return proposals


@pytest.mark.parametrize(("min_size", "score_thresh"), [(1e-3, 0.0), (20.0, 0.0), (1e-3, 0.5), (18.0, 0.45)])
def test_small_or_low_scoring_boxes_are_not_proposed(min_size, score_thresh):
    model = tiny_mask_rcnn()
    model.rpn.min_size, model.rpn.score_thresh = min_size, score_thresh
    model.rpn._post_nms_top_n["training"] = 1000
    expected = proposals_of(convert(copy.deepcopy(model)))
    found = proposals_of(convert(model, sync_free=True))
    assert [len(boxes) for boxes in expected] == [len(boxes) for boxes in found]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


# Synchronization, counted on a pretended device, with the values that it computes.


def on_the_device(images: list[Tensor], targets: list[dict[str, Any]]) -> tuple[Any, Any]:
    there = [
        {key: sent(value) if isinstance(value, Tensor) else value for key, value in target.items()}
        for target in targets
    ]
    return [sent(image) for image in images], there


def counts_of_a_step(model: nn.Module, examples: Any) -> tuple[Counts, dict[str, Tensor]]:
    """Train on the pretended device until nothing is checked or copied for the first time, and count one more step."""
    with pretended_device():
        moved(model).train()
        model.backbone.norm.momentum = 0.0
        if hasattr(model, "conversion"):
            model.conversion.box_format_checks = 0
        images, targets = on_the_device(*examples)
        for _ in range(2):
            model.zero_grad()
            torch.manual_seed(0)
            with counted() as counts:
                losses = model(images, targets)
                sum(losses.values()).backward()
    return counts, {key: loss.values for key, loss in losses.items()}


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("kind", ["bool", "uint8", "encoded"])
def test_a_step_waits_for_nms_and_twice_per_batch(size, kind):
    images, targets = repeated_batch(size)
    for image, target in zip(images, targets, strict=True):
        if kind == "encoded":
            target["masks"] = EncodedMasks([[box_polygon(box)] for box in target["boxes"]], *image.shape[-2:])
        else:
            target["masks"] = target["masks"].to(getattr(torch, kind))
    model = convert(tiny_mask_rcnn(), sync_free=True)
    counts, losses = counts_of_a_step(model, (images, targets))
    assert len(losses) == 5
    # The checks read the boxes, and the mask branch the number of positives. When the RPN reads its sample, the host
    # has waited for NMS since the sample was copied.
    assert counts.waits == {"torchvision::nms": size, "copy to the host": 1, "event": 1}


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("sync_free", [False, True])
def test_a_step_launches_and_waits_less_than_torchvisions_and_has_the_losses_of_a_cpu(size, sync_free):
    examples = repeated_batch(size)
    stock, _ = counts_of_a_step(tiny_mask_rcnn(), examples)
    model = tiny_mask_rcnn()
    ours, losses = counts_of_a_step(convert(model, sync_free=sync_free), examples)
    assert ours.waits.total() < stock.waits.total()
    assert ours.launches.total() < stock.launches.total()
    model = tiny_mask_rcnn()
    model.backbone.norm.momentum = 0.0
    torch.manual_seed(0)
    expected = convert(model, sync_free=sync_free).train()(*examples)
    for key, loss in expected.items():
        torch.testing.assert_close(losses[key], loss.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("branch", ["point_rend", "mask_iou"])
def test_a_step_with_another_mask_branch_waits_no_more_often(branch):
    model = convert(tiny_mask_rcnn(), mask_branch=branch, sync_free=True)
    counts, _ = counts_of_a_step(model, repeated_batch(2))
    assert counts.waits.total() <= 4, counts.waits


def repeated_batch(size: int) -> tuple[list[Tensor], list[dict[str, Any]]]:
    images, targets = batch()
    return [images[i % 2] for i in range(size)], [dict(targets[i % 2]) for i in range(size)]


def box_polygon(box: Tensor) -> list[float]:
    x1, y1, x2, y2 = box.tolist()
    return [x1, y1, x2, y1, x2, y2, x1, y2]


def test_the_pooler_does_not_wait_to_assign_boxes_to_levels():
    names = ["0", "1"]
    heads = convert(tiny_mask_rcnn(), sync_free=True).roi_heads
    for pooler in (heads.box_roi_pool, heads.mask_roi_pool):
        pooler.featmap_names = names
        with pretended_device():
            features = {
                name: sent(torch.rand(2, 6, 64 // stride, 96 // stride)).requires_grad_()
                for name, stride in zip(names, (8, 16), strict=True)
            }
            boxes = [sent(torch.rand(count, 4).cumsum(1)) for count in (5, 7)]
            waits = []
            for training in (True, False):
                with counted() as counts:
                    pooled = pooler.train(training)(features, boxes, [(64, 96)] * 2)
                assert pooled.shape == (12, 6, *pooler.output_size)
                waits.append(counts.waits.total())
        assert waits[0] == 0
        assert waits[1] > 0


def test_the_transform_keeps_boxes_on_the_host_only_in_training():
    model = convert(tiny_mask_rcnn(), sync_free=True)
    with pretended_device():
        image = sent(torch.rand(3, 64, 80))
        target = {"boxes": sent(torch.rand(2, 4)), "labels": torch.ones(2, dtype=torch.int64)}
        _, resized = model.transform.train().resize(image, target)
        assert resized["boxes"].device.type == "cpu"
        _, resized = model.transform.eval().resize(image, target)
        assert resized["boxes"].device.type == "cuda"


# Compatibility


def with_batch_norm() -> MaskRCNN:
    return maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None)


def test_a_batch_norm_in_the_roi_heads_raises_and_the_model_is_unchanged():
    model = with_batch_norm()
    with pytest.raises(ValueError, match=r"model\.roi_heads\.box_head\.\S+, a BatchNorm2d"):
        convert(model, sync_free=True)
    assert type(model.rpn).__module__.startswith("torchvision")
    convert(model)


class MySampler(BalancedPositiveNegativeSampler):
    """A custom sampler."""


@pytest.mark.parametrize("part", ["rpn", "roi_heads"])
def test_a_custom_sampler_raises_and_is_named(part):
    model = tiny_mask_rcnn()
    getattr(model, part).fg_bg_sampler = MySampler(8, 0.5)
    with pytest.raises(TypeError, match=rf"model\.{part}\.fg_bg_sampler.*MySampler"):
        convert(model, sync_free=True)
    assert type(model.rpn).__module__.startswith("torchvision")


def test_converting_again_restores_torchvisions_sampling():
    expected = training_pass(convert(tiny_mask_rcnn()), *batch())[0]
    model = convert(tiny_mask_rcnn(), sync_free=True)
    others = training_pass(model, *batch())[0]
    assert any(not torch.equal(others[key], expected[key]) for key in expected)
    back = training_pass(convert(tiny_mask_rcnn()), *batch())[0]
    model = convert(convert(tiny_mask_rcnn(), sync_free=True))
    again = training_pass(model, *batch())[0]
    assert all(torch.equal(again[key], back[key]) for key in back)


def test_evaluation_equals_that_of_the_parity_mode():
    images, targets = batch()
    model = tiny_mask_rcnn()
    ours, parity = convert(copy.deepcopy(model), sync_free=True).eval(), convert(model).eval()
    torch.manual_seed(0)
    losses, detections = losses_and_detections(ours, images, targets)
    torch.manual_seed(0)
    expected_losses, expected = losses_and_detections(parity, images, targets)
    assert all(torch.equal(losses[key], value) for key, value in expected_losses.items())
    for found, wanted in zip(detections, expected, strict=True):
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


# Pooling


@pytest.mark.parametrize("sampling_ratio", [2, -1])
def test_pooling_from_every_level_equals_torchvisions(sampling_ratio):
    generator = torch.Generator().manual_seed(0)
    names = ["0", "1", "2", "3"]
    size = (256, 320)
    features = {
        name: torch.rand(2, 3, size[0] // stride, size[1] // stride, generator=generator).requires_grad_()
        for name, stride in zip(names, (4, 8, 16, 32), strict=True)
    }
    side = torch.exp(2 + torch.rand(60, 2, generator=generator) * 6)  # 7 to 3,000 px, for every level
    low = torch.rand(60, 2, generator=generator) * 200
    boxes = list(torch.cat([low, low + side], dim=1).split([20, 40]))
    pooler = MultiScaleRoIAlign(names, 7, sampling_ratio)
    expected = pooler(features, boxes, [size] * 2)
    rois = torch.cat([torch.cat([torch.full_like(b[:, :1], i), b], dim=1) for i, b in enumerate(boxes)])
    levels = pooler.map_levels(boxes)
    assert levels.unique().tolist() == [0, 1, 2, 3]
    maps = list(features.values())
    pooled = pooled_from_every_level(maps, rois, levels, (7, 7), pooler.scales, sampling_ratio)
    assert torch.equal(pooled, expected)
    weights = torch.rand(pooled.shape, generator=generator)
    found = torch.autograd.grad((pooled * weights).sum(), maps)
    wanted = torch.autograd.grad((expected * weights).sum(), maps)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
