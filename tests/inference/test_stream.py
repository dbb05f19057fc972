"""Streams show what was written, no more and no less, and can be left at any token with the state of just that."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from typing import Any

import pytest

from rwkv_jax.inference.engine.engine import Engine
from rwkv_jax.inference.engine.requests import Chunk
from rwkv_jax.inference.engine.slot_arrays import SlotArrays
from rwkv_jax.inference.sampling.params import SamplingParams
from tests.inference.models import (
    CONFIGS,
    GREEDY,
    IDS,
    LONG_IDS,
    assert_free,
    assert_same,
    prompts,
    quick_engine,
    random_model,
    some,
    texts_of,
    what_was_read,
)

DRAWN: dict[str, Any] = {"sampling": SamplingParams(temperature=1.2), "seed": 3, "stop_ids": ()}
PIECES_OF_CHARACTERS = SamplingParams(logit_bias=dict.fromkeys([*b"a\xc3\xa9\xe6\x97\xa5\xf0\x9f\x91\xa9"], 100.0))


@pytest.fixture(scope="module")
def engine() -> Engine:
    """Without a store of prefixes, so that what is read again is read."""
    return quick_engine(random_model(CONFIGS["7"]), prefix_bytes=0)


@pytest.fixture(autouse=True)
def nothing_is_left(engine: Engine) -> Any:
    """No test leaves a text in a slot or in the queue."""
    yield
    assert_free(engine)


# What is shown


@pytest.mark.parametrize("seed", range(4))
def test_a_text_is_its_chunks_and_its_ids(engine: Engine, seed: int) -> None:
    options: dict[str, Any] = {"max_tokens": 23, "sampling": PIECES_OF_CHARACTERS, "seed": seed}
    chunks = list(engine.stream(IDS, **options))
    text, ids = texts_of(chunks)
    assert text == engine.tokenizer.decode(ids)
    assert text.encode(errors="strict")  # every chunk has whole characters
    assert "é" in text or "日" in text or "�" in text
    whole = engine.generate(IDS, **options)
    assert (whole.text, whole.ids) == (text, ids)
    assert [chunk.finish_reason for chunk in chunks] == [None] * 22 + ["length"]
    assert all(len(chunk.ids) == len(chunk.logprobs) == 1 for chunk in chunks)


def test_a_character_is_shown_once_it_is_whole(engine: Engine) -> None:
    in_order = [0xE6, 0x97, 0xA5]
    shown = []
    snapshot = engine.prefill(None, IDS)
    for token in in_order[:2]:
        sampling = SamplingParams.greedy(logit_bias={token: 1e6})
        (chunk,) = engine.stream("", state=snapshot, return_state=True, max_tokens=1, sampling=sampling)
        shown.append(chunk.text)
    assert shown == ["�", "�"]  # each text ends there
    stream = engine.stream(IDS, max_tokens=3, sampling=SamplingParams.greedy(logit_bias={0xE6: 1e6}))
    assert [chunk.text for chunk in stream] == ["", "�", "��"]


def test_a_stop_id_ends_a_text_and_is_no_part_of_it(engine: Engine) -> None:
    whole = engine.generate(IDS, max_tokens=12, **DRAWN)
    for place in range(12):
        stop = whole.ids[place]
        expected = whole.ids[: whole.ids.index(stop)]
        options: dict[str, Any] = DRAWN | {"stop_ids": [stop]}
        stream = engine.stream(IDS, max_tokens=12, return_state=True, **options)
        chunks = list(stream)
        assert texts_of(chunks) == (engine.tokenizer.decode(expected), expected)
        assert (chunks[-1].finish_reason, chunks[-1].stop, chunks[-1].ids) == ("stop", stop, ())
        assert_same(stream.snapshot, engine.prefill(None, (*IDS, *expected, stop)))


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_stop_string_ends_a_text_and_is_never_shown(engine: Engine, length: int) -> None:
    letters = SamplingParams(temperature=3.0, logit_bias=dict.fromkeys(b"abcdefgh", 1e3))
    options: dict[str, Any] = {"max_tokens": 14, "sampling": letters, "seed": 1}
    whole = engine.generate(IDS, **options)
    for place in range(14 - length):
        stop = whole.text[place : place + length]
        end = whole.text.index(stop)
        stream = engine.stream(IDS, return_state=True, stop=["never", stop], **options)
        chunks = list(stream)
        assert texts_of(chunks) == (whole.text[:end], whole.ids[: end + length])
        assert (chunks[-1].finish_reason, chunks[-1].stop) == ("stop", stop)
        assert_same(stream.snapshot, engine.prefill(None, IDS + whole.ids[: end + length]))


def test_what_might_have_become_a_stop_string_is_shown_in_the_end(engine: Engine) -> None:
    letters = SamplingParams.greedy(logit_bias={ord("a"): 1e3})
    chunks = list(engine.stream(IDS, max_tokens=3, sampling=letters, stop="aaaa"))
    assert [chunk.text for chunk in chunks] == ["", "", "aaa"]
    assert (chunks[-1].finish_reason, chunks[-1].stop) == ("length", None)


def test_chunks_of_several_texts_name_theirs(engine: Engine) -> None:
    each = list(prompts(2, 6))
    found: dict[int, list[Chunk]] = {i: [] for i in range(6)}
    stream = engine.stream(each, max_tokens=7, sampling=GREEDY)
    for chunk in stream:
        found[chunk.index].append(chunk)
    assert stream.num_prompt_tokens == tuple(map(len, each))
    for i, prompt in enumerate(each):
        assert texts_of(found[i])[1] == engine.generate(prompt, max_tokens=7, sampling=GREEDY).ids


# Leaving


@pytest.mark.parametrize("count", range(11))
def test_a_cancelled_text_stands_behind_what_was_collected(engine: Engine, count: int) -> None:
    going_on: dict[str, Any] = {"state": engine.prefill(None, IDS)}
    for prompt, options in ((IDS, {}), ("", going_on)):
        stream = engine.stream(prompt, max_tokens=9, return_state=True, **DRAWN, **options)
        chunks = some(stream, count)
        stream.cancel()
        stream.cancel()
        assert next(stream, None) is None
        if count == 0:
            assert stream.snapshot is options.get("state")
        else:
            assert_same(stream.snapshot, engine.prefill(None, IDS + what_was_read(chunks)))
            assert stream.snapshot is stream.snapshot


def test_a_text_that_was_written_and_not_collected_stands_where_it_began(engine: Engine) -> None:
    for state in (None, engine.prefill(None, IDS)):
        stream = engine.stream(IDS, max_tokens=9, return_state=True, state=state, **DRAWN)
        engine.generate(IDS, max_tokens=9)
        stream.cancel()
        assert stream.snapshot is state


@pytest.mark.parametrize("collected", [1, 3])
def test_a_text_that_ended_unseen_stands_behind_what_was_collected(engine: Engine, collected: int) -> None:
    stream = engine.stream(IDS, max_tokens=4, return_state=True, **DRAWN)
    chunks = some(stream, collected)
    engine.generate(IDS, max_tokens=9)
    stream.cancel()
    assert_same(stream.snapshot, engine.prefill(None, IDS + what_was_read(chunks)))


@pytest.mark.parametrize("count", range(1, 6))
@pytest.mark.parametrize("num_others", [1, 3])
def test_a_text_that_pauses_is_not_moved_by_others(engine: Engine, count: int, num_others: int) -> None:
    stream = engine.stream(IDS, max_tokens=9, return_state=True, **DRAWN)
    chunks = some(stream, count)
    engine.generate([IDS] * num_others, max_tokens=9)
    stream.cancel()
    assert_same(stream.snapshot, engine.prefill(None, IDS + what_was_read(chunks)))


def test_a_text_that_is_being_read_stands_where_it_was(engine: Engine) -> None:
    going_on: dict[str, Any] = {"state": engine.prefill(None, IDS)}
    for options in ({}, going_on):
        stream = engine.stream(LONG_IDS * 100, return_state=True, **options)
        engine.generate(IDS, max_tokens=1)
        assert engine.stats().num_running == 1
        stream.cancel()
        assert engine.stats().num_running == 0
        assert stream.snapshot is options.get("state")


def test_equal_texts_in_the_queue_are_told_apart(engine: Engine) -> None:
    with engine.hold():
        streams = [engine.stream(IDS, max_tokens=5, return_state=True, sampling=GREEDY) for _ in range(9)]
        for stream in streams[1::2]:
            stream.cancel()
            assert stream.snapshot is None
        assert engine.stats().num_queued == 5
    assert len({texts_of(list(stream)) for stream in streams[::2]}) == 1


def test_a_state_is_asked_for_at_the_end_only(engine: Engine) -> None:
    stream = engine.stream(IDS, max_tokens=3, return_state=True)
    expected = "single text, given return_state=True, whose stream has ended"
    with pytest.raises(RuntimeError, match=expected):
        _ = stream.snapshot
    chunks = some(stream, 3)
    assert chunks[-1].finish_reason == "length"
    assert_same(stream.snapshot, engine.prefill(None, IDS + what_was_read(chunks)))
    without = engine.stream(IDS, max_tokens=3)
    list(without)
    with pytest.raises(RuntimeError, match=expected):
        _ = without.snapshot


def test_leaving_a_block_ends_what_is_in_it(engine: Engine) -> None:
    with engine.stream([IDS] * 6, max_tokens=1000) as stream:
        some(stream, 3)
        assert engine.stats().num_running == 4
    found = engine.stats()
    assert (found.num_running, found.num_queued) == (0, 0)
    with pytest.raises(ZeroDivisionError), engine.stream(IDS, max_tokens=1000) as stream:
        raise ZeroDivisionError
    assert engine.stats().num_queued == 0


def test_forgotten_streams_free_their_slots(engine: Engine) -> None:
    for return_state in (False, True):
        streams = [engine.stream(IDS, max_tokens=10_000, return_state=return_state) for _ in range(7)]
        for stream in streams[:4]:
            next(stream)
        assert engine.stats().num_running == 4
        del stream, streams
        gc.collect()
        assert_free(engine)


# Threads and tasks


def test_many_tasks_read_at_once(engine: Engine) -> None:
    each = list(prompts(4, 12))

    async def read(prompt: tuple[int, ...], seed: int) -> tuple[str, tuple[int, ...]]:
        async with engine.stream(prompt, max_tokens=9, seed=seed) as stream:
            return texts_of([chunk async for chunk in stream])

    async def main() -> list[tuple[str, tuple[int, ...]]]:
        return await asyncio.gather(*(read(prompt, seed) for seed, prompt in enumerate(each)))

    found = asyncio.run(main())
    for seed, prompt in enumerate(each):
        alone = engine.generate(prompt, max_tokens=9, seed=seed)
        assert found[seed] == (alone.text, alone.ids)


def test_a_task_that_gives_up_waiting_loses_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It need not wait for the device; a chunk that comes too late is the next one's, and no part of the state yet."""
    decode = SlotArrays.decode

    def slow(*arguments: Any) -> Any:
        time.sleep(0.02)
        return decode(*arguments)

    monkeypatch.setattr(SlotArrays, "decode", slow)

    async def main() -> tuple[list[Chunk], int, Any]:
        chunks: list[Chunk] = []
        timeouts = 0
        async with engine.stream(IDS, max_tokens=12, return_state=True, **DRAWN) as stream:
            while len(chunks) < 6:
                try:
                    chunks.append(await asyncio.wait_for(anext(stream), 0.005))
                except TimeoutError:
                    timeouts += 1
        return chunks, timeouts, stream

    chunks, timeouts, stream = asyncio.run(main())
    assert timeouts > 1
    ids = texts_of(chunks)[1]
    assert ids == engine.generate(IDS, max_tokens=12, **DRAWN).ids[:6]
    assert_same(stream.snapshot, engine.prefill(None, IDS + ids))


