"""Prefix cache: states after common prefixes of prompts, so that each is prefilled once.

A radix tree: an edge has the tokens between two branches, so that a prompt of any length needs one or two nodes, and a
lookup compares whole edges at a time.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkv_jax.config import ConfigError
from rwkv_jax.inference.snapshot import Snapshot

Tokens = NDArray[np.int32]


class _Node:
    """A node: the tokens from its parent, and its children; with a snapshot, the end of an entry.

    Every node but the root has a snapshot or two children.
    """

    __slots__ = ("children", "edge", "num_bytes", "parent", "snapshot")

    def __init__(self, edge: Tokens, parent: _Node | None) -> None:
        # A copy: a view would keep the whole original array alive.
        self.edge = edge.copy()
        self.parent = parent
        self.children: dict[int, _Node] = {}
        self.snapshot: Snapshot | None = None
        self.num_bytes = 0


class PrefixCache:
    """Maps token sequences to snapshots; looks up the longest one that is a prefix of a prompt. Thread-safe.

    The least recently used are evicted first. An entry's size is its snapshot plus four bytes per token, even if tokens
    are shared with others.
    """

    def __init__(self, max_bytes: int) -> None:
        """An empty cache. Raises ConfigError for a bound that is not positive."""
        if max_bytes < 1:
            raise ConfigError(f"max_bytes = {max_bytes}: must be 1 or more")
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._root = _Node(np.empty(0, np.int32), None)
        self._entries: OrderedDict[_Node, None] = OrderedDict()  # the least recently used first
        self._num_bytes = 0

    def lookup(self, tokens: Sequence[int] | NDArray[Any]) -> tuple[int, Snapshot] | None:
        """The longest cached prefix of the tokens, possibly all of them, or None.

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
                return None
            self._entries.move_to_end(found)
            return found.snapshot.num_tokens, found.snapshot

    @property
    def max_bytes(self) -> int:
        """Maximum bytes of all entries."""
        return self._max_bytes

    def shared_prefix_length(self, tokens: Sequence[int] | NDArray[Any]) -> int:
        """Length of the longest common prefix of the tokens and any cached sequence."""
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
        """Stores the snapshot after some tokens, replacing an existing one.

        Args:
          tokens: all tokens read by the snapshot since its text began.

        Returns:
          Whether it is stored: not if it is larger than the whole cache, which is then unchanged.

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

    def _node_at(self, path: Tokens) -> _Node:
        """The node exactly at the end of a path, created if missing; splits an edge where the path diverges."""
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
    """The child whose whole edge matches the path at a position."""
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
    """Removes a leaf without snapshot; joins a node without snapshot and with one child to that child."""
    if not node.children and node.parent is not None:
        node, leaf = node.parent, node
        del node.children[int(leaf.edge[0])]
    if node.parent is None or node.snapshot is not None or len(node.children) != 1:
        return
    (child,) = node.children.values()
    child.edge = np.concatenate([node.edge, child.edge])
    child.parent = node.parent
    node.parent.children[int(child.edge[0])] = child
