"""The longest stored beginning is found, whatever was put, evicted and pinned before; held against a dict."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_jax.config import ConfigError
from rwkv_jax.inference.prefix_store import PrefixStatistics, PrefixStore
from rwkv_jax.inference.snapshot import Snapshot

STATE_BYTES = 100
PLENTY = 10**9


def snapshot(num_tokens: int, num_bytes: int = STATE_BYTES) -> Snapshot:
    """Of so many tokens; its arrays are NumPy's, which a store does not look into."""
    logits: Any = np.zeros(num_bytes, np.uint8)
    return Snapshot((), logits, num_tokens)


def put(store: PrefixStore, *tokens: int, pinned: bool = False) -> Snapshot:
    state = snapshot(len(tokens))
    assert store.put(tokens, state, pinned=pinned)
    return state


def check_tree(store: PrefixStore) -> int:
    """The number of nodes besides the root, of which each must have a reason to be."""
    nodes, count = [store._root], 0
    while nodes:
        node = nodes.pop()
        for first, child in node.children.items():
            assert child.parent is node
            assert len(child.edge) > 0
            assert first == child.edge[0]
            assert child.edge.base is None  # a view would keep more than its own tokens
            assert child.snapshot is not None or len(child.children) >= 2
            assert (child.snapshot is not None) == (child in store._entries)
            count += 1
            nodes.append(child)
    return count


def test_the_longest_beginning_is_found() -> None:
    store = PrefixStore(PLENTY)
    short, long, other = put(store, 1, 2), put(store, 1, 2, 3, 4), put(store, 1, 2, 3, 5)
    assert store.longest([1, 2, 3]) == (2, short)
    assert store.longest([1, 2]) == (2, short)
    assert store.longest([1, 2, 3, 4]) == (4, long)
    assert store.longest([1, 2, 3, 4, 9, 9]) == (4, long)
    assert store.longest([1, 2, 3, 5, 9]) == (4, other)
    assert store.longest([1]) is None
    assert store.longest([2, 1]) is None
    assert store.longest([]) is None
    assert store.statistics == PrefixStatistics(hits=5, misses=3, tokens_found=2 + 2 + 4 + 4 + 4)
    assert (len(store), check_tree(store)) == (3, 4)


def test_an_entry_replaces_the_one_before() -> None:
    store = PrefixStore(PLENTY)
    put(store, 1, 2)
    again = put(store, 1, 2)
    found = store.longest([1, 2])
    assert found is not None
    assert found[1] is again
    assert (len(store), store.nbytes) == (1, STATE_BYTES + 8)


def test_the_least_recently_used_goes_and_its_branch_with_it() -> None:
    store = PrefixStore(3 * (STATE_BYTES + 12))
    put(store, 1, 2, 3)
    put(store, 1, 2, 4)
    put(store, 5, 6, 7)
    assert check_tree(store) == 4
    store.longest([1, 2, 3])
    put(store, 5, 6, 8)  # over 1, 2, 4; what it shared with 1, 2, 3 is one edge again
    assert store.longest([1, 2, 4]) is None
    assert [store.longest(tokens) is not None for tokens in ([1, 2, 3], [5, 6, 7], [5, 6, 8])] == [True] * 3
    assert check_tree(store) == 4
    assert store.statistics.evictions == 1


def test_a_beginning_goes_and_what_follows_stays() -> None:
    store = PrefixStore(2 * STATE_BYTES + 4 * (2 + 4))
    put(store, 1, 2)
    long = put(store, 1, 2, 3, 4)
    put(store, 9)
    assert store.longest([1, 2]) is None
    assert store.longest([1, 2, 3, 4]) == (4, long)
    assert check_tree(store) == 2


def test_pinned_entries_stay_until_they_are_unpinned() -> None:
    store = PrefixStore(2 * (STATE_BYTES + 4))
    system = put(store, 1, pinned=True)
    for token in range(2, 20):
        put(store, token)
        assert store.longest([1]) == (1, system)
        assert len(store) == 2
    put(store, 1)  # another state of the same tokens is pinned as well
    for token in range(2, 20):
        put(store, token)
    assert store.longest([1]) is not None
    store.unpin([1])
    put(store, 20)
    put(store, 21)
    assert store.longest([1]) is None


def test_what_is_not_there_cannot_be_unpinned() -> None:
    store = PrefixStore(PLENTY)
    put(store, 1, 2, 3)
    put(store, 1, 2, 4)
    for tokens in ([], [1], [1, 2], [1, 2, 3, 4], [7]):
        with pytest.raises(ConfigError, match=f"no entry ends after these {len(tokens)} tokens"):
            store.unpin(tokens)


def test_without_room_beside_the_pinned_an_entry_is_not_kept() -> None:
    store = PrefixStore(2 * (STATE_BYTES + 4))
    put(store, 1, pinned=True)
    put(store, 2)
    assert not store.put([3, 4], snapshot(2))
    assert store.longest([3, 4]) is None
    assert (len(store), check_tree(store)) == (2, 2)
    assert store.statistics == PrefixStatistics(misses=1, refusals=1)
    with pytest.raises(ConfigError, match=r"of 108 bytes cannot be pinned where the store holds 208, of which 104 are"):
        store.put([3, 4], snapshot(2), pinned=True)
    assert len(store) == 2
    put(store, 5, pinned=True)  # exactly
    with pytest.raises(ConfigError, match="cannot be pinned"):
        store.put([1], snapshot(1, STATE_BYTES + 1))
    assert len(store) == 2


