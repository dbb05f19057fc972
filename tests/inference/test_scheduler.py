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
    CONFIGS,
    GREEDY,
    IDS,
    LONG_IDS,
    VOCAB_SIZE,
    Stepped,
    assert_free,
    assert_same,
    prompts,
    quick_engine,
    random_model,
    some,
    texts_in,
    texts_of,
    what_was_read,
)

OURS = {"jit(_make)", "jit(_put)", "jit(_take)", "jit(_prefill)", "jit(_decode)"}


def live_bytes() -> int:
    """Of all arrays of this process."""
    return sum(x.nbytes for x in jax.live_arrays() if not x.is_deleted())


@pytest.fixture(scope="module")
def stepped() -> Stepped:
    return Stepped(random_model(CONFIGS["7"]), max_queue=60)


# Coming and going


def test_a_hundred_prompts_take_eight_programs(engine: Engine, compiled: list[str]) -> None:
    for i, prompt in enumerate(prompts(0, 60, 90)):
        engine.generate(prompt, max_tokens=1 + i % 7, seed=i)
    assert engine.prefix_cache is not None
    before = live_bytes() - engine.prefix_cache.nbytes
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
    stream = None
    assert_free(engine)
    assert live_bytes() - engine.prefix_cache.nbytes < before + 2**16  # steps donate the slots


def test_weights_that_were_put_on_a_device_take_no_more_programs(engine: Engine, compiled: list[str]) -> None:
    """As those from files are; those of other tests come from a program."""
    placed = quick_engine(
        nnx.merge(*jax.device_put(nnx.split(engine.model), jax.devices()[0])), fresh=True, num_slots=2
    )
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


def test_rows_that_take_no_part_are_untouched(stepped: Stepped) -> None:
    """Of a paused text, and of slots that nobody has, down to the last bit."""

    def rows() -> list[list[Any]]:
        slots = stepped.scheduler.slots
        return [[np.array(x) for x in jax.tree.leaves(slots.row(slot))] for slot in range(slots.count)]

    def assert_identical(found: list[Any], expected: list[Any]) -> None:
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_array_equal(x, y)

    paused = stepped.queue(IDS, return_state=True, max_tokens=50, sampling=SamplingParams.rwkv())
    stepped.step(3)
    assert paused.is_paused
    (own,) = paused.slots
    before = rows()
    others = [stepped.queue(ids, max_tokens=1000, stop_ids=()) for ids in (LONG_IDS[::-1], (5,), IDS)]
    stepped.step(30)
    after = rows()
    assert {slot for job in others for slot in job.slots} == set(range(4)) - {own}
    for job in others:
        stepped.scheduler.cancel(job)
    stepped.finish(stepped.queue((7, *LONG_IDS), max_tokens=3))  # on its own
    assert_identical(before[own], after[own])
    assert_identical(before[own], rows()[own])
    for slot in set(range(4)) - {own}:
        assert any(not np.array_equal(x, y) for x, y in zip(before[slot], after[slot], strict=True))
    stepped.scheduler.cancel(paused)

    free = stepped.scheduler.slots.free[0]
    before = rows()
    stepped.finish(*(stepped.queue(ids, max_tokens=9) for ids in (IDS, (9, 8))))
    assert_identical(before[free], rows()[free])


def test_a_short_prompt_does_not_wait_for_a_long_one(stepped: Stepped) -> None:
    long_prompt = np.random.default_rng(0).integers(1, VOCAB_SIZE, 10_000).tolist()
    long, short = stepped.queue(long_prompt), stepped.queue(IDS[:4])
    stepped.step(3)
    assert short.chunks
    assert long.is_prefilling
    later = stepped.queue(IDS[:4])
    stepped.step()
    assert later.chunks  # though the long one was read before it came
    stepped.scheduler.cancel(later)
    other = stepped.queue(long_prompt[::-1])
    stepped.step(8)
    assert len(short.chunks) >= 8
    assert 0 < long.cursors[0].num_prefilled < 1000
    assert 0 < other.cursors[0].num_prefilled < 1000
    for job in (long, short, other):
        stepped.scheduler.cancel(job)


# Waiting


def test_a_full_queue_refuses_and_goes_on(narrow: Engine) -> None:
    with narrow.hold():
        streams = [narrow.stream([IDS, IDS], max_tokens=3, sampling=GREEDY) for _ in range(2)]
        with pytest.raises(QueueFullError, match=r"^queue: 4 texts wait, and 1 more would pass max_queue = 4; collect"):
            narrow.stream(IDS)
        streams[1].cancel()
        with pytest.raises(QueueFullError, match=r"^queue: 2 texts wait, and 3 more would pass max_queue = 4; collect"):
            narrow.stream([IDS] * 3)
        streams[1] = narrow.stream([IDS, IDS], max_tokens=3, sampling=GREEDY)
    # Of a list what does not fit waits outside the queue.
    alone = narrow.generate([IDS] * 9, max_tokens=3, sampling=GREEDY)
    assert len({completion.ids for completion in alone}) == 1
    assert [len(list(stream)) for stream in streams] == [2 * 3, 2 * 3]


def test_clients_take_turns() -> None:
    narrow = Stepped(random_model(CONFIGS["7"]), num_slots=1, max_queue=4)
    first = [narrow.queue(IDS, max_tokens=2, client_id="a") for _ in range(3)]
    second = narrow.queue(IDS, max_tokens=2, client_id="b")
    waiting, order = [*first, second], []
    while waiting:
        narrow.step()
        order += [job for job in waiting if job.has_begun]
        waiting = [job for job in waiting if not job.has_begun]
    assert order == [first[0], second, first[1], first[2]]


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
    assert texts_in(narrow) == (0, 0, 0)
    assert_same(stream.snapshot, narrow.prefill(None, IDS + texts_of(chunks)[1]))


def test_paused_texts_make_room_for_one_that_needs_two_slots(engine: Engine) -> None:
    expected = engine.generate(IDS, max_tokens=6, sampling=GREEDY, guidance_scale=2.0, negative_prompt="x")
    streams = [engine.stream((i, *IDS), return_state=True, max_tokens=20, seed=i) for i in range(2, 6)]
    chunks = [some(stream, 1) for stream in streams]
    assert engine.stats().num_running == 4
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
    with engine.hold():
        first = engine.stream((200, *LONG_IDS * 200), max_tokens=3)
        second = engine.stream((200, *LONG_IDS * 200, 7), max_tokens=3, sampling=GREEDY)
    engine.generate((5,), max_tokens=1)
    assert texts_in(engine) == (1, 1, 0)
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
