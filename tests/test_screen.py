"""maskloss/screen.py: log messages of the package on the screen, as the command line shows them."""

from __future__ import annotations

import io
import logging

import pytest

from maskloss.screen import messages_on_screen

LOGGER = logging.getLogger("maskloss.training.a_module")


def test_messages_go_to_stdout_and_warnings_to_stderr_in_one_line_each(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with messages_on_screen():
        LOGGER.debug("unseen")
        LOGGER.info("step %d\n of 10", 3)
        LOGGER.warning("odd: %s", "x" * 1000)
        LOGGER.error("bad\x1b[31m")
    captured = capsys.readouterr()
    assert captured.out == "step 3 of 10\n"
    first, second = captured.err.splitlines()
    assert first.startswith("warning: odd: xxx")
    assert len(first) == len("warning: ") + 300
    assert second == "warning: bad\\x1b[31m"


def test_other_loggers_and_the_root_logger_are_left_alone(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with messages_on_screen():
        logging.getLogger("another").warning("not ours")
        LOGGER.warning("ours")
    assert capsys.readouterr().err == "warning: ours\n"
    # A program's own handlers do not show it again.
    assert [record.getMessage() for record in caplog.records] == ["not ours"]


@pytest.mark.parametrize("error", [None, KeyError])
def test_the_logger_is_as_before_afterwards(
    error: type[Exception] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("maskloss")
    logger.setLevel(logging.ERROR)
    before = logger.level, logger.propagate, list(logger.handlers)
    try:
        if error is None:
            with messages_on_screen():
                assert logger.level == logging.INFO
        else:
            with pytest.raises(error), messages_on_screen():
                raise error
        assert (logger.level, logger.propagate, logger.handlers) == before
        LOGGER.info("unseen")
    finally:
        logger.setLevel(logging.NOTSET)
    assert capsys.readouterr() == ("", "")


class ClosedPipe(io.StringIO):
    """A stream whose reader has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_message_that_nobody_reads_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", ClosedPipe())
    monkeypatch.setattr("sys.stderr", ClosedPipe())
    with messages_on_screen():
        logging.getLogger("maskloss.training").info("step 10")
        logging.getLogger("maskloss.training").warning("a warning")
