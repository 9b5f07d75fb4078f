"""PointRend: its parts by plain loops and by Detectron2's constants, and the branch in training and inference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

import maskloss
from maskloss import EncodedMasks, LossWeights, MaskRCNNLoss, MaskTargets
from maskloss.detection import point_rend as module
from maskloss.detection.mask_branch import DetectedBoxes, Positives
from maskloss.detection.point_rend import (
    CoarseMaskHead,
    PointHead,
    PointRendBranch,
    fine_features,
    most_uncertain_cells,
    stride_of,
)
from maskloss.losses import MaskDiceLoss, MaskSoftmaxLoss
from maskloss.losses.normalizers import BatchCounts

from .small_models import NUM_CLASSES, batch, tiny_faster_rcnn, tiny_mask_rcnn, training_pass, without_objects


def test_the_defaults_are_detectron2s():
    branch = PointRendBranch(8, 3)
    assert (branch.num_points, branch.oversample, branch.importance) == (14 * 14, 3, 0.75)
    assert (branch.steps, branch.points_per_step) == (5, 28 * 28)
    assert branch.coarse_head(torch.rand(1, 8, 14, 14), torch.tensor([1])).shape[-1] == 7
    assert branch.coarse_head.fc1.out_features == 1024
    assert [layer.out_channels for layer in branch.point_head.layers] == [256, 256, 256]
    # Detectron2 initializes predictions with a small deviation, so that masks start undecided.
    assert branch.point_head.prediction.weight.detach().std() == pytest.approx(0.001, rel=0.2)


def test_the_coarse_head_selects_the_own_classs_logits():
    head, features = CoarseMaskHead(8, 4), torch.rand(3, 8, 14, 14)
    nn.init.normal_(head.prediction.weight)
    nn.init.normal_(head.prediction.bias)
    labels = torch.tensor([3, 1, 3])
    hidden = F.relu(head.reduce_side(features)).flatten(1)
    hidden = F.relu(head.fc2(F.relu(head.fc1(hidden))))
    everything = head.prediction(hidden).reshape(3, 4, 7, 7)
    torch.testing.assert_close(
        head(features, labels), everything[torch.arange(3), labels][:, None], rtol=1e-4, atol=1e-4
    )


def test_wide_features_are_reduced_first():
    head = CoarseMaskHead(300, 2)
    assert head.reduce_side.in_channels == 256
    assert head(torch.rand(1, 300, 14, 14), torch.tensor([1])).shape == (1, 1, 7, 7)


def test_the_point_head_by_hand():
    head = PointHead(5, 4, hidden_channels=6)
    nn.init.normal_(head.prediction.bias)
    fine, coarse, labels = torch.rand(2, 5, 7), torch.randn(2, 1, 7), torch.tensor([2, 0])
    hidden = torch.cat([fine, coarse], dim=1)
    for layer in head.layers:
        hidden = torch.cat([layer(hidden).relu(), coarse], dim=1)
    everything = head.prediction(hidden)
    expected = torch.stack([everything[0, 2], everything[1, 0]])[:, None]
    torch.testing.assert_close(head(fine, coarse, labels), expected)


def test_fine_features_by_hand():
    generator = torch.Generator().manual_seed(0)
    maps = {
        "0": torch.rand(2, 3, 16, 24, generator=generator),
        "1": torch.rand(2, 3, 8, 12, generator=generator),
    }
    sizes = [(62, 90), (64, 96)]
    boxes = [
        torch.tensor([[10.0, 8.0, 50.0, 40.0]]),
        torch.tensor([[0.0, 0.0, 20.0, 60.0], [30.0, 5.0, 90.0, 25.0]]),
    ]
    coords = torch.rand(3, 4, 2, generator=generator)
    found = fine_features(maps, ["0", "1"], boxes, coords, sizes)
    assert found.shape == (3, 6, 4)

    def value(level: str, image: int, channel: int, x: float, y: float) -> float:
        """Bilinear sampling between cell centers, 0 outside the map, at px of the padded image."""
        stride = {"0": 4, "1": 8}[level]
        plane = maps[level][image, channel]
        column, row = x / stride - 0.5, y / stride - 0.5
        total = 0.0
        for i in (math.floor(row), math.floor(row) + 1):
            for j in (math.floor(column), math.floor(column) + 1):
                if 0 <= i < plane.shape[0] and 0 <= j < plane.shape[1]:
                    total += float(plane[i, j]) * (1 - abs(row - i)) * (1 - abs(column - j))
        return total

    for roi, (image, box) in enumerate([(0, boxes[0][0]), (1, boxes[1][0]), (1, boxes[1][1])]):
        for point in range(4):
            x = float(box[0] + coords[roi, point, 0] * (box[2] - box[0]))
            y = float(box[1] + coords[roi, point, 1] * (box[3] - box[1]))
            expected = [value(level, image, channel, x, y) for level in ("0", "1") for channel in range(3)]
            torch.testing.assert_close(found[roi, :, point], torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_strides_are_powers_of_2():
    assert stride_of(torch.zeros(1, 1, 200, 304), [(800, 1201), (768, 900)]) == 4
    assert stride_of(torch.zeros(1, 1, 13, 19), [(201, 300)]) == 16


def test_most_uncertain_cells_by_sorting():
    logits = torch.randn(3, 1, 5, 7)
    indices, coords = most_uncertain_cells(logits, 6)
    for roi in range(3):
        flat = logits[roi].flatten().abs()
        assert set(indices[roi].tolist()) == set(flat.argsort()[:6].tolist())
    torch.testing.assert_close(coords[..., 0], ((indices % 7) + 0.5) / 7)
    torch.testing.assert_close(coords[..., 1], ((indices // 7) + 0.5) / 5)
    assert most_uncertain_cells(logits, 1000)[0].shape == (3, 35)


def test_training_points_prefer_uncertain_places():
    # The left half is certain, the right half is not: 3/4 of the points are chosen from three times as many.
    logits = torch.full((4, 1, 7, 7), 9.0)
    logits[..., 4:] = 0.0
    branch = PointRendBranch(8, 2, num_points=400)
    torch.manual_seed(0)
    points = branch._training_points(logits)
    assert points.shape == (4, 400, 2)
    chosen, others = points[:, :300], points[:, 300:]
    assert (chosen[..., 0] > 0.5).all()
    assert 0.3 < (others[..., 0] > 0.5).float().mean() < 0.6
    assert ((points >= 0) & (points <= 1)).all()


def test_points_and_targets_are_at_the_same_place():
    """A network that is right about every point has no loss, for aligned and unaligned targets alike."""
    for aligned in (True, False):
        branch = PointRendBranch(8, 2, num_points=50)
        branch.hold(MaskRCNNLoss(mask_targets=MaskTargets(aligned=aligned)))
        boxes = torch.tensor([[2.0, 2.0, 30.0, 30.0]])
        masks = EncodedMasks([[[10.0, 0.0, 40.0, 0.0, 40.0, 40.0, 10.0, 40.0]]], 40, 40)
        positives = Positives(
            [boxes], [torch.tensor([1])], [torch.tensor([0])], [(40, 40)], BatchCounts(1, 2, 1, 0)
        )
        coords = torch.rand(1, 50, 2)
        found = branch._point_targets(positives, [{"masks": masks}], coords)
        x = 2 + 28 * coords[..., 0] + (0 if aligned else 0.5)
        assert torch.equal(found, (x >= 10).float())


@pytest.mark.parametrize("sync_free", [False, True])
def test_training_gives_gradients_to_every_part(sync_free):
    images, targets = batch()
    model = maskloss.convert(tiny_mask_rcnn(), "aligned", mask_branch="point_rend", sync_free=sync_free)
    losses, gradients = training_pass(model, images, targets)
    assert losses["loss_mask"] == pytest.approx(math.log(2), abs=0.05)
    assert losses["loss_mask_point"] == pytest.approx(math.log(2), abs=0.05)
    own = {name: g for name, g in gradients.items() if "mask_branch" in name}
    assert all(gradient is not None for gradient in own.values())
    assert any(gradient.any() for gradient in own.values())
    # torchvision's own mask layers stay, and are not trained.
    assert all(g is None for name, g in gradients.items() if "mask_head" in name or "mask_predictor" in name)


def test_stock_layers_train_again_without_the_branch():
    model = tiny_mask_rcnn()
    frozen = model.roi_heads.mask_head[0][0].bias.requires_grad_(False)
    maskloss.convert(model, mask_branch="point_rend")
    assert not any(p.requires_grad for p in model.roi_heads.mask_predictor.parameters())
    maskloss.convert(model)
    assert all(p.requires_grad for p in model.roi_heads.mask_predictor.parameters())
    assert not frozen.requires_grad
    assert "mask_branch" not in dict(model.roi_heads.named_children())


def test_weights_of_stock_parts_load(tmp_path):
    stock = tiny_mask_rcnn(seed=1).state_dict()
    model = maskloss.convert(tiny_mask_rcnn(), mask_branch="point_rend")
    missing, unexpected = model.load_state_dict(stock, strict=False)
    assert not unexpected
    assert missing
    assert all(key.startswith("roi_heads.mask_branch.") for key in missing)


def test_it_gives_a_detector_without_masks_a_mask_branch():
    model = maskloss.convert(tiny_faster_rcnn(), mask_branch="point_rend")
    images, targets = batch()
    losses, _ = training_pass(model, images, targets)
    assert losses["loss_mask_point"] > 0
    assert "masks" in model.eval()(images)[0]


@pytest.mark.parametrize("paste", ["torchvision", "matched", None])
def test_masks_of_detections(paste):
    images, _ = batch()
    model = maskloss.convert(tiny_mask_rcnn(), mask_branch="point_rend", paste=paste).eval()
    detections = model(images)
    stock = tiny_mask_rcnn().eval()(images)
    for detection, expected, image in zip(detections, stock, images, strict=True):
        for key in ("boxes", "labels", "scores"):
            assert torch.equal(detection[key], expected[key])
        size = (224, 224) if paste is None else image.shape[-2:]
        assert detection["masks"].shape == (len(expected["boxes"]), 1, *size)
        assert ((detection["masks"] >= 0) & (detection["masks"] <= 1)).all()


def test_chunks_of_detections_change_nothing(monkeypatch):
    images, _ = batch()
    model = maskloss.convert(tiny_mask_rcnn(), mask_branch="point_rend", paste=None).eval()
    expected = model(images)
    monkeypatch.setattr(module, "_DETECTIONS_AT_ONCE", 1)
    for found, whole in zip(model(images), expected, strict=True):
        torch.testing.assert_close(found["masks"], whole["masks"], rtol=1e-4, atol=1e-5)


def test_subdivision_by_plain_loops():
    """Detectron2's loop: enlarge, predict the most uncertain cells anew, and skip steps that the next would repeat."""
    model = maskloss.convert(tiny_mask_rcnn(), mask_branch="point_rend", paste=None).eval()
    branch: Any = model.roi_heads.mask_branch
    branch.points_per_step = 200
    nn.init.normal_(branch.point_head.prediction.weight)
    nn.init.normal_(branch.coarse_head.prediction.weight)
    features = {"0": torch.rand(1, model.backbone.out_channels, 16, 16)}
    boxes, labels, sizes = torch.tensor([[5.0, 6.0, 50.0, 60.0]]), torch.tensor([1]), [(64, 64)]
    rois = DetectedBoxes([boxes], [labels], [torch.tensor([0.9])], sizes)
    found = branch._refined(features, rois)
    coarse = branch._coarse_logits(features, rois)
    logits = coarse
    for step, side in enumerate((14, 28, 56, 112, 224)):
        logits = F.interpolate(logits, size=(side, side), mode="bilinear", align_corners=False)
        if 4 * side * side <= 200 and step < 4:
            continue
        for index in logits.flatten().abs().argsort()[:200].tolist():
            row, column = divmod(index, side)
            point = torch.tensor([[[(column + 0.5) / side, (row + 0.5) / side]]])
            fine = fine_features(features, ["0"], [boxes], point, sizes)
            at_point = F.grid_sample(coarse, 2 * point[:, None] - 1, align_corners=False)[:, 0]
            logits[0, 0, row, column] = branch.point_head(fine, at_point, labels).item()
    torch.testing.assert_close(found, logits.sigmoid(), rtol=1e-3, atol=1e-3)


