"""Conversations kept by name, within bounds of bytes and of idle time."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, NamedTuple, Protocol, TypeVar

from rwkv_jax.config import ConfigError


class HasBytes(Protocol):
    """What a store keeps: a `Snapshot`, a `Session`, or anything else that knows its size."""

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        ...


Kept = TypeVar("Kept", bound=HasBytes)


class SessionStatistics(NamedTuple):
    """What a store has been asked for since it was made."""

    hits: int = 0
    """Lookups that found the conversation."""
    misses: int = 0
    """Lookups that did not."""
    evictions: int = 0
    """Conversations that went to make room."""
    expirations: int = 0
    """Conversations that went because nobody used them for too long."""


class _Entry(NamedTuple, Generic[Kept]):
    kept: Kept
    num_bytes: int
    """When it was put: what a store counts must not change behind its back."""
    used_at: float


class SessionStore(Generic[Kept]):
    """Conversation ids to sessions or snapshots: the least recently used goes first, and idle ones expire.

    Any number of threads may use it. An entry counts with the bytes it had when it was put, whether or not it shares
    arrays with others; put a session again after it has read more. What may not go, since it is in use, stays even
    where there are more bytes than there should be.
    """

    def __init__(
        self,
        max_bytes: int,
        max_idle_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        least_bytes: int = 0,
        may_go: Callable[[Kept], bool] = lambda kept: True,
    ) -> None:
        """Empty.

        Args:
          max_bytes: that all entries have together at most.
          max_idle_seconds: after which an entry that was neither put nor got is gone; None keeps it.
          clock: seconds that never go back.
          least_bytes: what an entry counts with even if it has fewer.
          may_go: whether an entry may be removed just now.

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
        self._least_bytes, self._may_go = least_bytes, may_go
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, _Entry[Kept]] = OrderedDict()  # the least recently used first
        self._num_bytes = 0
        self._statistics = SessionStatistics()

    def put(self, conversation: str, kept: Kept) -> None:
        """Keep a conversation, in the place of what was kept under its id.

        Raises ConfigError for one that is larger than the whole store, which then stays as it is.
        """
        num_bytes = max(kept.nbytes, self._least_bytes)
        if num_bytes > self._max_bytes:
            raise ConfigError(
                f"conversation {conversation!r}: has {num_bytes} bytes where the store holds {self._max_bytes}; "
                "raise max_bytes"
            )
        with self._lock:
            self._expire()
            self._remove(conversation)
            for other in [other for other, entry in self._entries.items() if self._may_go(entry.kept)]:
                if self._num_bytes + num_bytes <= self._max_bytes:
                    break
                self._remove(other)
                self._count(evictions=1)
            self._entries[conversation] = _Entry(kept, num_bytes, self._clock())
            self._num_bytes += num_bytes

    def get(self, conversation: str) -> Kept | None:
        """What is kept under an id, which makes it the most recently used; None where there is nothing (any more)."""
        with self._lock:
            entry = self._look_up(conversation)
            if entry is None:
                return None
            self._entries[conversation] = entry._replace(used_at=self._clock())
            self._entries.move_to_end(conversation)
            return entry.kept

    def pop(self, conversation: str) -> Kept | None:
        """What is kept under an id, and no longer is; None where there is nothing (any more)."""
        with self._lock:
            entry = self._look_up(conversation)
            self._remove(conversation)
            return None if entry is None else entry.kept

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

    @property
    def statistics(self) -> SessionStatistics:
        """Of all calls so far."""
        with self._lock:
            self._expire()
            return self._statistics

    def _look_up(self, conversation: str) -> _Entry[Kept] | None:
        self._expire()
        entry = self._entries.get(conversation)
        self._count(hits=int(entry is not None), misses=int(entry is None))
        return entry

    def _expire(self) -> None:
        oldest_allowed = self._clock() - self._max_idle_seconds
        stale = itertools.takewhile(lambda item: item[1].used_at <= oldest_allowed, self._entries.items())
        for conversation in [conversation for conversation, entry in stale if self._may_go(entry.kept)]:
            self._remove(conversation)
            self._count(expirations=1)

    def _remove(self, conversation: str) -> None:
        entry = self._entries.pop(conversation, None)
        if entry is not None:
            self._num_bytes -= entry.num_bytes

    def _count(self, **more: int) -> None:
        self._statistics = SessionStatistics(
            *(getattr(self._statistics, name) + more.get(name, 0) for name in SessionStatistics._fields)
        )
