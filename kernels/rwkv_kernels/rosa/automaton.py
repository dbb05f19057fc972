"""ROSA of one sequence on the host: a suffix automaton of the keys, and a forest of its links that knows latest ends.

The automaton (Blumer et al., 1985) has a state for each class of substrings of the keys that end at the same places, at
most two a key. A state's link leads to the longest suffix of its strings that is in another state, so the states that a
new key ends in are a path of links. What is asked of a state is where its strings ended last. Setting that along the
path at each key would take as many steps as the path is long, which is the number of keys where all are equal. So paths
whose states ended last at the same key are kept as one splay tree each (link-cut trees, Sleator and Tarjan, 1985; for
suffix trees, Larsson, 2014): O(log n) amortized steps a key, whatever the keys are.

All functions work on arrays alone, in the form that Numba compiles, and on lists, which the interpreter reads faster
than arrays. Names and meanings of the arrays are in `_SIZES`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

NONE = -1
"""No match, no state, no slot."""

_SYMBOL_BITS = 32
_SYMBOLS = (1 << _SYMBOL_BITS) - 1
_TREE = ("parent", "left", "right", "latest")
_STATES = ("link", "longest", "head")
_SLOTS = ("target", "chain")
_SIZES: dict[str, Callable[[int], int]] = {
    **dict.fromkeys(("keys", "values"), lambda capacity: capacity),
    # An entry for each transition, of which there are at most three a key; key and hash are state and symbol.
    "table": lambda capacity: 1 << (6 * capacity + 8).bit_length(),
    **dict.fromkeys(_SLOTS, lambda capacity: 1 << (6 * capacity + 8).bit_length()),
    # Of a state: its link, the length of its longest string, the slot of its first transition (the others follow in
    # `chain`); and its place in the splay trees, of which the root knows where the strings of all ended last.
    **dict.fromkeys((*_STATES, *_TREE), lambda capacity: 2 * capacity + 2),
}
_ORDER = ("keys", "values", "table", *_SLOTS, *_STATES, *_TREE)

REGISTERS = ("states", "last", "walk", "matched", "end")
"""States so far; the state of all keys; that of the match, its length, and the key where it ended last."""


def _slot(table: Any, state: int, symbol: int) -> int:
    """The slot of a transition, or the free one where it goes: linear probing."""
    mask = len(table) - 1
    wanted = (state << _SYMBOL_BITS) | symbol
    slot = (state * 2654435761 + symbol * 40503) & mask
    while table[slot] != NONE and table[slot] != wanted:
        slot = (slot + 1) & mask
    return slot


def _insert(table: Any, target: Any, chain: Any, head: Any, slot: int, state: int, symbol: int, to: int) -> None:
    """A new transition in its free slot."""
    table[slot] = (state << _SYMBOL_BITS) | symbol
    target[slot] = to
    chain[slot] = head[state]
    head[state] = slot


def _splay(x: int, parent: Any, left: Any, right: Any, latest: Any) -> None:
    """Makes x the root of its splay tree, and has it know where the tree's strings ended last."""
    while True:
        p = parent[x]
        if p < 0 or (left[p] != x and right[p] != x):
            return
        g = parent[p]
        p_is_left = g >= 0 and left[g] == p
        p_is_right = g >= 0 and right[g] == p
        x_is_left = left[p] == x
        if not (p_is_left or p_is_right):
            latest[x] = latest[p]
            _rotate(x, parent, left, right)
        elif p_is_left == x_is_left:
            latest[x] = latest[g]
            _rotate(p, parent, left, right)
            _rotate(x, parent, left, right)
        else:
            latest[x] = latest[g]
            _rotate(x, parent, left, right)
            _rotate(x, parent, left, right)


def _rotate(x: int, parent: Any, left: Any, right: Any) -> None:
    """x above its parent in a splay tree."""
    p = parent[x]
    g = parent[p]
    if left[p] == x:
        between = right[x]
        left[p] = between
        right[x] = p
    else:
        between = left[x]
        right[p] = between
        left[x] = p
    if between >= 0:
        parent[between] = p
    parent[p] = x
    parent[x] = g
    if g >= 0:
        if left[g] == p:
            left[g] = x
        elif right[g] == p:
            right[g] = x