def test_batches_without_positives_give_zeros_with_a_graph():
    images, _ = batch()
    model = maskloss.convert(tiny_mask_rcnn(), mask_branch="point_rend")
    losses, gradients = training_pass(model, images, without_objects(images))
    assert losses["loss_mask"] == losses["loss_mask_point"] == 0
    assert all(g is not None and not g.any() for name, g in gradients.items() if "mask_branch" in name)


def test_a_weight_of_0_skips_the_work_and_keeps_the_keys():
    images, targets = batch()
    loss = MaskRCNNLoss(weights=LossWeights(mask=0.0))
    losses, gradients = training_pass(
        maskloss.convert(tiny_mask_rcnn(), loss, mask_branch="point_rend"), images, targets
    )
    assert losses["loss_mask"] == losses["loss_mask_point"] == 0
    assert all(g is not None and not g.any() for name, g in gradients.items() if "mask_branch" in name)


def test_both_terms_can_be_swapped():
    images, targets = batch()
    seen: list[tuple[Tensor, Tensor]] = []

    def point_loss(logits: Tensor, wanted: Tensor) -> Tensor:
        seen.append((logits, wanted))
        return (logits.sigmoid() - wanted).abs()

    model = tiny_mask_rcnn()
    branch = PointRendBranch.of(model, point_loss=point_loss, point_weight=2.0, num_points=30)
    maskloss.convert(model, MaskRCNNLoss(mask=MaskDiceLoss()), mask_branch=branch)
    losses, _ = training_pass(model, images, targets)
    ((logits, wanted),) = seen
    assert logits.shape == wanted.shape == (len(logits), 30)
    expected = 2 * (logits.sigmoid() - wanted).abs().mean()
    torch.testing.assert_close(losses["loss_mask_point"], expected.detach())
    assert losses["loss_mask"] < 1


