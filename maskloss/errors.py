"""How a command ends early: two exceptions that print one line and no traceback, and what such a line looks like."""

from __future__ import annotations

import os
import re
import signal
import sys

#: Characters of an error or warning on the screen.
LINE_LENGTH = 300
_END_LENGTH = 100


class InputError(Exception):
    """Something given is wrong: arguments, a file, an annotation. The command line exits with 2."""


class RunError(Exception):
    """A run under way cannot go on: a loss is not finite, the disk is full. The command line exits with 1."""


def one_line(text: object, limit: int = LINE_LENGTH) -> str:
    """Return text as one printable line of at most `limit` characters; a longer one loses its middle.

    The start names the file, and the end says what to do about it, so both stay. Control characters, which could
    steer the terminal, and characters that no encoding has are escaped.
    """
    text = str(text)
    if len(text) > 4 * limit:
        # Before anything else is done with it: a name from a file may have megabytes.
        text = f"{text[: 3 * limit]} ... {text[-limit:]}"
    line = " ".join(text.split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    if len(line) > limit:
        # The last parts of a path tell the most.
        line = re.sub(r"/[^\s:]{40,}", lambda path: ".../" + "/".join(path.group().rsplit("/", 2)[-2:]), line)
    if len(line) > limit:
        line = f"{line[: limit - _END_LENGTH - 5]} ... {line[-_END_LENGTH:]}"
    return line


def exit_on_interrupt() -> None:
    """End the process in one line at Ctrl-C, where this is the `maskloss` command.

    Importing torch takes seconds, and a KeyboardInterrupt in it would end in a traceback before `cli.main` could
    handle it. `cli.main` restores Python's own handler.
    """
    arguments = sys.orig_argv
    module = arguments[arguments.index("-m") + 1 :][:1] if "-m" in arguments else []
    is_command = module == ["maskloss"] or (
        not module and os.path.basename(sys.argv[0] if sys.argv else "") in ("maskloss", "maskloss.exe")
    )
    if is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit_interrupted)


def interrupt_by_exception() -> None:
    """Take back `exit_on_interrupt`: from here on, Ctrl-C is a KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is _exit_interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _exit_interrupted(*_: object) -> None:
    # Nothing was written yet; exceptions raised inside an extension module's import come out as something else.
    os.write(2, b"maskloss: error: interrupted\n")
    os._exit(130)
