"""Texts that share slots: each is what it would be alone, whoever comes, goes or waits beside it."""

from __future__ import annotations

import dataclasses
import resource
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from rwkv_jax.inference.engine.engine import Engine
from rwkv_jax.inference.engine.requests import QueueFullError
from rwkv_jax.inference.engine.stream import Stream
from rwkv_jax.inference.sampling.params import SamplingParams
from rwkv_jax.inference.state.snapshot import Snapshot
from tests.inference.models import (
    GREEDY,
    IDS,
    LONG_IDS,
    VOCAB_SIZE,
    assert_same,
    prompts,
    quick_engine,
    some,
    texts_of,
    what_was_read,
)

OURS = {"jit(_make)", "jit(_put)", "jit(_take)", "jit(_prefill)", "jit(_decode)"}


def slots_of(engine: Engine) -> list[Any]:
    """Copies of all that the slots hold, rows first."""
    return [np.array(x) for x in jax.tree.leaves(engine._scheduler._slots)]


def count_ticks(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows with every turn of the scheduler."""
    ticks: list[bool] = []
    step = engine._scheduler.step
    monkeypatch.setattr(engine._scheduler, "step", lambda: ticks.append(step()) or ticks[-1])
    return ticks


# Coming and going


def test_a_hundred_prompts_take_eight_programs(engine: Engine, compiled: list[str]) -> None:
    for i, prompt in enumerate(prompts(0, 60, 90)):
        engine.generate(prompt, max_tokens=1 + i % 7, seed=i)
    shapes = [x.shape for x in slots_of(engine)]
    slots = engine._scheduler._slots
    some_of_them = list(prompts(1, 40, 90))
    engine.generate(some_of_them, max_tokens=5, sampling=SamplingParams.rwkv(top_k=4, min_p=0.01, typical_p=0.9))
    engine.generate(some_of_them[:5], max_tokens=5, guidance_scale=1.5, negative_prompt="x", stop=["a"], best_of=2)
    assert set(compiled) >= OURS
    assert sum(name in OURS for name in compiled) <= 8

    compiled.clear()
    engine.generate(some_of_them[::-1], max_tokens=9, sampling=[GREEDY, SamplingParams(temperature=2.0)] * 20)
    with engine.stream("", state=engine.prefill(None, "a"), return_state=True) as stream:
        some(stream, 5)
    assert stream.snapshot is not None
    assert compiled == []
    assert [x.shape for x in slots_of(engine)] == shapes
    assert all(x.is_deleted() for x in jax.tree.leaves(slots))  # their memory is what the next ones have


def test_weights_that_were_put_on_a_device_take_no_more_programs(engine: Engine, compiled: list[str]) -> None:
    """As those from files are; those of other tests come from a program."""
    placed = quick_engine(nnx.merge(*jax.device_put(nnx.split(engine.model), jax.devices()[0])), num_slots=2)
    compiled.clear()
    for seed in range(2):
        placed.generate("a", max_tokens=3, seed=seed)
    snapshot = placed.prefill(None, "b")
    placed.generate("c", state=dataclasses.replace(snapshot, state=jax.device_get(snapshot.state)), max_tokens=3)
    ours = [name for name in compiled if name in OURS]
    assert len(ours) == len(set(ours))


@pytest.mark.parametrize("seed", range(3))
def test_texts_that_come_and_go_are_what_they_are_alone(engine: Engine, seed: int) -> None:
    draws = np.random.default_rng(seed)
    samplings = (GREEDY, SamplingParams(temperature=1.3), SamplingParams.rwkv(penalize_prompt=True))
    settings: list[dict[str, Any]] = [
        {
            "prompts": prompt,
            "max_tokens": int(draws.integers(1, 20)),
            "sampling": samplings[draws.integers(3)],
            "seed": i,
            "return_state": bool(draws.integers(2)),
            "client_id": "xyz"[draws.integers(3)],
        }
        for i, prompt in enumerate(prompts(seed, 40))
    ]
    found: dict[int, list[Any]] = {}
    running: dict[int, tuple[Stream, int]] = {}
    states: dict[int, Snapshot | None] = {}
    while len(found) < len(settings) or running:
        if len(found) < len(settings) and (not running or draws.random() < 0.2):
            i = len(found)
            found[i] = []
            running[i] = (engine.stream(**settings[i]), int(draws.integers(1, 30)))
        i = int(draws.choice(list(running)))
        stream, most = running[i]
        found[i] += some(stream, int(draws.integers(1, 4)))
        if len(found[i]) >= min(most, settings[i]["max_tokens"]) or found[i][-1].finish_reason:
            stream.cancel()
            del running[i]
            states[i] = stream.snapshot if settings[i]["return_state"] else None
    assert any(chunks[-1].finish_reason is None for chunks in found.values())
    for i, chunks in found.items():
        options: dict[str, Any] = settings[i] | {"return_state": False}
        alone = engine.generate(options.pop("prompts"), **options)
        _, ids = texts_of(chunks)
        assert ids == alone.ids[: len(ids)]
        if settings[i]["return_state"]:
            assert_same(states[i], engine.prefill(None, settings[i]["prompts"] + what_was_read(chunks)))


def test_rows_that_take_no_part_are_untouched(engine: Engine) -> None:
    """Of a paused text, and of slots that nobody has, down to the last bit."""
    paused = engine.stream(IDS, return_state=True, max_tokens=50, sampling=SamplingParams.rwkv())
    next(paused)
    (own,) = paused._jobs[0].slots
    before = slots_of(engine)
    with engine.stream([LONG_IDS[::-1], (5,), IDS], max_tokens=1000, stop_ids=()) as others:
        some(others, 90)
        used = {slot for job in others._jobs for slot in job.slots}
        after = slots_of(engine)
    engine.generate((7, *LONG_IDS), max_tokens=3)  # on its own
    assert used == set(range(4)) - {own}
    for x, y, z in zip(before, after, slots_of(engine), strict=True):
        np.testing.assert_array_equal(x[own], y[own])
        np.testing.assert_array_equal(x[own], z[own])
    assert any(not np.array_equal(x[slot], y[slot]) for x, y in zip(before, after, strict=True) for slot in used)
    paused.cancel()

    free = engine._scheduler._free[0]
    before = slots_of(engine)
    engine.generate([IDS, (9, 8)], max_tokens=9)
    for x, y in zip(before, slots_of(engine), strict=True):
        np.testing.assert_array_equal(x[free], y[free])


def test_a_short_prompt_does_not_wait_for_a_long_one(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    long_prompt = np.random.default_rng(0).integers(1, VOCAB_SIZE, 10_000).tolist()
    with engine.stream(long_prompt) as long, engine.stream(IDS[:4]) as short:
        ticks = count_ticks(engine, monkeypatch)
        next(short)
        assert len(ticks) <= 3
        assert long._jobs[0].is_prefilling
        with engine.stream(long_prompt[::-1]) as other:
            some(short, 8)
            assert 0 < long._jobs[0].cursors[0].num_prefilled < 1000
            assert 0 < other._jobs[0].cursors[0].num_prefilled < 1000


# Waiting


def test_a_full_queue_refuses_and_goes_on(narrow: Engine) -> None:
    streams = [narrow.stream([IDS, IDS], max_tokens=3, sampling=GREEDY) for _ in range(2)]
    with pytest.raises(QueueFullError, match=r"^queue: 4 texts wait, and 1 more would pass max_queue = 4; collect"):
        narrow.stream(IDS)
    next(streams[0])
    with pytest.raises(QueueFullError, match=r"^queue: 3 texts wait, and 2 more would pass max_queue = 4; collect"):
        narrow.stream([IDS, IDS])
    # Of a list what does not fit waits outside the queue.
    alone = narrow.generate([IDS] * 9, max_tokens=3, sampling=GREEDY)
    assert len({completion.ids for completion in alone}) == 1
    assert len(list(streams[0])) == 2 * 3 - 1
    assert len(list(streams[1])) == 2 * 3


def test_clients_take_turns(narrow: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    admit = narrow._scheduler._admit

    def noted(job: Any) -> None:
        order.append(f"{job.request.client_id}{job.index}")
        admit(job)

    monkeypatch.setattr(narrow._scheduler, "_admit", noted)
    first = narrow.stream([IDS] * 3, max_tokens=2, client_id="a")
    second = narrow.stream([IDS], max_tokens=2, client_id="b")
    list(first)
    list(second)
    assert order == ["a0", "b0", "a1", "a2"]


def test_texts_whose_readers_pause_share_one_slot(narrow: Engine) -> None:
    samplings = (SamplingParams.rwkv(temperature=2.0), GREEDY, SamplingParams.rwkv(penalize_prompt=True))
    options = [{"max_tokens": 11, "sampling": sampling, "stop_ids": ()} for sampling in samplings]
    alone = [narrow.generate(IDS, **each) for each in options]
    streams = [narrow.stream(IDS, return_state=True, **each) for each in options]
    found: list[list[Any]] = [[], [], []]
    for _ in range(10):
        for stream, chunks in zip(streams, found, strict=True):
            chunks.append(next(stream))
    for stream, chunks, expected in zip(streams, found, alone, strict=True):
        stream.cancel()
        _, ids = texts_of(chunks)
        assert ids == expected.ids[:10]
        assert_same(stream.snapshot, narrow.prefill(None, IDS + ids))


@pytest.mark.parametrize("count", range(1, 10))
def test_a_text_without_its_slot_can_be_cancelled_anywhere(narrow: Engine, count: int) -> None:
    stream = narrow.stream(IDS, max_tokens=9, return_state=True, sampling=GREEDY, stop_ids=())
    chunks = some(stream, count)
    narrow.generate((3, 4), max_tokens=2)
    stream.cancel()
    assert narrow._scheduler.num_queued == 0
    assert_same(stream.snapshot, narrow.prefill(None, IDS + texts_of(chunks)[1]))


def test_paused_texts_make_room_for_one_that_needs_two_slots(engine: Engine) -> None:
    expected = engine.generate(IDS, max_tokens=6, sampling=GREEDY, guidance_scale=2.0, negative_prompt="x")
    streams = [engine.stream((i, *IDS), return_state=True, max_tokens=20, seed=i) for i in range(2, 6)]
    chunks = [some(stream, 1) for stream in streams]
    assert engine._scheduler.num_running == 4
    found = engine.generate(IDS, max_tokens=6, sampling=GREEDY, guidance_scale=2.0, negative_prompt="x")
    assert found.ids == expected.ids
    streams.pop().cancel()
    assert (
        engine.generate(IDS, max_tokens=6, sampling=GREEDY, guidance_scale=2.0, negative_prompt="x").ids == expected.ids
    )
    for i, stream in enumerate(streams):
        _, ids = texts_of(chunks[i] + list(stream))
        assert ids == engine.generate((i + 2, *IDS), max_tokens=20, seed=i + 2).ids


def test_two_prompts_of_which_one_begins_the_other_can_both_be_left(engine: Engine) -> None:
    """The second waits for the first to be read, which never is, and nobody else waits for either."""
    first = engine.stream((200, *LONG_IDS), max_tokens=3)
    second = engine.stream((200, *LONG_IDS, 7), max_tokens=3, sampling=GREEDY)
    engine.generate((5,), max_tokens=1)
    assert (engine._scheduler.num_running, engine._scheduler.num_queued) == (1, 1)
    first.cancel()
    assert len(list(second)) == 3


# Sessions


def test_fifty_sessions_never_mix(engine: Engine) -> None:
    draws = np.random.default_rng(1)
    each = list(prompts(7, 50, 20))
    sessions = [engine.session() for _ in each]
    for session, prompt in zip(sessions, each, strict=True):
        session.append(prompt)
    texts = [list(prompt) for prompt in each]
    for turn in range(2):
        streams = {
            i: session.stream((turn + 1, i + 1), max_tokens=7, seed=i, stop_ids=())
            for i, session in enumerate(sessions)
        }
        for i in streams:
            texts[i] += [turn + 1, i + 1]
        while streams:
            i = int(draws.choice(list(streams)))
            chunk = next(streams[i], None)
            if chunk is None:
                del streams[i]
            else:
                texts[i] += chunk.ids
    for i, (session, prompt) in enumerate(zip(sessions, each, strict=True)):
        assert session.num_tokens == len(texts[i]) == len(prompt) + 2 * (2 + 7)
        assert_same(session.snapshot, engine.prefill(None, texts[i]))
        alone = engine.generate((*prompt, 1, i + 1), max_tokens=7, seed=i, stop_ids=())
        assert list(alone.ids) == texts[i][len(prompt) + 2 : len(prompt) + 9]


def test_sessions_with_equal_requests_at_different_states(narrow: Engine) -> None:
    """They pause, queue and are cancelled beside each other, and nothing compares their states."""
    begun = narrow.session()
    begun.append(IDS)
    other = begun.fork()
    other.append((9,))
    streams = [session.stream(max_tokens=9, sampling=GREEDY, stop_ids=()) for session in (begun, other)]
    ids = [[*next(streams[i]).ids, *next(streams[i]).ids] for i in range(2)]
    for stream in streams:
        stream.cancel()
    assert_same(begun.snapshot, narrow.prefill(None, (*IDS, *ids[0])))
    assert_same(other.snapshot, narrow.prefill(None, (*IDS, 9, *ids[1])))


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("num_tokens", [10_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_a_session_that_goes_on_takes_no_more_memory(narrow: Engine, num_tokens: int) -> None:
    session = narrow.session()
    session.append(IDS)
    options: dict[str, Any] = {"max_tokens": 500, "stop_ids": ()}

    def speak(count: int) -> None:
        for seed in range(count // options["max_tokens"]):
            for chunk in session.stream(seed=seed, **options):
                assert len(chunk.ids) == 1

    speak(1_000)
    before = resident_bytes()
    size = session.nbytes
    speak(num_tokens)
    assert resident_bytes() - before < 5e6
    assert session.nbytes == size
    assert session.num_tokens == len(IDS) + 1_000 + num_tokens
