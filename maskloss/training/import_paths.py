"""What a user names by an import path "package.module.name": a loss, a term, a model."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from maskloss.errors import InputError


def imported(path: str, where: str) -> Any:
    """Import what a path "package.module.name" names; modules in the working folder are found too.

    Raises:
        InputError: it cannot be imported; the message says where the path stands.
    """
    module_name, _, name = path.rpartition(".")
    # As `python -m` does; the installed command does not. Last, so that nothing installed is hidden.
    if (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)
    try:
        return getattr(importlib.import_module(module_name), name)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise InputError(f"{where} {path!r}: cannot be imported: {described(error)}") from error


def called(found: Any, where: str, /, *arguments: Any, **options: Any) -> Any:
    """Call what was imported.

    Raises:
        InputError: it cannot be called, or raises; the message says where its path stands.
    """
    if not callable(found):
        raise InputError(f"{where}: is a {type(found).__name__}, no callable")
    try:
        return found(*arguments, **options)
    except (Exception, SystemExit) as error:  # a user's code may raise anything
        raise InputError(f"{where}: cannot be made: {described(error)}") from error


def described(error: BaseException) -> str:
    """Return what a user's code raised, with the type where the message alone would not say it."""
    says_itself = isinstance(error, (ImportError, AttributeError, ValueError))
    return str(error) if says_itself and str(error) else f"{type(error).__name__}: {error}"
