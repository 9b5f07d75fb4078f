"""The table of terms; and what cannot be a term is refused where the loss is made, with what to write instead."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maskloss
from maskloss import LossWeights, MaskRCNNLoss, losses
from maskloss.losses import BatchCounts, MaskBCELoss, MaskDiceLoss, WeightDecayLoss, per_positive
from maskloss.losses.terms import TERMS, KeypointBatch, MaskBatch
from maskloss.masks.targets import MaskTargets

from .test_criterion import COUNTS


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (losses.MaskDiceLoss, r"MaskDiceLoss is a class; write MaskDiceLoss\(\.\.\.\)"),
        (nn.CrossEntropyLoss, r"CrossEntropyLoss is a class; write CrossEntropyLoss\(\.\.\.\)"),
        ("dice", r"a term is a function or a loss object such as those of maskloss\.losses, not str 'dice'"),
        ({"class_path": "x"}, r"a term is a function or a loss object .*, not dict"),
        (3, r"a term is a function or a loss object .*, not int '3'"),
        ([], r"a term is a function or a loss object .*, not list"),
        (torch.ones(3), r"a term is a function or a loss object .*, not Tensor"),
    ],
    ids=["our class", "torch's class", "str", "dict", "int", "list", "tensor"],
)
def test_what_is_no_callable_object_is_a_type_error_that_names_the_term(term, wrong, message):
    with pytest.raises(TypeError, match=rf"^{term}: {message}"):
        MaskRCNNLoss(**{term: wrong})


@pytest.mark.parametrize("term", ["box", "rpn_box"])
@pytest.mark.parametrize(
    "wrong",
    [nn.SmoothL1Loss(reduction="none"), nn.L1Loss(), F.smooth_l1_loss, losses.MaskDiceLoss(), lambda a, b: a],
    ids=["SmoothL1Loss", "L1Loss", "smooth_l1_loss", "a mask loss", "a function of two"],
)
def test_a_box_term_that_takes_two_tensors_is_told_what_it_gets(term, wrong):
    with pytest.raises(
        TypeError, match=rf"^{term}: .* cannot be called with a BoxRegression; write .*BoxSmoothL1Loss"
    ):
        MaskRCNNLoss(**{term: wrong})


@pytest.mark.parametrize(
    ("term", "wrong", "arguments"),
    [
        ("mask", losses.BoxSmoothL1Loss(beta=1.0), "mask_logits and mask_targets"),
        ("classification", losses.WeightDecayLoss(), "class_logits and labels"),
        ("objectness", lambda logits: logits, "logits and labels"),
        ("regularization", lambda a, b: a, "the model"),
        ("mask", losses.MaskPointLoss(), "mask_logits and mask_targets; a term of all classes' logits"),
    ],
)
def test_a_term_of_other_arguments_is_told_what_it_gets(term, wrong, arguments):
    with pytest.raises(TypeError, match=rf"^{term}: .* cannot be called with {arguments}"):
        MaskRCNNLoss(**{term: wrong})


@pytest.mark.parametrize(
    ("term", "wrong"),
    [
        ("classification", nn.CrossEntropyLoss()),
        ("objectness", nn.BCEWithLogitsLoss(reduction="sum")),
        ("mask", losses.MaskDiceLoss(reduction="mean")),
        ("box", losses.BoxGIoULoss(reduction="sum")),
    ],
)
def test_a_term_that_reduces_is_told_to_write_none(term, wrong):
    name = type(wrong).__name__
    with pytest.raises(
        ValueError, match=rf'^{term}: {name} has reduction=.*; write {name}\(reduction="none"\)'
    ):
        MaskRCNNLoss(**{term: wrong})


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MaskRCNNLoss(mask=nn.Module()), TypeError, "^mask: a Module has no forward"),
        (lambda: MaskRCNNLoss(mask=MaskRCNNLoss()), TypeError, "^mask: a MaskRCNNLoss has no forward"),
        (
            lambda: MaskRCNNLoss(mask=functools.partial(losses.mask_dice_loss, reduction="mean")),
            ValueError,
            '^mask: mask_dice_loss has reduction="mean", .*; leave reduction out',
        ),
        (
            lambda: MaskRCNNLoss(mask=functools.partial(losses.MaskDiceLoss, smooth=2.0)),
            TypeError,
            "^mask: MaskDiceLoss is a class",
        ),
        (
            lambda: MaskRCNNLoss(mask=losses.mask_weighted_bce_loss),
            TypeError,
            r"alone; write functools\.partial\(mask_weighted_bce_loss, positive_weight=\.\.\., negative_weight",
        ),
        (
            lambda: losses.WeightedSum([losses.MaskDiceLoss]),
            TypeError,
            "term 0 of the sum: MaskDiceLoss is a",
        ),
        (
            lambda: losses.WeightedSum(["dice"]),
            TypeError,
            "term 0 of the sum: a term is a function or a loss",
        ),
        (
            lambda: losses.WeightedSum(losses.MaskDiceLoss()),
            TypeError,
            "terms must be a list of losses, not Mask",
        ),
        (
            lambda: losses.WeightedSum([losses.MaskDiceLoss(), nn.BCEWithLogitsLoss()]),
            ValueError,
            r'term 1 of the sum: BCEWithLogitsLoss has reduction="mean".*write BCEWithLogitsLoss\(reduction="none"',
        ),
        (lambda: losses.ClassAgnosticMaskLoss(losses.MaskDiceLoss), TypeError, "MaskDiceLoss is a class"),
        (lambda: losses.ClassAgnosticMaskLoss("dice"), TypeError, "a term is a function or a loss object"),
        (lambda: losses.ClassAgnosticMaskLoss(nn.BCEWithLogitsLoss()), ValueError, 'reduction="mean"'),
    ],
)
def test_what_only_looks_like_a_term_is_refused_wherever_a_term_is_taken(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_what_fits_is_taken_as_it_is():
    class Callable:
        def __call__(self, mask_logits: Tensor, mask_targets: Tensor) -> Tensor:
            return (mask_logits - mask_targets).abs()

    class Optional(nn.Module):
        def forward(self, logits: Tensor, labels: Tensor, extra: float = 1.0) -> Tensor:
            return extra * logits

    class Falsy(nn.ModuleList):
        def forward(self, mask_logits: Tensor, mask_targets: Tensor) -> Tensor:
            return mask_logits

    own = Callable()
    assert MaskRCNNLoss(mask=own).mask is own
    for term in (lambda *arguments: arguments[0], Optional(), Falsy(), losses.mask_dice_loss, torch.sub):
        assert MaskRCNNLoss(mask=term).mask is term
    softmax = losses.MaskSoftmaxLoss()
    assert MaskRCNNLoss(mask=softmax).mask is softmax


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
def test_other_arguments_of_another_type_are_named(arguments, message):
    with pytest.raises(TypeError, match=message):
        MaskRCNNLoss(**arguments)
    MaskRCNNLoss(normalizers={"box": per_positive}, weights=LossWeights(mask=2))


@pytest.mark.parametrize("weight", ["2", None, True, torch.tensor(1.0)])
def test_a_weight_that_is_no_number_is_a_type_error(weight):
    with pytest.raises(TypeError, match="the weight of mask must be a number"):
        LossWeights(mask=weight)


def test_weights_of_numpy_become_plain_numbers():
    weights = LossWeights(mask=np.float32(0.5), box=np.int64(2), rpn_box=3)
    assert (weights.mask, weights.box, weights.rpn_box) == (0.5, 2.0, 3.0)
    assert {type(weight) for weight in (weights.mask, weights.box, weights.rpn_box)} == {float}


@pytest.mark.parametrize("field", ["aligned", "binary"])
@pytest.mark.parametrize("value", ["no", 0, None])
def test_settings_of_mask_targets_are_true_or_false(field, value):
    # A string "no" would count as True.
    with pytest.raises(TypeError, match=rf"MaskTargets\({field}=\.\.\.\) is True or False, not"):
        maskloss.MaskTargets(**{field: value})


def test_a_preset_of_another_type_names_those_there_are():
    with pytest.raises(ValueError, match=r"no preset is named \['paper'\]; there are torchvision"):
        MaskRCNNLoss.preset(["paper"])


def test_active_classes_may_be_a_list():
    loss = MaskRCNNLoss.preset("matterport", active_classes=[True, False, True])
    assert loss.classification.active_classes.tolist() == [True, False, True]


def test_an_unknown_preset_names_those_there_are():
    with pytest.raises(
        ValueError, match=r"no preset is named 'detectron'; there are torchvision, detectron2, mat"
    ):
        MaskRCNNLoss.preset("detectron")


# Losses with parameters of their own.


class Tempered(nn.Module):
    """A term with a learned scale."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        self.log_scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, predictions: Tensor, labels: Tensor) -> Tensor:
        return self.loss(predictions * self.log_scale.exp(), labels)


