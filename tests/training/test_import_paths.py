"""maskloss/training/import_paths.py: users' objects by "package.module.name", and errors in their code."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from maskloss.errors import InputError
from maskloss.losses import mask_dice_loss
from maskloss.training.import_paths import called, described, imported


@pytest.fixture(autouse=True)
def _own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what `imported` appends to `sys.path`."""
    monkeypatch.setattr(sys, "path", [*sys.path])


def test_the_object_at_a_path_is_returned() -> None:
    assert imported("maskloss.losses.mask_dice_loss", "--loss") is mask_dice_loss
    assert imported("math.pi", "--loss") == math.pi


def test_a_module_in_the_working_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "losses_of_a_user.py").write_text("KNOB = 7\n")
    monkeypatch.chdir(tmp_path)
    assert imported("losses_of_a_user.KNOB", "--loss") == 7


def test_a_module_in_the_working_folder_hides_no_installed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "colorsys.py").write_text("rgb_to_hsv = 7\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    assert imported("colorsys.rgb_to_hsv", "--loss") != 7


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("nowhere.to.be_found", "No module named 'nowhere'"),
        ("math.nothing", "module 'math' has no attribute 'nothing'"),
        ("trailing.", "No module named 'trailing'"),
    ],
)
def test_a_path_to_nothing_is_named_with_its_option_and_the_reason(path: str, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        imported(path, "--loss mask")
    assert str(caught.value) == f"--loss mask {path!r}: cannot be imported: {reason}"


@pytest.mark.parametrize("path", ["MaskDiceLoss", ".leading"])
def test_a_name_without_a_module_is_told_to_have_one(path: str) -> None:
    with pytest.raises(InputError, match=rf"--loss mask '{path}': give an import path with its module"):
        imported(path, "--loss mask")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("1 / 0\n", "ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit(3)\n", "SystemExit: 3"),
        ("import no_such_package\n", "No module named 'no_such_package'"),
    ],
)
def test_a_module_that_fails_on_import_is_an_input_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, reason: str
) -> None:
    (tmp_path / "broken_losses.py").write_text(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        imported("broken_losses.l1", "--loss")
    assert str(caught.value) == f"--loss 'broken_losses.l1': cannot be imported: {reason}"


def test_an_object_is_called_with_all_arguments() -> None:
    assert called(divmod, "--loss", 7, 2) == (3, 1)
    # Options may have the names of `called`'s own parameters.
    assert called(dict, "--loss", where=2, found=3) == {"where": 2, "found": 3}


def test_an_object_that_is_not_callable_is_named() -> None:
    with pytest.raises(InputError, match=r"^--loss mask: must be callable, but is a int$"):
        called(3, "--loss mask")


def raising(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "reason"),
    [(KeyError("no such thing"), "KeyError: 'no such thing'"), (SystemExit(3), "SystemExit: 3")],
)
def test_an_object_that_raises_is_an_input_error_with_its_cause(error: BaseException, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        called(raising, "--model 'my.model'", error)
    assert str(caught.value) == f"--model 'my.model': cannot be made: {reason}"
    assert caught.value.__cause__ is error


def test_an_interruption_from_the_keyboard_is_no_input_error() -> None:
    with pytest.raises(KeyboardInterrupt):
        called(raising, "--loss", KeyboardInterrupt())


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("beta must be > 0"), "beta must be > 0"),
        (ImportError("No module named 'x'"), "No module named 'x'"),
        (AttributeError("no attribute"), "no attribute"),
        (ValueError(""), "ValueError: "),
        (KeyError("x"), "KeyError: 'x'"),
        (TypeError("3 arguments"), "TypeError: 3 arguments"),
        (SystemExit(3), "SystemExit: 3"),
    ],
    ids=repr,
)
def test_the_type_is_given_where_the_message_does_not_explain_itself(error: Any, text: str) -> None:
    assert described(error) == text
