"""SIGTERM and SIGINT are remembered once, then act as they always do."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from rwkv_jax.training.stopping import stop_requests


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_is_remembered_by_name(number: signal.Signals) -> None:
    with stop_requests() as requested:
        assert requested() is None
        os.kill(os.getpid(), number)
        assert requested() == number.name


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own SIGINT handler, which a process started in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_second_signal_acts_as_always(interruptible: None) -> None:
    with stop_requests() as requested:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert requested() == "SIGTERM"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("signaled", [False, True])
def test_handlers_of_before_are_put_back(number: signal.Signals, signaled: bool) -> None:
    before = signal.getsignal(number)
    with stop_requests():
        assert signal.getsignal(number) != before
        if signaled:
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


def test_handlers_are_put_back_after_a_failure() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), stop_requests():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) == before


def test_in_another_thread_signals_are_left_alone() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with stop_requests() as requested:
            seen.append((requested(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(None, before)]
