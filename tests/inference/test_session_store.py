"""Conversations are kept within their bounds, and nobody gets another one's."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_jax.config import ConfigError
from rwkv_jax.inference.sampling.params import SamplingParams
from rwkv_jax.inference.state.session import Session
from rwkv_jax.inference.state.session_store import SessionStore
from tests.inference.fake_engine import PASSES_FOR_ANY, FakeEngine


@dataclasses.dataclass(frozen=True)
class Sized(PASSES_FOR_ANY):
    nbytes: int
    name: str = ""


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_what_was_put_is_got() -> None:
    store = SessionStore(10)
    first, second = Sized(4), Sized(5)
    store.put("a", first)
    store.put("b", second)
    assert store.get("a") is first
    assert store.get("b") is second
    assert store.get("c") is None
    assert (len(store), store.nbytes) == (2, 9)


def test_the_least_recently_used_goes_first() -> None:
    store = SessionStore(10)
    for name in "abc":
        store.put(name, Sized(3))
    store.get("a")
    store.put("d", Sized(3))  # over b
    assert [name for name in "abcd" if store.get(name)] == ["a", "c", "d"]
    store.put("e", Sized(7))  # over a and c
    assert [name for name in "abcde" if store.get(name)] == ["d", "e"]
    assert store.nbytes == 10


def test_put_again_replaces_and_counts_anew() -> None:
    store = SessionStore(10)
    store.put("a", Sized(6))
    store.put("b", Sized(4))
    last = Sized(5)
    store.put("a", last)
    assert store.get("a") is last
    assert (len(store), store.nbytes) == (2, 9)
    store.put("a", Sized(1))
    assert (len(store), store.nbytes) == (2, 5)


def test_replacing_makes_its_own_room_first() -> None:
    store = SessionStore(10)
    store.put("a", Sized(6))
    store.put("b", Sized(4))
    store.put("a", Sized(6))
    assert len(store) == 2


def test_pop_takes_it_out() -> None:
    store = SessionStore(10)
    entry = Sized(4)
    store.put("a", entry)
    assert store.pop("a") is entry
    assert store.pop("a") is None
    assert (len(store), store.nbytes) == (0, 0)


def test_an_entry_larger_than_the_store_is_refused_by_name() -> None:
    store = SessionStore(10)
    entry = Sized(10)
    store.put("fits exactly", entry)
    with pytest.raises(ConfigError, match="conversation 'too large': has 11 bytes where the store holds 10; raise"):
        store.put("too large", Sized(11))
    with pytest.raises(ConfigError, match="raise max_bytes"):
        store.put("fits exactly", Sized(11))
    assert store.get("fits exactly") is entry


def test_idle_entries_expire() -> None:
    clock = Clock()
    store = SessionStore(100, max_idle_seconds=5, clock=clock)
    store.put("a", Sized(1))
    store.put("b", Sized(1))
    clock.now += 4
    assert store.get("a")
    clock.now += 1
    assert store.get("b") is None  # after five seconds
    assert len(store) == 1
    clock.now += 3
    assert store.get("a")  # used again in time
    clock.now += 5
    assert (len(store), store.nbytes) == (0, 0)
    assert store.pop("a") is None


def test_without_a_bound_nothing_expires() -> None:
    clock = Clock()
    store = SessionStore(100, clock=clock)
    store.put("a", Sized(1))
    clock.now += 1e12
    assert store.get("a")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_bytes": 0}, "max_bytes = 0"),
        ({"max_bytes": -1}, "max_bytes = -1"),
        ({"max_bytes": 1, "max_idle_seconds": 0}, "max_idle_seconds = 0"),
        ({"max_bytes": 1, "max_idle_seconds": -2.0}, r"max_idle_seconds = -2\.0"),
        ({"max_bytes": 1, "max_idle_seconds": float("nan")}, "max_idle_seconds = nan"),
    ],
)
def test_bounds_that_cannot_be(arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SessionStore(**arguments)


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["put", "get", "pop", "wait"]), st.sampled_from("abcdef"), st.integers(0, 12)),
    max_size=60,
)


@given(OPERATIONS)
def test_it_does_what_a_plain_list_does(operations: list[tuple[str, str, int]]) -> None:
    clock, max_bytes, max_idle = Clock(), 20, 15
    store = SessionStore(max_bytes, max_idle, clock)
    kept: OrderedDict[str, tuple[Sized, float]] = OrderedDict()
    for operation, name, number in operations:
        kept = OrderedDict((n, (x, used)) for n, (x, used) in kept.items() if clock.now - used < max_idle)
        if operation == "wait":
            clock.now += number
        elif operation == "put":
            kept.pop(name, None)
            entry = Sized(number, name)
            kept[name] = entry, clock.now
            while sum(x.nbytes for x, _ in kept.values()) > max_bytes:
                kept.popitem(last=False)
            store.put(name, entry)
        elif operation == "get":
            expected = kept.get(name)
            assert store.get(name) is (expected and expected[0])
            if expected:
                kept[name] = expected[0], clock.now
                kept.move_to_end(name)
        else:
            expected = kept.pop(name, None)
            assert store.pop(name) is (expected and expected[0])
        kept = OrderedDict((n, (x, used)) for n, (x, used) in kept.items() if clock.now - used < max_idle)
        assert len(store) == len(kept)
        assert store.nbytes == sum(x.nbytes for x, _ in kept.values()) <= max_bytes


def test_many_threads_use_it_at_once() -> None:
    store = SessionStore(50, max_idle_seconds=1e-5)
    wrong: list[str] = []

    def use(seed: int) -> None:
        for i in range(400):
            name = f"{(seed * 7 + i * 13) % 17}"
            store.put(name, Sized(i % 11, name))
            found: Any = (store.get if i % 3 else store.pop)(f"{i % 17}")
            if (found is not None and found.name != f"{i % 17}") or store.nbytes > 50:
                wrong.append(name)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(use, range(8)))
    assert not wrong


def test_sessions_are_kept() -> None:
    session = Session(FakeEngine())
    session.append("hello")
    snapshot = session.snapshot
    assert snapshot is not None
    sessions = SessionStore(snapshot.nbytes)
    sessions.put("a", session)
    assert sessions.nbytes == snapshot.nbytes
    assert sessions.get("a") is session
    session.generate(max_tokens=3, sampling=SamplingParams(temperature=0.0))
    sessions.put("a", session)
    assert sessions.nbytes == snapshot.nbytes  # however much it has read
