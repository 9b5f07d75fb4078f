"""maskloss/training/interruption.py: Ctrl-C waits for the end of a step."""

from __future__ import annotations

import signal
import threading

import pytest

from maskloss.training.interruption import Interruption


def press() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def handler() -> object:
    """Check that each test restores Python's own handler."""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_first_ctrl_c_is_a_request_and_the_second_interrupts() -> None:
    with Interruption() as interruption:
        assert not interruption.requested
        press()
        assert interruption.requested
        with pytest.raises(KeyboardInterrupt):
            press()


def test_in_a_block_that_changes_nothing_it_interrupts_at_once() -> None:
    with Interruption() as interruption:
        with pytest.raises(KeyboardInterrupt), interruption.at_once():
            press()
        assert interruption.requested


def test_after_the_block_it_is_delayed_again() -> None:
    with Interruption() as interruption:
        with interruption.at_once():
            pass
        press()
        assert interruption.requested


def test_disabled_it_changes_nothing() -> None:
    with Interruption(enabled=False) as interruption:
        with pytest.raises(KeyboardInterrupt):
            press()
        assert not interruption.requested


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            press()
            assert not interruption.requested
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_in_another_thread_it_does_nothing() -> None:
    failures: list[BaseException] = []

    def enter() -> None:
        try:
            with Interruption():
                pass
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert failures == []
