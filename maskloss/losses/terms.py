"""What a term of the loss is: one Protocol per term, which functions, modules and torch.nn's losses fill alike."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from maskloss.losses.boxes import BoxRegression


class ObjectnessTerm(Protocol):
    """Compare the logits (S,) of sampled anchors with their labels (S,), 1. for an object and 0. for background."""

    def __call__(self, logits: Tensor, labels: Tensor, /) -> Tensor:
        """Return one value per anchor, (S,)."""


class BoxTerm(Protocol):
    """Compare the predicted boxes or deltas of P positives with what they should be."""

    def __call__(self, regression: BoxRegression, /) -> Tensor:
        """Return one value per positive, (P,), or one per coordinate, (P, 4)."""


class ClassificationTerm(Protocol):
    """Compare class logits (R, C) with labels (R,) int64."""

    def __call__(self, class_logits: Tensor, labels: Tensor, /) -> Tensor | tuple[Tensor, Tensor]:
        """Return one value per RoI, (R,), or values and the weights (R,) that enter the divisor."""


class MaskTerm(Protocol):
    """Compare the logits (P, M, M) of each positive's own class with its targets (P, M, M)."""

    def __call__(self, mask_logits: Tensor, mask_targets: Tensor, /) -> Tensor:
        """Return one value per positive, (P,), or one per cell, (P, M, M)."""


class AllClassesMaskTerm(Protocol):
    """Compare the logits (P, C, M, M) of all classes with the targets (P, M, M) of the labels (P,).

    Attributes:
        all_classes: True.
    """

    all_classes: bool

    def __call__(self, mask_logits: Tensor, mask_targets: Tensor, labels: Tensor, /) -> Tensor:
        """Return one value per positive, (P,), or one per cell, (P, M, M)."""


class RegularizationTerm(Protocol):
    """A penalty on a model's parameters."""

    def __call__(self, model: nn.Module, /) -> Tensor:
        """Return a scalar."""


#: What each term is called with, for error messages.
_ARGUMENTS = {
    "objectness": ("logits", "labels"),
    "rpn_box": ("a BoxRegression",),
    "classification": ("class_logits", "labels"),
    "box": ("a BoxRegression",),
    "mask": ("mask_logits", "mask_targets"),
    "regularization": ("the model",),
}


def check_term(name: str, term: Any) -> None:
    """Check that something can be a term of the loss, as far as that can be known without calling it.

    Args:
        name: of the term.
        term: what was given for it.

    Raises:
        TypeError: it is a class, no callable, or takes other arguments; the message says what to write.
        ValueError: it reduces its values to one number.
    """
    if isinstance(term, type):
        raise TypeError(f"{name}: {term.__name__} is a class; write {term.__name__}(...), an object of it")
    if not callable(term):
        raise TypeError(
            f"{name}: a term is a function or a loss object such as those of maskloss.losses, not "
            f"{type(term).__name__} {str(term)[:60]!r}; from names and mappings `maskloss train` makes losses"
        )
    arguments = _ARGUMENTS[name]
    if name == "mask" and getattr(term, "all_classes", False):
        arguments = (*arguments, "labels")
    if not _takes(term, len(arguments)):
        way_out = ""
        if name in ("box", "rpn_box"):
            way_out = (
                "; write maskloss.losses.BoxSmoothL1Loss(beta=1.0), or "
                "lambda boxes: my_loss(boxes.deltas, boxes.target_deltas)"
            )
        elif name == "mask" and _takes(term, 3):
            way_out = "; a term of all classes' logits and labels has the attribute all_classes = True"
        raise TypeError(f"{name}: {_name_of(term)} cannot be called with {' and '.join(arguments)}{way_out}")
    own = isinstance(term, _Loss) or type(term).__module__.startswith("maskloss.")
    reduction = getattr(term, "reduction", "none")
    if own and name != "regularization" and reduction != "none":
        raise ValueError(
            f'{name}: {_name_of(term)} has reduction="{reduction}", but MaskRCNNLoss divides by itself; write '
            f'{type(term).__name__}(reduction="none")'
        )


def _takes(term: Any, count: int) -> bool:
    """Whether a callable takes so many positional arguments; of what does not say, yes."""
    try:
        signature = inspect.signature(term.forward if isinstance(term, nn.Module) else term)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True


def _name_of(term: Any) -> str:
    name: str = getattr(term, "__qualname__", type(term).__qualname__)
    return name
