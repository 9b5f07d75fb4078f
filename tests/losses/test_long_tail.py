"""`maskloss.losses.long_tail` against slow references written from the papers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from maskloss import MaskRCNNLoss, losses
from maskloss.losses import (
    EqualizationLossV2,
    FederatedLoss,
    SeesawLoss,
    class_sigmoid_loss,
    equalization_loss_v2,
    federated_loss,
    seesaw_loss,
)
from tests import reference

C = 5
LABELS = torch.tensor([0, 1, 2, 3, 4, 1, 0])
COUNTS = torch.tensor([900.0, 100.0, 10.0, 1.0, 0.0])


@pytest.fixture
def class_logits(generator) -> Tensor:
    return 3 * torch.randn(len(LABELS), C, generator=generator, dtype=torch.float64)


# Seesaw


@pytest.mark.parametrize(("p", "q"), [(0.8, 2.0), (0.0, 2.0), (0.8, 0.0), (1.5, 0.5)])
def test_seesaw_agrees_with_the_reference(class_logits, p, q):
    found = seesaw_loss(class_logits, LABELS, class_counts=COUNTS, p=p, q=q)
    expected = reference.seesaw(class_logits, LABELS.tolist(), COUNTS.tolist(), p, q)
    torch.testing.assert_close(found.tolist(), expected)


def test_seesaw_without_factors_is_cross_entropy(class_logits):
    expected = torch.nn.functional.cross_entropy(class_logits, LABELS, reduction="none")
    torch.testing.assert_close(seesaw_loss(class_logits, LABELS, class_counts=COUNTS, p=0, q=0), expected)


def test_a_frequent_classs_example_pushes_a_rare_class_less():
    class_logits = torch.zeros(1, C, requires_grad=True)
    seesaw_loss(class_logits, torch.tensor([1]), class_counts=COUNTS, q=0.0).sum().backward()
    _, _, tenth, hundredth, none = class_logits.grad[0].tolist()
    assert tenth / hundredth == pytest.approx(10**0.8, rel=1e-4)
    assert none == pytest.approx(hundredth)  # a count of 0 counts as 1


def test_the_seesaw_module_counts_what_it_sees_and_only_with_gradients(class_logits):
    module = SeesawLoss(C)
    first = module(class_logits, LABELS)
    assert module.class_counts.tolist() == [2, 2, 1, 1, 1]
    torch.testing.assert_close(
        first, seesaw_loss(class_logits, LABELS, class_counts=torch.tensor([2.0, 2, 1, 1, 1]))
    )
    with torch.no_grad():
        module(class_logits, LABELS)
    assert module.class_counts.tolist() == [2, 2, 1, 1, 1]
    restored = SeesawLoss(C)
    restored.load_state_dict(module.state_dict())
    torch.testing.assert_close(restored(class_logits, LABELS), module(class_logits, LABELS))
    assert "num_classes=5, p=0.8, q=2" in repr(module)


def test_no_gradient_goes_through_the_seesaws_factors(class_logits):
    found = class_logits.clone().requires_grad_()
    seesaw_loss(found, LABELS, class_counts=COUNTS).sum().backward()
    # The same factors as constants: p and q of 0, and log S added to the logits by hand.
    scores, own = class_logits.softmax(dim=1), class_logits.softmax(dim=1)[range(len(LABELS)), LABELS]
    log_factors = torch.zeros_like(class_logits)
    counts = COUNTS.clamp(min=1)
    for roi, label in enumerate(LABELS.tolist()):
        for other in range(1, C):
            if label and other != label:
                mitigation = (counts[other] / counts[label]).clamp(max=1) ** 0.8
                compensation = (scores[roi, other] / own[roi].clamp(min=0.01)).clamp(min=1) ** 2.0
                log_factors[roi, other] = (mitigation * compensation).log()
    expected = class_logits.clone().requires_grad_()
    torch.nn.functional.cross_entropy(expected + log_factors, LABELS, reduction="sum").backward()
    torch.testing.assert_close(found.grad, expected.grad)


def test_the_seesaw_of_the_background_and_one_class_is_cross_entropy(class_logits):
    logits, labels = class_logits[:, :2], LABELS.clamp(max=1)
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(SeesawLoss(2)(logits, labels), expected)


# EQL v2


RATIO = torch.tensor([0.0, 0.1, 0.8, 2.0, 100.0])


def test_equalized_agrees_with_the_reference(class_logits):
    found = equalization_loss_v2(class_logits, LABELS, gradient_ratio=RATIO, gamma=3.0, mu=0.7, alpha=2.0)
    expected, _, _ = reference.equalized(class_logits, LABELS.tolist(), RATIO.tolist(), 3.0, 0.7, 2.0)
    torch.testing.assert_close(found.tolist(), expected)


def test_the_equalized_module_sums_the_gradients_of_each_class(class_logits):
    module = EqualizationLossV2(C)
    # Without statistics the ratio is 100: f(100) = 1, and every weight is 1.
    torch.testing.assert_close(module(class_logits, LABELS), class_sigmoid_loss(class_logits, LABELS))
    _, positive, negative = reference.equalized(class_logits, LABELS.tolist(), [100.0] * C, 12.0, 0.8, 4.0)
    torch.testing.assert_close(module.positive_gradients, torch.tensor(positive))
    torch.testing.assert_close(module.negative_gradients, torch.tensor(negative))
    ratio = module.gradient_ratio
    torch.testing.assert_close(ratio[1:], torch.tensor(positive)[1:] / torch.tensor(negative)[1:])
    second = module(class_logits, LABELS)
    expected, _, _ = reference.equalized(class_logits, LABELS.tolist(), ratio.tolist(), 12.0, 0.8, 4.0)
    torch.testing.assert_close(second.tolist(), expected, rtol=1e-5, atol=1e-6)
    before = copy.deepcopy(module.state_dict())
    with torch.no_grad():
        module(class_logits, LABELS)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert "mu=0.8" in repr(module)


def test_one_class_besides_the_background_can_be_equalized(class_logits):
    logits, labels = class_logits[:, :2], LABELS.clamp(max=1)
    torch.testing.assert_close(EqualizationLossV2(2)(logits, labels), class_sigmoid_loss(logits, labels))


# Federated


def test_federated_sums_over_the_counted_classes_alone(class_logits):
    counted = torch.tensor([False, True, False, True, False])
    per_class = torch.nn.functional.binary_cross_entropy_with_logits(
        class_logits, torch.nn.functional.one_hot(LABELS, C).double(), reduction="none"
    )
    found = federated_loss(class_logits, LABELS, counted_classes=counted)
    torch.testing.assert_close(found, per_class[:, 1] + per_class[:, 3])
    everything = federated_loss(class_logits, LABELS, counted_classes=torch.ones(C, dtype=torch.bool))
    torch.testing.assert_close(everything, class_sigmoid_loss(class_logits, LABELS))


def counted_by(module: FederatedLoss, labels: Tensor, num_classes: int) -> Tensor:
    class_logits = torch.zeros(len(labels), num_classes, requires_grad=True)
    module(class_logits, labels).sum().backward()
    return (class_logits.grad != 0).any(dim=0)


def test_classes_in_the_batch_always_count_and_others_in_proportion_to_their_weight():
    torch.manual_seed(0)
    counts = [1000.0, 1.0, 4.0, 16.0, 0.0, 9.0]
    module = FederatedLoss(counts, num_classes=2)
    times = torch.zeros(6)
    for _ in range(2000):
        counted = counted_by(module, torch.tensor([0, 5, 5]), 6)
        assert counted.sum() == 2
        times += counted
    # One class besides that of the batch: class 1, 2 or 3 by 1 : 2 : 4, the roots of their counts.
    assert times[[0, 4, 5]].tolist() == [0, 0, 2000]
    torch.testing.assert_close(times[1:4] / 2000, torch.tensor([1 / 7, 2 / 7, 4 / 7]), rtol=0, atol=0.05)


def test_classes_with_a_count_of_zero_are_never_sampled():
    counted = counted_by(FederatedLoss([0.0, 5.0, 0.0, 0.0], num_classes=3), torch.tensor([0, 1]), 4)
    assert counted.tolist() == [False, True, False, False]
    # Unless the batch has an object of the class.
    counted = counted_by(FederatedLoss([0.0, 5.0, 0.0, 0.0], num_classes=3), torch.tensor([0, 2]), 4)
    assert counted.tolist() == [False, True, True, False]


def test_all_classes_in_the_batch_count_even_if_they_are_more_than_num_classes():
    counted = counted_by(FederatedLoss([1.0] * 6, num_classes=1), torch.tensor([1, 2, 5]), 6)
    assert counted.tolist() == [False, True, True, False, False, True]
    assert "num_classes=1 of 5" in repr(FederatedLoss([1.0] * 6, num_classes=1))


def test_counts_that_are_whole_numbers_are_kept_as_float32(class_logits):
    module = FederatedLoss([0, 5, 3, 2, 1], power=1)
    assert module.class_weights.dtype == torch.float32
    assert module.class_weights.tolist() == [0, 5, 3, 2, 1]
    # All foreground classes are in the loss.
    torch.testing.assert_close(module(class_logits, LABELS), class_sigmoid_loss(class_logits, LABELS))


# All of them


MODULES = [SeesawLoss(C), EqualizationLossV2(C), FederatedLoss([1.0] * C, num_classes=3)]


def test_the_defaults_are_those_of_the_papers(class_logits):
    found = seesaw_loss(class_logits, LABELS, class_counts=COUNTS)
    expected = reference.seesaw(class_logits, LABELS.tolist(), COUNTS.tolist(), 0.8, 2.0)
    torch.testing.assert_close(found.tolist(), expected)
    found = equalization_loss_v2(class_logits, LABELS, gradient_ratio=RATIO)
    expected, _, _ = reference.equalized(class_logits, LABELS.tolist(), RATIO.tolist(), 12.0, 0.8, 4.0)
    torch.testing.assert_close(found.tolist(), expected)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: type(module).__name__)
def test_empty_half_precision_and_extreme_inputs(module, class_logits):
    nothing = torch.zeros(0, C, requires_grad=True)
    value = module(nothing, torch.zeros(0, dtype=torch.int64))
    value.sum().backward()
    assert value.shape == (0,)
    assert nothing.grad.shape == (0, C)
    torch.manual_seed(0)
    values = copy.deepcopy(module)(class_logits.half(), LABELS)
    assert values.dtype == torch.float32
    extreme = (1e4 * class_logits.sign()).float().requires_grad_()
    values = copy.deepcopy(module)(extreme, LABELS)
    values.sum().backward()
    assert values.isfinite().all()
    assert extreme.grad.isfinite().all()


@pytest.mark.parametrize(
    "make",
    [
        lambda **arguments: SeesawLoss(C, **arguments),
        lambda **arguments: EqualizationLossV2(C, **arguments),
        lambda **arguments: FederatedLoss([1.0] * C, 4, **arguments),
    ],
)
def test_reductions(make, class_logits):
    values = make()(class_logits, LABELS)
    assert values.shape == LABELS.shape
    torch.testing.assert_close(make(reduction="sum")(class_logits, LABELS), values.sum())
    torch.testing.assert_close(make(reduction="mean")(class_logits, LABELS), values.mean())
    with pytest.raises(ValueError, match="reduction"):
        make(reduction="average")


@pytest.mark.parametrize("module", MODULES, ids=lambda module: type(module).__name__)
@pytest.mark.parametrize("label", [-1, C])
def test_a_label_outside_of_the_classes_raises_and_does_not_become_background(module, class_logits, label):
    with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)"):
        copy.deepcopy(module)(class_logits[:2], torch.tensor([1, label]))


@pytest.mark.parametrize("make", [lambda: SeesawLoss(C), lambda: EqualizationLossV2(C)])
def test_in_evaluation_mode_no_statistics_are_collected(make, class_logits):
    module = make().eval()
    module(class_logits.requires_grad_(), LABELS)
    assert not any(value.any() for value in module.state_dict().values())


@pytest.mark.parametrize("module", MODULES, ids=lambda module: type(module).__name__)
def test_another_number_of_classes_raises_with_both(module):
    with pytest.raises(ValueError, match=r"shape \(5,\), but class_logits has 7 classes"):
        module(torch.zeros(2, 7), torch.tensor([0, 1]))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: type(module).__name__)
def test_statistics_move_and_are_saved_with_the_loss(module):
    loss = MaskRCNNLoss(classification=copy.deepcopy(module))
    expected = {f"classification.{key}" for key in module.state_dict()}
    assert {key for key in loss.state_dict() if key.startswith("classification.")} == expected != set()
    assert all(value.device.type == "meta" for value in copy.deepcopy(loss).to("meta").state_dict().values())


NO_LOGITS, NO_LABELS = torch.zeros(0, C), torch.zeros(0, dtype=torch.int64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SeesawLoss(C, p=-1.0), "p must be"),
        (lambda: SeesawLoss(C, q=-1.0), "q must be"),
        (lambda: SeesawLoss(1), "num_classes"),
        (lambda: EqualizationLossV2(C, gamma=0.0), "gamma"),
        (lambda: EqualizationLossV2(C, alpha=-1.0), "alpha"),
        (lambda: EqualizationLossV2(C, mu=float("nan")), "mu"),
        (lambda: EqualizationLossV2(1), "num_classes"),
        (lambda: seesaw_loss(NO_LOGITS, NO_LABELS, class_counts=COUNTS, p=-1.0), "p must be"),
        (lambda: seesaw_loss(NO_LOGITS, NO_LABELS, class_counts=COUNTS, q=-1.0), "q must be"),
        (lambda: equalization_loss_v2(NO_LOGITS, NO_LABELS, gradient_ratio=RATIO, gamma=0.0), "gamma"),
        (lambda: equalization_loss_v2(NO_LOGITS, NO_LABELS, gradient_ratio=RATIO, mu=-1.0), "mu"),
        (lambda: equalization_loss_v2(NO_LOGITS, NO_LABELS, gradient_ratio=RATIO, alpha=-1.0), "alpha"),
        (lambda: FederatedLoss([1.0, 1.0], power=float("nan")), "power"),
        (lambda: FederatedLoss([1.0, -1.0]), "class_counts"),
        (lambda: FederatedLoss([1.0, 2.0], num_classes=0), "num_classes"),
    ],
)
def test_bad_knobs_raise_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("power", [0.0, 0.5])
def test_a_class_without_an_object_is_never_sampled(power):
    loss = losses.FederatedLoss([0.0, 5.0, 0.0, 3.0], num_classes=3, power=power)
    for _ in range(20):  # classes 1 and 3, of ln 2 each
        assert loss(torch.zeros(1, 4), torch.tensor([1])).item() == pytest.approx(2 * math.log(2))