def test_weights_of_objects_reach_the_point_loss():
    images, targets = batch()
    model = maskloss.convert(tiny_mask_rcnn(), mask_branch="point_rend")
    plain, _ = training_pass(model, images, targets)
    weighted, _ = training_pass(model, images, [{**t, "weights": torch.tensor([2.0, 2.0])} for t in targets])
    torch.testing.assert_close(weighted["loss_mask_point"], 2 * plain["loss_mask_point"])
    partial, _ = training_pass(
        model, images, [{**t, "has_mask": torch.tensor([True, False])} for t in targets]
    )
    assert partial["loss_mask_point"] > 0


def test_encoded_masks_and_losses_in_evaluation():
    images, targets = batch()
    for target in targets:
        boxes = target["boxes"].tolist()
        polygons = [[[x1, y1, x2, y1, x2, y2, x1, y2]] for x1, y1, x2, y2 in boxes]
        target["masks"] = EncodedMasks(polygons, *target["masks"].shape[1:])
    model = maskloss.convert(tiny_mask_rcnn(), mask_branch="point_rend").eval()
    losses, detections = maskloss.losses_and_detections(model, images, targets)
    again, _ = maskloss.losses_and_detections(model, images, targets)
    assert torch.equal(losses["loss_mask_point"], again["loss_mask_point"])
    assert len(detections) == 2


