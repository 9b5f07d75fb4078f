"""maskloss/errors.py: errors as one line, and Ctrl-C before the command line can handle it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from maskloss.errors import LINE_LENGTH, exit_on_interrupt, interrupt_by_exception, one_line


def test_one_line_is_short_and_printable_and_keeps_both_ends() -> None:
    line = one_line("a.json: " + "W" * 2_000_000 + "\n\x1b[31m\udce9 rename it")
    assert len(line) <= 300
    assert line.startswith("a.json: W")
    assert line.endswith("\\x1b[31m\\udce9 rename it")
    assert one_line("short\n  text") == "short text"


@pytest.mark.parametrize(
    "arguments", [["shapes", "--output", "/dev/null/shapes", "--images", "1"], ["train", "--help"]]
)
def test_interruption_during_the_imports_prints_one_line(arguments: list[str]) -> None:
    # The handler is installed before torch is imported, so it handles a signal at the first line of torch.
    program = (
        "import sys, signal\n"
        "sys.orig_argv = ['python', '-m', 'maskloss']\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from maskloss.cli import main\n"
        f"main({arguments})\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert (ended.returncode, ended.stderr) == (130, "maskloss: error: interrupted\n")


def test_a_text_of_the_limit_is_kept_and_a_longer_one_is_cut_in_the_middle() -> None:
    assert one_line("x" * LINE_LENGTH) == "x" * LINE_LENGTH
    cut = one_line("a" * 300 + "b" * 300)
    assert cut == "a" * 195 + " ... " + "b" * 100
    assert one_line("a" * 150 + "b" * 150, limit=120) == "a" * 75 + " ... " + "b" * 40


@pytest.mark.parametrize("limit", [16, 30, 60, 80, 104, 105, 300])
def test_a_line_never_exceeds_its_limit(limit: int) -> None:
    for text in ("x" * 200, "y" * 5000, "/" + "z" * 90 + "/a.json: is odd", "\x1b" * 100):
        assert len(one_line(text, limit)) <= limit
    assert len(one_line("x" * 200, limit)) == min(limit, 200)


def test_a_long_path_is_shortened_to_its_last_two_parts_first() -> None:
    path = "/data" + "/folder" * 40 + "/train/a.json"
    assert one_line(f"{path}: annotation 7 is odd") == ".../train/a.json: annotation 7 is odd"
    # A short text keeps its paths.
    assert one_line(f"{path[:100]}: odd") == f"{path[:100]}: odd"


def test_any_object_can_be_told_in_one_line() -> None:
    assert one_line(KeyError("a\nb")) == "'a\\nb'"
    assert one_line("a\tb\r\n c\x00") == "a b c\\x00"
    assert one_line("") == ""


# Ctrl-C. Only the `maskloss` command is changed, not a program that imports the package.


@pytest.fixture
def default_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


COMMANDS = {
    "python -m maskloss": (["python", "-m", "maskloss", "train"], "/x/maskloss/__main__.py", True),
    "python -X dev -m maskloss": (["python", "-X", "dev", "-m", "maskloss"], "/x/__main__.py", True),
    "maskloss": (["/usr/bin/python", "/usr/bin/maskloss", "train"], "/usr/bin/maskloss", True),
    "maskloss.exe": (["python", "maskloss.exe"], "maskloss.exe", True),
    "python -m pytest": (["python", "-m", "pytest"], "/x/pytest/__main__.py", False),
    "python -m pytest maskloss": (["python", "-m", "pytest"], "maskloss", False),
    "a script": (["python", "train.py", "maskloss"], "train.py", False),
    "an interactive session": (["python"], "", False),
    "-m without a module": (["python", "-m"], "", False),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_is_handled_only_in_the_command(
    name: str, default_handler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, script, is_command = COMMANDS[name]
    monkeypatch.setattr(sys, "orig_argv", original)
    monkeypatch.setattr(sys, "argv", [script])
    exit_on_interrupt()
    assert (signal.getsignal(signal.SIGINT) is not signal.default_int_handler) == is_command
    interrupt_by_exception()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_someone_else_stays(default_handler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def own(number: int, frame: object) -> None:
        """Do nothing."""

    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "maskloss"])
    signal.signal(signal.SIGINT, own)
    exit_on_interrupt()
    assert signal.getsignal(signal.SIGINT) is own
    interrupt_by_exception()
    assert signal.getsignal(signal.SIGINT) is own
