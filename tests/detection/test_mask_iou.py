"""Mask Scoring R-CNN: the IoU of masks by hand and by rasterizing, and the branch in training and inference."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign, roi_align

import maskloss
from maskloss import EncodedMasks, LossWeights, MaskRCNNLoss
from maskloss.detection.mask_branch import DetectedBoxes, MaskBranch, Positives, TorchvisionMaskBranch
from maskloss.detection.mask_iou import MaskIoUBranch, MaskIoUHead, mask_areas
from maskloss.detection.point_rend import PointRendBranch
from maskloss.losses import MaskSoftmaxLoss
from maskloss.losses.normalizers import BatchCounts

from .small_models import NUM_CLASSES, batch, tiny_faster_rcnn, tiny_mask_rcnn, training_pass, without_objects


def test_the_head_selects_the_own_class():
    head = MaskIoUHead(3, 4, side=6, hidden_channels=5, hidden_features=7)
    features, probs, labels = torch.rand(2, 3, 6, 6), torch.rand(2, 1, 12, 12), torch.tensor([3, 1])
    found = head(features, probs, labels)
    hidden = torch.cat([features, torch.nn.functional.max_pool2d(probs, 2)], dim=1)
    for convolution in head.convolutions:
        hidden = convolution(hidden).relu()
    assert hidden.shape == (2, 5, 3, 3)
    hidden = head.fc2(head.fc1(hidden.flatten(1)).relu()).relu()
    torch.testing.assert_close(found, head.prediction(hidden)[torch.arange(2), labels])


def test_areas_of_every_kind_of_mask():
    bitmap = torch.zeros(2, 6, 8, dtype=torch.bool)
    bitmap[0, 1:4, 2:7] = True
    assert mask_areas(bitmap, torch.tensor([0, 1, 0])).tolist() == [15, 0, 15]
    # Two overlapping squares of 4, 1 of it in common; and the runs of columns 2 to 3, rows 1 to 2.
    squares = [[0.0, 0, 2, 0, 2, 2, 0, 2], [1.0, 1, 3, 1, 3, 3, 1, 3]]
    masks = EncodedMasks([squares, {"size": [6, 8], "counts": [13, 2, 4, 2, 27]}], 6, 8)
    assert mask_areas(masks, torch.tensor([0, 1])).tolist() == [7, 4]
    assert mask_areas(masks.resize(12, 24), torch.tensor([0, 1])).tolist() == [42, 24]


def test_the_iou_counts_what_lies_outside_of_the_roi():
    """The object covers 20 x 20 px; the RoI its left half; the predicted mask the upper half of the RoI."""
    model = tiny_mask_rcnn()
    branch = MaskIoUBranch.of(model)
    branch.hold(MaskRCNNLoss.preset("aligned"))
    masks = EncodedMasks([[[10.0, 10, 30, 10, 30, 30, 10, 30]]], 64, 64)
    positives = Positives(
        [torch.tensor([[10.0, 10.0, 20.0, 30.0]])],
        [torch.tensor([1])],
        [torch.tensor([0])],
        [(64, 64)],
        BatchCounts(1, 2, 1, 0),
    )
    probs = torch.zeros(1, 1, 28, 28)
    probs[:, :, :14] = 0.9
    # Predicted 10 x 10 = 100 px, all of it inside; the object has 400.
    found = branch._mask_iou(positives, [{"masks": masks}], probs)
    torch.testing.assert_close(found, torch.tensor([100 / 400]))
    found = branch._mask_iou(positives, [{"masks": masks}], torch.ones_like(probs))
    torch.testing.assert_close(found, torch.tensor([200 / 400]))
    found = branch._mask_iou(positives, [{"masks": masks}], torch.zeros_like(probs))
    assert found == 0


def inner_branches() -> dict[str, Any]:
    return {"torchvision": lambda model: None, "point_rend": PointRendBranch.of}


@pytest.mark.parametrize("sync_free", [False, True])
@pytest.mark.parametrize("inner", inner_branches())
def test_training_gives_gradients_to_every_part(inner, sync_free):
    images, targets = batch()
    model = tiny_mask_rcnn()
    branch = MaskIoUBranch.of(model, inner_branches()[inner](model))
    maskloss.convert(model, mask_branch=branch, sync_free=sync_free)
    losses, gradients = training_pass(model, images, targets)
    assert losses["loss_mask_iou"] > 0
    assert ("loss_mask_point" in losses) == (inner == "point_rend")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(gradients[name] is not None for name in trained)
    assert any(gradients[name].any() for name in trained if "iou_head" in name)
    stock = [name for name in gradients if "mask_predictor" in name]
    assert all((gradients[name] is None) == (inner == "point_rend") for name in stock)


def test_the_inner_branchs_numbers_stay():
    images, targets = batch()
    plain, expected = training_pass(maskloss.convert(tiny_mask_rcnn()), images, targets)
    model = maskloss.convert(tiny_mask_rcnn(), mask_branch="mask_iou")
    losses, gradients = training_pass(model, images, targets)
    for key, value in plain.items():
        torch.testing.assert_close(losses[key], value, rtol=0, atol=0)
    # The IoU head reads the features, so only what lies after them is as before.
    for name, gradient in expected.items():
        if "mask_predictor" in name or "box_predictor" in name:
            torch.testing.assert_close(gradients[name], gradient)


def test_the_loss_by_hand():
    images, targets = batch()
    seen: list[tuple[Tensor, Tensor]] = []

    def term(predicted: Tensor, wanted: Tensor) -> Tensor:
        seen.append((predicted, wanted))
        return (predicted - wanted).square()

    model = tiny_mask_rcnn()
    branch = MaskIoUBranch.of(model, iou_loss=term, iou_weight=3.0)
    maskloss.convert(model, MaskRCNNLoss(weights=LossWeights(mask=0.5)), mask_branch=branch)
    losses, _ = training_pass(model, images, targets)
    ((predicted, wanted),) = seen
    counted = wanted > 0
    assert counted.any()
    assert ((wanted >= 0) & (wanted <= 1)).all()
    expected = 3 * 0.5 * (predicted - wanted).square()[counted].mean()
    torch.testing.assert_close(losses["loss_mask_iou"], expected.detach())


def test_mask_scores_are_class_scores_times_the_predicted_iou():
    images, _ = batch()
    stock = tiny_mask_rcnn().eval()(images)
    model = maskloss.convert(tiny_mask_rcnn(), mask_branch="mask_iou").eval()
    branch: Any = model.roi_heads.mask_branch
    torch.nn.init.zeros_(branch.iou_head.prediction.weight)
    for bias, quality in ((0.25, 0.25), (7.0, 1.0), (-1.0, 0.0)):
        torch.nn.init.constant_(branch.iou_head.prediction.bias, bias)
        for detection, expected in zip(model(images), stock, strict=True):
            for key in ("boxes", "labels", "scores"):
                assert torch.equal(detection[key], expected[key])
            torch.testing.assert_close(detection["masks"], expected["masks"], rtol=0, atol=1e-6)
            torch.testing.assert_close(detection["mask_scores"], quality * expected["scores"])


def test_coco_results_have_the_mask_scores():
    images, _ = batch(1)
    model = maskloss.convert(tiny_mask_rcnn(), mask_branch="mask_iou", paste=None).eval()
    detections = model(images)
    results = maskloss.coco_results(model, detections, [tuple(images[0].shape[-2:])], [1])
    scores = [result["mask_score"] for result in results]
    assert scores == pytest.approx(detections[0]["mask_scores"].tolist())
    assert [result["score"] for result in results] == pytest.approx(detections[0]["scores"].tolist())


def test_batches_without_positives_and_a_weight_of_0():
    images, targets = batch()
    for loss, given in (
        (None, without_objects(images)),
        (MaskRCNNLoss(weights=LossWeights(mask=0.0)), targets),
    ):
        model = maskloss.convert(tiny_mask_rcnn(), loss, mask_branch="mask_iou")
        losses, gradients = training_pass(model, images, given)
        assert losses["loss_mask_iou"] == losses["loss_mask"] == 0
        assert all(g is not None and not g.any() for name, g in gradients.items() if "mask" in name)
    assert model.eval()([torch.zeros(3, 64, 64)])[0]["mask_scores"].dim() == 1


def test_weak_labels_and_losses_in_evaluation():
    images, targets = batch()
    targets = [
        {**t, "has_mask": torch.tensor([False, True]), "weights": torch.tensor([1.0, 2.0])} for t in targets
    ]
    model = maskloss.convert(tiny_mask_rcnn(), "weak", mask_branch="mask_iou")
    losses, _ = training_pass(model, images, targets)
    assert losses["loss_mask_iou"].isfinite()
    losses, _ = maskloss.losses_and_detections(model.eval(), images, targets)
    assert losses["loss_mask_iou"] > 0


def test_a_softmax_over_classes_can_be_scored():
    images, targets = batch()
    model = maskloss.convert(tiny_mask_rcnn(), MaskRCNNLoss(mask=MaskSoftmaxLoss()), mask_branch="mask_iou")
    losses, _ = training_pass(model, images, targets)
    assert losses["loss_mask_iou"] > 0


def test_half_precision_under_autocast():
    images, targets = batch()
    model = maskloss.convert(tiny_mask_rcnn(), mask_branch="mask_iou").train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(images, targets)
        sum(losses.values()).backward()
        assert losses["loss_mask_iou"].dtype == torch.float32
        assert model.eval()(images)[0]["mask_scores"].isfinite().all()


def test_a_detector_without_masks_needs_an_inner_branch():
    with pytest.raises(TypeError, match="the model has no mask layers whose masks mask_iou could score"):
        maskloss.convert(tiny_faster_rcnn(), mask_branch="mask_iou")
    model = tiny_faster_rcnn()
    maskloss.convert(model, mask_branch=MaskIoUBranch.of(model, PointRendBranch.of(model)))
    losses, _ = training_pass(model, *batch())
    assert losses["loss_mask_iou"] > 0


def test_a_branch_whose_masks_cannot_be_scored_says_so():
    class Blank(MaskBranch):
        pass

    model = tiny_mask_rcnn()
    maskloss.convert(model, mask_branch=MaskIoUBranch.of(model, Blank()))
    with pytest.raises(
        NotImplementedError, match="Blank has no losses_and_probs, so its masks cannot be scored"
    ):
        training_pass(model, *batch())


def test_weights_of_stock_parts_load_and_features_are_pooled_by_the_models_pooling():
    stock = tiny_mask_rcnn(seed=1).state_dict()
    model = maskloss.convert(tiny_mask_rcnn(), mask_branch="mask_iou")
    missing, unexpected = model.load_state_dict(stock, strict=False)
    assert not unexpected
    assert all(key.startswith("roi_heads.mask_branch.iou_head.") for key in missing)
    branch: Any = model.roi_heads.mask_branch
    assert isinstance(branch.inner, TorchvisionMaskBranch)
    features = {"0": torch.rand(1, model.backbone.out_channels, 16, 16)}
    boxes = [torch.tensor([[4.0, 4.0, 40.0, 30.0]])]
    pooled = branch._pool()(features, boxes, [(64, 64)])
    expected = roi_align(features["0"], boxes, branch.side, 1 / 4, sampling_ratio=2)
    torch.testing.assert_close(pooled, expected)


def test_features_are_pooled_by_the_models_pooling_at_the_time_of_the_pass():
    model = maskloss.convert(tiny_mask_rcnn(), mask_branch="mask_iou")
    heads: Any = copy.deepcopy(model).roi_heads
    calls: list[nn.Module] = []

    class Watched(MultiScaleRoIAlign):
        def forward(self, *arguments: Any) -> Tensor:
            calls.append(self)
            return super().forward(*arguments)

    heads.mask_roi_pool = Watched(["0"], output_size=4, sampling_ratio=2)
    assert heads.mask_branch._pool() is heads.mask_roi_pool
    assert model.roi_heads.mask_branch._pool() is model.roi_heads.mask_roi_pool
    boxes, labels = [torch.tensor([[4.0, 4.0, 40.0, 30.0]])], [torch.tensor([1])]
    features = {"0": torch.rand(1, model.backbone.out_channels, 16, 16)}
    heads.mask_branch.predict(features, DetectedBoxes(boxes, labels, [torch.ones(1)], [(64, 64)]))
    assert len(calls) == 2  # of the inner branch and of the IoU head


def test_the_mean_count_of_all_processes_divides_the_loss(monkeypatch):
    def losses_with(synchronize: Any) -> dict[str, Tensor]:
        model = maskloss.convert(tiny_mask_rcnn(), mask_branch="mask_iou")
        if synchronize is not None:
            monkeypatch.setattr(model.roi_heads.loss, "synchronize", synchronize)
        return training_pass(model, *batch())[0]

    seen: list[float] = []

    def halved(counts: BatchCounts, device: torch.device) -> BatchCounts:
        seen.append(float(counts.weight_sum))
        return replace(counts, weight_sum=torch.as_tensor(counts.weight_sum) / 2)

    alone, synchronized = losses_with(None), losses_with(halved)
    torch.testing.assert_close(synchronized["loss_mask_iou"], 2 * alone["loss_mask_iou"])
    images, targets = batch()
    monkeypatch.undo()
    wanted: list[Tensor] = []
    model = tiny_mask_rcnn()
    branch = MaskIoUBranch.of(model, iou_loss=lambda predicted, iou: wanted.append(iou) or predicted * 0)
    training_pass(maskloss.convert(model, mask_branch=branch), images, targets)
    assert seen[-1] == int((wanted[0] > 0).sum())


class Halved:
    """A term with a parameter, that is not a module."""

    def __init__(self) -> None:
        self.scale = nn.Parameter(torch.tensor(0.5))

    def __call__(self, predicted: Tensor, wanted: Tensor) -> Tensor:
        return self.scale * (predicted - wanted).square()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"iou_loss": nn.MSELoss}, TypeError, r"iou_loss: MSELoss is a class; write MSELoss\(\.\.\.\)"),
        ({"iou_loss": "mse"}, TypeError, "iou_loss: a term is a function or a loss object"),
        ({"iou_loss": nn.MSELoss()}, ValueError, 'iou_loss: MSELoss has reduction="mean"'),
        ({"iou_loss": partial(nn.functional.mse_loss, reduction="sum")}, ValueError, "iou_loss: .*sum"),
        ({"iou_weight": -1.0}, ValueError, "iou_weight must be >= 0 and finite, got -1"),
        ({"iou_weight": float("nan")}, ValueError, "iou_weight must be >= 0 and finite, got nan"),
    ],
)
def test_wrong_arguments_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        MaskIoUBranch.of(tiny_mask_rcnn(), **options)


def test_the_parameters_of_a_term_that_is_no_module_are_the_branchs():
    branch = MaskIoUBranch.of(tiny_mask_rcnn(), iou_loss=Halved())
    assert any(parameter is branch.iou_loss.scale for parameter in branch.parameters())


def test_a_term_that_returns_another_shape_is_named():
    model = tiny_mask_rcnn()
    maskloss.convert(model, mask_branch=MaskIoUBranch.of(model, iou_loss=nn.functional.mse_loss))
    with pytest.raises(
        ValueError, match=r"iou_loss must return one value per RoI, shape \(\d+,\), not shape \(\)"
    ):
        training_pass(model, *batch())


def test_a_loss_that_the_inner_branch_refuses_leaves_the_branch_as_it_was():
    model = tiny_mask_rcnn()
    branch = MaskIoUBranch.of(model, PointRendBranch.of(model))
    with pytest.raises(TypeError, match="point_rend computes the logits of each object's own class only"):
        maskloss.convert(model, MaskRCNNLoss(mask=MaskSoftmaxLoss()), mask_branch=branch)
    with pytest.raises(RuntimeError, match="has no loss yet"):
        _ = branch.loss


@pytest.mark.parametrize("inner", inner_branches())
def test_a_model_with_more_classes_than_its_branch_is_refused(inner):
    model = tiny_mask_rcnn()
    branch = MaskIoUBranch.of(model, inner_branches()[inner](model))
    maskloss.convert(model, mask_branch=branch)
    model.roi_heads.box_predictor = FastRCNNPredictor(16, NUM_CLASSES + 2)
    message = rf"the mask branch has {NUM_CLASSES} classes, but .*box_predictor has {NUM_CLASSES + 2} .*convert again"
    for training in (True, False):
        with pytest.raises(ValueError, match=message):
            model.train(training)(*batch())
    with pytest.raises(ValueError, match=message):
        maskloss.convert(model, mask_branch=branch)
    maskloss.convert(model, mask_branch="point_rend")
    training_pass(model, *batch())
