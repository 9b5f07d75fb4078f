"""`maskloss.losses.term_checks`: what cannot be a term is refused, and what a term holds is registered."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maskloss
from maskloss import LossWeights, MaskRCNNLoss, losses
from maskloss.losses.term_checks import check_callable, check_unreduced, register_parts
from maskloss.losses.terms import TERMS, MaskBatch

from .test_criterion import COUNTS

# Checks


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
def test_an_object_that_is_not_a_loss_raises_by_the_name_of_the_term(term, wrong, message):
    with pytest.raises(TypeError, match=rf"^{term}: {message}"):
        MaskRCNNLoss(**{term: wrong})


@pytest.mark.parametrize("term", ["box", "rpn_box"])
@pytest.mark.parametrize(
    "wrong",
    [nn.SmoothL1Loss(reduction="none"), nn.L1Loss(), F.smooth_l1_loss, losses.MaskDiceLoss(), lambda a, b: a],
    ids=["SmoothL1Loss", "L1Loss", "smooth_l1_loss", "a mask loss", "a function of two"],
)
def test_a_box_term_of_two_tensors_raises_with_what_to_write(term, wrong):
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
    ],
)
def test_a_term_of_other_arguments_raises_with_the_expected_ones(term, wrong, arguments):
    with pytest.raises(TypeError, match=rf"^{term}: .* cannot be called with {arguments}"):
        MaskRCNNLoss(**{term: wrong})


def test_only_a_mask_term_of_three_arguments_is_told_of_all_classes():
    def of_three(first: Tensor, second: Tensor, third: Tensor) -> Tensor:
        return first

    with pytest.raises(TypeError, match=r"^mask: .* and mask_targets; .* the attribute all_classes = True$"):
        MaskRCNNLoss(mask=of_three)
    with pytest.raises(
        TypeError, match=r"^classification: .* cannot be called with class_logits and labels$"
    ):
        MaskRCNNLoss(classification=of_three)


def test_a_regularization_term_may_have_a_reduction_of_its_own():
    def penalty(model: nn.Module, *, reduction: str) -> Tensor:
        return torch.zeros(())

    term = functools.partial(penalty, reduction="sum")
    assert MaskRCNNLoss(regularization=term).regularization is term


@pytest.mark.parametrize(
    ("term", "wrong"),
    [
        ("classification", nn.CrossEntropyLoss()),
        ("objectness", nn.BCEWithLogitsLoss(reduction="sum")),
        ("mask", losses.MaskDiceLoss(reduction="mean")),
        ("box", losses.BoxGIoULoss(reduction="sum")),
    ],
)
def test_a_term_that_reduces_raises_with_what_to_write(term, wrong):
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
def test_objects_that_only_look_like_terms_raise_wherever_a_term_is_taken(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_valid_terms_are_kept_as_they_are():
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


class Averaging:
    """A loss object of a user, whose `reduction` may mean anything."""

    reduction = "mean"

    def __call__(self, mask_logits: Tensor, mask_targets: Tensor) -> Tensor:
        return (mask_logits - mask_targets).mean(dim=(1, 2))


def test_the_reduction_of_a_users_own_object_is_not_judged():
    check_unreduced("mask", Averaging())
    check_unreduced("mask", functools.partial(losses.mask_dice_loss, smooth=2.0))
    check_unreduced("mask", losses.MaskDiceLoss())
    with pytest.raises(
        ValueError, match=r'^mask: L1Loss has reduction="sum", .*; write L1Loss\(reduction="none"\)$'
    ):
        check_unreduced("mask", nn.L1Loss(reduction="sum"))


def test_a_module_with_a_forward_among_its_attributes_is_callable():
    module = nn.Module()
    with pytest.raises(TypeError, match=r"^box: a Module has no forward, so it cannot be called as a term$"):
        check_callable("box", module)
    module.forward = lambda regression: regression.deltas
    check_callable("box", module)


def test_parts_are_found_in_nested_attributes_and_not_in_what_a_function_refers_to():
    layer, other, weight = nn.Linear(1, 1), nn.Linear(1, 1), nn.Parameter(torch.ones(2))

    class Holder:
        def __init__(self) -> None:
            self.parts = {"inner": [functools.partial(scaled_by, layer), (weight, "text", 3)]}

        def __call__(self, mask_logits: Tensor, mask_targets: Tensor) -> Tensor:
            return mask_logits

    owner = nn.Module()
    register_parts(owner, [Holder(), lambda logits, targets: other(logits), other.forward, other])
    assert {id(p) for p in owner.parameters()} == {id(weight), id(layer.weight), id(layer.bias)}


def test_without_parts_nothing_is_registered():
    class WithSlots:
        __slots__ = ()

        def __call__(self, mask_logits: Tensor, mask_targets: Tensor) -> Tensor:
            return mask_logits

    owner = nn.Module()
    register_parts(owner, [losses.mask_dice_loss, losses.MaskDiceLoss(), WithSlots()])
    assert list(owner.children()) == []


# Terms with parameters


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


# Parameters of terms that are not modules


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
def test_parameters_of_a_term_that_is_not_a_module_are_found_and_trained(make, count, make_copy):
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


def test_parameters_of_terms_move_and_are_saved_with_the_loss():
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
def test_a_term_that_holds_the_model_itself_raises(kind):
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
