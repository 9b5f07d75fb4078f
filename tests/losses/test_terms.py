"""`maskloss.losses.terms`: the table of terms and their weights; and the settings of the mask targets."""

from __future__ import annotations

import dataclasses
import inspect
import math

import numpy as np
import pytest
import torch

import maskloss
from maskloss import LossWeights, MaskRCNNLoss
from maskloss.losses.terms import TERMS


@pytest.mark.parametrize("weight", ["2", None, True, torch.tensor(1.0)])
def test_a_weight_that_is_not_a_number_raises(weight):
    with pytest.raises(TypeError, match="the weight of mask must be a number"):
        LossWeights(mask=weight)


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", TERMS)
def test_weights_must_be_finite_and_not_negative(name, weight):
    with pytest.raises(ValueError, match=rf"the weight of {name} must be a finite number >= 0"):
        LossWeights(**{name: weight})


def test_numpy_weights_become_floats():
    weights = LossWeights(mask=np.float32(0.5), box=np.int64(2), rpn_box=3)
    assert (weights.mask, weights.box, weights.rpn_box) == (0.5, 2.0, 3.0)
    assert {type(weight) for weight in (weights.mask, weights.box, weights.rpn_box)} == {float}


@pytest.mark.parametrize("field", ["aligned", "binary"])
@pytest.mark.parametrize("value", ["no", 0, None])
def test_settings_of_mask_targets_must_be_bools(field, value):
    # A string "no" would count as True.
    with pytest.raises(TypeError, match=rf"MaskTargets\({field}=\.\.\.\) must be True or False, not"):
        maskloss.MaskTargets(**{field: value})


def test_the_loss_and_its_weights_have_every_term_of_the_table() -> None:
    arguments = set(inspect.signature(MaskRCNNLoss).parameters)
    assert set(TERMS) == arguments - {"weights", "normalizers", "mask_targets", "synchronized"}
    assert list(TERMS) == [field.name for field in dataclasses.fields(LossWeights)]
    loss = MaskRCNNLoss()
    assert set(loss.normalizers) == set(TERMS) - {"regularization"}
    for name, term in TERMS.items():
        assert (getattr(loss, name) is None) == (term.default is None)
