"""What comes at a bad moment: finalizers and interrupts in the midst of a step, slow readers, broken states."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator
from typing import Any

import jax
import numpy as np
import pytest

from rwkv_jax.inference.engine import engine as engine_module
from rwkv_jax.inference.engine.engine import Engine
from rwkv_jax.inference.engine.requests import QueueFullError
from rwkv_jax.inference.sampling.params import SamplingParams
from rwkv_jax.inference.state.snapshot import Snapshot
from tests.inference.models import CONFIGS, GREEDY, assert_same, prompts, quick_engine, random_model, some, texts_of

IDS = (1, 40, 41, 42, 43)
OTHER = (7, 3, 1)
PLAIN: dict[str, Any] = {"sampling": GREEDY, "stop_ids": ()}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return quick_engine(random_model(CONFIGS["7"]), num_slots=2, prefix_bytes=0, max_queue=6)


@pytest.fixture(autouse=True)
def nothing_is_left(engine: Engine) -> Any:
    """No test leaves a text in a slot or in the queue."""
    yield
    engine.generate("x", max_tokens=1)
    assert (engine._scheduler.num_running, engine._scheduler.num_queued) == (0, 0)


@pytest.fixture(scope="module")
def stopped(engine: Engine) -> dict[str, Any]:
    """What a stream is asked for that a stop string ends in the midst of its second burst."""
    for seed in range(100):
        drawn: dict[str, Any] = {"sampling": SamplingParams(temperature=2.0), "stop_ids": (), "seed": seed}
        ids = engine.generate(IDS, max_tokens=12, **drawn).ids
        if ids[5] < 128 and ids[5] not in ids[:5]:
            return drawn | {"max_tokens": 12, "stop": [chr(ids[5])]}
    raise AssertionError("no seed stops there")


def in_the_next_turn(engine: Engine, monkeypatch: pytest.MonkeyPatch, action: Callable[[], Any]) -> None:
    """Has something done in the midst of the next step that decodes."""
    programs = engine._scheduler._programs
    decode = programs.decode

    def disturbed(*arguments: Any, **named: Any) -> Any:
        monkeypatch.setattr(programs, "decode", decode)
        action()
        return decode(*arguments, **named)

    monkeypatch.setattr(programs, "decode", disturbed)


# States at the end


def test_a_stop_string_after_a_pause_leaves_the_state_behind_it(engine: Engine, stopped: dict[str, Any]) -> None:
    stream = engine.stream(IDS, return_state=True, **stopped)
    chunks = some(stream, 1)
    engine.generate([OTHER, IDS, OTHER], max_tokens=3)  # both slots are wanted, so that the stream gives its own up
    chunks += list(stream)
    ids = texts_of(chunks)[1]
    assert len(ids) == 6
    assert_same(stream.snapshot, engine.prefill(None, IDS + ids))


def test_the_end_of_a_reply_waits_for_nobodys_slot(
    engine: Engine, stopped: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state behind a stop string is read in a slot that is lent for the moment, and given back as it was."""
    expected = [engine.generate(ids, max_tokens=30, **PLAIN).ids for ids in (OTHER, IDS)]
    stream = engine.stream(IDS, return_state=True, **stopped)
    chunks = some(stream, 4)
    others = [engine.stream(ids, max_tokens=30, **PLAIN) for ids in (OTHER, IDS)]
    while not stream._jobs[0].is_done:
        chunks += some(stream, 1)
    begun = [some(other, 1) for other in others]
    assert not engine._scheduler._free
    with monkeypatch.context() as context:
        context.setattr(engine._scheduler, "step", lambda: pytest.fail("it ran the others"))
        chunks += list(stream)
        snapshot = stream.snapshot
    for other, first, ids in zip(others, begun, expected, strict=True):
        assert texts_of([*first, *other])[1] == ids
    assert_same(snapshot, engine.prefill(None, IDS + texts_of(chunks)[1]))


