"""`MaskRCNNLoss`: the arguments, the divisor and the weight of each term."""

import copy
import math
import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import fastrcnn_loss, maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork

from maskloss import BoxRegression, LossWeights, MaskRCNNLoss, MaskTargets, mask_targets
from maskloss.losses import (
    BatchCounts,
    BoxSmoothL1Loss,
    ClassAgnosticMaskLoss,
    MaskBCELoss,
    MaskDiceLoss,
    MaskLabels,
    MaskSoftmaxLoss,
    WeightDecayLoss,
    per_full_batch,
    per_location,
    per_positive,
    per_positive_coordinate,
    per_sampled,
    per_weight_sum,
)
from maskloss.losses.terms import KeypointBatch, MaskBatch, RoIBatch, RPNBatch
from tests.reference import module_of

COUNTS = BatchCounts(num_images=2, sampled=6, positives=3, batch_size_per_image=8, locations=20)
KEYS_OF_TERMS = {
    "objectness": "loss_objectness",
    "rpn_box": "loss_rpn_box_reg",
    "classification": "loss_classifier",
    "box": "loss_box_reg",
    "mask": "loss_mask",
}


class Batches:
    """Six sampled anchors and RoIs, three of them positive, of three classes; and the leaves of each term."""

    def __init__(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> None:
        def leaf(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

        self.leaves = {
            "objectness": leaf(6),
            "rpn_box": leaf(3, 4),
            "classification": leaf(6, 3),
            "box": leaf(3, 4),
            "mask": leaf(3, 3, 2, 2),
        }
        self.targets = torch.randn(2, 3, 4, generator=generator)
        self.objectness_labels = torch.tensor([1.0, 0, 0, 1, 0, 1])
        self.labels = torch.tensor([0, 1, 2, 0, 0, 2])
        self.mask_labels = self.labels[self.labels > 0]
        self.mask_targets = torch.rand(3, 2, 2, generator=generator)

    def losses(self, loss: MaskRCNNLoss) -> dict[str, torch.Tensor]:
        leaves = self.leaves
        rpn_box = BoxRegression(leaves["rpn_box"], self.targets[0], lambda deltas: 10 * deltas)
        box = BoxRegression(leaves["box"], self.targets[1], lambda deltas: 10 * deltas)
        return {
            **loss.rpn_losses(RPNBatch(leaves["objectness"], self.objectness_labels, rpn_box, COUNTS)),
            **loss.roi_losses(RoIBatch(leaves["classification"], self.labels, box, COUNTS)),
            **loss.mask_losses(MaskBatch(leaves["mask"], self.mask_targets, self.mask_labels, COUNTS)),
        }

    def loss_of(self, name: str, loss: MaskRCNNLoss) -> torch.Tensor:
        return self.losses(loss)[KEYS_OF_TERMS[name]]


@pytest.fixture
def batches(generator):
    return Batches(generator)


def ones(predictions, *_):
    """A term that returns 1 per sample, so that the loss is the number of samples over the divisor."""
    predictions = predictions.deltas if isinstance(predictions, BoxRegression) else predictions
    return torch.ones(predictions.shape[0])


def refused(*_):
    raise AssertionError("the term was called")


# The defaults are torchvision's


def test_default_detector_losses_are_those_of_torchvision(generator):
    class_logits = torch.randn(7, 4, generator=generator)
    box_regression = torch.randn(7, 16, generator=generator)
    labels = torch.tensor([0, 3, 1, 0, 2, 0, 3])
    target_deltas = torch.randn(7, 4, generator=generator)
    positive = labels > 0
    losses = MaskRCNNLoss().roi_losses(
        RoIBatch(
            class_logits,
            labels,
            BoxRegression(
                box_regression.reshape(7, 4, 4)[positive, labels[positive]], target_deltas[positive]
            ),
            BatchCounts(num_images=2, sampled=7, positives=4, batch_size_per_image=512),
        )
    )
    classification, box = fastrcnn_loss(
        class_logits, box_regression, [labels[:3], labels[3:]], [target_deltas[:3], target_deltas[3:]]
    )
    torch.testing.assert_close(
        losses, {"loss_classifier": classification, "loss_box_reg": box}, rtol=1e-6, atol=0
    )


def test_default_rpn_losses_are_those_of_torchvision(generator):
    objectness, deltas = torch.randn(2, 5, generator=generator), torch.randn(10, 4, generator=generator)
    target_deltas = torch.randn(10, 4, generator=generator)
    # Per anchor: 1 an object, 0 background, -1 not sampled.
    labels = torch.tensor([[1, 0, -1, 1, 0], [-1, 0, 0, 1, -1]])
    sampler = SimpleNamespace(fg_bg_sampler=lambda _: (list(labels == 1), list(labels == 0)))
    expected = RegionProposalNetwork.compute_loss(
        sampler, objectness.reshape(10, 1), deltas, list(labels.float()), list(target_deltas.reshape(2, 5, 4))
    )
    sampled, positive = (labels >= 0).reshape(-1), (labels == 1).reshape(-1)
    losses = MaskRCNNLoss().rpn_losses(
        RPNBatch(
            objectness.reshape(-1)[sampled],
            labels.reshape(-1)[sampled].float(),
            BoxRegression(deltas[positive], target_deltas[positive]),
            BatchCounts(num_images=2, sampled=7, positives=3, batch_size_per_image=256),
        )
    )
    expected = dict(zip(("loss_objectness", "loss_rpn_box_reg"), expected, strict=True))
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)


def test_the_default_mask_loss_is_that_of_torchvision(generator):
    gt_masks = torch.rand(2, 20, 24, generator=generator) > 0.5
    boxes = torch.tensor([[1.0, 2.0, 15.5, 18.0], [3.5, 0.0, 22.0, 11.2], [0.0, 0.0, 24.0, 20.0]])
    gt_labels, matched_idxs = torch.tensor([2, 1]), torch.tensor([0, 1, 0])
    mask_logits = torch.randn(3, 3, 7, 7, generator=generator)
    expected = maskrcnn_loss(mask_logits, [boxes], [gt_masks.to(torch.uint8)], [gt_labels], [matched_idxs])
    loss = MaskRCNNLoss()
    targets = mask_targets(
        gt_masks,
        boxes,
        matched_idxs,
        7,
        aligned=loss.mask_targets.aligned,
        binary=loss.mask_targets.binary,
    )
    counts = BatchCounts(num_images=1, sampled=9, positives=3, batch_size_per_image=512)
    losses = loss.mask_losses(MaskBatch(mask_logits, targets, gt_labels[matched_idxs], counts))
    torch.testing.assert_close(losses, {"loss_mask": expected}, rtol=1e-6, atol=0)


def test_no_argument_is_the_preset_torchvision(batches):
    assert batches.losses(MaskRCNNLoss()) == batches.losses(MaskRCNNLoss.preset("torchvision"))


# The arguments of a term


@pytest.mark.parametrize("name", ["rpn_box", "box"])
def test_a_box_term_reads_deltas_and_decoded_boxes(batches, name):
    seen = []

    def term(regression):
        seen.append(regression)
        return regression.deltas.sum(1)

    batches.losses(MaskRCNNLoss(**{name: term}))
    (regression,) = seen
    target = batches.targets[["rpn_box", "box"].index(name)]
    assert regression.deltas is batches.leaves[name]
    assert torch.equal(regression.target_deltas, target)
    assert torch.equal(regression.boxes, 10 * batches.leaves[name])
    assert torch.equal(regression.target_boxes, 10 * target)


def test_a_mask_term_gets_the_channel_of_each_rois_class(batches):
    seen = []
    batches.losses(MaskRCNNLoss(mask=lambda *arguments: seen.append(arguments) or ones(arguments[0])))
    ((mask_logits, targets),) = seen
    own = [batches.leaves["mask"][roi, label] for roi, label in enumerate(batches.mask_labels)]
    assert torch.equal(mask_logits, torch.stack(own))
    assert torch.equal(targets, batches.mask_targets)


def test_a_mask_term_of_all_classes_gets_all_channels_and_the_labels(batches):
    class AllClasses:
        all_classes = True

        def __call__(self, *arguments):
            self.seen = arguments
            return ones(arguments[0])

    term = AllClasses()
    loss = MaskRCNNLoss(mask=term)
    batches.losses(loss)
    mask_logits, targets, labels = term.seen
    assert loss.needs_all_mask_classes
    assert mask_logits is batches.leaves["mask"]
    assert torch.equal(targets, batches.mask_targets)
    assert torch.equal(labels, batches.mask_labels)


def test_a_mask_term_of_the_image_gets_the_crops_and_the_box_grids(batches, generator):
    class OfTheImage:
        uses_image = True

        def __call__(self, mask_logits, mask_targets, image_crops, gt_box_grids):
            self.seen = mask_logits, mask_targets, image_crops, gt_box_grids
            return ones(mask_logits)

    term = OfTheImage()
    crops, grids = torch.rand(3, 3, 2, 2, generator=generator), torch.rand(3, 2, 2, generator=generator)
    labels = replace(MaskLabels.of_masks(batches.mask_targets), image_crops=crops, gt_box_grids=grids)
    logits = batches.leaves["mask"]
    MaskRCNNLoss(mask=term).mask_losses(
        MaskBatch(logits, batches.mask_targets, batches.mask_labels, COUNTS, mask_labels=labels)
    )
    own = torch.stack([logits[roi, label] for roi, label in enumerate(batches.mask_labels)])
    for seen, expected in zip(term.seen, (own, batches.mask_targets, crops, grids), strict=True):
        assert torch.equal(seen, expected)


def test_the_default_mask_term_does_not_need_all_classes():
    assert not MaskRCNNLoss().needs_all_mask_classes


def test_the_channel_that_a_mask_term_reads_is_its_own_or_that_of_the_label():
    labels = torch.tensor([2, 0, 1])
    assert MaskRCNNLoss().mask_channels(labels).tolist() == [2, 0, 1]
    assert MaskRCNNLoss(mask=MaskSoftmaxLoss()).mask_channels(labels) is None
    of_channel_0 = MaskRCNNLoss(mask=ClassAgnosticMaskLoss(MaskBCELoss()))
    assert of_channel_0.mask_channels(labels).tolist() == [0, 0, 0]


def test_the_gradient_of_the_mask_loss_is_zero_on_every_other_class(batches):
    batches.loss_of("mask", MaskRCNNLoss()).backward()
    grad = batches.leaves["mask"].grad
    own = F.one_hot(batches.mask_labels, 3).bool()
    assert grad[~own].count_nonzero() == 0
    assert (grad[own] != 0).all()


# The values of a term


@pytest.mark.parametrize("name", ["rpn_box", "box"])
def test_box_values_per_coordinate_are_summed(batches, name):
    per_coordinate = batches.loss_of(
        name, MaskRCNNLoss(**{name: lambda r: (r.deltas - r.target_deltas) ** 2})
    )
    per_box = batches.loss_of(
        name, MaskRCNNLoss(**{name: lambda r: ((r.deltas - r.target_deltas) ** 2).sum(dim=1)})
    )
    torch.testing.assert_close(per_coordinate, per_box)


def test_mask_values_per_cell_are_averaged(batches):
    per_cell = batches.loss_of("mask", MaskRCNNLoss(mask=lambda logits, targets: (logits - targets) ** 2))
    per_roi = batches.loss_of(
        "mask", MaskRCNNLoss(mask=lambda logits, targets: ((logits - targets) ** 2).mean(dim=(1, 2)))
    )
    torch.testing.assert_close(per_cell, per_roi)


def test_the_losses_of_torch_fit_as_terms(batches):
    torch_terms = MaskRCNNLoss(
        objectness=nn.BCEWithLogitsLoss(reduction="none"),
        classification=nn.CrossEntropyLoss(reduction="none"),
        mask=nn.BCEWithLogitsLoss(reduction="none"),
    )
    torch.testing.assert_close(batches.losses(torch_terms), batches.losses(MaskRCNNLoss()))


def test_the_weights_of_a_classification_term_enter_the_divisor(batches):
    class_weights = torch.tensor([0.1, 1.0, 3.0])

    def weighted(class_logits, labels):
        weights = class_weights[labels]
        return weights * F.cross_entropy(class_logits, labels, reduction="none"), weights

    # torch's own class-weighted mean divides by the sum of weights, too.
    expected = F.cross_entropy(batches.leaves["classification"], batches.labels, weight=class_weights)
    torch.testing.assert_close(
        batches.loss_of("classification", MaskRCNNLoss(classification=weighted)), expected
    )


def test_classification_weights_that_sum_to_zero_give_zero(batches):
    def weightless(class_logits, labels):
        weights = torch.zeros(len(labels))
        return weights * F.cross_entropy(class_logits, labels, reduction="none"), weights

    value = batches.loss_of("classification", MaskRCNNLoss(classification=weightless))
    value.backward()
    assert value == 0
    assert batches.leaves["classification"].grad.tolist() == [[0] * 3] * 6


@pytest.mark.parametrize(
    ("name", "sample", "expected"),
    [
        ("objectness", "sampled anchor", 6),
        ("rpn_box", "positive", 3),
        ("classification", "sampled RoI", 6),
        ("box", "positive", 3),
        ("mask", "positive", 3),
    ],
)
def test_values_of_another_shape_raise_and_name_the_term(batches, name, sample, expected):
    loss = MaskRCNNLoss(**{name: lambda *_: torch.ones(5)})
    cells = rf" or \({expected}, M, M\)" if name == "mask" else ""
    message = (
        rf"the {name} term must return one value per {sample}, shape \({expected},\){cells}, not shape \(5,\)"
    )
    with pytest.raises(ValueError, match=message):
        batches.losses(loss)


@pytest.mark.parametrize("name", KEYS_OF_TERMS)
def test_a_reduced_value_raises_and_says_what_torch_losses_need(batches, name):
    loss = MaskRCNNLoss(**{name: lambda *_: torch.tensor(1.0)})
    with pytest.raises(ValueError, match=rf"the {name} term .* not shape \(\); .* reduction='none'"):
        batches.losses(loss)


@pytest.mark.parametrize("name", KEYS_OF_TERMS)
def test_a_value_that_is_no_tensor_raises_and_names_the_term(batches, name):
    loss = MaskRCNNLoss(**{name: lambda *_: 1.0})
    with pytest.raises(ValueError, match=rf"the {name} term .* not float"):
        batches.losses(loss)


def test_classification_weights_of_another_shape_raise(batches):
    loss = MaskRCNNLoss(classification=lambda *_: (torch.ones(6), torch.ones(1)))
    with pytest.raises(ValueError, match=r"the classification term .* not shape \(1,\)"):
        batches.losses(loss)


# Normalizers


@pytest.mark.parametrize(
    ("normalizer", "divisor"),
    [
        (per_sampled, 6),
        (per_positive, 3),
        (per_positive_coordinate, 12),
        (per_full_batch, 16),  # 2 images of 8
    ],
)
@pytest.mark.parametrize("name", KEYS_OF_TERMS)
def test_a_normalizer_sets_the_divisor_of_its_term(batches, name, normalizer, divisor):
    loss = MaskRCNNLoss(**{name: ones}, normalizers={name: normalizer})
    count = 6 if name in ("objectness", "classification") else 3
    assert batches.loss_of(name, loss).item() == pytest.approx(count / divisor)


@pytest.mark.parametrize(("name", "count"), [("objectness", 6), ("rpn_box", 3)])
def test_the_rpns_terms_may_be_divided_by_the_20_locations(batches, name, count):
    loss = MaskRCNNLoss(**{name: ones}, normalizers={name: per_location})
    assert batches.loss_of(name, loss).item() == pytest.approx(count / 20)


@pytest.mark.parametrize("name", ["classification", "box", "mask"])
def test_the_detectors_terms_have_no_locations(name):
    with pytest.raises(ValueError, match=f"{name} cannot be divided by per_location"):
        MaskRCNNLoss(normalizers={name: per_location})


@pytest.mark.parametrize(
    ("name", "expected"),
    [("objectness", 1.0), ("rpn_box", 0.5), ("classification", 1.0), ("box", 0.5), ("mask", 1.0)],
)
def test_default_divisors(batches, name, expected):
    # 6 samples over 6; box values of 3 positives over all 6; masks of 3 positives over 3.
    assert batches.loss_of(name, MaskRCNNLoss(**{name: ones})).item() == expected


def test_normalizers_leave_the_other_terms_as_they_are(batches):
    changed = batches.losses(MaskRCNNLoss(normalizers={"box": per_positive}))
    default = batches.losses(MaskRCNNLoss())
    assert changed["loss_box_reg"].item() == pytest.approx(2 * default["loss_box_reg"].item())
    del changed["loss_box_reg"], default["loss_box_reg"]
    assert changed == default


def test_a_weight_sum_without_weights_is_the_number_of_rois(batches):
    loss = MaskRCNNLoss(classification=ones, normalizers={"classification": per_weight_sum})
    assert batches.loss_of("classification", loss).item() == 1.0


def test_an_unknown_normalizer_raises():
    with pytest.raises(ValueError, match="no term is named masks"):
        MaskRCNNLoss(normalizers={"masks": per_positive})


@pytest.fixture
def group_of_one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_the_mean_counts_of_one_process_are_its_own(batches, group_of_one_process):
    # `test_synchronized` has two processes.
    loss = MaskRCNNLoss(synchronized=True)
    mean = loss.synchronize(replace(COUNTS, weight_sum=2.5), torch.device("cpu"))
    assert all(isinstance(count, torch.Tensor) for count in (mean.sampled, mean.weight_sum))
    assert {name: float(count) for name, count in vars(mean).items()} == {**vars(COUNTS), "weight_sum": 2.5}
    torch.testing.assert_close(batches.losses(loss), batches.losses(MaskRCNNLoss()))
    assert loss.eval().synchronize(COUNTS, torch.device("cpu")) is COUNTS


# Weights


@pytest.mark.parametrize("name", KEYS_OF_TERMS)
def test_a_weight_multiplies_its_own_term_and_gradient_only(generator, name):
    plain = Batches(generator)
    weighted = copy.deepcopy(plain)
    losses = plain.losses(MaskRCNNLoss())
    weighted_losses = weighted.losses(MaskRCNNLoss(weights=LossWeights(**{name: 2.5})))
    sum(losses.values()).backward()
    sum(weighted_losses.values()).backward()
    for other, key in KEYS_OF_TERMS.items():
        factor = 2.5 if other == name else 1.0
        torch.testing.assert_close(weighted_losses[key], factor * losses[key])
        torch.testing.assert_close(weighted.leaves[other].grad, factor * plain.leaves[other].grad)


@pytest.mark.parametrize("name", KEYS_OF_TERMS)
def test_weight_zero_skips_the_term_and_leaves_a_graph_connected_zero(batches, name):
    loss = MaskRCNNLoss(**{name: refused}, weights=LossWeights(**{name: 0.0}))
    value = batches.loss_of(name, loss)
    value.backward()
    assert value.shape == ()
    assert value == 0
    assert batches.leaves[name].grad.shape == batches.leaves[name].shape
    assert batches.leaves[name].grad.count_nonzero() == 0


@pytest.mark.parametrize("name", KEYS_OF_TERMS)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_weight_zero_stays_zero_for_predictions_that_are_not_finite(batches, name, bad):
    with torch.no_grad():
        batches.leaves[name].fill_(bad)
    value = batches.loss_of(name, MaskRCNNLoss(weights=LossWeights(**{name: 0.0})))
    value.backward()
    assert value == 0
    assert batches.leaves[name].grad.count_nonzero() == 0


# Nothing sampled


def empty_batch_losses(loss, dtype=torch.float32):
    leaves = {
        "objectness": torch.zeros(0, dtype=dtype, requires_grad=True),
        "rpn_box": torch.zeros(0, 4, dtype=dtype, requires_grad=True),
        "classification": torch.zeros(0, 3, dtype=dtype, requires_grad=True),
        "box": torch.zeros(0, 4, dtype=dtype, requires_grad=True),
        "mask": torch.zeros(0, 3, 2, 2, dtype=dtype, requires_grad=True),
    }
    counts = BatchCounts(num_images=0, sampled=0, positives=0, batch_size_per_image=8)
    labels = torch.zeros(0, dtype=torch.int64)

    def box(name):
        return BoxRegression(leaves[name], torch.zeros(0, 4), lambda deltas: deltas)

    losses = {
        **loss.rpn_losses(RPNBatch(leaves["objectness"], torch.zeros(0), box("rpn_box"), counts)),
        **loss.roi_losses(RoIBatch(leaves["classification"], labels, box("box"), counts)),
        **loss.mask_losses(MaskBatch(leaves["mask"], torch.zeros(0, 2, 2), labels, counts)),
    }
    return losses, leaves


@pytest.mark.parametrize("preset", ["torchvision", "detectron2", "matterport", "paper", "aligned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_sampled_gives_zeros_with_gradients(preset, dtype):
    losses, leaves = empty_batch_losses(MaskRCNNLoss.preset(preset), dtype)
    assert set(losses) == set(KEYS_OF_TERMS.values())
    assert all(value == 0 for value in losses.values())
    sum(losses.values()).backward()
    assert all(leaf.grad is not None and leaf.grad.shape == leaf.shape for leaf in leaves.values())


def test_the_gradient_of_an_empty_batch_reaches_the_layer_before(generator):
    # The head's weights must get a gradient of zeros, or data-parallel training hangs.
    layer = nn.Linear(5, 4)
    box = BoxRegression(layer(torch.zeros(0, 5)), torch.zeros(0, 4))
    counts = BatchCounts(num_images=1, sampled=3, positives=0, batch_size_per_image=8)
    class_logits = torch.randn(3, 2, generator=generator)
    losses = MaskRCNNLoss().roi_losses(RoIBatch(class_logits, torch.zeros(3, dtype=torch.int64), box, counts))
    losses["loss_box_reg"].backward()
    assert layer.weight.grad.tolist() == [[0] * 5] * 4
    assert layer.bias.grad.tolist() == [0] * 4


def test_an_empty_active_class_batch_is_zero():
    loss = MaskRCNNLoss.preset("matterport", active_classes=torch.ones(3, dtype=torch.bool))
    losses, leaves = empty_batch_losses(loss)
    losses["loss_classifier"].backward()
    assert losses["loss_classifier"] == 0
    assert leaves["classification"].grad.shape == (0, 3)


# Half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_give_float32_losses(generator, dtype):
    half = Batches(generator, dtype)
    full = copy.deepcopy(half)
    full.leaves = {name: leaf.detach().float().requires_grad_() for name, leaf in half.leaves.items()}
    losses = half.losses(MaskRCNNLoss())
    assert {value.dtype for value in losses.values()} == {torch.float32}
    # The same rounded inputs in float32: nothing of the arithmetic was done in half precision.
    torch.testing.assert_close(losses, full.losses(MaskRCNNLoss()), rtol=0, atol=0)
    sum(losses.values()).backward()
    assert all(leaf.grad.dtype == dtype for leaf in half.leaves.values())


def test_a_zero_of_half_inputs_is_float32(generator):
    weights = LossWeights(objectness=0, rpn_box=0, classification=0, box=0, mask=0)
    losses = Batches(generator, torch.float16).losses(MaskRCNNLoss(weights=weights))
    assert {value.dtype for value in losses.values()} == {torch.float32}


def test_terms_run_with_autocast_off(batches):
    seen = []

    def term(logits, _):
        # Autocast would compute a matrix product in bfloat16.
        product = logits[:, None] @ logits.new_ones(1, 1)
        seen.append((logits.dtype, product.dtype))
        return product[:, 0]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        batches.losses(MaskRCNNLoss(objectness=term))
    assert seen == [(torch.float32, torch.float32)]


# Regularization


def test_no_penalty_gives_no_key():
    assert MaskRCNNLoss().regularization_losses(nn.Linear(1, 1)) == {}


def test_the_penalty_is_weighted():
    model = module_of(torch.tensor([3.0, -4.0]))
    loss = MaskRCNNLoss(
        regularization=lambda model: model.weight_0.abs().sum(), weights=LossWeights(regularization=0.5)
    )
    losses = loss.regularization_losses(model)
    losses["loss_regularization"].backward()
    assert losses["loss_regularization"].item() == 3.5
    assert model.weight_0.grad.tolist() == [0.5, -0.5]


def test_a_penalty_of_weight_zero_is_not_called_and_stays_connected():
    model = module_of(torch.tensor([math.inf, 1.0]))
    loss = MaskRCNNLoss(regularization=refused, weights=LossWeights(regularization=0.0))
    value = loss.regularization_losses(model)["loss_regularization"]
    value.backward()
    assert value == 0
    assert model.weight_0.grad.tolist() == [0, 0]
    # Also of a model without parameters.
    assert loss.regularization_losses(nn.Identity())["loss_regularization"] == 0


@pytest.mark.parametrize("value", [torch.ones(2), 1.0], ids=["vector", "float"])
def test_a_penalty_that_is_no_scalar_tensor_raises(value):
    loss = MaskRCNNLoss(regularization=lambda _: value)
    with pytest.raises(ValueError, match="the regularization term must return a scalar tensor"):
        loss.regularization_losses(nn.Linear(1, 1))


# The Module itself


def test_modules_among_the_terms_move_with_the_loss():
    loss = MaskRCNNLoss.preset("matterport", active_classes=torch.tensor([True, False]))
    assert [name for name, _ in loss.named_buffers()] == ["classification.active_classes"]


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_a_copy_gives_the_same_losses(batches, make_copy):
    loss = MaskRCNNLoss(
        box=BoxSmoothL1Loss(beta=0.0),
        mask=MaskBCELoss(),
        weights=LossWeights(mask=2.0),
        normalizers={"rpn_box": per_full_batch},
        mask_targets=MaskTargets(aligned=True, binary=True),
    )
    copied = make_copy(loss)
    assert copied.mask_targets == loss.mask_targets
    assert batches.losses(copied) == batches.losses(loss)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": {"mask": 2.0}}, r"weights must be a maskloss\.LossWeights, not dict"),
        ({"mask_targets": "aligned"}, r"mask_targets must be a maskloss\.MaskTargets, not str"),
        (
            {"normalizers": {"box": "per_positive"}},
            r"the normalizer of box must be a callable on BatchCounts",
        ),
        ({"normalizers": ["box"]}, r'normalizers must be a mapping such as {"box": .*, not list'),
        ({"normalizers": per_positive}, r"normalizers must be a mapping such as .*, not function"),
        ({"normalizers": {"box": 256}}, r"the normalizer of box must be a callable on BatchCounts"),
    ],
)
def test_other_arguments_of_another_type_raise_by_name(arguments, message):
    with pytest.raises(TypeError, match=message):
        MaskRCNNLoss(**arguments)
    MaskRCNNLoss(normalizers={"box": per_positive}, weights=LossWeights(mask=2))


def test_the_settings_of_a_loss_make_it_again() -> None:
    term = MaskDiceLoss()
    loss = MaskRCNNLoss(
        mask=term,
        weights=LossWeights(box=2.0),
        normalizers={"box": per_positive},
        mask_targets=MaskTargets(aligned=True, binary=True),
        regularization=WeightDecayLoss(),
    )
    again = MaskRCNNLoss(**loss.settings())
    assert again.settings() == loss.settings()
    assert again.mask is term
    changed = MaskRCNNLoss(**{**loss.settings(), "mask": None})
    assert isinstance(changed.mask, MaskBCELoss)
    assert changed.weights.box == 2.0
    assert loss.mask is term


def test_a_keypoint_term_is_a_term_like_the_others() -> None:
    torch.manual_seed(0)
    logits, cells = torch.randn(5, 49, requires_grad=True), torch.randint(0, 49, (5,))
    batch = KeypointBatch(logits, cells, BatchCounts(2, sampled=5, positives=3, batch_size_per_image=8))
    expected = F.cross_entropy(logits, cells)  # torchvision's `keypointrcnn_loss`
    assert torch.allclose(MaskRCNNLoss().keypoint_losses(batch)["loss_keypoint"], expected)
    tripled = MaskRCNNLoss(
        keypoint=lambda keypoint_logits, cells: 3 * F.cross_entropy(keypoint_logits, cells, reduction="none"),
        weights=LossWeights(keypoint=0.5),
        normalizers={"keypoint": per_positive},
    )
    value = tripled.keypoint_losses(batch)["loss_keypoint"]
    assert torch.allclose(value, 0.5 * 3 * expected * 5 / 3)
    none = KeypointBatch(
        logits[:0], cells[:0], BatchCounts(2, sampled=0, positives=0, batch_size_per_image=8)
    )
    zero = MaskRCNNLoss().keypoint_losses(none)["loss_keypoint"]
    zero.backward()
    assert zero == 0
    assert logits.grad is not None
    with pytest.raises(TypeError, match=r"keypoint: .* is a class"):
        MaskRCNNLoss(keypoint=torch.nn.CrossEntropyLoss)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r'keypoint: .* write CrossEntropyLoss\(reduction="none"\)'):
        MaskRCNNLoss(keypoint=torch.nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match=r"one value per visible keypoint"):
        MaskRCNNLoss(keypoint=lambda logits, cells: logits).keypoint_losses(batch)


@pytest.mark.parametrize("weights", [torch.ones(1), torch.ones(3, 1), torch.ones(4)])
def test_weights_of_another_number_of_rois_are_refused(weights):
    rois = RoIBatch(
        class_logits=torch.zeros(3, 2),
        labels=torch.zeros(3, dtype=torch.int64),
        box=BoxRegression(torch.zeros(0, 4), torch.zeros(0, 4)),
        counts=BatchCounts(num_images=1, sampled=3, positives=0, batch_size_per_image=512),
        weights=weights,
    )
    with pytest.raises(ValueError, match=r"shapes differ: weights .*, values \(3,\)"):
        MaskRCNNLoss.preset("torchvision").roi_losses(rois)
