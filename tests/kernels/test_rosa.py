"""ROSA's lookups: the definition, other people's numbers, the automaton and the scan agree, however a text is cut."""

from __future__ import annotations

import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rwkv_kernels.rosa import SuffixAutomaton, empty_state, is_compiled, rosa_lookup
from rwkv_kernels.rosa.automaton import read_rows
from tests.golden import load_golden
from tests.kernels.rosa_definition import definition, of_rows

GOLDEN = load_golden("rosa/rosa_s0.npz")
SEQUENCES = sorted(name[:-2] for name in GOLDEN if name.startswith("seq.") and name.endswith(".x"))
LOOKUPS = sorted(name[:-2] for name in GOLDEN if name.startswith("qkv.") and name.endswith(".q"))
COMPILED = [False, True] if is_compiled() else [False]


def of_golden(name: str) -> tuple[list[NDArray], NDArray, NDArray]:
    """Queries, keys and values; answers and lengths."""
    inputs = [GOLDEN[f"{name}.{part}"] for part in ("qkv" if name in LOOKUPS else "xxx")]
    return inputs, GOLDEN[f"{name}.y"], GOLDEN[f"{name}.match_length"]


@functools.partial(jax.jit, static_argnames=("window", "implementation"))
def _run(q: Any, k: Any, v: Any, state: Any, **options: Any) -> Any:
    return rosa_lookup(q, k, v, state, **options)


def looked_up(q: NDArray, k: NDArray, v: NDArray, state: Any = None, **options: Any) -> tuple[NDArray, Any]:
    """Answers, or -1, and the next state."""
    found = _run(*(jnp.asarray(x, jnp.int32) for x in (q, k, v)), state, **options)
    return np.where(found.found, found.symbols, -1), found.state


def drawn(seed: int, alphabet: int, shape: tuple[int, ...]) -> list[NDArray]:
    draws = np.random.default_rng(seed)
    return [draws.integers(0, alphabet, shape) for _ in range(3)]


@pytest.mark.parametrize("name", [*SEQUENCES, *LOOKUPS])
def test_lookups_are_those_of_other_implementations(name: str) -> None:
    inputs, answers, lengths = of_golden(name)
    for compiled in COMPILED:
        found = SuffixAutomaton(compiled=compiled, capacity=1).read(*inputs)
        np.testing.assert_array_equal(found[0], answers)
        np.testing.assert_array_equal(found[1], lengths)
    rows = [x[None, None] for x in inputs]
    np.testing.assert_array_equal(looked_up(*rows, window=len(answers))[0][0, 0], answers)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_automaton_is_the_definition(data: st.DataObject) -> None:
    alphabet = data.draw(st.integers(1, 4))
    symbols = st.lists(st.integers(0, alphabet - 1), min_size=1, max_size=40)
    q = data.draw(symbols)
    k, v = ((data.draw(symbols) * len(q))[: len(q)] for _ in range(2))
    if data.draw(st.booleans()):
        k = q
    for compiled in COMPILED:
        automaton = SuffixAutomaton(compiled=compiled, capacity=3)
        cut = data.draw(st.integers(0, len(q)))
        parts = [automaton.read(q[own], k[own], v[own]) for own in (slice(0, cut), slice(cut, None))]
        expected = definition(q, k, v)
        assert [np.concatenate(part).tolist() for part in zip(*parts, strict=True)] == list(expected)


@pytest.mark.parametrize("compiled", COMPILED)
def test_a_saved_automaton_goes_on(compiled: bool) -> None:
    q, k, v = drawn(0, 3, (300,))
    automaton = SuffixAutomaton(compiled=compiled, capacity=8)
    automaton.read(q[:170], k[:170], v[:170])
    again = SuffixAutomaton.from_state({name: x.copy() for name, x in automaton.state().items()}, compiled=compiled)
    assert again.num_tokens == 170
    whole = SuffixAutomaton(compiled=compiled).read(q, k, v)
    for part, expected in zip(again.read(q[170:], k[170:], v[170:]), whole, strict=True):
        np.testing.assert_array_equal(part, expected[170:])
    automaton.reset()
    np.testing.assert_array_equal(automaton.read(q, k, v)[0], whole[0])