def test_half_precision_under_autocast():
    images, targets = batch()
    model = maskloss.convert(tiny_mask_rcnn(), mask_branch="point_rend").train()
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(images, targets)
    assert losses["loss_mask_point"].dtype == torch.float32
    sum(losses.values()).backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.eval()(images)[0]["masks"].isfinite().all()


def test_a_term_of_all_classes_is_refused_before_anything_changes():
    model = tiny_mask_rcnn()
    before = type(model.roi_heads)
    with pytest.raises(TypeError, match="point_rend computes the logits of each object's own class only"):
        maskloss.convert(model, MaskRCNNLoss(mask=MaskSoftmaxLoss()), mask_branch="point_rend")
    assert type(model.roi_heads) is before


@pytest.mark.parametrize("name", ["point_rend", "mask_iou"])
def test_a_model_whose_number_of_classes_is_unknown_is_refused(name):
    model = tiny_mask_rcnn()
    model.roi_heads.box_predictor = nn.Identity()
    with pytest.raises(TypeError, match="the model's box predictor has no linear layer cls_score"):
        maskloss.convert(model, mask_branch=name)


def test_an_unknown_name_is_refused():
    with pytest.raises(
        ValueError, match="no mask branch is named 'pointrend'; available: point_rend, mask_iou"
    ):
        maskloss.convert(tiny_mask_rcnn(), mask_branch="pointrend")


