"""Texts that share slots: whoever fails, is interrupted or refused harms nobody beside it."""

from __future__ import annotations

import _thread
import copy
import gc
import signal
from typing import Any

import jax
import numpy as np
import pytest

from rwkv_jax.inference.engine.engine import Engine
from rwkv_jax.inference.engine.requests import NotFiniteError, QueueFullError
from rwkv_jax.inference.engine.scheduler import Scheduler
from rwkv_jax.inference.engine.slot_arrays import SlotArrays
from tests.inference.bad_requests import bad_requests
from tests.inference.models import GREEDY, IDS, LONG_IDS, assert_free, assert_same, prompts, some, texts_of

# Failures


def test_a_number_of_tokens_without_end_harms_nobody(engine: Engine) -> None:
    expected = engine.generate(IDS, max_tokens=9, sampling=GREEDY)
    with (
        engine.stream(IDS, max_tokens=2**70, stop_ids=()) as endless,
        engine.stream(IDS, max_tokens=9, sampling=GREEDY) as other,
    ):
        assert next(endless).ids
        assert texts_of(list(other))[1] == expected.ids


def test_a_tokenizer_that_fails_ends_one_text(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = engine.generate(IDS, max_tokens=9, sampling=GREEDY)
    with engine.hold():
        fails, goes_on = (engine.stream(IDS, max_tokens=9, sampling=GREEDY) for _ in range(2))
        monkeypatch.setattr(fails._jobs[0].text, "push", lambda token: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(fails)
    assert texts_of(list(goes_on))[1] == expected.ids


def test_a_queue_of_forgotten_texts_has_room(narrow: Engine) -> None:
    with narrow.hold():
        streams = [narrow.stream(IDS, max_tokens=9) for _ in range(4)]
        with pytest.raises(QueueFullError):
            narrow.stream(IDS)
        del streams
        gc.collect()
        narrow.stream(IDS).cancel()


def test_more_prompts_than_may_wait_are_all_written(narrow: Engine) -> None:
    expected = narrow.generate(IDS, max_tokens=3, sampling=GREEDY)
    with narrow.hold():
        waiting = [narrow.stream(IDS, max_tokens=2) for _ in range(4)]  # others have filled the queue
    assert [done.ids for done in narrow.generate([IDS] * 7, max_tokens=3, sampling=GREEDY)] == [expected.ids] * 7
    assert narrow.prefill(None, IDS).num_tokens == len(IDS)
    for stream in waiting:
        assert len(list(stream)) == 2


def test_an_interrupt_stops_no_step(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's text is lost; whose it was can still be cancelled where its consumer stood."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # programs in the background ignore it
    session = engine.session()
    stream = session.stream(IDS, max_tokens=9, sampling=GREEDY, stop_ids=())
    ids = [*next(stream).ids, *next(stream).ids]
    other = engine.stream(IDS, max_tokens=9, sampling=GREEDY, stop_ids=())
    step = Scheduler.step

    def interrupting(scheduler: Scheduler) -> bool:
        monkeypatch.setattr(Scheduler, "step", step)
        _thread.interrupt_main()
        return step(scheduler)

    def collect_for_ever() -> None:
        while True:
            ids.extend(token for chunk in stream for token in chunk.ids)

    monkeypatch.setattr(Scheduler, "step", interrupting)
    try:
        with pytest.raises(KeyboardInterrupt):
            collect_for_ever()
    finally:
        signal.signal(signal.SIGINT, handler)
    session.cancel()
    assert len(IDS) + len(ids) <= session.num_tokens <= len(IDS) + 9
    assert texts_of(list(other))[1] == engine.generate(IDS, max_tokens=9, sampling=GREEDY, stop_ids=()).ids


@pytest.mark.parametrize("call", ["put", "prefill", "decode", "row"])
def test_a_failure_of_the_device_ends_what_is_running(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """What waits and what pauses elsewhere goes on, in new slots."""
    expected = engine.generate(IDS, max_tokens=9, sampling=GREEDY)
    session = engine.session()
    session.append(IDS)
    works = getattr(SlotArrays, call)

    def fails(slots: SlotArrays, *arguments: Any, **named: Any) -> Any:
        monkeypatch.setattr(SlotArrays, call, works)
        jax.tree.map(lambda x: x.delete(), slots._slots)  # as donation leaves them
        raise OSError("the device is gone")

    # Three that run, one that is about to, and three that wait.
    running = [engine.stream((i, *LONG_IDS), max_tokens=100_000, stop_ids=()) for i in range(2, 5)]
    for stream in running:
        next(stream)
    with engine.hold():
        last = engine.stream((100, *LONG_IDS[::-1]), max_tokens=9, return_state=True)
        waiting = [engine.stream(IDS, max_tokens=9, sampling=GREEDY) for _ in range(3)]
        monkeypatch.setattr(SlotArrays, call, fails)
    with pytest.raises(OSError, match="the device is gone"):
        list(last)
    for stream in running:
        with pytest.raises(OSError, match="the device is gone"):
            list(stream)
        assert next(stream, None) is None
    assert last.snapshot is None
    for stream in waiting:
        assert texts_of(list(stream))[1] == expected.ids
    assert session.generate(max_tokens=9, sampling=GREEDY).ids == expected.ids
    assert_free(engine)


def test_a_device_that_stays_away_ends_what_waits_too(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the engine goes on once it is back."""

    def fails(*_: Any, **__: Any) -> Any:
        raise OSError("the device is gone")

    expected = engine.generate(IDS, max_tokens=3, sampling=GREEDY)
    with engine.hold():
        streams = [engine.stream(IDS, max_tokens=9) for _ in range(7)]
        for name in ("put", "_allocate"):
            monkeypatch.setattr(SlotArrays, name, fails)
    for stream in streams:
        with pytest.raises(OSError, match="the device is gone"):
            list(stream)
    monkeypatch.undo()
    assert engine.generate(IDS, max_tokens=3, sampling=GREEDY).ids == expected.ids


def test_a_text_without_a_slot_outlives_a_failure(narrow: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = narrow.generate(IDS, max_tokens=9, sampling=GREEDY, stop_ids=())
    away = narrow.stream(IDS, max_tokens=9, return_state=True, sampling=GREEDY, stop_ids=())
    chunks = some(away, 2)
    decode = SlotArrays.decode

    def fails(*_: Any) -> Any:
        monkeypatch.setattr(SlotArrays, "decode", decode)
        raise OSError("the device is gone")

    monkeypatch.setattr(SlotArrays, "decode", fails)
    with pytest.raises(OSError, match="the device is gone"):
        narrow.generate((3,), max_tokens=2)
    assert texts_of(chunks + list(away))[1] == expected.ids


def test_logits_that_are_not_finite_end_their_text_alone(engine: Engine) -> None:
    snapshot = engine.prefill(None, IDS)
    broken = copy.copy(snapshot)
    object.__setattr__(broken, "logits", snapshot.logits.at[3].set(np.nan))
    streams = [engine.stream("", state=start, max_tokens=6, seed=2, stop_ids=()) for start in (broken, snapshot)]
    with pytest.raises(NotFiniteError, match=r"^the model's logits are not finite"):
        list(streams[0])
    alone = engine.generate(IDS, max_tokens=6, seed=2, stop_ids=())
    assert texts_of(list(streams[1]))[1] == alone.ids
    assert next(streams[0], None) is None
    assert engine.generate(IDS, max_tokens=6, seed=2, stop_ids=()).ids == alone.ids


# Bad requests among good ones


def test_bad_requests_harm_nobody(engine: Engine) -> None:
    """Two hundred, of which more than half are refused, among texts and sessions that are under way."""
    draws = np.random.default_rng(2)
    bad = bad_requests(engine)
    assert len(bad) > 90
    asked = [*bad, *(bad[i] for i in draws.integers(len(bad), size=130 - len(bad)))]
    good: list[tuple[dict[str, Any], Any]] = []
    sessions = [engine.session() for _ in range(5)]
    written: list[list[int]] = [list(prompt) for prompt in prompts(3, 5)]
    for session, ids in zip(sessions, written, strict=True):
        session.append(ids)
    under_way = {i: session.stream(max_tokens=200, seed=i, stop_ids=()) for i, session in enumerate(sessions)}
    pieces = list(prompts(11, 70))
    for kind in draws.permutation(200):
        if kind < 130:
            asked[kind]()
        else:
            settings = {"prompts": pieces[kind - 130], "max_tokens": int(draws.integers(1, 6)), "seed": int(kind)}
            good.append((settings, engine.generate(**settings)))
        i = int(draws.integers(5))
        written[i] += next(under_way[i]).ids
    for stream in under_way.values():
        stream.cancel()
    for session, ids in zip(sessions, written, strict=True):
        assert_same(session.snapshot, engine.prefill(None, ids))
    assert len(good) == 70
    for settings, completion in good:
        assert engine.generate(**settings).ids == completion.ids
    assert_free(engine)