def _ends(x: int, now: int, parent: Any, left: Any, right: Any, latest: Any) -> None:
    """The strings of x and of all states on its path of links end at key `now`: their path becomes one splay tree."""
    below = NONE
    node = x
    while node >= 0:
        _splay(node, parent, left, right, latest)
        cut = right[node]
        if cut >= 0:
            latest[cut] = latest[node]
        right[node] = below
        below = node
        node = parent[node]
    _splay(x, parent, left, right, latest)
    latest[x] = now


def _clone(
    p: int,
    symbol: int,
    d: int,
    clone: int,
    table: Any,
    target: Any,
    chain: Any,
    link: Any,
    longest: Any,
    head: Any,
    parent: Any,
    left: Any,
    right: Any,
    latest: Any,
) -> None:
    """Splits state d: the strings that p reaches it with, which end at more keys than the others, go to `clone`."""
    longest[clone] = longest[p] + 1
    head[clone] = NONE
    edge = head[d]
    while edge >= 0:
        of_edge = table[edge] & _SYMBOLS
        _insert(table, target, chain, head, _slot(table, clone, of_edge), clone, of_edge, target[edge])
        edge = chain[edge]
    link[clone] = link[d]
    while p >= 0:
        slot = _slot(table, p, symbol)
        if table[slot] < 0 or target[slot] != d:
            break
        target[slot] = clone
        p = link[p]
    # So far they ended last where d's did: right above d in its splay tree.
    _splay(d, parent, left, right, latest)
    above = left[d]
    left[clone] = above
    right[clone] = NONE
    if above >= 0:
        parent[above] = clone
    left[d] = clone
    parent[clone] = d
    link[d] = clone


def _advance(
    q: Any,
    k: Any,
    v: Any,
    begin: int,
    answers: Any,
    lengths: Any,
    registers: Any,
    keys: Any,
    values: Any,
    table: Any,
    target: Any,
    chain: Any,
    link: Any,
    longest: Any,
    head: Any,
    parent: Any,
    left: Any,
    right: Any,
    latest: Any,
) -> None:
    """Reads tokens `begin`, `begin` + 1, ... and writes to `answers` the places of their answers in `values`."""
    states, last, walk, matched, end = registers[0], registers[1], registers[2], registers[3], registers[4]
    for i in range(len(q)):
        now = begin + i
        keys[now] = k[i]
        values[now] = v[i]
        # The longest suffix of the queries that is one of the keys so far: what goes on where it was found last can be
        # no longer, and was nowhere later.
        symbol = q[i]
        goes_on = 0 <= end < now - 1 and keys[end + 1] == symbol
        slot = _slot(table, walk, symbol)
        while table[slot] < 0 and walk > 0:
            walk = link[walk]
            matched = min(matched, longest[walk])
            slot = _slot(table, walk, symbol)
        if table[slot] < 0:
            walk, matched, end = 0, 0, NONE
        else:
            walk = target[slot]
            matched += 1
            while longest[link[walk]] >= matched:
                walk = link[walk]
            if goes_on:
                end += 1
            else:
                _splay(walk, parent, left, right, latest)
                end = latest[walk]
        answers[i] = end + 1 if end >= 0 else NONE
        lengths[i] = matched
        # The key itself.
        symbol = k[i]
        new = states
        states += 1
        longest[new] = longest[last] + 1
        head[new] = NONE
        p = last
        slot = _slot(table, p, symbol)
        while table[slot] < 0:
            _insert(table, target, chain, head, slot, p, symbol, new)
            p = link[p]
            if p < 0:
                break
            slot = _slot(table, p, symbol)
        if p < 0:
            link[new] = 0
        elif longest[p] + 1 == longest[target[slot]]:
            link[new] = target[slot]
        else:
            d = target[slot]
            clone = states
            states += 1
            _clone(p, symbol, d, clone, table, target, chain, link, longest, head, parent, left, right, latest)
            link[new] = clone
        left[new] = NONE
        right[new] = NONE
        parent[new] = link[new]
        _ends(new, now, parent, left, right, latest)
        last = new
    registers[0], registers[1], registers[2], registers[3], registers[4] = states, last, walk, matched, end