@pytest.mark.parametrize("kind", ["equal", "one key", "period", "fibonacci", "halves"])
def test_a_token_takes_few_steps_whatever_the_keys_are(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Setting where strings ended along their path of links takes as many steps as tokens, if all are equal."""
    from rwkv_kernels.rosa import automaton as module

    count, steps = 4000, 0
    words = ["0", "01"]
    while len(words[-1]) < count:
        words.append(words[-1] + words[-2])
    draws = np.random.default_rng(0).integers(0, 2, count)
    same = np.zeros(count, int)
    q, k = {
        "equal": (same, same),
        "one key": (draws, same),
        "period": (np.arange(count) % 7, np.arange(count) % 7),
        "fibonacci": (np.array([int(c) for c in words[-1][:count]]),) * 2,
        "halves": (np.tile(draws[: count // 2], 2),) * 2,
    }[kind]
    rotate = module._rotate

    def counted(*arguments: Any) -> None:
        nonlocal steps
        steps += 1
        rotate(*arguments)

    monkeypatch.setattr(module, "_rotate", counted)
    SuffixAutomaton(compiled=False).read(q, k, k)
    assert steps < 40 * count


@pytest.mark.parametrize("compiled", COMPILED)
def test_short_texts_take_no_more_because_of_a_long_one(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a text's tokens cost does not depend on the room that was taken for a row, nor on the tokens before them."""
    from rwkv_kernels.rosa import automaton as module

    automaton = SuffixAutomaton(compiled=compiled, capacity=50_000)
    sizes, new_containers = [], module._container
    monkeypatch.setattr(module, "_container", lambda size, *rest: sizes.append(size) or new_containers(size, *rest))
    q, k, v = drawn(0, 3, (60,))
    for _ in range(3):
        automaton.reset()
        found = automaton.read(q, k, v)
        assert [x.tolist() for x in found] == list(definition(q.tolist(), k.tolist(), v.tolist()))
    assert not sizes


def test_a_token_of_a_long_text_takes_no_copy_of_it() -> None:
    class Watched(list[int]):
        def __getitem__(self, index: Any) -> Any:
            assert not isinstance(index, slice)
            return super().__getitem__(index)

    automaton = SuffixAutomaton(compiled=False)
    tokens = np.arange(30) % 3
    automaton.read(tokens)
    automaton._arrays["values"] = Watched(automaton._arrays["values"])
    assert automaton.read([0, 1])[0].tolist() == [1, 2]


@pytest.mark.parametrize("alphabet", [2, 16])
@pytest.mark.parametrize("window", [1, 7, 40])
def test_a_window_bounds_what_a_token_looks_back_on(alphabet: int, window: int) -> None:
    q, k, v = drawn(alphabet, alphabet, (2, 3, 40))
    answers, _ = of_rows(q, k, v, window)
    np.testing.assert_array_equal(looked_up(q, k, v, window=window)[0], answers)


@pytest.mark.parametrize("window", [5, 64])
def test_texts_may_be_cut_anywhere(window: int) -> None:
    inputs = drawn(3, 2, (2, 2, 30))
    whole, last = looked_up(*inputs, window=window)
    for cuts in ((0, 1, 2, 17, 30), (0, 29, 30)):
        state, parts = None, []
        for begin, end in itertools.pairwise(cuts):
            q, k, v = (x[:, :, begin:end] for x in inputs)
            part, state = looked_up(q, k, v, state, window=window)
            parts.append(part)
        np.testing.assert_array_equal(np.concatenate(parts, axis=2), whole)
        jax.tree.map(np.testing.assert_array_equal, state, last)


@pytest.mark.parametrize("implementation", ["scan", "host"])
def test_ragged_rows_keep_their_states(implementation: str) -> None:
    inputs = drawn(5, 2, (3, 2, 20))
    lengths = np.array([20, 0, 7])
    found, state = looked_up(*inputs, window=20, lengths=lengths, implementation=implementation)
    for row, length in enumerate(lengths):
        own = [x[row : row + 1, :, : max(length, 1)] for x in inputs]
        expected, alone = looked_up(*own, window=20)
        if length:
            np.testing.assert_array_equal(found[row : row + 1, :, :length], expected)
        else:
            alone = jax.tree.map(jnp.zeros_like, alone)
        jax.tree.map(lambda x, y, row=row: np.testing.assert_array_equal(x[row], y[0]), state, alone)


@pytest.mark.parametrize("implementation", ["scan", "host"])
def test_nothing_is_found_in_another_text(implementation: str) -> None:
    q, k, v = drawn(7, 2, (2, 2, 24))
    segment_ids = np.array([[0] * 9 + [1] * 15, [0] * 24])
    expected, _ = of_rows(q, k, v, segment_ids=segment_ids)
    options: dict[str, Any] = {"window": 24, "segment_ids": segment_ids, "implementation": implementation}
    found, state = looked_up(q, k, v, **options)
    np.testing.assert_array_equal(found, expected)
    # The state is that of the last text alone.
    alone, of_last = looked_up(*(x[:1, :, 9:] for x in (q, k, v)), window=24)
    np.testing.assert_array_equal(found[:1, :, 9:], alone)
    q, k, v = drawn(8, 2, (2, 2, 5))
    found, _ = looked_up(q, k, v, state, window=24)
    alone, _ = looked_up(q[:1], k[:1], v[:1], of_last, window=24)
    np.testing.assert_array_equal(found[:1], alone)


def test_the_host_answers_within_compiled_programs() -> None:
    q, k, v = drawn(11, 16, (2, 3, 50))
    expected, _ = looked_up(q, k, v, window=50)
    found, _ = looked_up(q, k, v, window=50, implementation="host")
    np.testing.assert_array_equal(found, expected)
    answers, _ = read_rows(*(x.reshape(6, 50) for x in (q, k, v)), compiled=False)
    np.testing.assert_array_equal(answers.reshape(found.shape), expected)


def test_large_symbols_are_looked_up() -> None:
    tokens = np.random.default_rng(0).integers(0, 2**31 - 1, 5)[np.random.default_rng(1).integers(0, 5, 60)]
    answers, lengths = SuffixAutomaton(compiled=False).read(tokens)
    assert (answers.tolist(), lengths.tolist()) == definition(*(tokens.tolist(),) * 3)
    assert looked_up(*(tokens[None, None],) * 3, window=60)[0][0, 0].tolist() == answers.tolist()


def refused(call: Any, *said: str) -> None:
    with pytest.raises(ValueError, match=".*".join(map(re.escape, said))):
        call()


def test_tokens_that_are_none_are_refused() -> None:
    automaton = SuffixAutomaton(compiled=False)
    refused(lambda: automaton.read([[1]]), "queries: int64 of shape (1, 1) must be integers [T]")
    refused(lambda: automaton.read([0.5]), "queries: float64")
    refused(lambda: automaton.read([1, -1]), "queries: from -1 to 1")
    refused(lambda: automaton.read([1, 2], [1]), "keys: there are 1 for 2 tokens")
    assert automaton.num_tokens == 0
    assert automaton.read([])[0].shape == (0,)


def test_states_that_are_none_are_refused() -> None:
    automaton = SuffixAutomaton(compiled=False)
    automaton.read(drawn(0, 3, (40,))[0])
    state = automaton.state()
    refused(lambda: SuffixAutomaton.from_state({}), "state: has no keys, values, match")
    refused(lambda: SuffixAutomaton.from_state(state | {"values": state["values"][1:]}), "values: there are 39")
    refused(lambda: SuffixAutomaton.from_state(state | {"keys": -1 - state["keys"]}), "keys: from -")
    for match in ([3, 1], [1, 39], [0, 5], [-1, 4], [1, 2, 3], [0.0, -1.0]):
        wrong = state | {"match": np.array(match)}
        refused(lambda wrong=wrong: SuffixAutomaton.from_state(wrong), "match: ", "is none of 40 keys")


def test_lookups_that_cannot_be_are_refused() -> None:
    x = jnp.zeros((1, 2, 3), jnp.int32)
    refused(lambda: rosa_lookup(x, x[:, :1], x, window=3), "keys: int32 of shape (1, 1, 3) must be int32 [B, G, T]")
    refused(lambda: rosa_lookup(x, x, x.astype(jnp.uint8), window=3), "values: uint8")
    refused(lambda: rosa_lookup(x + 0.5, x + 0.5, x + 0.5, window=3), "must be an integer one")
    refused(lambda: rosa_lookup(x, x, x, window=0), "window = 0")
    refused(lambda: rosa_lookup(x, x, x, window=3, implementation="gpu"), "'gpu': must be one of scan, host")
    state = rosa_lookup(x, x, x, window=4).state
    refused(lambda: rosa_lookup(x, x, x, state, window=5), "state: keys of shape (1, 2, 4) must be (1, 2, 5)")
    # Symbols of a state are not cut to fewer bits: 256 would be 0 in uint8.
    said = "state: keys are uint8 and values uint8, and must be int32"
    refused(lambda: rosa_lookup(x + 256, x, x, empty_state(1, 2, 4), window=4), said)