def test_many_threads_write_at_once(engine: Engine) -> None:
    each = list(prompts(6, 8))
    found: dict[int, Any] = {}

    def write(place: int) -> None:
        found[place] = engine.generate([each[place], IDS], max_tokens=8, seed=place)

    threads = [threading.Thread(target=write, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, prompt in enumerate(each):
        for i, alone in enumerate((prompt, IDS)):
            assert found[place][i].ids == engine.generate(alone, max_tokens=8, seed=place + i).ids


def test_a_state_waits_for_the_step_in_which_its_text_ends(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which the last chunk comes before the state is taken out."""
    row = SlotArrays.row

    def slow(*arguments: Any) -> Any:
        time.sleep(0.05)
        return row(*arguments)

    monkeypatch.setattr(SlotArrays, "row", slow)
    stream = engine.stream(IDS, max_tokens=6, return_state=True, **DRAWN)
    chunks: list[Chunk] = []
    while len(chunks) < 6:
        chunks += stream._jobs[0].chunks and some(stream, 1)  # without waiting for news
    assert_same(stream.snapshot, engine.prefill(None, IDS + texts_of(chunks)[1]))


def test_another_thread_may_cancel(engine: Engine) -> None:
    stream = engine.stream(IDS, max_tokens=100_000, return_state=True, sampling=GREEDY, stop_ids=())
    chunks = some(stream, 3)
    thread = threading.Timer(0.05, stream.cancel)
    thread.start()
    chunks += list(stream)
    thread.join()
    assert 3 < len(chunks) < 100_000
    snapshot = stream.snapshot
    assert snapshot is not None
    assert snapshot.num_tokens == len(IDS) + len(chunks)
    ids = IDS + texts_of(chunks)[1]
    assert_same(snapshot, engine.prefill(None, ids))