def _moved(
    old: Any, old_target: Any, old_head: Any, states: int, table: Any, target: Any, chain: Any, head: Any
) -> None:
    """The transitions of a table in a larger one; `chain` of the old one is in the order of its slots."""
    for state in range(states):
        head[state] = NONE
    for slot in range(len(old)):
        if old[slot] >= 0:
            state, symbol = old[slot] >> _SYMBOL_BITS, old[slot] & _SYMBOLS
            _insert(table, target, chain, head, _slot(table, state, symbol), state, symbol, old_target[slot])


def _clear(table: Any, head: Any, chain: Any, states: int) -> None:
    """Frees the slots of all transitions, which are as many as the tokens, however large the table is."""
    for state in range(states):
        slot = head[state]
        while slot >= 0:
            table[slot] = NONE
            slot = chain[slot]


def is_compiled() -> bool:
    """Whether Numba is installed, which compiles the automaton; otherwise the interpreter runs it."""
    return importlib.util.find_spec("numba") is not None


@functools.cache
def _functions(compiled: bool) -> dict[str, Callable[..., None]]:
    """The functions that an automaton calls by name, compiled or not."""
    functions = {"advance": _advance, "moved": _moved, "clear": _clear}
    if not compiled:
        return functions
    numba: Any = importlib.import_module("numba")
    extending: Any = importlib.import_module("numba.extending")
    for function in (_slot, _insert, _rotate, _splay, _ends, _clone):
        extending.register_jitable(function)
    compile_one = numba.njit(nogil=True)
    return {name: compile_one(function) for name, function in functions.items()}


def _container(size: int, compiled: bool, dtype: type[Any] = np.int32) -> Any:
    return np.full(size, NONE, dtype) if compiled else [NONE] * size


