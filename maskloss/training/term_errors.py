"""Errors in the terms of a loss, reported with the name of the term and the line in the user's file."""

from __future__ import annotations

import contextlib
import os
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import torch

from maskloss.errors import InputError, RunError, one_line
from maskloss.losses.criterion import MaskRCNNLoss
from maskloss.losses.terms import TERMS


@contextlib.contextmanager
def terms_named(loss: MaskRCNNLoss, step: int) -> Iterator[None]:
    """Convert errors that a term raises into a RunError that names the term and the line in the user's file.

    Errors from elsewhere pass unchanged, and so do InputError, RunError and torch.OutOfMemoryError.
    """
    try:
        yield
    except (InputError, RunError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a user's term may raise anything
        frames = _frames_of(error)
        lines = [(code, number) for code, number in frames if _is_users(code.co_filename)]
        term = failing_term(loss, error)
        in_criterion = any(Path(code.co_filename).name == "criterion.py" for code, _ in frames)
        if not (lines or term or in_criterion):
            raise
        where = f" ({lines[-1][0].co_filename}:{lines[-1][1]})" if lines else ""
        what = f"the {term} term" if term else "the loss"
        described = one_line(f"{type(error).__name__}: {error}", 180)
        raise RunError(f"step {step}: {what} fails: {described}{where}") from error


def failing_term(loss: MaskRCNNLoss, error: BaseException) -> str | None:
    """Return the name of the term in whose code an error was raised, or None if it was raised elsewhere."""
    codes = {code for code, _ in _frames_of(error)}
    return next((name for name in TERMS if _code_of(getattr(loss, name, None)) & codes), None)


def _frames_of(error: BaseException) -> list[tuple[CodeType, int]]:
    return [(frame.f_code, number) for frame, number in traceback.walk_tb(error.__traceback__)]


def _code_of(term: Any) -> set[Any]:
    """Return the code objects of a term: those of the function, or of its class's `forward` and `__call__`."""
    functions = [term, *(getattr(type(term), name, None) for name in ("forward", "__call__"))]
    return {
        f.__code__ for f in functions if hasattr(f, "__code__") and "torch/nn" not in f.__code__.co_filename
    }


def _is_users(file: str) -> bool:
    """Return whether a source file belongs to neither maskloss nor a library."""
    libraries = (
        str(Path(__file__).resolve().parents[1]),
        *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
        str(Path(torch.__file__).parent),
    )
    return not file.startswith("<") and not os.path.realpath(file).startswith(
        tuple(os.path.realpath(path) + os.sep for path in libraries)
    )
