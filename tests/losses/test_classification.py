"""`maskloss.losses.classification`."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskloss import losses
from maskloss.losses import (
    ActiveClassCrossEntropyLoss,
    BatchCounts,
    BoxRegression,
    ClassWeightedCrossEntropyLoss,
    MaskRCNNLoss,
    active_class_cross_entropy_loss,
    class_focal_loss,
    class_sigmoid_loss,
    class_weighted_cross_entropy_loss,
)
from maskloss.losses.terms import RoIBatch
from tests import reference


def active(*flags: bool) -> torch.Tensor:
    return torch.tensor(flags)


def test_value_by_hand():
    # Equal logits of three classes cost log 3 each; argmax takes the first, the background, which is active.
    values, weights = active_class_cross_entropy_loss(
        torch.zeros(2, 3), torch.tensor([0, 2]), active_classes=active(True, False, False)
    )
    torch.testing.assert_close(values, torch.full((2,), math.log(3)))
    assert weights.tolist() == [1, 1]


def test_the_predicted_class_decides_and_not_the_label():
    # Both RoIs have the label 1. The first is predicted as class 1, the second as class 2.
    class_logits = torch.tensor([[0.0, 5.0, 0.0], [0.0, 0.0, 5.0]])
    labels = torch.tensor([1, 1])
    values, weights = active_class_cross_entropy_loss(
        class_logits, labels, active_classes=active(True, True, False)
    )
    assert weights.tolist() == [1, 0]
    assert values[1] == 0
    assert values[0].item() == pytest.approx(math.log(1 + 2 * math.exp(-5)), rel=1e-5)


def test_agrees_with_the_reference(generator, tolerance):
    class_logits = torch.randn(20, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (20,), generator=generator)
    flags = [True, False, True, True, False]
    values, weights = active_class_cross_entropy_loss(class_logits, labels, active_classes=active(*flags))
    expected_values, expected_weights = reference.active_class_cross_entropy(class_logits, labels, flags)
    assert 0 < sum(expected_weights) < 20  # the case has RoIs of both kinds
    torch.testing.assert_close(values.tolist(), expected_values, **tolerance[torch.float64])
    assert weights.tolist() == expected_weights


def test_all_classes_active_is_cross_entropy(generator):
    class_logits, labels = torch.randn(6, 4, generator=generator), torch.tensor([0, 1, 2, 3, 3, 0])
    values, weights = active_class_cross_entropy_loss(
        class_logits, labels, active_classes=torch.ones(4, dtype=torch.bool)
    )
    torch.testing.assert_close(values, F.cross_entropy(class_logits, labels, reduction="none"))
    assert weights.tolist() == [1] * 6


def test_a_roi_predicted_as_inactive_gets_no_gradient(generator):
    class_logits = torch.randn(8, 3, generator=generator, requires_grad=True)
    values, weights = active_class_cross_entropy_loss(
        class_logits, torch.ones(8, dtype=torch.int64), active_classes=active(True, True, False)
    )
    values.sum().backward()
    assert 0 < weights.sum() < 8
    assert class_logits.grad[weights == 0].count_nonzero() == 0
    assert class_logits.grad[weights == 1].count_nonzero() > 0


def test_permuting_rois_permutes_values_and_weights(generator):
    class_logits = torch.randn(7, 3, generator=generator)
    labels = torch.randint(0, 3, (7,), generator=generator)
    order = torch.randperm(7, generator=generator)
    flags = active(True, True, False)
    values, weights = active_class_cross_entropy_loss(class_logits, labels, active_classes=flags)
    permuted = active_class_cross_entropy_loss(class_logits[order], labels[order], active_classes=flags)
    torch.testing.assert_close(permuted, (values[order], weights[order]))


def test_gradcheck(generator):
    class_logits = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 1])
    assert torch.autograd.gradcheck(
        lambda logits: active_class_cross_entropy_loss(
            logits, labels, active_classes=active(True, True, False)
        )[0],
        class_logits,
    )


def test_values_and_gradients_are_finite_at_extreme_logits():
    class_logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], requires_grad=True)
    values, _ = active_class_cross_entropy_loss(
        class_logits, torch.tensor([1, 1]), active_classes=active(True, True, True)
    )
    values.sum().backward()
    assert values.tolist() == [2e4, 0]  # log-sum-exp is the higher logit, 1e4
    assert class_logits.grad.tolist() == [[1, -1, 0], [0, 0, 0]]


def test_no_rois_give_empty_values_that_backpropagate():
    class_logits = torch.zeros(0, 3, requires_grad=True)
    values, weights = active_class_cross_entropy_loss(
        class_logits, torch.zeros(0, dtype=torch.int64), active_classes=active(True, True, True)
    )
    values.sum().backward()
    assert values.shape == weights.shape == (0,)
    assert class_logits.grad.shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(generator, dtype):
    class_logits = (4 * torch.randn(6, 3, generator=generator)).to(dtype)
    labels = torch.randint(0, 3, (6,), generator=generator)
    flags = active(True, True, False)
    values, weights = active_class_cross_entropy_loss(class_logits, labels, active_classes=flags)
    assert values.dtype == weights.dtype == torch.float32
    # The same rounded logits in float32 give the same bits: nothing was computed in half precision.
    expected = active_class_cross_entropy_loss(class_logits.float(), labels, active_classes=flags)
    torch.testing.assert_close((values, weights), expected, rtol=0, atol=0)


def test_a_mask_of_another_number_of_classes_raises():
    with pytest.raises(ValueError, match=r"active_classes has shape \(2,\), but class_logits has 3 classes"):
        active_class_cross_entropy_loss(
            torch.zeros(1, 3), torch.tensor([0]), active_classes=active(True, True)
        )


def test_module_equals_function(generator):
    class_logits, labels = torch.randn(5, 3, generator=generator), torch.tensor([0, 1, 2, 1, 0])
    flags = active(True, False, True)
    torch.testing.assert_close(
        ActiveClassCrossEntropyLoss(flags)(class_logits, labels),
        active_class_cross_entropy_loss(class_logits, labels, active_classes=flags),
        rtol=0,
        atol=0,
    )


def test_module_refuses_a_mask_that_is_not_one_dimensional():
    with pytest.raises(ValueError, match="one entry per class"):
        ActiveClassCrossEntropyLoss(torch.ones(1, 3, dtype=torch.bool))


def test_module_refuses_labels_in_the_place_of_a_mask():
    # As truth values, all three would be active.
    with pytest.raises(
        ValueError, match=r"True or False for each class, .* not the active labels \[1, 2, 3\]"
    ):
        ActiveClassCrossEntropyLoss([1, 2, 3])
    assert ActiveClassCrossEntropyLoss([0, 1, 1]).active_classes.tolist() == [False, True, True]


def test_module_shows_how_many_classes_count():
    assert repr(ActiveClassCrossEntropyLoss(active(True, False, True))) == (
        "ActiveClassCrossEntropyLoss(active=2 of 3)"
    )


# class_weighted_cross_entropy_loss


CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 4.0])


def test_class_weighted_cross_entropy_is_torchs_weighted_mean(generator):
    class_logits = torch.randn(7, 3, generator=generator)
    labels = torch.randint(3, (7,), generator=generator)
    values, weights = class_weighted_cross_entropy_loss(class_logits, labels, class_weights=CLASS_WEIGHTS)
    expected = F.cross_entropy(class_logits, labels, weight=CLASS_WEIGHTS)
    torch.testing.assert_close(values.sum() / weights.sum(), expected)


def test_the_criterion_divides_by_the_weights_or_by_the_rois(generator):
    class_logits = torch.randn(7, 3, generator=generator)
    labels = torch.randint(3, (7,), generator=generator)
    none = BoxRegression(torch.zeros(0, 4), torch.zeros(0, 4))
    counts = BatchCounts(num_images=1, sampled=7, positives=0, batch_size_per_image=7)

    def loss(term: nn.Module) -> Tensor:
        batch = RoIBatch(class_logits, labels, none, counts)
        return MaskRCNNLoss(classification=term).roi_losses(batch)["loss_classifier"]

    of_torch = F.cross_entropy(class_logits, labels, weight=CLASS_WEIGHTS)
    torch.testing.assert_close(loss(ClassWeightedCrossEntropyLoss(CLASS_WEIGHTS)), of_torch)
    # mmdetection's: the same sum over the number of RoIs.
    over_rois = loss(nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, reduction="none"))
    torch.testing.assert_close(over_rois, of_torch * CLASS_WEIGHTS[labels].sum() / 7)


def test_class_weights_need_one_finite_weight_per_class(generator):
    with pytest.raises(ValueError, match="class_weights has shape"):
        class_weighted_cross_entropy_loss(
            torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), class_weights=CLASS_WEIGHTS
        )
    for bad in ([1.0, -1.0], [1.0, float("nan")], [[1.0, 2.0]]):
        with pytest.raises(ValueError, match="class_weights must be"):
            ClassWeightedCrossEntropyLoss(bad)
    assert "3 classes" in repr(ClassWeightedCrossEntropyLoss([0.5, 2.0, 4.0]))


def test_class_weights_that_are_whole_numbers_are_kept_as_float32():
    module = ClassWeightedCrossEntropyLoss([1, 2, 4])
    assert module.class_weights.dtype == torch.float32
    assert module.class_weights.tolist() == [1, 2, 4]


def test_torchs_label_smoothing_is_a_valid_term(generator):
    class_logits = torch.randn(7, 3, generator=generator)
    labels = torch.randint(3, (7,), generator=generator)
    none = BoxRegression(torch.zeros(0, 4), torch.zeros(0, 4))
    counts = BatchCounts(num_images=1, sampled=7, positives=0, batch_size_per_image=7)
    term = nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none")
    found = MaskRCNNLoss(classification=term).roi_losses(RoIBatch(class_logits, labels, none, counts))
    log_p = class_logits.log_softmax(1)
    own = log_p[torch.arange(7), labels]
    expected = -(0.9 * own + 0.1 * log_p.mean(1)).mean()
    torch.testing.assert_close(found["loss_classifier"], expected)


# Focal losses and sigmoids


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_class_focal_is_kornias(generator, gamma):
    # Earlier versions, the newest for Python 3.10, add 1e-6 to every class of the target.
    kornia = pytest.importorskip("kornia", minversion="0.9", reason="kornia 0.9 is not installed").losses
    class_logits = 2 * torch.randn(7, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (7,), generator=generator)
    per_class = kornia.focal_loss(class_logits, labels, alpha=None, gamma=gamma, reduction="none")
    expected = per_class.sum(dim=1)
    torch.testing.assert_close(class_focal_loss(class_logits, labels, gamma=gamma), expected)


def test_class_sigmoid_sums_binary_cross_entropies_and_leaves_the_background_alone(generator):
    class_logits = torch.randn(5, 4, generator=generator, requires_grad=True)
    labels = torch.tensor([0, 1, 3, 2, 0])
    values = class_sigmoid_loss(class_logits, labels)
    one_hot = F.one_hot(labels, 4)[:, 1:].float()
    expected = F.binary_cross_entropy_with_logits(class_logits[:, 1:], one_hot, reduction="none").sum(1)
    torch.testing.assert_close(values, expected)
    values.sum().backward()
    assert class_logits.grad[:, 0].count_nonzero() == 0


LABELED = {
    "sigmoid": losses.ClassSigmoidLoss(),
    "focal": losses.ClassFocalLoss(),
    "class weights": losses.ClassWeightedCrossEntropyLoss(torch.ones(4)),
    "active classes": losses.ActiveClassCrossEntropyLoss([True] * 4),
    "seesaw": losses.SeesawLoss(4),
    "equalization": losses.EqualizationLossV2(4),
    "federated": losses.FederatedLoss([1.0] * 4, num_classes=2),
}


@pytest.mark.parametrize("loss", LABELED.values(), ids=LABELED.keys())
@pytest.mark.parametrize(
    "labels",
    [torch.tensor([1]), torch.zeros(0, dtype=torch.int64), torch.tensor([[1], [2], [3]]), torch.ones(3)],
    ids=["short", "empty", "two axes", "float"],
)
def test_labels_that_are_not_one_integer_per_roi_are_refused(loss, labels):
    state = {name: tensor.clone() for name, tensor in loss.state_dict().items()}
    with pytest.raises(ValueError, match=r"labels must have shape \(3,\) and dtype int64, got"):
        loss(torch.zeros(3, 4), labels)
    # A refused batch is not counted.
    for name, tensor in loss.state_dict().items():
        assert torch.equal(tensor, state[name])


@pytest.mark.parametrize("loss", LABELED.values(), ids=LABELED.keys())
@pytest.mark.parametrize("label", [-100, -1, 4])
def test_a_label_outside_the_classes_is_an_error(loss, label):
    """torch's cross-entropy ignores the label -100 by default."""
    with pytest.raises((IndexError, RuntimeError)):
        loss(torch.zeros(2, 4), torch.tensor([1, label]))
