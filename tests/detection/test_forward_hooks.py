"""What a converted model does around each forward pass: checks, warnings and the regularization."""

from __future__ import annotations

import copy
import linecache
import types
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.roi_heads import RoIHeads as TorchvisionRoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork as TorchvisionRPN

import maskloss
from maskloss import LossWeights, MaskRCNNLoss
from maskloss.detection.roi_heads import RoIHeads
from maskloss.losses import (
    MatterportL2Loss,
)

from .small_models import (
    batch,
    tiny_mask_rcnn,
    training_pass,
)


def test_loss_regularization_exists_only_with_a_penalty():
    without, _ = training_pass(maskloss.convert(tiny_mask_rcnn()), *batch())
    assert "loss_regularization" not in without
    model = maskloss.convert(tiny_mask_rcnn(), MaskRCNNLoss(regularization=MatterportL2Loss(0.5)))
    losses, _ = training_pass(model, *batch())
    # λ Σ mean(w²) over all tensors but the BatchNorm's.
    expected = 0.5 * sum(
        float(parameter.detach().square().mean())
        for name, parameter in model.named_parameters()
        if "backbone.norm" not in name
    )
    assert float(losses["loss_regularization"]) == pytest.approx(expected, rel=1e-6)


def test_regularization_with_weight_zero_is_zero_and_not_evaluated():
    def never(_: nn.Module) -> Tensor:
        raise AssertionError("the penalty was evaluated")

    loss = MaskRCNNLoss(regularization=never, weights=LossWeights(regularization=0.0))
    model = maskloss.convert(tiny_mask_rcnn(), loss).train()
    value = model(*batch())["loss_regularization"]
    assert value == 0
    value.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not any(parameter.grad.any() for parameter in model.parameters())


def test_evaluation_with_a_penalty_returns_only_detections():
    model = maskloss.convert(tiny_mask_rcnn(), "matterport").eval()
    detections = model(batch()[0])
    assert isinstance(detections, list)
    assert detections[0].keys() == {"boxes", "labels", "scores", "masks"}


class LossesAndNothing(MaskRCNN):
    """A subclass that returns a pair in both modes, as torchvision's scripted models do."""

    def eager_outputs(self, losses: dict[str, Tensor], detections: Any) -> Any:
        return losses, detections


def test_a_subclass_that_returns_losses_and_detections_still_does():
    model = maskloss.convert(tiny_mask_rcnn(kind=LossesAndNothing)).train()
    losses, detections = model(*batch())
    assert losses.keys() == {
        "loss_objectness",
        "loss_rpn_box_reg",
        "loss_classifier",
        "loss_box_reg",
        "loss_mask",
    }
    assert detections == []


@pytest.mark.parametrize("num_images", [1, 2], ids=["one size", "two sizes"])
def test_only_the_detections_of_such_a_subclass_come_beside_the_losses(num_images):
    images, targets = batch(num_images)
    model = maskloss.convert(tiny_mask_rcnn(kind=LossesAndNothing))
    losses, detections = maskloss.losses_and_detections(model, images, targets)
    assert losses["loss_mask"].dim() == 0
    for detection, image in zip(detections, images, strict=True):
        assert detection["masks"].shape[-2:] == image.shape[-2:]


class OfASample(MaskRCNN):
    def forward(self, sample: dict[str, Any]) -> Any:
        return super().forward(sample["images"], sample["targets"])


def test_a_subclass_may_take_other_arguments():
    model = tiny_mask_rcnn(kind=OfASample).train()
    images, targets = batch()
    losses = []
    for made in (copy.deepcopy(model), maskloss.convert(model)):
        torch.manual_seed(0)
        losses.append(made({"images": images, "targets": targets}))
    assert losses[0].keys() == losses[1].keys()
    assert losses[1]["loss_mask"].item() == pytest.approx(losses[0]["loss_mask"].item(), rel=1e-5)


class LearnedScale(nn.Module):
    """Cross-entropy under a learned uncertainty, as in Kendall et al., 2018."""

    def __init__(self) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.tensor(0.0))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        values = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return values * torch.exp(-self.log_variance) + self.log_variance


def train_with_learned_scale(
    *, optimize_it: bool, batches_per_step: int = 1, frozen: bool = False
) -> list[str]:
    """Train four batches; return the warnings."""
    model = maskloss.convert(tiny_mask_rcnn(), MaskRCNNLoss(mask=LearnedScale()))
    if frozen:
        next(maskloss.loss_parameters(model)).requires_grad_(False)
    parameters = [*model.parameters(), *(maskloss.loss_parameters(model) if optimize_it else [])]
    optimizer = torch.optim.SGD(parameters, lr=1e-4)
    images, targets = batch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4):
            sum(model(images, targets).values()).backward()
            if (step + 1) % batches_per_step == 0:
                optimizer.step()
                optimizer.zero_grad()
    return [str(warning.message) for warning in caught]


def test_a_loss_whose_parameters_no_optimizer_changes_is_warned_of_once() -> None:
    (message,) = train_with_learned_scale(optimize_it=False)
    assert "the loss's parameter mask.log_variance has a gradient" in message
    assert "pass maskloss.loss_parameters(model) to the optimizer" in message


