"""What cannot be a term of the loss is refused where the loss is made, with what to write instead."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maskloss
from maskloss import LossWeights, MaskRCNNLoss, losses
from maskloss.losses import per_positive

TERMS = ("objectness", "rpn_box", "classification", "box", "mask", "regularization")


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
