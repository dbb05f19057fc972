"""What comes at a bad moment: finalizers and interrupts during a step, slow consumers, broken states."""

from __future__ import annotations

import _thread
import dataclasses
import gc
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from rwkv_jax.inference.engine import engine as engine_module
from rwkv_jax.inference.engine.driver import EngineClosedError
from rwkv_jax.inference.engine.engine import Engine
from rwkv_jax.inference.engine.requests import QueueFullError
from rwkv_jax.inference.engine.scheduler import Scheduler
from rwkv_jax.inference.engine.slot_arrays import SlotArrays
from rwkv_jax.inference.sampling.params import SamplingParams
from rwkv_jax.inference.state.snapshot import Snapshot
from tests.inference.models import (
    CONFIGS,
    GREEDY,
    Stepped,
    assert_free,
    assert_same,
    prompts,
    quick_engine,
    random_model,
    some,
    texts_of,
)

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
    assert_free(engine)


@pytest.fixture(scope="module")
def stopped(engine: Engine) -> dict[str, Any]:
    """What a stream is asked for that a stop string ends in the midst of its second burst."""
    for seed in range(100):
        drawn: dict[str, Any] = {"sampling": SamplingParams(temperature=2.0), "stop_ids": (), "seed": seed}
        ids = engine.generate(IDS, max_tokens=12, **drawn).ids
        if ids[5] < 128 and ids[5] not in ids[:5]:
            return drawn | {"max_tokens": 12, "stop": [chr(ids[5])]}
    raise AssertionError("no seed stops there")


def in_the_next_step(monkeypatch: pytest.MonkeyPatch, action: Callable[[], Any]) -> None:
    """Has something done by the engine's thread, in the midst of the next step that decodes."""
    decode = SlotArrays.decode

    def disturbed(*arguments: Any) -> Any:
        monkeypatch.setattr(SlotArrays, "decode", decode)
        action()
        return decode(*arguments)

    monkeypatch.setattr(SlotArrays, "decode", disturbed)