class TemperedBox(Tempered):
    """A box term with a learned scale."""

    def forward(self, regression: maskloss.BoxRegression) -> Tensor:
        return self.loss(regression) * self.log_scale.exp()


def with_parameters() -> MaskRCNNLoss:
    return MaskRCNNLoss(
        objectness=Tempered(nn.BCEWithLogitsLoss(reduction="none")),
        rpn_box=TemperedBox(losses.BoxSmoothL1Loss(beta=1.0)),
        classification=Tempered(nn.CrossEntropyLoss(reduction="none")),
        box=TemperedBox(losses.BoxGIoULoss()),
        mask=losses.WeightedSum([Tempered(losses.MaskBCELoss()), losses.MaskDiceLoss()]),
    )


def test_the_parameters_of_every_term_are_the_losss_and_get_gradients():
    from tests.detection.small_models import batch, tiny_mask_rcnn, training_pass

    loss = with_parameters()
    names = dict(loss.named_parameters())
    assert len(names) == 5
    training_pass(maskloss.convert(tiny_mask_rcnn(), loss), *batch())
    for name, parameter in names.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs() > 0, name


def test_a_weight_of_zero_leaves_a_terms_parameters_alone():
    from tests.detection.small_models import batch, tiny_mask_rcnn, training_pass

    loss = with_parameters()
    loss.weights = LossWeights(classification=0.0)
    training_pass(maskloss.convert(tiny_mask_rcnn(), loss), *batch())
    assert loss.classification.log_scale.grad is None
    assert loss.box.log_scale.grad is not None