def test_a_device_that_fails_while_a_slot_is_lent_ends_the_texts_with_slots(
    engine: Engine, stopped: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = engine.stream(IDS, return_state=True, **stopped)
    list(stream)
    others = [engine.stream(ids, max_tokens=30, **PLAIN) for ids in (OTHER, IDS)]
    for other in others:
        next(other)

    def broken(*_: Any) -> Any:
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as context:
        context.setattr(engine._scheduler._programs, "prefill", broken)
        with pytest.raises(RuntimeError, match="the device is gone"):
            _ = stream.snapshot
    for other in others:
        with pytest.raises(RuntimeError, match="the device is gone"):
            list(other)
    assert stream.snapshot is not None
    assert stream.snapshot.num_tokens == len(IDS) + 6


# Finalizers and interrupts


def test_a_finalizer_in_the_midst_of_a_turn_harms_nobody(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def generator() -> Generator[str]:
        with engine.stream(IDS, max_tokens=50, **PLAIN) as stream:
            for chunk in stream:
                yield chunk.text

    expected = engine.generate(OTHER, max_tokens=20, **PLAIN).ids
    dropped = generator()
    next(dropped)
    other = engine.stream(OTHER, max_tokens=20, **PLAIN)
    in_the_next_turn(engine, monkeypatch, dropped.close)
    assert texts_of(list(other))[1] == expected
    assert engine._scheduler.num_running == 0


def test_a_session_whose_stream_ends_in_a_turn_stays_where_it_was(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = engine.session()
    session.append(IDS)
    stream = session.stream(max_tokens=50, **PLAIN)
    next(stream)
    in_the_next_turn(engine, monkeypatch, stream.cancel)
    engine.generate(OTHER, max_tokens=9)
    assert session.num_tokens == len(IDS)
    assert session.generate(max_tokens=3, **PLAIN).ids == engine.generate(IDS, max_tokens=3, **PLAIN).ids


def test_a_finalizer_cannot_run_the_engine_in_its_turn(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = engine.stream(OTHER, max_tokens=9, **PLAIN)

    def run_the_engine() -> None:
        with pytest.raises(RuntimeError, match="midst of a step"):
            next(stream)

    in_the_next_turn(engine, monkeypatch, run_the_engine)
    assert engine.generate(IDS, max_tokens=3, **PLAIN).finish_reason == "length"
    assert len(texts_of(list(stream))[1]) == 9


def test_an_interrupted_end_can_be_taken_up(
    engine: Engine, stopped: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = engine.session()
    session.append(IDS)
    stream = session.stream(**stopped)

    def interrupted(*_: Any) -> Snapshot:
        raise KeyboardInterrupt

    chunks = []
    with monkeypatch.context() as context:
        context.setattr(engine._scheduler, "extend", interrupted)
        with pytest.raises(KeyboardInterrupt):
            chunks.extend(chunk for chunk in stream if chunks.append(chunk))
    session.cancel()
    assert session.num_tokens == len(IDS) + len(texts_of(chunks)[1]) == len(IDS) + 6


def test_an_interrupted_generate_leaves_its_session(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    session = engine.session()
    session.append(IDS)
    step, count = engine._scheduler.step, iter(range(9))

    def interrupted() -> bool:
        if next(count) == 2:
            raise KeyboardInterrupt
        return step()

    with monkeypatch.context() as context:
        context.setattr(engine._scheduler, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.generate(max_tokens=50, **PLAIN)
    assert session.num_tokens == len(IDS)
    assert not session.is_in_use


def test_an_iterators_end_is_no_error_of_a_text(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """StopIteration from somewhere within would pass for the end of the text."""
    stream = engine.stream(IDS, max_tokens=5, **PLAIN)
    monkeypatch.setattr(stream._jobs[0], "add_burst", lambda *_: next(iter(())))
    with pytest.raises(RuntimeError, match="could not be generated"):
        list(stream)


# What one text brings along


def test_a_deleted_state_is_its_own_texts_failure(engine: Engine) -> None:
    expected = engine.generate(OTHER, max_tokens=20, **PLAIN).ids
    snapshot = engine.prefill(None, IDS)
    state = jax.tree.map(lambda x: x + 0, snapshot.state)
    jax.tree.leaves(state)[0].delete()
    other = engine.stream(OTHER, max_tokens=20, **PLAIN)
    first = some(other, 1)
    with pytest.raises(RuntimeError, match="deleted"):
        engine.generate("x", state=dataclasses.replace(snapshot, state=state), max_tokens=2)
    assert texts_of([*first, *other])[1] == expected


# Slow readers, and others


def test_texts_that_come_back_let_others_pass(engine: Engine) -> None:
    readers = [engine.stream(IDS, max_tokens=4000, return_state=True, client_id=str(i), **PLAIN) for i in range(3)]
    for reader in readers:
        next(reader)
    last = engine.stream(OTHER, max_tokens=3, client_id="last", **PLAIN)
    for _ in range(20):
        for reader in readers:
            next(reader)
    assert last._jobs[0].is_done
    for stream in (*readers, last):
        stream.cancel()


def test_half_collected_texts_do_not_make_others_wait_for_ever(engine: Engine) -> None:
    streams = []
    for _ in range(2 + engine.options.max_queue):
        streams.append(engine.stream(IDS, max_tokens=50, return_state=True, **PLAIN))
        next(streams[-1])
    with pytest.raises(QueueFullError, match=r"0 texts wait \(6 others are half collected\), and 1 more"):
        engine.stream(IDS)
    for call in (lambda: engine.generate(OTHER, max_tokens=2), lambda: engine.prefill(None, OTHER)):
        with pytest.raises(QueueFullError, match=r"max_queue = 6, and as many texts are half collected"):
            call()
    for stream in streams:
        stream.cancel()


def test_many_prompts_at_once_leave_room_for_others(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    rooms: list[int] = []
    step = engine._scheduler.step
    monkeypatch.setattr(engine._scheduler, "step", lambda: (rooms.append(engine._scheduler.room), step())[1])
    found = engine.generate(list(prompts(5, 30, 9)), max_tokens=3, **PLAIN)
    assert [completion.index for completion in found] == list(range(30))
    assert min(rooms) == engine.options.max_queue - engine.options.num_slots


def test_a_text_that_nobody_collects_waits(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "_MAX_PENDING_CHUNKS", 6)
    expected = engine.generate(IDS, max_tokens=40, **PLAIN).ids
    left_alone = engine.stream(IDS, max_tokens=40, **PLAIN)
    for _ in range(5):
        engine.generate(OTHER, max_tokens=20, **PLAIN)
    assert 6 <= len(left_alone._jobs[0].chunks) < 6 + engine.options.burst_length
    assert texts_of(list(left_alone))[1] == expected


def test_prompts_are_compared_once_and_not_at_every_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = quick_engine(random_model(CONFIGS["7"]), num_slots=2)
    beginning = tuple(np.random.default_rng(0).integers(1, 256, 200).tolist())
    assert engine.prefix_cache is not None
    lookup, found = engine.prefix_cache.lookup, []
    monkeypatch.setattr(engine.prefix_cache, "lookup", lambda ids: (found.append(lookup(ids)), found[-1])[1])
    first = engine.stream(beginning, max_tokens=1, **PLAIN)
    engine._scheduler.step()
    others = [engine.stream((*beginning, i), max_tokens=1, **PLAIN) for i in range(5)]
    engine._scheduler.step()
    assert [other._jobs[0].waits_for for other in others] == [first._jobs[0]] * 5
    for other in others:
        assert len(list(other)) == 1
    assert [length for length, _ in filter(None, found)] == [200] * 5