@pytest.mark.parametrize(
    "way",
    [
        {"optimize_it": True},
        {"optimize_it": True, "batches_per_step": 3},
        {"optimize_it": False, "frozen": True},
    ],
)
def test_a_loss_that_is_optimized_or_frozen_is_not_warned_of(way: dict[str, Any]) -> None:
    assert train_with_learned_scale(**way) == []


def test_warnings_point_at_the_users_line() -> None:
    images, targets = batch()
    targets[0]["boxes"][0, 2] = 200.0
    model = maskloss.convert(tiny_mask_rcnn(), MaskRCNNLoss(mask=LearnedScale())).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    found = []
    for _ in range(3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            losses = model(images, targets)
        sum(losses.values()).backward()
        optimizer.step()
        found += caught
    assert len(found) == 2
    for words, warning in zip(("boxes reach outside", "maskloss.loss_parameters"), found, strict=True):
        assert words in str(warning.message)
        assert warning.filename == __file__
        assert (
            linecache.getline(warning.filename, warning.lineno).strip() == "losses = model(images, targets)"
        )


# A `forward` of the user's own: mostly a copy of torchvision's with a head more, which calls torchvision's losses.


def copied_forward(self, *args):
    return TorchvisionRoIHeads.forward(self, *args)


class CopiedHeads(RoIHeads):
    forward = copied_forward


@pytest.mark.parametrize("options", [{"loss": "detectron2"}, {"mask_branch": "point_rend"}])
def test_a_patched_forward_that_computes_torchvisions_losses_is_refused(options):
    model = maskloss.convert(tiny_mask_rcnn(), **options).train()
    model.roi_heads.forward = types.MethodType(copied_forward, model.roi_heads)
    message = (
        r"model\.roi_heads\.forward, which has been patched on the instance, computes losses without the loss"
    )
    with pytest.raises(TypeError, match=message):
        model(*batch())


def test_a_subclass_that_computes_torchvisions_losses_is_refused():
    model = maskloss.convert(tiny_mask_rcnn(), "detectron2").train()
    model.roi_heads.__class__ = CopiedHeads
    with pytest.raises(
        TypeError, match=r"model\.roi_heads\.forward, which is that of .*CopiedHeads, computes losses"
    ):
        model(*batch())


def test_a_patched_forward_of_the_rpn_is_refused_unless_it_calls_compute_loss():
    def without(self, images, features, targets=None):
        boxes, _ = type(self).forward(self, images, features, targets)
        self.used_loss = False  # as if it had computed its own losses
        return boxes, {"loss_objectness": torch.zeros(()), "loss_rpn_box_reg": torch.zeros(())}

    model = maskloss.convert(tiny_mask_rcnn(), "detectron2").train()
    model.rpn.forward = types.MethodType(without, model.rpn)
    with pytest.raises(TypeError, match=r"model\.rpn\.forward, which has been patched"):
        model(*batch())
    # torchvision's code calls `compute_loss`, which evaluates our loss.
    model.rpn.forward = types.MethodType(lambda self, *args: TorchvisionRPN.forward(self, *args), model.rpn)
    model(*batch())


def test_a_patched_forward_has_torchvisions_losses_with_the_default_loss():
    model = maskloss.convert(tiny_mask_rcnn()).train()
    model.roi_heads.forward = types.MethodType(copied_forward, model.roi_heads)
    losses = []
    for trained in (tiny_mask_rcnn().train(), model):
        torch.manual_seed(0)
        losses.append(trained(*batch()))
    for key, value in losses[0].items():
        torch.testing.assert_close(losses[1][key], value, rtol=1e-6, atol=0)


def test_a_patched_forward_that_calls_ours_keeps_the_loss():
    def forward(self, *args):
        return type(self).forward(self, *args)

    model = maskloss.convert(tiny_mask_rcnn(), MaskRCNNLoss(weights=LossWeights(mask=0.0))).train()
    model.roi_heads.forward = types.MethodType(forward, model.roi_heads)
    assert model(*batch())["loss_mask"].item() == 0


class RPNAlone(MaskRCNN):
    """Trains the RPN alone, as in the first of the alternating steps of Faster R-CNN."""

    def forward(self, images, targets=None):
        images, targets = self.transform(images, targets)
        features = self.backbone(images.tensors)
        _, losses = self.rpn(images, {"0": features}, targets)
        return losses


def test_a_model_that_does_not_call_its_roi_heads_trains():
    model = tiny_mask_rcnn()
    model.__class__ = RPNAlone
    losses = maskloss.convert(model, "detectron2").train()(*batch())
    assert losses.keys() == {"loss_objectness", "loss_rpn_box_reg"}


def test_the_refusal_before_convert_names_what_works_afterwards():
    model = tiny_mask_rcnn()
    model.roi_heads.forward = types.MethodType(copied_forward, model.roi_heads)
    with pytest.raises(
        TypeError, match=r"call convert first, and let the patch call type\(model\.roi_heads\)\.forward"
    ):
        maskloss.convert(model)
