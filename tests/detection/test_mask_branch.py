"""Custom mask branches: one object replaces torchvision's mask layers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor

import maskloss
from maskloss import LossWeights, MaskRCNNLoss
from maskloss.detection.mask_branch import DetectedBoxes, MaskBranch, Positives, grids_of
from maskloss.losses import mask_bce_loss

from .small_models import (
    CHANNELS,
    NUM_CLASSES,
    batch,
    tiny_faster_rcnn,
    tiny_keypoint_rcnn,
    tiny_mask_rcnn,
    training_pass,
    without_objects,
)

SIZE = 6


class Coarse(MaskBranch):
    """One linear layer from the mean of a RoI's features to a class-agnostic mask and its score."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool
        self.layer = nn.Linear(CHANNELS, SIZE * SIZE)
        self.quality = nn.Linear(CHANNELS, 1)
        self.seen: list[Positives] = []

    def hidden(
        self, features: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]
    ) -> Tensor:
        return self.pool(features, boxes, sizes).mean(dim=(2, 3))

    def losses(
        self, features: dict[str, Tensor], positives: Positives, targets: list[dict[str, Any]]
    ) -> dict[str, Tensor]:
        self.seen.append(positives)
        hidden = self.hidden(features, positives.boxes, positives.image_sizes)
        logits = self.layer(hidden).unflatten(1, (SIZE, SIZE))
        grids = grids_of(positives, targets, SIZE, aligned=True, binary=False)
        count = max(len(logits), 1)
        quality = (self.quality(hidden)[:, 0].sigmoid() - grids.mean(dim=(1, 2))).square()
        return {
            "loss_mask": self.loss.weights.mask * mask_bce_loss(logits, grids).sum() / count,
            "loss_mask_quality": quality.sum() / count,
        }

    def predict(
        self, features: dict[str, Tensor], detections: DetectedBoxes
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        hidden = self.hidden(features, detections.boxes, detections.image_sizes)
        counts = [len(boxes) for boxes in detections.boxes]
        masks = self.layer(hidden).unflatten(1, (1, SIZE, SIZE)).sigmoid()
        return list(masks.split(counts)), list(self.quality(hidden)[:, 0].sigmoid().split(counts))


def with_branch(loss: MaskRCNNLoss | None = None, **options: Any) -> tuple[nn.Module, Coarse]:
    model = tiny_mask_rcnn()
    torch.manual_seed(7)
    branch = Coarse(model.roi_heads.mask_roi_pool)
    return maskloss.convert(model, loss, mask_branch=branch, **options), branch


@pytest.mark.parametrize("sync_free", [False, True])
def test_the_branchs_losses_replace_the_mask_loss_and_the_others_stay(sync_free):
    model, branch = with_branch(sync_free=sync_free)
    expected, _ = training_pass(maskloss.convert(tiny_mask_rcnn(), sync_free=sync_free), *batch())
    losses, gradients = training_pass(model, *batch())
    assert losses.keys() == expected.keys() | {"loss_mask_quality"}
    for key in expected.keys() - {"loss_mask"}:
        assert torch.equal(losses[key], expected[key]), key
    assert gradients["roi_heads.mask_branch.layer.weight"].abs().max() > 0
    assert gradients["roi_heads.mask_branch.quality.weight"].abs().max() > 0
    assert gradients["roi_heads.mask_predictor.mask_fcn_logits.weight"] is None
    positives = branch.seen[0]
    assert positives.counts.positives == sum(len(boxes) for boxes in positives.boxes) > 0
    for boxes, labels, idxs, target in zip(
        positives.boxes, positives.labels, positives.matched_idxs, batch()[1], strict=True
    ):
        assert boxes.shape == (len(labels), 4)
        assert torch.equal(labels, target["labels"][idxs])


def test_its_mask_scores_are_in_the_detections():
    model, _ = with_branch(paste=None)
    detections = model.eval()(batch()[0])
    for detection in detections:
        assert detection["masks"].shape == (len(detection["boxes"]), 1, SIZE, SIZE)
        assert detection["mask_scores"].shape == detection["scores"].shape
        assert ((detection["mask_scores"] > 0) & (detection["mask_scores"] < 1)).all()


def test_torchvisions_branch_has_no_mask_scores():
    detections = maskloss.convert(tiny_mask_rcnn()).eval()(batch()[0])
    assert set(detections[0]) == {"boxes", "labels", "scores", "masks"}


def test_its_masks_are_pasted_like_torchvisions():
    model, _ = with_branch(paste="matched")
    detection = model.eval()(batch()[0])[0]
    assert detection["masks"].shape[-2:] == batch()[0][0].shape[-2:]


def test_its_parameters_belong_to_the_model():
    model, branch = with_branch()
    own = {f"roi_heads.mask_branch.{name}" for name in branch.state_dict()}
    assert own == set(model.state_dict()) - set(tiny_mask_rcnn().state_dict())
    assert {id(p) for p in branch.parameters()} <= {id(p) for p in model.parameters()}
    published = tiny_mask_rcnn(seed=3).state_dict()
    assert set(model.load_state_dict(published, strict=False).missing_keys) == own


def test_a_model_without_masks_gets_them_from_a_branch():
    model = tiny_faster_rcnn()
    branch = Coarse(copy.deepcopy(model.roi_heads.box_roi_pool))
    maskloss.convert(model, mask_branch=branch)
    losses, _ = training_pass(model, *batch())
    assert {"loss_mask", "loss_mask_quality"} <= losses.keys()
    assert "masks" in model.eval()(batch()[0])[0]
    images, targets = batch()
    del targets[0]["masks"]
    with pytest.raises(ValueError, match="the target has no masks"):
        model.train()(images, targets)


def test_a_batch_without_objects_has_every_loss():
    model, _ = with_branch()
    images, _ = batch()
    losses, gradients = training_pass(model, images, without_objects(images))
    assert losses["loss_mask"] == losses["loss_mask_quality"] == 0
    assert gradients["roi_heads.mask_branch.layer.weight"].abs().max() == 0


def test_objects_without_a_mask_are_not_passed_to_it():
    model, branch = with_branch()
    images, targets = batch()
    for target in targets:
        target["has_mask"] = torch.tensor([False, True])
    training_pass(model, images, targets)
    positives = branch.seen[0]
    assert all((idxs == 1).all() for idxs in positives.matched_idxs)
    assert positives.counts.positives == sum(map(len, positives.boxes)) > 0


def test_losses_and_detections_has_the_branchs_losses():
    model, _ = with_branch()
    losses, detections = maskloss.losses_and_detections(model, *batch())
    assert "loss_mask_quality" in losses
    assert "mask_scores" in detections[0]


def test_it_uses_the_loss_of_the_latest_conversion():
    model, branch = with_branch(MaskRCNNLoss(weights=LossWeights(mask=3.0)))
    heavy, _ = training_pass(model, *batch())
    maskloss.convert(model, MaskRCNNLoss(), mask_branch=branch)
    light, _ = training_pass(model, *batch())
    assert heavy["loss_mask"].item() == pytest.approx(3 * light["loss_mask"].item(), rel=1e-6)


def test_converting_again_without_a_branch_restores_torchvisions_layers():
    model, _ = with_branch()
    expected, _ = training_pass(maskloss.convert(tiny_mask_rcnn()), *batch())
    losses, _ = training_pass(maskloss.convert(model), *batch())
    assert {key: value.item() for key, value in losses.items()} == {k: v.item() for k, v in expected.items()}
    assert set(model.state_dict()) == set(tiny_mask_rcnn().state_dict())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("own", [True, False])
def test_a_copy_has_a_branch_of_its_own(duplicate, own):
    model = with_branch()[0] if own else maskloss.convert(tiny_mask_rcnn())
    expected, _ = training_pass(model, *batch())
    other = duplicate(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    losses, _ = training_pass(other, *batch())
    assert {key: value.item() for key, value in losses.items()} == {k: v.item() for k, v in expected.items()}
    assert other.roi_heads.mask_branch is not model.roi_heads.mask_branch
    if not own:
        assert other.roi_heads.mask_branch.heads is other.roi_heads


def test_it_moves_with_the_model():
    model, branch = with_branch()
    model.double()
    assert branch.layer.weight.dtype == torch.float64
    late = Coarse(model.roi_heads.mask_roi_pool)
    maskloss.convert(model, mask_branch=late)
    assert late.layer.weight.dtype == torch.float64


@pytest.mark.parametrize("wrong", [Coarse, nn.Linear(1, 1), 3])
def test_a_mask_branch_of_another_type_raises(wrong):
    model = tiny_mask_rcnn()
    with pytest.raises(TypeError, match="mask_branch must be an instance of a MaskBranch, not "):
        maskloss.convert(model, mask_branch=wrong)


def test_missing_methods_raise_and_are_named():
    class Nothing(MaskBranch):
        pass

    model = maskloss.convert(tiny_mask_rcnn(), mask_branch=Nothing())
    with pytest.raises(NotImplementedError, match="Nothing has no losses"):
        model.train()(*batch())
    with pytest.raises(NotImplementedError, match="Nothing predicts no masks"):
        model.eval()(batch()[0])


def test_selected_positives_by_hand():
    model, branch = with_branch(sync_free=True)
    training_pass(model, *batch())
    positives = branch.seen[0]
    kept = [torch.tensor([1]), torch.tensor([], dtype=torch.int64)]
    selected = positives.select(kept)
    assert torch.equal(selected.boxes[0], positives.boxes[0][1:2])
    assert torch.equal(selected.labels[0], positives.labels[0][1:2])
    assert [len(boxes) for boxes in selected.boxes] == [1, 0]
    assert selected.counts.positives == 1
    assert selected.counts.sampled == positives.counts.sampled
    assert torch.equal(selected.on_host[0][0], positives.on_host[0][0][1:2])
    assert NUM_CLASSES > 1


# torchvision's layers, which may change at any time.

MASK_LAYERS = ("mask_roi_pool", "mask_head", "mask_predictor")


def with_mask_layers(model: nn.Module) -> nn.Module:
    """Add the mask layers of a Mask R-CNN to a model, as users do with a Faster R-CNN."""
    layers = tiny_mask_rcnn(seed=3).roi_heads
    for name in MASK_LAYERS:
        setattr(model.roi_heads, name, getattr(layers, name))
    return model


def without_mask_layers(model: nn.Module, names: tuple[str, ...] = MASK_LAYERS) -> nn.Module:
    for name in names:
        setattr(model.roi_heads, name, None)
    return model


@pytest.mark.parametrize(
    ("build", "change"),
    [
        (tiny_faster_rcnn, with_mask_layers),
        (tiny_keypoint_rcnn, with_mask_layers),
        (tiny_mask_rcnn, without_mask_layers),
        (tiny_mask_rcnn, lambda model: without_mask_layers(model, ("mask_head",))),
        (tiny_mask_rcnn, lambda model: with_mask_layers(without_mask_layers(model))),
    ],
)
def test_mask_layers_added_or_removed_after_convert_train_and_predict_as_in_torchvision(build, change):
    images, targets = batch()
    stock, model = change(build()), change(maskloss.convert(build()))
    expected, _ = training_pass(stock, images, targets)
    losses, gradients = training_pass(model, images, targets)
    assert losses.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value, rtol=1e-5, atol=1e-7)
    assert any("mask" in name for name in gradients) == any("mask" in name for name in model.state_dict())
    for detection, wanted in zip(model.eval()(images), stock.eval()(images), strict=True):
        assert detection.keys() == wanted.keys()
        assert torch.equal(detection["boxes"], wanted["boxes"])


def test_without_a_branch_the_box_losses_are_trained():
    model = maskloss.convert(tiny_mask_rcnn(), mask_branch="point_rend")
    model.roi_heads.mask_branch = None
    losses, _ = training_pass(model, *batch())
    assert losses.keys() == training_pass(tiny_faster_rcnn(), *batch())[0].keys()


def test_targets_of_mask_layers_added_after_convert_need_masks():
    images, targets = batch()
    model = with_mask_layers(maskloss.convert(tiny_faster_rcnn())).train()
    for target in targets:
        del target["masks"]
    with pytest.raises(ValueError, match=r"image 0 of the batch.*the target has no masks"):
        model(images, targets)


def excluded(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


def test_layers_are_trained_again_after_their_parameters_have_been_replaced():
    model = maskloss.convert(tiny_mask_rcnn(), mask_branch="point_rend")
    assert (
        len(excluded(model)) == 6
    )  # weights and biases of the head's convolution and of the predictor's two layers
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
    maskloss.convert(model)
    assert not excluded(model)


def test_layers_that_the_user_has_frozen_stay_frozen_after_a_branch():
    model = tiny_mask_rcnn()
    model.roi_heads.mask_head.requires_grad_(False)
    frozen = excluded(model)
    maskloss.convert(maskloss.convert(model, mask_branch="point_rend"))
    assert excluded(model) == frozen


@pytest.mark.parametrize("change", ["unfreeze", "replace"])
def test_layers_that_a_branch_does_not_call_get_zero_gradients_if_they_are_trained(change):
    # DistributedDataParallel waits for the gradients of all parameters that are trained when it wraps the model.
    expected, _ = training_pass(maskloss.convert(tiny_mask_rcnn(), mask_branch="point_rend"), *batch())
    model = maskloss.convert(tiny_mask_rcnn(), mask_branch="point_rend")
    if change == "unfreeze":
        model.requires_grad_(True)
    else:
        model.roi_heads.mask_predictor = MaskRCNNPredictor(CHANNELS, CHANNELS, NUM_CLASSES)
    losses, gradients = training_pass(model, *batch())
    assert all(torch.equal(losses[key], value) for key, value in expected.items())
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("mask_predictor" in name for name in trained)
    assert all(gradients[name] is not None for name in trained)
    assert not any(gradients[name].any() for name in trained if "mask_predictor" in name)


def test_everything_enters_a_branch_by_its_forward_pass_so_that_hooks_run():
    model = maskloss.convert(tiny_mask_rcnn(), mask_branch="mask_iou")
    branch = model.roi_heads.mask_branch
    calls: list[str] = []
    branch.register_forward_hook(lambda module, args, output: calls.append(type(output).__name__))
    branch.inner.register_forward_hook(lambda module, args, output: calls.append("inner"))
    training_pass(model, *batch())
    model.eval()(batch()[0])
    assert calls == ["inner", "dict", "inner", "tuple"]


class Returns(MaskBranch):
    """A user's branch that returns what a test gives it."""

    def __init__(self, losses: Any = None, predicted: Any = None) -> None:
        super().__init__()
        self.found, self.predicted = losses, predicted

    def losses(self, features: Any, positives: Positives, targets: Any) -> Any:
        return self.found

    def predict(self, features: Any, detections: DetectedBoxes) -> Any:
        return self.predicted(detections)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, r"Returns\.losses must return a dict of losses, not a NoneType"),
        ([torch.zeros(())], "not a list"),
        ({"loss_mask": 0.5}, r"Returns\.losses: 'loss_mask' must be a scalar tensor, not float"),
        ({"loss_mask": torch.zeros(3)}, r"must be a scalar tensor, not shape \(3,\)"),
        ({"loss_classifier": torch.zeros(())}, "'loss_classifier', which is the key of another term"),
    ],
)
def test_losses_of_a_branch_that_are_none_are_refused(found: Any, message: str) -> None:
    model = maskloss.convert(tiny_mask_rcnn(), mask_branch=Returns(found)).train()
    with pytest.raises((TypeError, ValueError), match=message):
        model(*batch())