def test_a_pinned_entry_may_be_replaced_by_one_that_needs_its_room() -> None:
    store = PrefixStore(STATE_BYTES + 4)
    put(store, 1, pinned=True)
    again = put(store, 1)
    assert store.longest([1]) == (1, again)
    assert store.nbytes == STATE_BYTES + 4


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
    store = PrefixStore(PLENTY)
    with pytest.raises(ConfigError, match=message):
        store.put(tokens, snapshot(num_tokens))
    assert (len(store), check_tree(store)) == (0, 0)


@pytest.mark.parametrize("max_bytes", [0, -1])
def test_bounds_that_cannot_be(max_bytes: int) -> None:
    with pytest.raises(ConfigError, match=f"max_bytes = {max_bytes}"):
        PrefixStore(max_bytes)


class Plain:
    """A dict in the order of use: what the store says, word for word."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.entries: OrderedDict[tuple[int, ...], tuple[Snapshot, bool]] = OrderedDict()

    def num_bytes(self, *, pinned_only: bool = False) -> int:
        kept = ((tokens, state) for tokens, (state, pinned) in self.entries.items() if pinned or not pinned_only)
        return sum(state.nbytes + 4 * len(tokens) for tokens, state in kept)

    def put(self, tokens: tuple[int, ...], state: Snapshot, pinned: bool) -> bool | None:
        """None where the store must refuse with an error."""
        before = self.entries.pop(tokens, None)
        stays = pinned or (before is not None and before[1])
        if self.num_bytes(pinned_only=True) + state.nbytes + 4 * len(tokens) > self.max_bytes:
            assert before is None
            return None if stays else False
        self.entries[tokens] = state, stays
        for other in tuple(self.entries):
            if self.num_bytes() <= self.max_bytes:
                break
            if other != tokens and not self.entries[other][1]:
                del self.entries[other]
        return True

    def longest(self, tokens: tuple[int, ...]) -> tuple[int, Snapshot] | None:
        for length in range(len(tokens), 0, -1):
            if tokens[:length] in self.entries:
                self.entries.move_to_end(tokens[:length])
                return length, self.entries[tokens[:length]][0]
        return None


PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=7).map(tuple)
ENTRIES = st.lists(st.tuples(st.sampled_from(["put", "put", "pin", "unpin", "find"]), PATHS), max_size=50)


@settings(max_examples=300)
@given(ENTRIES)
def test_it_does_what_a_dict_does(operations: list[tuple[str, tuple[int, ...]]]) -> None:
    # Entries of the same tokens have one size, so that what is there is never refused in its own place.
    size = 5 * (STATE_BYTES + 4 * 7)
    store, plain = PrefixStore(size), Plain(size)
    for operation, tokens in operations:
        state = snapshot(len(tokens))
        if operation == "find":
            assert store.longest(tokens) == plain.longest(tokens)
        elif operation == "unpin":
            if tokens in plain.entries:
                plain.entries[tokens] = plain.entries[tokens][0], False
                store.unpin(tokens)
            else:
                with pytest.raises(ConfigError):
                    store.unpin(tokens)
        else:
            expected = plain.put(tokens, state, operation == "pin")
            if expected is None:
                with pytest.raises(ConfigError):
                    store.put(tokens, state, pinned=operation == "pin")
            else:
                assert store.put(tokens, state, pinned=operation == "pin") is expected
        assert len(store) == len(plain.entries)
        assert store.nbytes == plain.num_bytes() <= size
        check_tree(store)
    for tokens in plain.entries:
        found = store.longest(tokens)
        assert found is not None
        assert found[1] is plain.entries[tokens][0]


def test_long_prompts_cost_nodes_by_the_entry_and_little_time() -> None:
    rng = np.random.default_rng(0)
    shared = rng.integers(65536, size=100_000)
    store = PrefixStore(PLENTY)
    started = time.process_time()
    for i in range(20):
        tokens = np.concatenate([shared[: 5000 * (i + 1)], [i]])
        store.put(tokens, snapshot(len(tokens)))
        found = store.longest(np.concatenate([tokens, shared]))
        assert found is not None
        assert found[0] == len(tokens)
    assert check_tree(store) < 2 * 20
    assert time.process_time() - started < 2


@pytest.mark.parametrize("recently_used", [0, 2999])
def test_a_chain_of_many_entries_is_made_found_and_let_go(recently_used: int) -> None:
    length = 3000  # deeper than Python recurses
    store = PrefixStore(PLENTY)
    tokens = np.arange(length)
    for end in range(length, 0, -1):
        store.put(tokens[:end], snapshot(end, 1))
    found = store.longest(tokens)
    assert found is not None
    assert found[0] == length == check_tree(store)
    store.longest(tokens[: recently_used + 1])
    store.put([7], snapshot(1, PLENTY - 4))
    assert (len(store), check_tree(store)) == (1, 1)


def test_a_chain_of_many_entries_is_collected() -> None:
    store = PrefixStore(PLENTY)
    tokens = np.arange(3000)
    for end in range(len(tokens), 0, -1):
        store.put(tokens[:end], snapshot(end, 1))
    gone = weakref.ref(store)
    del store
    gc.collect()
    assert gone() is None


def test_many_threads_use_it_at_once() -> None:
    store = PrefixStore(12 * (STATE_BYTES + 4 * 6))
    wrong: list[object] = []

    def use(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(300):
            tokens = rng.integers(0, 3, rng.integers(1, 7))
            store.put(tokens, snapshot(len(tokens)))
            found = store.longest(tokens)
            if found is not None and (found[0] != found[1].num_tokens or found[0] > len(tokens)):
                wrong.append(found)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    check_tree(store)
    assert store.nbytes == sum(node.num_bytes for node in store._entries)
