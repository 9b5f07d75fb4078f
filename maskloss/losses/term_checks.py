"""Checks of what a user gives as a term of the loss, and the registration of what it holds."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.nn.modules.loss import _Loss

from maskloss.losses.terms import TERMS


def register_parts(owner: nn.Module, terms: Iterable[Any]) -> None:
    """Register the modules and parameters that terms hold without being modules themselves.

    A function object with a learned weight among its attributes, or a `functools.partial` of a module, is called like
    any term; registered, its parameters are found by an optimizer, move to another device and are saved. What a
    function or a method refers to is not searched: that may be the model.

    Args:
        owner: the module that calls the terms; the parts become its submodule `held`, if there are any.
        terms: any callables. Modules among them register their own parts.
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
    """Check that something can be a term of the loss, as far as that can be known without calling it.

    Args:
        name: of the term.
        term: what was given for it.

    Raises:
        TypeError: it is a class, no callable, or takes other arguments; the message says what to write.
        ValueError: it reduces its values to one number.
    """
    check_callable(name, term)
    arguments = TERMS[name].arguments
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
        elif keywords := _required_keywords(term):
            settings = ", ".join(f"{keyword}=..." for keyword in keywords)
            way_out = f" alone; write functools.partial({_name_of(term)}, {settings})"
        raise TypeError(f"{name}: {_name_of(term)} cannot be called with {' and '.join(arguments)}{way_out}")
    if name != "regularization":
        check_unreduced(name, term)


def check_callable(name: str, term: Any) -> None:
    """Check that something is a function or a loss object.

    Args:
        name: of the term, for the message.
        term: what was given for it.

    Raises:
        TypeError: it is a class, or cannot be called.
    """
    function = term.func if isinstance(term, functools.partial) else term
    if isinstance(function, type):
        raise TypeError(
            f"{name}: {function.__name__} is a class; write {function.__name__}(...), an object of it"
        )
    if not callable(term):
        raise TypeError(
            f"{name}: a term is a function or a loss object such as those of maskloss.losses, not "
            f"{type(term).__name__} {str(term)[:60]!r}; from names and mappings `maskloss train` makes losses"
        )
    if (
        isinstance(term, nn.Module)
        and type(term).forward is nn.Module.forward
        and "forward" not in vars(term)
    ):
        raise TypeError(f"{name}: a {type(term).__name__} has no forward, so it cannot be called as a term")


def check_unreduced(name: str, term: Any) -> None:
    """Check that a term gives a value per sample, where it says how it reduces them.

    Args:
        name: of the term, for the message.
        term: what was given for it.

    Raises:
        ValueError: it is torch's or maskloss's, or a partial function, and sums or averages.
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
            f'{name}: {_name_of(term)} has reduction="{reduction}", but MaskRCNNLoss needs a value per sample; '
            f"{way_out}"
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


def _required_keywords(term: Any) -> list[str]:
    """Return the keyword-only arguments without a default, of a callable that says what it takes."""
    if isinstance(term, nn.Module):
        term = term.forward
    parameters = inspect.signature(term).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]


def _name_of(term: Any) -> str:
    if isinstance(term, functools.partial):
        term = term.func
    name: str = getattr(term, "__qualname__", type(term).__qualname__)
    return name
