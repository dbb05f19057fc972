"""The longest stored beginning is found, whatever was put and evicted before; held against a dict."""

from __future__ import annotations

import gc
import time
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_jax.config import ConfigError
from rwkv_jax.inference.state.prefix_cache import PrefixCache
from rwkv_jax.inference.state.snapshot import Snapshot

STATE_BYTES = 100
PLENTY = 10**9


def snapshot(num_tokens: int, num_bytes: int = STATE_BYTES) -> Snapshot:
    """Of so many tokens; its arrays are NumPy's, which a store does not look into."""
    logits: Any = np.zeros(num_bytes, np.uint8)
    return Snapshot((), logits, num_tokens)


def put(store: PrefixCache, *tokens: int) -> Snapshot:
    state = snapshot(len(tokens))
    assert store.put(tokens, state)
    return state


def check(store: PrefixCache) -> None:
    assert store._keys == sorted(store._snapshots)
    assert store.nbytes == sum(len(key) + state.nbytes for key, state in store._snapshots.items())


def test_the_longest_beginning_is_found() -> None:
    store = PrefixCache(PLENTY)
    short, long, other = put(store, 1, 2), put(store, 1, 2, 3, 4), put(store, 1, 2, 3, 5)
    assert store.lookup([1, 2, 3]) == (2, short)
    assert store.lookup([1, 2]) == (2, short)
    assert store.lookup([1, 2, 3, 4]) == (4, long)
    assert store.lookup([1, 2, 3, 4, 9, 9]) == (4, long)
    assert store.lookup([1, 2, 3, 5, 9]) == (4, other)
    assert store.lookup([1]) is None
    assert store.lookup([2, 1]) is None
    assert store.lookup([]) is None
    assert len(store) == 3
    check(store)


def test_an_entry_replaces_the_one_before() -> None:
    store = PrefixCache(PLENTY)
    put(store, 1, 2)
    again = put(store, 1, 2)
    found = store.lookup([1, 2])
    assert found is not None
    assert found[1] is again
    assert (len(store), store.nbytes) == (1, STATE_BYTES + 8)


def test_the_least_recently_used_goes() -> None:
    store = PrefixCache(3 * (STATE_BYTES + 12))
    put(store, 1, 2, 3)
    put(store, 1, 2, 4)
    put(store, 5, 6, 7)
    store.lookup([1, 2, 3])
    put(store, 5, 6, 8)  # over 1, 2, 4
    assert store.lookup([1, 2, 4]) is None
    assert [store.lookup(tokens) is not None for tokens in ([1, 2, 3], [5, 6, 7], [5, 6, 8])] == [True] * 3
    check(store)


def test_a_beginning_goes_and_what_follows_stays() -> None:
    store = PrefixCache(2 * STATE_BYTES + 4 * (2 + 4))
    put(store, 1, 2)
    long = put(store, 1, 2, 3, 4)
    put(store, 9)
    assert store.lookup([1, 2]) is None
    assert store.lookup([1, 2, 3, 4]) == (4, long)
    check(store)


def test_an_entry_larger_than_the_store_is_not_kept() -> None:
    store = PrefixCache(STATE_BYTES + 4)
    first = put(store, 1)
    for tokens in ([1], [3, 4]):
        assert not store.put(tokens, snapshot(len(tokens), STATE_BYTES + 1))
    assert store.lookup([1]) == (1, first)
    assert len(store) == 1
    check(store)


@pytest.mark.parametrize(
    ("tokens", "num_tokens", "message"),
    [
        ([], 0, "tokens: 0 where the snapshot has read 0"),
        ([1, 2], 3, "tokens: 2 where the snapshot has read 3"),
        ([1, -2], 2, "from -2 to 1"),
        ([1, 2**31], 2, "from 1 to 2147483648"),
        ([1.0, 2.0], 2, "float64"),
        ([[1, 2]], 1, r"shape \(1, 2\)"),
        ("ab", 2, "must be a sequence of token ids"),
    ],
)
def test_what_are_no_tokens_of_the_snapshot(tokens: Any, num_tokens: int, message: str) -> None:
    store = PrefixCache(PLENTY)
    with pytest.raises(ConfigError, match=message):
        store.put(tokens, snapshot(num_tokens))
    assert len(store) == 0
    check(store)


