"""Prefix cache: states after common prefixes of prompts, so that each is prefilled once.

Sequences are kept sorted, so that those with the longest common prefix are neighbors.
"""

from __future__ import annotations

import bisect
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkv_jax.config import ConfigError
from rwkv_jax.inference.state.snapshot import Snapshot

_TOKEN_BYTES = 4


class PrefixCache:
    """Maps token sequences to snapshots; looks up the longest one that is a prefix of a prompt. Thread-safe.

    The least recently used are evicted first. An entry's size is its snapshot plus four bytes per token.
    """

    def __init__(self, max_bytes: int) -> None:
        """An empty cache. Raises ConfigError for a bound that is not positive."""
        if max_bytes < 1:
            raise ConfigError(f"max_bytes = {max_bytes}: must be 1 or more")
        self.max_bytes = max_bytes
        """Maximum bytes of all entries."""
        self._lock = threading.Lock()
        self._keys: list[bytes] = []  # sorted
        self._snapshots: OrderedDict[bytes, Snapshot] = OrderedDict()  # the least recently used first
        self._num_bytes = 0

    def lookup(self, tokens: Sequence[int] | NDArray[Any], adapter: int = 0) -> tuple[int, Snapshot] | None:
        """The longest cached prefix of the tokens, possibly all of them, or None.

        Args:
          adapter: number of the text's adapter, whose states no other text sees; 0 for none.

        Returns:
          Its number of tokens, and the snapshot after them, which becomes the most recently used.
        """
        wanted, mark = _as_key(tokens, adapter), _mark(adapter)
        with self._lock:
            # Prefixes come before what they begin. If the last key before it is none, no longer one than both share is.
            while index := bisect.bisect_right(self._keys, wanted):
                key = self._keys[index - 1]
                if wanted.startswith(key):
                    self._snapshots.move_to_end(key)
                    return (len(key) - len(mark)) // _TOKEN_BYTES, self._snapshots[key]
                wanted = wanted[: _common_length(key, wanted)]
            return None

    def shared_prefix_length(self, tokens: Sequence[int] | NDArray[Any], adapter: int = 0) -> int:
        """Length of the longest common prefix of the tokens and any cached sequence of the same adapter."""
        wanted, mark = _as_key(tokens, adapter), _mark(adapter)
        with self._lock:
            index = bisect.bisect_left(self._keys, wanted)
            neighbors = self._keys[max(0, index - 1) : index + 1]
        shared = max((_common_length(key, wanted) for key in neighbors), default=0)
        return max(0, shared - len(mark)) // _TOKEN_BYTES

    def put(self, tokens: Sequence[int] | NDArray[Any], snapshot: Snapshot, adapter: int = 0) -> bool:
        """Stores the snapshot after some tokens, replacing an existing one.

        Args:
          tokens: all tokens read by the snapshot since its text began.
          adapter: as in `lookup`.

        Returns:
          Whether it is stored: not if it is larger than the whole cache, which is then unchanged.

        Raises:
          ConfigError: no tokens, or not as many as the snapshot has read.
        """
        key = _as_key(tokens, adapter)
        count = (len(key) - len(_mark(adapter))) // _TOKEN_BYTES
        if not count or count != snapshot.num_tokens:
            raise ConfigError(
                f"tokens: {count} where the snapshot has read {snapshot.num_tokens}; "
                "give all tokens since the text began, of which there must be one or more"
            )
        with self._lock:
            if _size(key, snapshot) > self.max_bytes:
                return False
            if (previous := self._snapshots.pop(key, None)) is None:
                bisect.insort(self._keys, key)
            else:
                self._num_bytes -= _size(key, previous)
            self._snapshots[key] = snapshot
            self._num_bytes += _size(key, snapshot)
            while self._num_bytes > self.max_bytes:
                oldest, evicted = self._snapshots.popitem(last=False)
                del self._keys[bisect.bisect_left(self._keys, oldest)]
                self._num_bytes -= _size(oldest, evicted)
            return True

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def nbytes(self) -> int:
        """Bytes of all entries together."""
        # Without the lock, for which the engine's thread would wait if a finalizer came along and waited for it.
        return self._num_bytes


def _mark(adapter: int) -> bytes:
    """What the keys of an adapter begin with: no token is as large, so that they are all behind those without one."""
    return (2**31 + adapter).to_bytes(_TOKEN_BYTES, "big") if adapter else b""


def _as_key(tokens: Sequence[int] | NDArray[Any], adapter: int) -> bytes:
    """The tokens as big-endian numbers, which sort like the tokens themselves, behind the mark of their adapter."""
    array = np.asarray(tokens)
    if array.size == 0:
        return _mark(adapter)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ConfigError(f"tokens: {array.dtype} of shape {array.shape} must be a sequence of token ids")
    if array.min() < 0 or array.max() > np.iinfo(np.int32).max:
        raise ConfigError(f"tokens: from {array.min()} to {array.max()} must lie from 0 to V - 1")
    return _mark(adapter) + array.astype(">i4").tobytes()


def _common_length(a: bytes, b: bytes) -> int:
    """Number of bytes of the tokens with which both begin."""
    shorter = min(len(a), len(b))
    differs = np.frombuffer(a[:shorter], np.int32) != np.frombuffer(b[:shorter], np.int32)
    return _TOKEN_BYTES * int(differs.argmax()) if differs.any() else shorter


def _size(key: bytes, snapshot: Snapshot) -> int:
    return len(key) + snapshot.nbytes
