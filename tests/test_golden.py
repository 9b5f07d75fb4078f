"""The presets against numbers that torchvision, Detectron2 and matterport computed themselves.

Every `*.npz` of a folder is one scene: the folder that the environment variable MASKLOSS_GOLDEN names, else
`../shared/golden`, else (in a clone without it) the copies under `tests/data/golden`.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.ops
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder

from maskloss import BoxRegression, EncodedMasks, MaskRCNNLoss, mask_targets
from maskloss.losses import (
    BatchCounts,
    BoxGIoULoss,
    BoxSmoothL1Loss,
    L1RegularizationLoss,
    MatterportL2Loss,
    select_class_masks,
)
from maskloss.losses.terms import MaskBatch, RoIBatch, RPNBatch
from tests.reference import module_of

# RPN: 256 anchors per image in every library; detector: 512 RoIs, which no preset divides by.
RPN_BATCH_SIZE, ROI_BATCH_SIZE = 256, 512


def golden_folder() -> Path:
    named = os.environ.get("MASKLOSS_GOLDEN")
    if named:
        return Path(named)
    beside_the_repository = Path(__file__).resolve().parents[1].parent / "shared" / "golden"
    return (
        beside_the_repository if beside_the_repository.is_dir() else Path(__file__).parent / "data" / "golden"
    )


GOLDEN_FILES = sorted(golden_folder().glob("*.npz"))


def test_the_folder_of_golden_vectors_has_a_file():
    # Without this a wrong folder would leave every test below without a parameter, that is, skipped.
    assert GOLDEN_FILES, f"{golden_folder()} has no *.npz"


@dataclass(frozen=True)
class Scene:
    """One file: its arrays as tensors."""

    arrays: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(np.asarray(self.arrays[name]))

    def number(self, name: str) -> float:
        return float(self.arrays[name])

    def polygons(self) -> EncodedMasks:
        """The instances as polygons, `polygon_i_j` being the j-th of instance i."""
        instances: list[list[list[float]]] = [[] for _ in self.arrays["gt_boxes"]]
        for name in sorted(name for name in self.arrays if name.startswith("polygon_")):
            instances[int(name.split("_")[1])].append(self.arrays[name].tolist())
        return EncodedMasks(instances, int(self.number("height")), int(self.number("width")))

    def targets(self, source: Tensor | EncodedMasks, loss: MaskRCNNLoss) -> Tensor:
        settings = loss.mask_targets
        return mask_targets(
            source,
            self["proposals"],
            self["matched_idxs"],
            28,
            aligned=settings.aligned,
            binary=settings.binary,
        )

    def regularized_weights(self) -> list[Tensor]:
        return [self[name] for name in sorted(self.arrays) if name.startswith("reg_weight_")]


@pytest.fixture(scope="module", params=GOLDEN_FILES, ids=lambda path: path.stem)
def scene(request: pytest.FixtureRequest) -> Scene:
    with np.load(request.param) as arrays:
        return Scene(dict(arrays))


def assert_scalar(actual: Tensor, expected: float, relative: float = 1e-5) -> None:
    assert actual.item() == pytest.approx(expected, rel=relative, abs=0)


def assert_tensor(actual: Tensor, expected: Tensor) -> None:
    """Within 1e-5 of the largest entry: entries near 0 are differences of larger ones."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def rpn_losses(
    loss: MaskRCNNLoss, scene: Scene, coder_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The RPN's terms, with the leaves that their gradients belong to."""
    objectness = scene["rpn_objectness_logits"].requires_grad_()
    deltas = scene["rpn_deltas"].requires_grad_()
    labels = scene["rpn_sampled_labels"]
    sampled, positive = labels >= 0, labels == 1
    num_images, num_anchors = labels.shape
    coder = BoxCoder(weights=coder_weights)
    anchors = scene["rpn_anchors"].expand(num_images, num_anchors, 4)[positive]
    box = BoxRegression(
        deltas[positive],
        coder.encode_single(scene["rpn_matched_gt_boxes"][positive], anchors),
        lambda encoded: coder.decode_single(encoded, anchors),
    )
    counts = BatchCounts(
        num_images=num_images,
        sampled=int(sampled.sum()),
        positives=int(positive.sum()),
        batch_size_per_image=RPN_BATCH_SIZE,
        locations=num_images * num_anchors,
    )
    batch = RPNBatch(objectness[sampled], labels[sampled].float(), box, counts)
    return loss.rpn_losses(batch), objectness, deltas