def counts_of(detections: DetectedBoxes) -> list[int]:
    return [len(boxes) for boxes in detections.boxes]


@pytest.mark.parametrize(
    ("predicted", "message"),
    [
        (lambda d: [torch.zeros(n, 1, 7, 7) for n in counts_of(d)], r"Returns\.predict must return a pair"),
        (lambda d: ([torch.zeros(n, 7, 7) for n in counts_of(d)], None), r"must be \(D, 1, M, M\), not"),
        (lambda d: ([torch.zeros(n, 3, 7, 7) for n in counts_of(d)], None), r"must be \(D, 1, M, M\), not"),
        (lambda d: ([torch.zeros(n + 1, 1, 7, 7) for n in counts_of(d)], None), "of an image with D = "),
        (lambda d: (torch.zeros(3, 1, 7, 7), None), "masks must be a list with a tensor for each image"),
        (
            lambda d: ([torch.zeros(n, 1, 7, 7) for n in counts_of(d)], [torch.zeros(1)]),
            "scores must be a list",
        ),
    ],
)
def test_predictions_of_a_branch_that_do_not_fit_are_refused(predicted: Any, message: str) -> None:
    model = maskloss.convert(tiny_mask_rcnn(), mask_branch=Returns(predicted=predicted)).eval()
    with pytest.raises((TypeError, ValueError), match=message):
        model(batch()[0])