@pytest.mark.parametrize(
    "options", [{"num_points": 0}, {"importance": 1.5}, {"oversample": 0.5}, {"steps": -1}]
)
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="num_points and oversample must be at least 1"):
        PointRendBranch(8, NUM_CLASSES, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"points_per_step": 0}, ValueError, "points_per_step must be at least 1, got 0"),
        ({"point_weight": -0.5}, ValueError, "point_weight must be >= 0 and finite, got -0.5"),
        ({"point_loss": nn.BCEWithLogitsLoss}, TypeError, "point_loss: BCEWithLogitsLoss is a class"),
        ({"point_loss": 3}, TypeError, "point_loss: a term is a function or a loss object"),
        ({"point_loss": nn.BCEWithLogitsLoss()}, ValueError, 'BCEWithLogitsLoss has reduction="mean"'),
    ],
)
def test_wrong_arguments_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        PointRendBranch(8, NUM_CLASSES, **options)


def test_a_term_that_returns_another_shape_is_named():
    model = tiny_mask_rcnn()
    summed = nn.functional.binary_cross_entropy_with_logits
    maskloss.convert(model, mask_branch=PointRendBranch.of(model, point_loss=summed))
    with pytest.raises(
        ValueError, match=r"point_loss must return one value per RoI, shape \(\d+,\), not shape \(\)"
    ):
        training_pass(model, *batch())


class Scaled:
    """A term with a parameter, that is not a module."""

    def __init__(self) -> None:
        self.scale = nn.Parameter(torch.tensor(0.5))

    def __call__(self, logits: Tensor, wanted: Tensor) -> Tensor:
        return self.scale * (logits.sigmoid() - wanted).abs()


def test_the_parameters_of_a_term_that_is_no_module_are_the_branchs():
    model = tiny_mask_rcnn()
    branch = PointRendBranch.of(model, point_loss=Scaled())
    maskloss.convert(model, mask_branch=branch)
    assert any(parameter is branch.point_loss.scale for parameter in model.parameters())


def test_a_model_with_more_classes_than_its_branch_is_refused():
    model = maskloss.convert(tiny_mask_rcnn(), mask_branch="point_rend")
    model.roi_heads.box_predictor = FastRCNNPredictor(16, NUM_CLASSES + 1)
    with pytest.raises(ValueError, match=f"the mask branch has {NUM_CLASSES} classes, but .*convert again"):
        training_pass(model, *batch())
    training_pass(maskloss.convert(model, mask_branch="point_rend"), *batch())