def roi_losses(
    loss: MaskRCNNLoss, scene: Scene, box_scale: float = 1.0
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The detector's terms, with the leaves; `box_scale` multiplies the box head's output beforehand.

    The gradient is with respect to the scaled output. Every one of Detectron2's box losses was made so.
    """
    class_logits = scene["det_class_logits_bg0"].requires_grad_()
    box_regression = (scene["det_box_regression_bg0"] * box_scale).requires_grad_()
    labels, proposals = scene["det_labels_bg0"], scene["det_proposals"]
    positive = labels > 0
    coder = BoxCoder(weights=(10.0, 10.0, 5.0, 5.0))
    target_deltas = coder.encode_single(scene["det_matched_gt_boxes"], proposals)
    box = BoxRegression(
        box_regression.reshape(len(labels), -1, 4)[positive, labels[positive]],
        target_deltas[positive],
        lambda encoded: coder.decode_single(encoded, proposals[positive]),
    )
    counts = BatchCounts(
        num_images=1,
        sampled=len(labels),
        positives=int(positive.sum()),
        batch_size_per_image=ROI_BATCH_SIZE,
    )
    return loss.roi_losses(RoIBatch(class_logits, labels, box, counts)), class_logits, box_regression


def mask_loss(loss: MaskRCNNLoss, scene: Scene, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The mask term, and the leaf of its foreground channels; the background's stands in front, unused."""
    foreground = scene["mask_logits_fg"].requires_grad_()
    mask_logits = torch.cat([torch.zeros_like(foreground[:, :1]), foreground], dim=1)
    labels = scene["gt_labels_fg0"][scene["matched_idxs"]] + 1
    counts = BatchCounts(
        num_images=1, sampled=len(labels), positives=len(labels), batch_size_per_image=ROI_BATCH_SIZE
    )
    if not loss.needs_all_mask_classes:
        mask_logits = select_class_masks(mask_logits, labels)[:, None]
    return loss.mask_losses(MaskBatch(mask_logits, targets, labels, counts))["loss_mask"], foreground


# torchvision


def test_torchvision_mask_targets(scene):
    targets = scene.targets(scene["gt_masks"], MaskRCNNLoss.preset("torchvision"))
    assert_tensor(targets, scene["tv_mask_targets"])


def test_torchvision_mask_loss_and_gradient(scene):
    loss = MaskRCNNLoss.preset("torchvision")
    value, foreground = mask_loss(loss, scene, scene.targets(scene["gt_masks"], loss))
    value.backward()
    assert_scalar(value, scene.number("tv_mask_loss"))
    assert_tensor(foreground.grad, scene["tv_mask_grad"])


def test_torchvision_detector_losses_and_gradients(scene):
    losses, class_logits, box_regression = roi_losses(MaskRCNNLoss.preset("torchvision"), scene)
    sum(losses.values()).backward()
    assert_scalar(losses["loss_classifier"], scene.number("tv_class_loss"))
    assert_scalar(losses["loss_box_reg"], scene.number("tv_box_loss"))
    assert_tensor(class_logits.grad, scene["tv_class_grad"])
    assert_tensor(box_regression.grad, scene["tv_box_grad"])


def test_torchvision_rpn_losses_and_gradients(scene):
    losses, objectness, deltas = rpn_losses(MaskRCNNLoss.preset("torchvision"), scene)
    sum(losses.values()).backward()
    assert_scalar(losses["loss_objectness"], scene.number("tv_rpn_objectness_loss"))
    assert_scalar(losses["loss_rpn_box_reg"], scene.number("tv_rpn_box_loss"))
    assert_tensor(objectness.grad, scene["tv_rpn_objectness_grad"])
    assert_tensor(deltas.grad, scene["tv_rpn_box_grad"])


# Detectron2


def test_detectron2_targets_of_bitmaps(scene):
    targets = scene.targets(scene["gt_masks"], MaskRCNNLoss.preset("detectron2"))
    torch.testing.assert_close(targets, scene["d2_bitmask_targets"].float(), rtol=0, atol=0)


def test_detectron2_targets_of_polygons(scene):
    targets = scene.targets(scene.polygons(), MaskRCNNLoss.preset("detectron2"))
    torch.testing.assert_close(targets, scene["d2_polygon_targets"].float(), rtol=0, atol=0)


@pytest.mark.parametrize("source", ["bitmask", "polygon"])
def test_detectron2_mask_loss_and_gradient(scene, source):
    loss = MaskRCNNLoss.preset("detectron2")
    gt_masks = scene["gt_masks"] if source == "bitmask" else scene.polygons()
    value, foreground = mask_loss(loss, scene, scene.targets(gt_masks, loss))
    value.backward()
    assert_scalar(value, scene.number(f"d2_{source}_loss"))
    assert_tensor(foreground.grad, scene[f"d2_{source}_grad"])


def test_detectron2_detector_losses_and_box_gradient(scene):
    scale = scene.number("d2_box_regression_scale")
    losses, _, box_regression = roi_losses(MaskRCNNLoss.preset("detectron2"), scene, scale)
    losses["loss_box_reg"].backward()
    assert_scalar(losses["loss_classifier"], scene.number("d2_class_loss"))
    assert_scalar(losses["loss_box_reg"], scene.number("d2_smooth_l1_beta0.000_box_loss"))
    assert_tensor(box_regression.grad[:, 4:], scene["d2_smooth_l1_beta0.000_box_grad_fg"])
    assert box_regression.grad[:, :4].count_nonzero() == 0  # the background has no box


def test_detectron2_rpn_losses(scene):
    losses, _, _ = rpn_losses(MaskRCNNLoss.preset("detectron2"), scene)
    assert_scalar(losses["loss_objectness"], scene.number("d2_rpn_objectness_loss"))
    assert_scalar(losses["loss_rpn_box_reg"], scene.number("d2_rpn_box_loss"))


def test_detectron2_smooth_l1_with_a_beta(scene):
    # The key rounds: the numbers are those of 1/9, torchvision's beta.
    scale = scene.number("d2_box_regression_scale")
    losses, _, box_regression = roi_losses(MaskRCNNLoss(box=BoxSmoothL1Loss(beta=1 / 9)), scene, scale)
    losses["loss_box_reg"].backward()
    assert_scalar(losses["loss_box_reg"], scene.number("d2_smooth_l1_beta0.111_box_loss"))
    assert_tensor(box_regression.grad[:, 4:], scene["d2_smooth_l1_beta0.111_box_grad_fg"])


def diou_term(regression: BoxRegression) -> Tensor:
    return torchvision.ops.distance_box_iou_loss(regression.boxes, regression.target_boxes)


def ciou_term(regression: BoxRegression) -> Tensor:
    return torchvision.ops.complete_box_iou_loss(regression.boxes, regression.target_boxes)


@pytest.mark.parametrize(
    ("name", "term"), [("giou", BoxGIoULoss()), ("diou", diou_term), ("ciou", ciou_term)]
)
def test_detectron2_iou_losses_of_decoded_boxes(scene, name, term):
    scale = scene.number("d2_box_regression_scale")
    losses, _, box_regression = roi_losses(MaskRCNNLoss(box=term), scene, scale)
    losses["loss_box_reg"].backward()
    assert_scalar(losses["loss_box_reg"], scene.number(f"d2_{name}_beta0.000_box_loss"))
    assert_tensor(box_regression.grad[:, 4:], scene[f"d2_{name}_beta0.000_box_grad_fg"])


def test_detectron2_sigmoid_class_loss_is_a_term_of_three_lines(scene):
    def sigmoid_cross_entropy(class_logits: Tensor, labels: Tensor) -> Tensor:
        one_hot = F.one_hot(labels, class_logits.shape[1])[:, 1:].to(class_logits)
        return F.binary_cross_entropy_with_logits(class_logits[:, 1:], one_hot, reduction="none").sum(dim=1)

    losses, _, _ = roi_losses(MaskRCNNLoss(classification=sigmoid_cross_entropy), scene)
    assert_scalar(losses["loss_classifier"], scene.number("d2_sigmoid_class_loss"))


# matterport


def test_matterport_mask_targets(scene):
    targets = scene.targets(scene["gt_masks"], MaskRCNNLoss.preset("matterport"))
    torch.testing.assert_close(targets, scene["matterport_mask_targets"], rtol=0, atol=0)


def test_matterport_mask_loss(scene):
    loss = MaskRCNNLoss.preset("matterport")
    value, _ = mask_loss(loss, scene, scene.targets(scene["gt_masks"], loss))
    # Its own loss takes probabilities, which round before the logarithm.
    assert_scalar(value, scene.number("matterport_mask_loss"), relative=2e-5)


def test_matterport_detector_losses(scene):
    losses, _, _ = roi_losses(MaskRCNNLoss.preset("matterport"), scene)
    assert_scalar(losses["loss_classifier"], scene.number("matterport_class_loss"))
    assert_scalar(losses["loss_box_reg"], scene.number("matterport_bbox_loss"))


def test_matterport_class_loss_with_an_inactive_class(scene):
    active = torch.ones(int(scene.number("num_foreground_classes")) + 1, dtype=torch.bool)
    active[-1] = False
    losses, _, _ = roi_losses(MaskRCNNLoss.preset("matterport", active_classes=active), scene)
    assert_scalar(losses["loss_classifier"], scene.number("matterport_class_loss_last_class_inactive"))


def test_matterport_rpn_losses(scene):
    # matterport encodes the RPN's boxes with the detector's weights; a preset leaves coders alone.
    losses, _, _ = rpn_losses(MaskRCNNLoss.preset("matterport"), scene, coder_weights=(10.0, 10.0, 5.0, 5.0))
    assert_scalar(losses["loss_objectness"], scene.number("matterport_rpn_class_loss"))
    assert_scalar(losses["loss_rpn_box_reg"], scene.number("matterport_rpn_bbox_loss"))


def test_matterport_l2_regularization(scene):
    model = module_of(*scene.regularized_weights())
    weight_decay = scene.number("matterport_weight_decay")
    loss = MaskRCNNLoss(regularization=MatterportL2Loss(weight_decay))
    value = loss.regularization_losses(model)["loss_regularization"]
    assert_scalar(value, scene.number("matterport_l2_regularization"))


def test_matterport_preset_has_the_l2_regularization(scene):
    assert scene.number("matterport_weight_decay") == 1e-4  # what the preset is compared with below
    model = module_of(*scene.regularized_weights())
    losses = MaskRCNNLoss.preset("matterport").regularization_losses(model)
    assert_scalar(losses["loss_regularization"], scene.number("matterport_l2_regularization"))


def test_l1_regularization(scene):
    model = module_of(*scene.regularized_weights())
    losses = MaskRCNNLoss(regularization=L1RegularizationLoss()).regularization_losses(model)
    assert_scalar(losses["loss_regularization"], scene.number("seed_l1_regularization_sum_abs"))
