"""Ctrl-C during training: finish the step, so that nothing is lost."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

from maskloss.errors import TERMINATING

logger = logging.getLogger(__name__)


class Interruption:
    """Delay Ctrl-C to the end of a step, inside a `with` statement; a second one interrupts at once.

    SIGTERM, by which schedulers end jobs, and SIGHUP, by which terminals do, are delayed likewise if they raise a
    KeyboardInterrupt, as in the `maskloss` command. This class does nothing outside the main thread, where Python
    delivers no signals, or if the program ignores Ctrl-C or handles it in its own way.

    Args:
        enabled: whether to delay the signals. Processes that train together receive them in different steps, and would
            wait for each other.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        main = threading.current_thread() is threading.main_thread()
        enabled = enabled and main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        self._handlers: dict[int, Any] = {}
        if enabled:
            handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, *TERMINATING)}
            self._handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
        self._received = signal.SIGINT
        self._is_safe = False
        self.requested = False

    def __enter__(self) -> Interruption:
        for number in self._handlers:
            signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore_handlers()

    def raise_now(self) -> NoReturn:
        """Raise what the delayed signal would have raised."""
        if handler := self._handlers.get(self._received):
            handler(self._received, None)
        raise KeyboardInterrupt

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Let Ctrl-C interrupt the block, in which the model does not change; raise if it was pressed before."""
        if self.requested:
            self.raise_now()
        self._is_safe = True
        try:
            yield
        finally:
            self._is_safe = False

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number)
        if self.requested:
            self._restore_handlers()
            self.raise_now()
        self.requested = True
        if self._is_safe:
            self.raise_now()
        logger.warning("stopping after this step; press Ctrl-C again to stop at once, without saving")

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


def ignore_interrupts(*_: Any) -> None:
    """Ignore Ctrl-C and other signals to all processes of a job in a data-loader worker.

    The main process then finishes its step, for which it needs the worker. A worker ends with its main process. A
    second SIGTERM ends it at once.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
