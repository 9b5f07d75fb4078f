"""Import paths "package.module.name", by which users name their own losses, models, mask branches and trackers."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from maskloss.errors import InputError


def imported(path: str, where: str) -> Any:
    """Import the object at a path "package.module.name", also from the working directory.

    Args:
        path: the import path.
        where: the option or field that holds the path, for error messages.

    Raises:
        InputError: the object cannot be imported; the message names `where`, the path and the reason.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise InputError(f"{where} {path!r}: give an import path with its module, such as my_module.{path}")
    # `python -m` searches the working directory, the installed command does not. It comes last, so that its modules
    # hide no installed ones.
    if (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)
    try:
        return getattr(importlib.import_module(module_name), name)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise InputError(f"{where} {path!r}: cannot be imported: {described(error)}") from error


def called(found: Any, where: str, /, *arguments: Any, **options: Any) -> Any:
    """Call an imported object.

    Args:
        found: from `imported`.
        where: the option or field that names the object, for error messages.
        *arguments: positional arguments of the call.
        **options: keyword arguments of the call.

    Raises:
        InputError: the object is not callable, or raises; the message names `where` and the reason.
    """
    if not callable(found):
        raise InputError(f"{where}: must be callable, but is a {type(found).__name__}")
    try:
        return found(*arguments, **options)
    except (Exception, SystemExit) as error:  # a user's code may raise anything
        raise InputError(f"{where}: cannot be made: {described(error)}") from error


def described(error: BaseException) -> str:
    """Return the message of an error in a user's code, with the error's type unless the message explains itself."""
    says_itself = isinstance(error, (ImportError, AttributeError, ValueError))
    return str(error) if says_itself and str(error) else f"{type(error).__name__}: {error}"
