"""Errors that end a command with one line instead of a traceback, and the formatting of that line."""

from __future__ import annotations

import os
import re
import signal
import sys

#: Signals that end a process without a word by default: from schedulers, and from a terminal that is closed.
TERMINATING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
#: Maximum length of an error or warning on the screen, in characters.
LINE_LENGTH = 300
_END_LENGTH = 100


class InputError(Exception):
    """Invalid input: arguments, a file or an annotation. The command line exits with 2."""


class RunError(Exception):
    """Failure of a run, such as a loss that is not finite or a full disk. The command line exits with 1."""


def one_line(text: object, limit: int = LINE_LENGTH) -> str:
    """Return text as one printable line of at most `limit` characters, with the middle of longer text cut out.

    The start names the file and the end says what to do about it, so both are kept. Control characters, which could
    control the terminal, and characters that cannot be encoded are escaped.
    """
    text = str(text)
    if len(text) > 4 * limit:
        # Shorten first: a name from a file may be megabytes long.
        text = f"{text[: 3 * limit]} ... {text[-limit:]}"
    line = " ".join(text.split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    if len(line) > limit:
        # The last parts of a path are the most informative.
        line = re.sub(r"/[^\s:]{40,}", lambda path: ".../" + "/".join(path.group().rsplit("/", 2)[-2:]), line)
    if len(line) > limit:
        end = min(_END_LENGTH, limit // 3)
        line = f"{line[: limit - end - 5]} ... {line[-end:]}"
    return line


def exit_on_interrupt() -> None:
    """Make Ctrl-C end the process with one line if it runs the `maskloss` command.

    Importing torch takes seconds, and a KeyboardInterrupt during the import would end in a traceback before `cli.main`
    could handle it. `cli.main` restores Python's own handler.
    """
    arguments = sys.orig_argv
    module = arguments[arguments.index("-m") + 1 :][:1] if "-m" in arguments else []
    is_command = module == ["maskloss"] or (
        not module and os.path.basename(sys.argv[0] if sys.argv else "") in ("maskloss", "maskloss.exe")
    )
    if is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit_interrupted)


def interrupt_by_exception() -> None:
    """Undo `exit_on_interrupt`, so that Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _exit_interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _exit_interrupted(*_: object) -> None:
    # Exit at once: nothing is written yet, and an exception raised while an extension module is imported may come
    # out as another one.
    os.write(2, b"maskloss: error: interrupted\n")
    os._exit(130)
