"""Stopping cleanly on SIGTERM (a scheduler's warning) and SIGINT (Ctrl-C)."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], str | None]]:
    """Yields a function that returns the name of the first SIGTERM or SIGINT within the context, or None before it.

    A second signal has its usual effect. Signals reach the main thread only; elsewhere this does nothing.
    """
    name: str | None = None
    previous: dict[signal.Signals, Any] = {}

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal name
        name = signal.Signals(number).name
        restore()

    def restore() -> None:
        while previous:
            signal.signal(*previous.popitem())

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, remember)
    try:
        yield lambda: name
    finally:
        restore()
