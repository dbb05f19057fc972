"""How a stream's consumer learns that there is something to collect, in a thread or in an event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from queue import SimpleQueue


class News:
    """Wakes the one consumer of a stream. `announce` never waits, so the engine's thread may call it."""

    def __init__(self) -> None:
        self._announced: SimpleQueue[None] = SimpleQueue()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    def announce(self) -> None:
        """Wakes whoever waits; whoever comes later looks first."""
        if self._announced.empty():
            self._announced.put(None)
        if (waiter := self._waiter) is not None:
            loop, future = waiter
            with contextlib.suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(_resolve, future)

    def wait(self, has_news: Callable[[], bool]) -> None:
        """Waits until there are news."""
        while not has_news():
            self._announced.get()

    async def wait_async(self, has_news: Callable[[], bool]) -> None:
        """As `wait`, while other tasks run."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                future = loop.create_future()
                self._waiter = (loop, future)
                if has_news():  # looked at after the waiter is known, so that none is missed
                    return
                await future
        finally:
            self._waiter = None


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
