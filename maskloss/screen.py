"""Messages of the package on the screen, for programs of ours; other programs set up `logging` as they like."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from maskloss.errors import one_line


class _ScreenHandler(logging.Handler):
    """One line per message: warnings on stderr, the rest on stdout, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm  # here, since commands without a bar need it only for this

        is_warning = record.levelno >= logging.WARNING
        text = one_line(record.getMessage())
        stream = sys.stderr if is_warning else sys.stdout
        tqdm.write(f"warning: {text}" if is_warning else text, file=stream)
        stream.flush()


@contextmanager
def messages_on_screen() -> Iterator[None]:
    """Show the package's messages from here on, as the command line does."""
    logger = logging.getLogger("maskloss")
    handler = _ScreenHandler()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
