"""Ctrl-C during training: finish the step, so that nothing is lost."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)


class Interruption:
    """Delay Ctrl-C to the end of a step, inside a `with` statement; a second one interrupts at once.

    It does nothing outside the main thread, where Python delivers no signals, and where the program ignores Ctrl-C or
    handles it in its own way.

    Args:
        enabled: whether to delay Ctrl-C. Processes that train together receive it in different steps, and would wait
            for each other.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        main = threading.current_thread() is threading.main_thread()
        self._enabled = enabled and main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        self._is_safe = False
        self.requested = False

    def __enter__(self) -> Interruption:
        if self._enabled:
            signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        if self._enabled:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Let Ctrl-C interrupt the block, in which the model does not change; raise if it was pressed before."""
        if self.requested:
            raise KeyboardInterrupt
        self._is_safe = True
        try:
            yield
        finally:
            self._is_safe = False

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        self.requested = True
        if self._is_safe:
            raise KeyboardInterrupt
        logger.warning("stopping after this step; press Ctrl-C again to stop at once, without saving")


def ignore_interrupts(*_: Any) -> None:
    """Ignore Ctrl-C in a data-loader worker, so that the main process can finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