def until(condition: Callable[[], bool]) -> None:
    """Waits, though not for ever."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, which programs in the background ignore."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


# States at the end


def test_a_stop_string_after_a_pause_leaves_the_state_behind_it(engine: Engine, stopped: dict[str, Any]) -> None:
    stream = engine.stream(IDS, return_state=True, **stopped)
    chunks = some(stream, 1)
    engine.generate([OTHER, IDS, OTHER], max_tokens=3)  # both slots are wanted, so that the stream gives its own up
    chunks += list(stream)
    ids = texts_of(chunks)[1]
    assert len(ids) == 6
    assert_same(stream.snapshot, engine.prefill(None, IDS + ids))


def test_the_end_of_a_reply_waits_for_nobodys_slot(engine: Engine, stopped: dict[str, Any]) -> None:
    """The state behind a stop string is read in a slot that is lent for the moment, and given back as it was."""
    expected = [engine.generate(ids, max_tokens=600, **PLAIN).ids for ids in (OTHER, IDS)]
    stream = engine.stream(IDS, return_state=True, **stopped)
    chunks = list(stream)
    others = [engine.stream(ids, max_tokens=600, **PLAIN) for ids in (OTHER, IDS)]
    begun = [some(other, 1) for other in others]
    assert engine.stats().num_running == 2
    snapshot = stream.snapshot
    assert engine.stats().num_running == 2
    for other, first, ids in zip(others, begun, expected, strict=True):
        assert texts_of([*first, *other])[1] == ids
    assert_same(snapshot, engine.prefill(None, IDS + texts_of(chunks)[1]))


def test_a_device_that_fails_while_a_slot_is_lent_ends_the_texts_with_slots(
    engine: Engine, stopped: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = engine.stream(IDS, return_state=True, **stopped)
    list(stream)
    others = [engine.stream(ids, max_tokens=100_000, **PLAIN) for ids in (OTHER, IDS)]
    for other in others:
        next(other)

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as context:
        context.setattr(SlotArrays, "prefill", broken)
        with pytest.raises(RuntimeError, match="the device is gone"):
            _ = stream.snapshot
    for other in others:
        with pytest.raises(RuntimeError, match="the device is gone"):
            list(other)
    assert stream.snapshot is not None
    assert stream.snapshot.num_tokens == len(IDS) + 6


# Finalizers, which Python may run in any thread, and interrupts, which reach the main one


def test_a_generator_that_is_dropped_during_a_step_harms_nobody(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generator() -> Generator[str]:
        with engine.stream(IDS, max_tokens=5000, **PLAIN) as stream:
            for chunk in stream:
                yield chunk.text

    expected = engine.generate(OTHER, max_tokens=20, **PLAIN).ids
    dropped = generator()
    next(dropped)
    in_the_next_step(monkeypatch, dropped.close)
    assert engine.generate(OTHER, max_tokens=20, **PLAIN).ids == expected
    assert_free(engine)


def test_a_session_whose_stream_is_dropped_during_a_step_stays_where_it_was(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = engine.session()
    session.append(IDS)
    stream = session.stream(max_tokens=50, **PLAIN)
    next(stream)
    in_the_next_step(monkeypatch, stream.cancel)
    engine.generate(OTHER, max_tokens=9)
    assert session.num_tokens == len(IDS)
    assert session.generate(max_tokens=3, **PLAIN).ids == engine.generate(IDS, max_tokens=3, **PLAIN).ids


def test_a_finalizer_does_not_wait_for_the_thread_that_it_runs_in(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = engine.stream(OTHER, max_tokens=9, **PLAIN)
    errors: list[str] = []

    def wait() -> None:
        for call in (lambda: list(waiting), lambda: engine.generate(OTHER), lambda: engine.prefill(None, IDS)):
            with pytest.raises(RuntimeError, match="midst of a step") as error:
                call()
            errors.append(str(error.value))

    with engine.hold():
        stream = engine.stream(IDS, max_tokens=3, **PLAIN)
        in_the_next_step(monkeypatch, wait)
    assert len(list(stream)) == 3
    assert len(errors) == 3
    waiting.cancel()


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_end_can_be_taken_up(
    engine: Engine, stopped: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = engine.session()
    session.append(IDS)
    stream = session.stream(**stopped)
    prefilled = SlotArrays.prefilled

    def interrupting(*arguments: Any) -> Snapshot:
        monkeypatch.setattr(SlotArrays, "prefilled", prefilled)
        _thread.interrupt_main()
        return prefilled(*arguments)

    monkeypatch.setattr(SlotArrays, "prefilled", interrupting)
    chunks = []
    with pytest.raises(KeyboardInterrupt):
        chunks.extend(chunk for chunk in stream if chunks.append(chunk))
    session.cancel()
    assert session.num_tokens == len(IDS) + len(texts_of(chunks)[1]) == len(IDS) + 6


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_generate_leaves_its_session(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    session = engine.session()
    session.append(IDS)
    in_the_next_step(monkeypatch, _thread.interrupt_main)
    with pytest.raises(KeyboardInterrupt):
        session.generate(max_tokens=50_000, **PLAIN)
    assert session.num_tokens == len(IDS)
    assert not session.is_in_use


def test_an_iterators_end_is_no_error_of_a_text(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """StopIteration from somewhere within would pass for the end of the text."""
    with engine.hold():
        stream = engine.stream(IDS, max_tokens=5, **PLAIN)
        monkeypatch.setattr(stream._jobs[0], "add_burst", lambda *_: next(iter(())))
    with pytest.raises(RuntimeError, match="could not be generated"):
        list(stream)


# The thread


def test_a_closed_engine_ends_its_texts_and_takes_no_more() -> None:
    with quick_engine(random_model(CONFIGS["7"]), num_slots=2) as engine:
        streams = [engine.stream(IDS, max_tokens=100_000, **PLAIN) for _ in range(3)]
        next(streams[0])
    for stream in streams:
        with pytest.raises(EngineClosedError, match="before this text's end"):
            list(stream)
        stream.cancel()
    for call in (lambda: engine.generate(IDS), lambda: engine.stream(IDS), engine.start, engine.warm_up):
        with pytest.raises(EngineClosedError, match="build another one"):
            call()
    engine.close()


def test_an_engine_may_close_while_a_text_is_submitted() -> None:
    """Which ends with the engine, or is refused; its consumer does not wait for ever."""
    for _ in range(30):
        engine = quick_engine(random_model(CONFIGS["7"]), num_slots=2)
        engine.start()
        closing = threading.Thread(target=engine.close)
        closing.start()
        with pytest.raises(EngineClosedError):
            list(engine.stream(IDS, max_tokens=2**40, **PLAIN))
        closing.join()


def test_a_thread_that_fails_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    others = set(threading.enumerate())
    engine = quick_engine(random_model(CONFIGS["7"]), num_slots=2)
    stream = engine.stream(IDS, max_tokens=100_000, **PLAIN)
    next(stream)
    monkeypatch.setattr(Scheduler, "step", lambda _: 1 / 0)
    with pytest.raises(EngineClosedError, match="thread has failed: ZeroDivisionError"):
        list(stream)
    with pytest.raises(EngineClosedError, match="build another one"):
        engine.generate(IDS)
    stream.cancel()
    for thread in set(threading.enumerate()) - others:
        thread.join()  # its traceback is shown in the end


def test_cached_tokens_are_the_prompts_own() -> None:
    engine = quick_engine(random_model(CONFIGS["7"]), min_prefix_tokens=1)
    negative = tuple(range(1, 31))
    engine.prefill(None, negative)
    stream = engine.stream(IDS, max_tokens=1, guidance_scale=2.0, negative_prompt=negative)
    list(stream)
    assert stream.num_cached_tokens == (0,)


def test_an_engine_that_nobody_has_any_more_ends_its_thread() -> None:
    others = set(threading.enumerate())
    engine = quick_engine(random_model(CONFIGS["7"]), num_slots=2)
    stream = engine.stream(IDS, max_tokens=9, **PLAIN)
    (thread,) = set(threading.enumerate()) - others
    del engine
    assert len(list(stream)) == 9  # it keeps the thread
    assert thread.is_alive()
    del stream
    gc.collect()
    until(lambda: not thread.is_alive())


def test_python_ends_with_texts_under_way() -> None:
    """Without a crash or a word, though nobody has closed the engine."""
    code = (
        "from tests.inference.models import *\n"
        "engine = quick_engine(random_model(CONFIGS['4']), num_slots=1)\n"
        "stream = engine.stream(IDS, max_tokens=100_000, stop_ids=())\n"
        "next(stream)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stderr) == (0, "")


def test_texts_submitted_together_start_together(engine: Engine) -> None:
    before = engine.stats().generated_tokens
    with engine.hold():
        streams = [engine.stream(ids, max_tokens=3, **PLAIN) for ids in (IDS, OTHER)]
        time.sleep(0.02)
        assert (engine.stats().num_queued, engine.stats().generated_tokens) == (2, before)
    assert [len(list(stream)) for stream in streams] == [3, 3]


def test_warming_up_compiles_everything_and_changes_nothing(compiled: list[str]) -> None:
    engine = quick_engine(random_model(CONFIGS["7"]), fresh=True, num_slots=2, prefix_bytes=0)
    with engine.stream(IDS, max_tokens=40, return_state=True, **PLAIN) as stream:
        chunks = some(stream, 5)
        engine.warm_up()
        compiled.clear()
        chunks += list(stream)
    assert texts_of(chunks)[1] == engine.generate(IDS, max_tokens=40, **PLAIN).ids
    engine.generate([IDS * 9, OTHER, OTHER], max_tokens=9, top_logprobs=3)
    engine.embed([IDS * 9, OTHER])
    assert [name for name in compiled if name.startswith("jit(_")] == []


def test_64_bit_types_are_those_of_where_the_engine_was_built() -> None:
    """And not of whoever happens to wait for it."""
    engine = quick_engine(random_model(CONFIGS["4"]), num_slots=2)
    expected = engine.generate(IDS, max_tokens=5, **PLAIN)
    with jax.enable_x64(True):
        assert engine.generate(IDS, max_tokens=5, **PLAIN) == expected


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


# Slow consumers, and others


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
    step = Scheduler.step

    def noted(self: Scheduler) -> bool:
        rooms.append(self.room)
        return step(self)

    monkeypatch.setattr(Scheduler, "step", noted)
    found = engine.generate(list(prompts(5, 30, 9)), max_tokens=3, **PLAIN)
    assert [completion.index for completion in found] == list(range(30))
    assert min(rooms) == engine.options.max_queue - engine.options.num_slots


def test_a_text_that_nobody_collects_waits(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "_MAX_PENDING_CHUNKS", 6)
    expected = engine.generate(IDS, max_tokens=40, **PLAIN).ids
    left_alone = engine.stream(IDS, max_tokens=40, **PLAIN)
    for _ in range(5):
        engine.generate(OTHER, max_tokens=20, **PLAIN)
    until(lambda: left_alone._jobs[0].is_paused)
    assert 6 <= len(left_alone._jobs[0].chunks) < 6 + engine.options.burst_length
    assert texts_of(list(left_alone))[1] == expected


def test_prompts_are_compared_once_and_not_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    stepped = Stepped(random_model(CONFIGS["7"]), num_slots=2)
    beginning = tuple(np.random.default_rng(0).integers(1, 256, 200).tolist())
    assert stepped.prefix_cache is not None
    lookup, found = stepped.prefix_cache.lookup, []
    monkeypatch.setattr(stepped.prefix_cache, "lookup", lambda *key: (found.append(lookup(*key)), found[-1])[1])
    first = stepped.queue(beginning, max_tokens=1, **PLAIN)
    stepped.step()
    others = [stepped.queue((*beginning, i), max_tokens=1, **PLAIN) for i in range(5)]
    stepped.step()
    assert [other.waits_for for other in others] == [first] * 5
    stepped.finish(first, *others)
    assert [length for length, _ in filter(None, found)] == [200] * 5
