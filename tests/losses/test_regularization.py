"""`maskloss.losses.regularization`."""

import math

import pytest
import torch
from torch import nn

from maskloss import losses
from maskloss.losses import (
    L1RegularizationLoss,
    MatterportL2Loss,
    WeightDecayLoss,
    l1_regularization_loss,
    matterport_l2_loss,
    weight_decay_loss,
)
from tests import reference


def test_l2_by_hand_counts_each_tensor_alike():
    # Mean squares: (1 + 9) / 2 = 5 of the first, 4 of the second; 0.1 * (5 + 4) = 0.9.
    model = reference.module_of(torch.tensor([1.0, -3.0]), torch.full((10, 10), 2.0))
    assert matterport_l2_loss(model, weight_decay=0.1).item() == pytest.approx(0.9, rel=1e-6)


def test_l1_by_hand_sums_absolute_values():
    model = reference.module_of(torch.tensor([1.0, -3.0]), torch.full((2, 2), -0.5))
    assert l1_regularization_loss(model).item() == 6


def test_l2_agrees_with_the_reference(generator, tolerance):
    weights = [
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 4), (7,), (2, 2, 2))
    ]
    value = matterport_l2_loss(reference.module_of(*weights), weight_decay=1e-4)
    expected = reference.l2_regularization(weights, 1e-4)
    assert value.item() == pytest.approx(expected, rel=tolerance[torch.float64]["rtol"])


def test_l1_agrees_with_the_reference(generator, tolerance):
    weights = [
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 4), (7,), (2, 2, 2))
    ]
    expected = reference.l1_regularization(weights)
    value = l1_regularization_loss(reference.module_of(*weights))
    assert value.item() == pytest.approx(expected, rel=tolerance[torch.float64]["rtol"])


def test_l2_gradient_by_hand():
    # d/dw of λ mean(w²) = 2 λ w / size.
    model = reference.module_of(torch.tensor([1.0, -3.0]))
    matterport_l2_loss(model, weight_decay=0.5).backward()
    torch.testing.assert_close(model.weight_0.grad, torch.tensor([0.5, -1.5]))


def test_l1_gradient_is_the_sign():
    model = reference.module_of(torch.tensor([2.0, -3.0, 0.0]))
    l1_regularization_loss(model).backward()
    assert model.weight_0.grad.tolist() == [1, -1, 0]


def test_weight_decay_by_hand_counts_each_weight_alike():
    # (0.1 / 2) * (1 + 9 + 100 * 4).
    model = reference.module_of(torch.tensor([1.0, -3.0]), torch.full((10, 10), 2.0))
    assert weight_decay_loss(model, weight_decay=0.1).item() == pytest.approx(20.5, rel=1e-6)


def test_a_step_on_weight_decay_is_the_optimizers(generator):
    weights = torch.randn(3, 4, generator=generator)
    ours, theirs = reference.module_of(weights.clone()), reference.module_of(weights.clone())
    weight_decay_loss(ours, weight_decay=0.3).backward()
    torch.optim.SGD(ours.parameters(), lr=0.7).step()
    for parameter in theirs.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD(theirs.parameters(), lr=0.7, weight_decay=0.3).step()
    torch.testing.assert_close(ours.weight_0, theirs.weight_0)


LOSSES = [
    MatterportL2Loss(weight_decay=1.0),
    L1RegularizationLoss(),
    WeightDecayLoss(weight_decay=1.0),
]


@pytest.fixture(params=LOSSES, ids=["l2", "l1", "weight decay"])
def penalty(request):
    return request.param


@pytest.mark.parametrize(
    "normalization",
    [
        nn.BatchNorm2d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, affine=True),
        nn.GroupNorm(2, 4),
        nn.LayerNorm(4),
        nn.RMSNorm(4),
    ],
    ids=lambda module: type(module).__name__,
)
def test_normalization_layers_are_skipped_by_their_type(penalty, normalization):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), normalization)
    with_normalization = penalty(model)
    assert with_normalization.item() == pytest.approx(penalty(model[0]).item(), rel=1e-6)
    assert with_normalization > 0


def test_a_layer_with_the_name_of_a_normalization_but_another_type_counts(penalty):
    model = nn.Module()
    model.bn_gamma = nn.Linear(2, 1)
    assert penalty(model).item() == pytest.approx(penalty(model.bn_gamma).item())
    assert penalty(model) > 0


def test_biases_count(penalty):
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(0.0)
        model.bias.fill_(3.0)
    assert penalty(model).item() == pytest.approx(
        {MatterportL2Loss: 9, L1RegularizationLoss: 3, WeightDecayLoss: 4.5}[type(penalty)]
    )


def test_frozen_parameters_are_skipped(penalty):
    model = reference.module_of(torch.full((3,), 2.0), torch.full((3,), 5.0))
    model.weight_1.requires_grad_(False)
    assert penalty(model).item() == pytest.approx(penalty(reference.module_of(torch.full((3,), 2.0))).item())


def test_a_parameter_that_two_modules_share_counts_once(penalty):
    shared_layer = nn.Linear(2, 2)
    tied = nn.Linear(2, 2, bias=False)
    tied.weight = shared_layer.weight
    assert penalty(nn.Sequential(shared_layer, tied)).item() == pytest.approx(penalty(shared_layer).item())


def test_a_model_without_trainable_parameters_costs_zero(penalty):
    value = penalty(nn.ReLU())
    assert value.shape == ()
    assert value == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_are_summed_in_float32(penalty, dtype):
    # 300² and the sum of a thousand 300s are beyond float16.
    value = penalty(reference.module_of(torch.full((1000,), 300.0, dtype=dtype)))
    assert value.dtype == torch.float32
    expected = {MatterportL2Loss: 90_000, L1RegularizationLoss: 300_000, WeightDecayLoss: 45_000_000}[
        type(penalty)
    ]
    assert value.item() == pytest.approx(expected, rel=1e-6)


def test_l2_weight_decay_of_zero_is_zero_with_zero_gradient():
    model = reference.module_of(torch.ones(3))
    value = matterport_l2_loss(model, weight_decay=0.0)
    value.backward()
    assert value == 0
    assert model.weight_0.grad.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "make",
    [
        MatterportL2Loss,
        lambda λ: matterport_l2_loss(nn.Linear(1, 1), weight_decay=λ),
        WeightDecayLoss,
        lambda λ: weight_decay_loss(nn.Linear(1, 1), weight_decay=λ),
    ],
)
@pytest.mark.parametrize("value", [-1, math.inf, math.nan])
def test_a_weight_decay_that_is_negative_or_not_finite_raises(make, value):
    with pytest.raises(ValueError, match=f"weight_decay must be >= 0 and finite, got {value}"):
        make(value)


def test_modules_equal_functions(generator):
    model = reference.module_of(torch.randn(3, 2, generator=generator))
    assert MatterportL2Loss(0.3)(model) == matterport_l2_loss(model, weight_decay=0.3)
    assert L1RegularizationLoss()(model) == l1_regularization_loss(model)


def test_l2_module_shows_its_weight_decay():
    assert repr(MatterportL2Loss()) == "MatterportL2Loss(weight_decay=0.0001)"


def test_a_parameter_without_elements_adds_nothing():
    linear = nn.Linear(1, 3)
    linear.weight = nn.Parameter(torch.zeros(3, 0))
    nn.init.constant_(linear.bias, 2.0)
    for loss, expected in ((losses.matterport_l2_loss, 4.0), (losses.weight_decay_loss, 6.0)):
        assert loss(linear, weight_decay=1.0).item() == expected
