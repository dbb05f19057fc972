"""Store of named sessions, bounded in bytes and idle time."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from rwkv_jax.config import ConfigError
from rwkv_jax.inference.state.session import Session

Name = str | tuple[str, str]
"""Of a conversation, or of one and its adapter."""


class _Entry(NamedTuple):
    session: Session
    num_bytes: int
    """Size at the time of `put`; the session may have grown since."""
    used_at: float


class SessionStore:
    """Maps names to sessions; the least recently used is evicted first, and idle ones expire. Thread-safe.

    An entry's size is that at `put`, including shared arrays; put a session again after it has changed. Sessions in use
    are kept, even if the store then exceeds its bound.
    """

    def __init__(
        self,
        max_bytes: int,
        max_idle_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        min_bytes: int = 0,
        may_go: Callable[[Session], bool] = lambda session: True,
    ) -> None:
        """Empty.

        Args:
          max_bytes: maximum of all entries together.
          max_idle_seconds: after which an unused entry expires; None for never.
          clock: monotonic, in seconds.
          min_bytes: minimum size counted per entry.
          may_go: whether a session may be removed now.

        Raises:
          ConfigError: a bound that is not positive.
        """
        if max_bytes < 1:
            raise ConfigError(f"max_bytes = {max_bytes}: must be 1 or more")
        if max_idle_seconds is not None and not 0 < max_idle_seconds <= math.inf:
            raise ConfigError(f"max_idle_seconds = {max_idle_seconds}: must be positive, or None for no limit")
        self._max_bytes = max_bytes
        self._max_idle_seconds = math.inf if max_idle_seconds is None else max_idle_seconds
        self._clock = clock
        self._min_bytes, self._may_go = min_bytes, may_go
        self._lock = threading.Lock()
        self._entries: OrderedDict[Name, _Entry] = OrderedDict()  # the least recently used first
        self._num_bytes = 0

    def put(self, name: Name, session: Session) -> None:
        """Stores a session under a name, replacing an existing one.

        Raises ConfigError for one larger than the whole store, which is then unchanged.
        """
        num_bytes = max(session.nbytes, self._min_bytes)
        if num_bytes > self._max_bytes:
            raise ConfigError(
                f"conversation {name!r}: has {num_bytes} bytes where the store holds {self._max_bytes}; raise max_bytes"
            )
        with self._lock:
            self._expire()
            self._remove(name)
            for other in [other for other, entry in self._entries.items() if self._may_go(entry.session)]:
                if self._num_bytes + num_bytes <= self._max_bytes:
                    break
                self._remove(other)
            self._entries[name] = _Entry(session, num_bytes, self._clock())
            self._num_bytes += num_bytes

    def get(self, name: Name) -> Session | None:
        """The named session, which becomes the most recently used; None if there is none."""
        with self._lock:
            self._expire()
            entry = self._entries.get(name)
            if entry is None:
                return None
            self._entries[name] = entry._replace(used_at=self._clock())
            self._entries.move_to_end(name)
            return entry.session

    def pop(self, name: Name) -> Session | None:
        """Removes and returns the named session; None if there is none."""
        with self._lock:
            self._expire()
            entry = self._entries.get(name)
            self._remove(name)
            return None if entry is None else entry.session

    def __len__(self) -> int:
        with self._lock:
            self._expire()
            return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all entries together."""
        with self._lock:
            self._expire()
            return self._num_bytes

    def _expire(self) -> None:
        oldest_allowed = self._clock() - self._max_idle_seconds
        stale = itertools.takewhile(lambda item: item[1].used_at <= oldest_allowed, self._entries.items())
        for name in [name for name, entry in stale if self._may_go(entry.session)]:
            self._remove(name)

    def _remove(self, name: Name) -> None:
        entry = self._entries.pop(name, None)
        if entry is not None:
            self._num_bytes -= entry.num_bytes