@pytest.mark.parametrize("max_bytes", [0, -1])
def test_bounds_that_cannot_be(max_bytes: int) -> None:
    with pytest.raises(ConfigError, match=f"max_bytes = {max_bytes}"):
        PrefixCache(max_bytes)


class Plain:
    """A dict in the order of use: what the store says, word for word."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.entries: OrderedDict[tuple[int, ...], Snapshot] = OrderedDict()

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes + 4 * len(tokens) for tokens, state in self.entries.items())

    def put(self, tokens: tuple[int, ...], state: Snapshot) -> bool:
        if state.nbytes + 4 * len(tokens) > self.max_bytes:
            return False
        self.entries.pop(tokens, None)
        self.entries[tokens] = state
        while self.nbytes > self.max_bytes:
            self.entries.popitem(last=False)
        return True

    def lookup(self, tokens: tuple[int, ...]) -> tuple[int, Snapshot] | None:
        for length in range(len(tokens), 0, -1):
            if tokens[:length] in self.entries:
                self.entries.move_to_end(tokens[:length])
                return length, self.entries[tokens[:length]]
        return None

    def shared_prefix_length(self, tokens: tuple[int, ...]) -> int:
        starts = (tuple(tokens[:length]) for length in range(len(tokens), 0, -1))
        return next((len(start) for start in starts if any(x[: len(start)] == start for x in self.entries)), 0)


PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=7).map(tuple)
OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["put", "put", "find"]), PATHS, st.sampled_from([STATE_BYTES, 5 * STATE_BYTES])),
    max_size=50,
)


@settings(max_examples=300, deadline=None)
@given(OPERATIONS)
def test_it_does_what_a_dict_does(operations: list[tuple[str, tuple[int, ...], int]]) -> None:
    size = 5 * (STATE_BYTES + 4)  # the larger states fit after up to five tokens, and not after more
    store, plain = PrefixCache(size), Plain(size)
    for operation, tokens, num_bytes in operations:
        assert store.shared_prefix_length(tokens) == plain.shared_prefix_length(tokens)
        if operation == "find":
            assert store.lookup(tokens) == plain.lookup(tokens)
        else:
            state = snapshot(len(tokens), num_bytes)
            assert store.put(tokens, state) is plain.put(tokens, state)
        assert len(store) == len(plain.entries)
        assert store.nbytes == plain.nbytes <= size
        check(store)
    for tokens, state in plain.entries.items():
        found = store.lookup(tokens)
        assert found is not None
        assert found[1] is state


def test_long_prompts_cost_little_time() -> None:
    rng = np.random.default_rng(0)
    shared = rng.integers(65536, size=100_000)
    store = PrefixCache(PLENTY)
    started = time.process_time()
    for i in range(20):
        tokens = np.concatenate([shared[: 5000 * (i + 1)], [i]])
        store.put(tokens, snapshot(len(tokens)))
        found = store.lookup(np.concatenate([tokens, shared]))
        assert found is not None
        assert found[0] == len(tokens)
    check(store)
    assert time.process_time() - started < 2


@pytest.mark.parametrize("recently_used", [0, 2999])
def test_a_chain_of_many_entries_is_made_found_and_let_go(recently_used: int) -> None:
    length = 3000  # deeper than Python recurses
    store = PrefixCache(PLENTY)
    tokens = np.arange(length)
    for end in range(length, 0, -1):
        store.put(tokens[:end], snapshot(end, 1))
    found = store.lookup(tokens)
    assert found is not None
    assert found[0] == length == len(store)
    store.lookup(tokens[: recently_used + 1])
    store.put([7], snapshot(1, PLENTY - 4))
    assert len(store) == 1
    check(store)


def test_a_chain_of_many_entries_is_collected() -> None:
    store = PrefixCache(PLENTY)
    tokens = np.arange(3000)
    for end in range(len(tokens), 0, -1):
        store.put(tokens[:end], snapshot(end, 1))
    gone = weakref.ref(store)
    del store
    gc.collect()
    assert gone() is None


def test_many_threads_use_it_at_once() -> None:
    store = PrefixCache(12 * (STATE_BYTES + 4 * 6))
    wrong: list[object] = []

    def use(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(300):
            tokens = rng.integers(0, 3, rng.integers(1, 7))
            store.put(tokens, snapshot(len(tokens)))
            found = store.lookup(tokens)
            if found is not None and (found[0] != found[1].num_tokens or found[0] > len(tokens)):
                wrong.append(found)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(use, range(8)))
    assert not wrong
    check(store)
