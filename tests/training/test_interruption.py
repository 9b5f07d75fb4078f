"""maskloss/training/interruption.py: Ctrl-C waits for the end of a step."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Iterator

import pytest

from maskloss.training.interruption import Interruption, ignore_interrupts


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


class Terminated(KeyboardInterrupt):
    pass


def terminate(*_: object) -> None:
    raise Terminated


@pytest.fixture
def handled_sigterm() -> Iterator[None]:
    """Handle SIGTERM as the command line does."""
    before = signal.signal(signal.SIGTERM, terminate)
    yield
    assert signal.getsignal(signal.SIGTERM) is terminate
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("handled_sigterm")
def test_sigterm_is_delayed_and_raises_its_own_exception() -> None:
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGTERM)
        assert interruption.requested
        with pytest.raises(Terminated):
            interruption.raise_now()
        with pytest.raises(Terminated):  # a second one ends the run at once
            signal.raise_signal(signal.SIGTERM)
    with Interruption() as interruption, pytest.raises(Terminated), interruption.at_once():
        signal.raise_signal(signal.SIGTERM)


def test_a_request_before_a_block_that_changes_nothing_interrupts_it() -> None:
    with Interruption() as interruption:
        press()
        with pytest.raises(KeyboardInterrupt), interruption.at_once():
            pytest.fail("the block must not begin")


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


def test_a_worker_ignores_the_first_signal_to_all_processes_of_a_job() -> None:
    # Slurm's scancel, for example, sends SIGTERM to all of them, and the main process needs the worker for its step.
    worker = multiprocessing.get_context("fork").Process(target=signaled_worker)
    worker.start()
    worker.join(30)
    assert worker.exitcode == -signal.SIGTERM  # of the second


def signaled_worker() -> None:
    ignore_interrupts()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.raise_signal(number)
    signal.raise_signal(signal.SIGTERM)
    raise AssertionError("the second SIGTERM did not end the worker")