# Parameters of terms that are no modules.


class Scaled:
    """A function object that is no module, with a learned scale and a module in a list."""

    def __init__(self) -> None:
        self.log_scale = nn.Parameter(torch.tensor(0.3))
        self.inner = [Tempered(losses.MaskBCELoss())]

    def __call__(self, mask_logits: Tensor, mask_targets: Tensor) -> Tensor:
        return self.log_scale.exp() * self.inner[0](mask_logits, mask_targets)


def scaled_by(module: nn.Module, mask_logits: Tensor, mask_targets: Tensor) -> Tensor:
    return module(mask_logits, mask_targets)


def mask_loss_of(loss: MaskRCNNLoss) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, generator=generator)
    batch = MaskBatch(logits, torch.rand(2, 4, 4, generator=generator), torch.tensor([1, 2]), COUNTS)
    return loss.mask_losses(batch)["loss_mask"]


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (Scaled, 2),
        (lambda: functools.partial(scaled_by, Tempered(losses.MaskBCELoss())), 1),
        (lambda: functools.partial(Tempered(losses.MaskBCELoss())), 1),
        (lambda: losses.WeightedSum([Scaled(), losses.MaskDiceLoss()]), 2),
        (lambda: losses.ClassAgnosticMaskLoss(Scaled()), 2),
        (lambda: functools.partial(losses.WeightedSum([Scaled()])), 2),
    ],
    ids=["object", "argument", "partial module", "in a sum", "class-agnostic", "partial sum"],
)
@pytest.mark.parametrize("make_copy", [None, copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_parameters_of_a_term_that_is_no_module_are_found_and_trained(make, count, make_copy):
    loss = MaskRCNNLoss(mask=make())
    if make_copy is not None:
        loss = make_copy(loss)
    parameters = list(loss.parameters())
    assert len(parameters) == count
    before = mask_loss_of(loss)
    before.backward()
    # What is trained is what the term computes with, also in a copy.
    assert all(parameter.grad is not None and parameter.grad != 0 for parameter in parameters)
    torch.optim.SGD(parameters, lr=0.1).step()
    assert mask_loss_of(loss) < before


def test_they_move_and_are_saved_with_the_loss():
    loss = MaskRCNNLoss(mask=Scaled()).double()
    assert loss.mask.log_scale.dtype == loss.mask.inner[0].log_scale.dtype == torch.float64
    other = MaskRCNNLoss(mask=Scaled())
    with torch.no_grad():
        loss.mask.log_scale.fill_(0.7)
    other.load_state_dict(loss.state_dict())
    assert float(other.mask.log_scale.detach()) == pytest.approx(0.7)


def test_a_converted_models_loss_parameters_are_those_of_its_terms_alone():
    from tests.detection.small_models import tiny_mask_rcnn

    model = tiny_mask_rcnn()
    term = Scaled()
    # A layer of the model that a term reads, as for a distance of features, stays the model's.
    term.layer = model.roi_heads.mask_predictor
    maskloss.convert(model, MaskRCNNLoss(mask=term))
    found = {id(parameter) for parameter in maskloss.loss_parameters(model)}
    assert found == {id(term.log_scale), id(term.inner[0].log_scale)}


@pytest.mark.parametrize("kind", ["object", "module"])
def test_a_term_that_holds_the_model_itself_is_refused(kind):
    from tests.detection.small_models import tiny_mask_rcnn

    model = tiny_mask_rcnn()
    term = Scaled() if kind == "object" else Tempered(losses.MaskBCELoss())
    term.model = model
    with pytest.raises(ValueError, match="a term of the loss holds the model itself"):
        maskloss.convert(model, MaskRCNNLoss(mask=term))


def test_uncertainty_weighting_of_every_term_reaches_its_optimum():
    # Kendall et al., 2018, arXiv:1705.07115: e^-s L + s is least at s = log L, where e^-s L = 1.
    class Uncertain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.s = nn.Parameter(torch.tensor(0.0))

        def forward(self, mask_logits: Tensor, mask_targets: Tensor) -> Tensor:
            return losses.mask_bce_loss(mask_logits, mask_targets) * (-self.s).exp() + self.s

    loss = MaskRCNNLoss(mask=Uncertain(), normalizers={"mask": lambda _: 2})
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        mask_loss_of(loss).backward()
        optimizer.step()
    plain = mask_loss_of(MaskRCNNLoss(normalizers={"mask": lambda _: 2}))
    assert float(loss.mask.s.detach()) == pytest.approx(float(plain.log()), abs=1e-4)


def test_the_loss_and_its_weights_have_every_term_of_the_table() -> None:
    arguments = set(inspect.signature(MaskRCNNLoss).parameters)
    assert set(TERMS) == arguments - {"weights", "normalizers", "mask_targets"}
    assert list(TERMS) == [field.name for field in dataclasses.fields(LossWeights)]
    loss = MaskRCNNLoss()
    assert set(loss.normalizers) == set(TERMS) - {"regularization"}
    for name, term in TERMS.items():
        assert (getattr(loss, name) is None) == (term.default is None)


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
