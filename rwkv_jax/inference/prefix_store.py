"""States of beginnings that many texts share, found by their tokens: each is read once.

A radix tree: an edge holds the tokens that no stored text parts with, so that a prompt of any length costs a node or
two, and looking one up compares whole edges at a time.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_jax.config import ConfigError
from rwkv_jax.inference.snapshot import Snapshot

Tokens = NDArray[np.int32]


class PrefixStatistics(NamedTuple):
    """What a store has been asked for since it was made."""

    hits: int = 0
    """Lookups that found a beginning."""
    misses: int = 0
    """Lookups that found none."""
    tokens_found: int = 0
    """Tokens of the beginnings found, which nobody had to read again."""
    evictions: int = 0
    """Entries that went to make room."""
    refusals: int = 0
    """Entries larger than the whole store."""


class _Node:
    """The tokens from its parent to here, and what follows; with a snapshot, the end of an entry.

    Every node but the root has a snapshot or two children.
    """

    __slots__ = ("children", "edge", "num_bytes", "parent", "snapshot")

    def __init__(self, edge: Tokens, parent: _Node | None) -> None:
        # A copy: a view would keep all the tokens that it was taken from.
        self.edge = edge.copy()
        self.parent = parent
        self.children: dict[int, _Node] = {}
        self.snapshot: Snapshot | None = None
        self.num_bytes = 0


class PrefixStore:
    """Token sequences to snapshots, found by the longest stored one that a text begins with.

    The least recently used go first when there are too many bytes. An entry counts with its snapshot and four bytes a
    token, whether or not it shares some with others. Any number of threads may use the store.
    """

    def __init__(self, max_bytes: int) -> None:
        """Empty. Raises ConfigError for a bound that is not positive."""
        if max_bytes < 1:
            raise ConfigError(f"max_bytes = {max_bytes}: must be 1 or more")
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._root = _Node(np.empty(0, np.int32), None)
        self._entries: OrderedDict[_Node, None] = OrderedDict()  # the least recently used first
        self._num_bytes = 0
        self._statistics = PrefixStatistics()

    def longest(self, tokens: Sequence[int] | NDArray[Any]) -> tuple[int, Snapshot] | None:
        """The longest stored beginning of some tokens, which may be all of them, or None.

        Returns:
          Its number of tokens, and the snapshot after them, which becomes the most recently used.
        """
        wanted = _as_tokens(tokens)
        with self._lock:
            found, node, position = None, self._root, 0
            while node is not None:
                if node.snapshot is not None:
                    found = node
                node = _next_node(node, wanted, position)
                position += 0 if node is None else len(node.edge)
            if found is None or found.snapshot is None:
                self._count(misses=1)
                return None
            self._entries.move_to_end(found)
            self._count(hits=1, tokens_found=found.snapshot.num_tokens)
            return found.snapshot.num_tokens, found.snapshot

    @property
    def max_bytes(self) -> int:
        """What it holds at most."""
        return self._max_bytes

    def parting(self, tokens: Sequence[int] | NDArray[Any]) -> int:
        """How many tokens the longest beginning has that some stored text begins with, too."""
        wanted = _as_tokens(tokens)
        with self._lock:
            node, position = self._root, 0
            while position < len(wanted):
                child = node.children.get(int(wanted[position]))
                if child is None:
                    break
                common = _common_length(child.edge, wanted[position:])
                position += common
                if common < len(child.edge):
                    break
                node = child
            return position

    def put(self, tokens: Sequence[int] | NDArray[Any], snapshot: Snapshot) -> bool:
        """Keep the snapshot after some tokens, in the place of one that is there already.

        Args:
          tokens: all that the snapshot has read since its text began.

        Returns:
          Whether it is kept; not, where it is larger than the whole store, which then stays as it is.

        Raises:
          ConfigError: no tokens, or not as many as the snapshot has read.
        """
        path = _as_tokens(tokens)
        if len(path) == 0 or len(path) != snapshot.num_tokens:
            raise ConfigError(
                f"tokens: {len(path)} where the snapshot has read {snapshot.num_tokens}; "
                "give all tokens since the text began, of which there must be one or more"
            )
        num_bytes = snapshot.nbytes + path.nbytes
        with self._lock:
            if num_bytes > self._max_bytes:
                self._count(refusals=1)
                return False
            node = self._node_at(path)
            self._num_bytes += num_bytes - node.num_bytes
            node.snapshot, node.num_bytes = snapshot, num_bytes
            self._entries[node] = None
            self._entries.move_to_end(node)
            self._make_room()
            return True

    def __len__(self) -> int:
        with self._lock:
            return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all entries together."""
        with self._lock:
            return self._num_bytes

    @property
    def statistics(self) -> PrefixStatistics:
        """Of all calls so far."""
        with self._lock:
            return self._statistics

    def _node_at(self, path: Tokens) -> _Node:
        """The node that ends exactly there, made if need be; an edge from which the path parts is cut in two."""
        node, position = self._root, 0
        while position < len(path):
            child = node.children.get(int(path[position]))
            if child is None:
                child = _Node(path[position:], node)
                node.children[int(path[position])] = child
            else:
                common = _common_length(child.edge, path[position:])
                if common < len(child.edge):
                    child = _cut(child, common)
            node, position = child, position + len(child.edge)
        return node

    def _make_room(self) -> None:
        while self._num_bytes > self._max_bytes:
            node, _ = self._entries.popitem(last=False)
            self._num_bytes -= node.num_bytes
            node.snapshot, node.num_bytes = None, 0
            _prune(node)
            self._count(evictions=1)

    def _count(self, **more: int) -> None:
        self._statistics = PrefixStatistics(
            *(getattr(self._statistics, name) + more.get(name, 0) for name in PrefixStatistics._fields)
        )


def _as_tokens(tokens: Sequence[int] | NDArray[Any]) -> Tokens:
    array = np.asarray(tokens)
    if array.size == 0:
        return np.empty(0, np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ConfigError(f"tokens: {array.dtype} of shape {array.shape} must be a sequence of token ids")
    if array.min() < 0 or array.max() > np.iinfo(np.int32).max:
        raise ConfigError(f"tokens: from {array.min()} to {array.max()} must lie from 0 to V - 1")
    return array.astype(np.int32)


def _next_node(node: _Node, path: Tokens, position: int) -> _Node | None:
    """The child whose whole edge the path has at a position."""
    child = node.children.get(int(path[position])) if position < len(path) else None
    if child is None or not np.array_equal(child.edge, path[position : position + len(child.edge)]):
        return None
    return child


def _common_length(a: Tokens, b: Tokens) -> int:
    shorter = min(len(a), len(b))
    differs = a[:shorter] != b[:shorter]
    return int(differs.argmax()) if differs.any() else shorter


def _cut(node: _Node, length: int) -> _Node:
    """A new node in the middle of an edge, `length` tokens after its start."""
    assert node.parent is not None
    middle = _Node(node.edge[:length], node.parent)
    node.parent.children[int(node.edge[0])] = middle
    node.parent, node.edge = middle, node.edge[length:].copy()
    middle.children[int(node.edge[0])] = node
    return middle


def _prune(node: _Node) -> None:
    """Takes out a node that lost its snapshot, if nothing needs it, and then perhaps the one before it."""
    if not node.children and node.parent is not None:
        node, leaf = node.parent, node
        del node.children[int(leaf.edge[0])]
    if node.parent is None or node.snapshot is not None or len(node.children) != 1:
        return
    (child,) = node.children.values()
    child.edge = np.concatenate([node.edge, child.edge])
    child.parent = node.parent
    node.parent.children[int(child.edge[0])] = child