class SuffixAutomaton:
    """ROSA of one sequence, token after token: O(log n) amortized steps a token, memory linear in their number.

    Args:
      compiled: whether Numba compiles it; None is where it is installed (`pip install rwkv-jax[rosa]`). Interpreted, a
        token takes five to ten times as long.
      capacity: tokens for which memory is taken at once; it grows by itself.
    """

    def __init__(self, *, compiled: bool | None = None, capacity: int = 64) -> None:
        self._compiled = is_compiled() if compiled is None else compiled
        self._functions = _functions(self._compiled)
        self._arrays = self._new_arrays(max(capacity, 1))
        self._registers: Any = _container(len(REGISTERS), self._compiled)
        self.num_tokens = 0
        """Tokens read so far."""
        self.reset()

    def _new_arrays(self, capacity: int) -> dict[str, Any]:
        wide = ("table",)
        return {
            name: _container(size(capacity), self._compiled, np.int64 if name in wide else np.int32)
            for name, size in _SIZES.items()
        }

    def reset(self) -> None:
        """Forgets all tokens."""
        if self.num_tokens:
            self._functions["clear"](*(self._arrays[name] for name in ("table", "head", "chain")), self._registers[0])
        for name in (*_STATES, *_TREE):
            self._arrays[name][0] = NONE
        self._arrays["longest"][0] = 0
        self._registers[:] = [1, 0, 0, 0, NONE]
        self.num_tokens = 0

    def _reserve(self, count: int) -> None:
        """Room for `count` tokens."""
        held, capacity = self._arrays, len(self._arrays["keys"])
        if count <= capacity:
            return
        while capacity < count:
            capacity *= 2
        self._arrays = self._new_arrays(capacity)
        for name in ("keys", "values", *_STATES, *_TREE):
            self._arrays[name][: len(held[name])] = held[name]
        new = (self._arrays[name] for name in ("table", *_SLOTS, "head"))
        self._functions["moved"](held["table"], held["target"], held["head"], self._registers[0], *new)

    def read(
        self, queries: ArrayLike, keys: ArrayLike | None = None, values: ArrayLike | None = None
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Looks tokens up and adds them.

        Args:
          queries: integers [T] from 0 to 2^31 - 1; keys, values: the same; None is the queries.

        Returns:
          The answers, values or -1 where nothing matches, and the lengths of the matches; int32 [T].

        Raises:
          ValueError: of other shapes, dtypes or signs; nothing is read then.
        """
        q = _checked("queries", queries, None)
        k = q if keys is None else _checked("keys", keys, len(q))
        v = q if values is None else _checked("values", values, len(q))
        places, lengths = (np.full(len(q), NONE, np.int32) for _ in range(2))
        self._reserve(self.num_tokens + len(q))
        if self._compiled:
            tokens, found = (q, k, v), (places, lengths)
        else:
            tokens, found = (q.tolist(), k.tolist(), v.tolist()), (places.tolist(), lengths.tolist())
        self._functions["advance"](
            *tokens, self.num_tokens, *found, self._registers, *(self._arrays[name] for name in _ORDER)
        )
        self.num_tokens += len(q)
        held: Any = self._arrays["values"]
        if self._compiled:
            answers = np.where(places >= 0, held[np.maximum(places, 0)], NONE)
        else:  # of a list one at a time, since an array of it takes as long as the text
            answers = [held[place] if place >= 0 else NONE for place in found[0]]
        return np.asarray(answers, np.int32), np.asarray(found[1], np.int32)

    def state(self) -> dict[str, NDArray]:
        """What `from_state` makes the same automaton of: the tokens, int32 [T], and [length, last key] of the match.

        The automaton itself, some thirty times as much, is built of them again.
        """
        tokens = {name: np.array(self._arrays[name][: self.num_tokens], np.int32) for name in ("keys", "values")}
        return tokens | {"match": np.array(self._registers[3:], np.int32)}

    @classmethod
    def from_state(cls, state: Mapping[str, ArrayLike], *, compiled: bool | None = None) -> SuffixAutomaton:
        """The automaton that `state` was taken from.

        Raises:
          ValueError: other arrays than those, or a match that its keys cannot have.
        """
        if missing := [name for name in ("keys", "values", "match") if name not in state]:
            raise ValueError(f"state: has no {', '.join(missing)}; give what SuffixAutomaton.state returned")
        keys = _checked("keys", state["keys"], None)
        match = np.asarray(state["match"])
        length, end = match.tolist() if match.shape == (2,) and match.dtype.kind == "i" else (0, 0)
        if not (0 < length <= end + 1 < len(keys) or (length, end) == (0, NONE)):
            raise ValueError(f"match: {match.tolist()} is none of {len(keys)} keys, [length, last key] or [0, -1]")
        automaton = cls(compiled=compiled, capacity=len(keys))
        automaton.read(keys, keys, _checked("values", state["values"], len(keys)))
        walk, arrays = 0, automaton._arrays
        for symbol in keys[end + 1 - length : end + 1].tolist():
            walk = int(arrays["target"][_slot(arrays["table"], walk, symbol)])
        automaton._registers[2:] = [walk, length, end]
        return automaton


def _checked(name: str, tokens: ArrayLike, length: int | None) -> NDArray[np.int32]:
    array = np.asarray(tokens)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"{name}: {array.dtype} of shape {array.shape} must be integers [T]")
    if length is not None and len(array) != length:
        raise ValueError(f"{name}: there are {len(array)} for {length} tokens; give as many")
    if array.size and not 0 <= array.min() <= array.max() < 2**31:
        raise ValueError(f"{name}: from {array.min()} to {array.max()} must lie from 0 to 2^31 - 1")
    return array.astype(np.int32)


def read_rows(
    queries: NDArray, keys: NDArray, values: NDArray, starts: NDArray | None = None, *, compiled: bool | None = None
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """ROSA of many sequences, each from its beginning.

    Args:
      queries, keys, values: integers [N, T]; starts: bool [N, T], where a new text begins; None is in no row.

    Returns:
      Answers (values, or -1) and lengths of matches, int32 [N, T].
    """
    rows, time = queries.shape
    automaton = SuffixAutomaton(compiled=compiled, capacity=time)
    found = [np.full((rows, time), NONE, np.int32) for _ in range(2)]
    for row in range(rows):
        bounds: Sequence[int] = [0, *([] if starts is None else (np.flatnonzero(starts[row, 1:]) + 1).tolist()), time]
        for begin, end in itertools.pairwise(bounds):
            automaton.reset()
            own = slice(begin, end)
            results = automaton.read(queries[row, own], keys[row, own], values[row, own])
            for target, result in zip(found, results, strict=True):
                target[row, own] = result
    return found[0], found[1]
