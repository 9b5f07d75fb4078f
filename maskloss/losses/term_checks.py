"""Checks of the terms that a user passes to a loss, and the registration of their modules and parameters."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.loss import _Loss

from maskloss.losses.terms import TERMS


def register_parts(owner: nn.Module, terms: Iterable[Any]) -> None:
    """Register the modules and parameters of terms that are not modules themselves.

    Examples are an object with a learned weight among its attributes, and a `functools.partial` of a module. Once
    registered, their parameters are found by an optimizer, move to another device and are saved. References of a
    function or a method are not searched, because they may include the model.

    Args:
        owner: the module that calls the terms. The parts become its submodule `held`, if there are any.
        terms: any callables. Modules among them already have their own parts.
    """
    parts = [part for term in terms for part in _parts_of(term)]
    if not parts:
        return
    owner.held = nn.Module()
    for index, part in enumerate(parts):
        setattr(owner.held, f"part_{index}", part)


def _parts_of(term: Any) -> Iterator[nn.Module | nn.Parameter]:
    if isinstance(term, functools.partial):
        yield from _parts_in([term.func, term.args, term.keywords])
    elif not (isinstance(term, nn.Module) or inspect.isroutine(term)):
        yield from _parts_in(getattr(term, "__dict__", {}))


def _parts_in(value: Any) -> Iterator[nn.Module | nn.Parameter]:
    if isinstance(value, nn.Module | nn.Parameter):
        yield value
    elif isinstance(value, functools.partial):
        yield from _parts_of(value)
    elif isinstance(value, list | tuple | dict):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _parts_in(one)


def check_term(name: str, term: Any) -> None:
    """Check that an object can be a term of the loss, without calling it.

    Args:
        name: name of the term, a key of `TERMS`.
        term: the object.

    Raises:
        TypeError: the object is a class, is not callable, or takes other arguments; the message says what to write.
        ValueError: it reduces its values to one number.
    """
    check_callable(name, term)
    arguments = TERMS[name].arguments
    if name == "mask":
        if _is_of_weak_labels(term):
            raise TypeError(
                f"mask: {_name_of(term)} is for objects without a mask; write MaskBySupervision(points=..., boxes=...)"
            )
        if getattr(term, "all_classes", False) and getattr(term, "uses_image", False):
            raise TypeError(
                f"mask: {_name_of(term)} has both all_classes and uses_image; a term can have only one"
            )
        arguments = mask_arguments(term)
    way_out = ""
    if name in ("box", "rpn_box"):
        way_out = (
            "; write maskloss.losses.BoxSmoothL1Loss(beta=1.0), or "
            "lambda boxes: my_loss(boxes.deltas, boxes.target_deltas)"
        )
    elif name == "mask" and _accepts(term, 3):
        way_out = (
            "; a term that takes all classes' logits and the labels needs the attribute all_classes = True"
        )
    check_arguments(name, term, arguments, way_out)
    if name != "regularization":
        check_unreduced(name, term)


def check_arguments(name: str, term: Any, arguments: Sequence[str], way_out: str = "") -> None:
    """Check that a term can be called with some positional arguments, without calling it.

    Args:
        name: name of the term, for the message.
        term: the term.
        arguments: names of the arguments.
        way_out: end of the message; by default, how to pass keyword arguments that the term needs.

    Raises:
        TypeError: it takes other arguments.
    """
    if _accepts(term, len(arguments)):
        return
    if not way_out and (keywords := _required_keywords(term)):
        settings = ", ".join(f"{keyword}=..." for keyword in keywords)
        way_out = f" alone; write functools.partial({_name_of(term)}, {settings})"
    raise TypeError(f"{name}: {_name_of(term)} cannot be called with {' and '.join(arguments)}{way_out}")


def _is_of_weak_labels(term: Any) -> bool:
    """Return whether a term is one of maskloss's for objects without a mask, as an object or as a function."""
    function = term.func if isinstance(term, functools.partial) else term
    is_own = inspect.isfunction(function) and function.__module__ == "maskloss.losses.mask_weak"
    return is_own or bool(getattr(function, "of_weak_labels", False))


def mask_arguments(term: Any) -> tuple[str, ...]:
    """Return the names of the arguments that a mask term is called with, by its attributes."""
    if getattr(term, "uses_mask_labels", False):
        return ("mask_logits", "mask_labels")
    arguments = TERMS["mask"].arguments
    if getattr(term, "all_classes", False):
        return (*arguments, "labels")
    return (*arguments, "image_crops", "gt_box_grids") if getattr(term, "uses_image", False) else arguments


def check_callable(name: str, term: Any) -> None:
    """Check that an object is a function or a loss object.

    Args:
        name: name of the term, for the message.
        term: the object.

    Raises:
        TypeError: it is a class, or not callable.
    """
    function = term.func if isinstance(term, functools.partial) else term
    if isinstance(function, type):
        raise TypeError(
            f"{name}: {function.__name__} is a class; write {function.__name__}(...) to make a loss object"
        )
    if not callable(term):
        raise TypeError(
            f"{name}: a term is a function or a loss object such as those of maskloss.losses, not "
            f"{type(term).__name__} {str(term)[:60]!r}; only `maskloss train` makes losses from names and mappings"
        )
    if (
        isinstance(term, nn.Module)
        and type(term).forward is nn.Module.forward
        and "forward" not in vars(term)
    ):
        raise TypeError(f"{name}: a {type(term).__name__} has no forward, so it cannot be called as a term")


def check_unreduced(name: str, term: Any) -> None:
    """Check that a term returns one value per sample, as far as its `reduction` is known.

    The reduction is known for the losses of torch and of maskloss, and for `functools.partial` objects.

    Args:
        name: name of the term, for the message.
        term: the term.

    Raises:
        ValueError: the term sums or averages its values.
    """
    if isinstance(term, functools.partial):
        reduction = term.keywords.get("reduction", "none")
        way_out = "leave reduction out"
    else:
        own = isinstance(term, _Loss) or type(term).__module__.startswith("maskloss.")
        reduction = getattr(term, "reduction", "none") if own else "none"
        way_out = f'write {_name_of(term)}(reduction="none")'
    if reduction != "none":
        raise ValueError(
            f'{name}: {_name_of(term)} has reduction="{reduction}", but MaskRCNNLoss needs one value per sample; '
            f"{way_out}"
        )


def _accepts(term: Any, count: int) -> bool:
    """Return whether a callable accepts `count` positional arguments; True if it has no signature."""
    try:
        signature = inspect.signature(term.forward if isinstance(term, nn.Module) else term)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True


def _required_keywords(term: Any) -> list[str]:
    """Return the names of a callable's keyword-only arguments without a default."""
    if isinstance(term, nn.Module):
        term = term.forward
    parameters = inspect.signature(term).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]


def _name_of(term: Any) -> str:
    if isinstance(term, functools.partial):
        term = term.func
    name: str = getattr(term, "__qualname__", type(term).__qualname__)
    return name
