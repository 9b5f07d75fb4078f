"""Screen output of the package's log messages, for the `maskloss` command; other programs configure `logging`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from maskloss.errors import one_line


class _ScreenHandler(logging.Handler):
    """Handler that writes one line per message, above any progress bar: warnings to stderr, the rest to stdout."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm  # imported here, because many commands show no progress bar

        is_warning = record.levelno >= logging.WARNING
        text = one_line(record.getMessage())
        stream = sys.stderr if is_warning else sys.stdout
        # Nobody may be listening any more: a closed terminal or pipe, a full disk. That must not end a training run.
        with suppress(OSError, ValueError):
            tqdm.write(f"warning: {text}" if is_warning else text, file=stream)
            stream.flush()


@contextmanager
def messages_on_screen() -> Iterator[None]:
    """Show the package's messages on the screen inside this context, as the command line does."""
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
