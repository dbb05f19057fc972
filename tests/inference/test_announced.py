"""Texts that come together start together, and no first token waits for a second one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from rwkv_jax.inference.engine import driver
from rwkv_jax.inference.engine.engine import Engine
from rwkv_jax.inference.engine.job import Job
from rwkv_jax.inference.engine.slot_arrays import SlotArrays
from tests.inference.models import CONFIGS, GREEDY, quick_engine, random_model

IDS = (1, 40, 41)
OTHER = (7, 3, 1)
PLAIN: dict[str, Any] = {"sampling": GREEDY, "stop_ids": ()}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with quick_engine(random_model(CONFIGS["7"]), num_slots=9, prefix_bytes=0) as engine:
        yield engine


def what_is_called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Calls of the device from here on, with the number of texts in each."""
    calls: list[tuple[str, int]] = []
    prefill, decode = SlotArrays.prefill, SlotArrays.decode

    def noted_prefill(slots: SlotArrays, pieces: Any, *arguments: Any, **given: Any) -> Any:
        calls.append(("prefill", len(pieces)))
        return prefill(slots, pieces, *arguments, **given)

    def noted_decode(slots: SlotArrays, jobs: Any, *arguments: Any) -> Any:
        calls.append(("decode", len(jobs)))
        return decode(slots, jobs, *arguments)

    monkeypatch.setattr(SlotArrays, "prefill", noted_prefill)
    monkeypatch.setattr(SlotArrays, "decode", noted_decode)
    return calls


def test_announced_texts_start_together(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle engine waits for them."""
    monkeypatch.setattr(driver, "_GATHER_SECONDS", 20.0)
    calls = what_is_called(monkeypatch)
    first, second = engine.announce(), engine.announce()
    streams = [engine.stream(IDS, max_tokens=2, **PLAIN)]
    first.end()
    time.sleep(0.05)
    assert calls == []
    streams.append(engine.stream(OTHER, max_tokens=2, **PLAIN))
    second.end()
    second.end()  # no effect
    for stream in streams:
        list(stream)
    assert calls == [("prefill", 1), ("prefill", 1), ("decode", 2), ("decode", 2)]


def test_a_full_prefill_waits_for_nobody(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_GATHER_SECONDS", 20.0)
    calls = what_is_called(monkeypatch)
    coming = engine.announce()
    with engine.hold():
        streams = [engine.stream(IDS, max_tokens=1, **PLAIN) for _ in range(8)]
    for stream in streams:
        list(stream)
    assert calls == [("prefill", 8), ("decode", 8)]
    coming.end()


def test_nobody_waits_for_what_does_not_come(engine: Engine) -> None:
    engine.generate(IDS, max_tokens=20, **PLAIN)  # compiles
    coming = engine.announce()
    begin = time.monotonic()
    assert len(engine.generate(IDS, max_tokens=20, **PLAIN).ids) == 20
    assert time.monotonic() - begin < 30  # 20 ms, and what the text takes on a busy machine
    coming.end()


def test_the_first_token_waits_for_no_second_one(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first burst of a text has one step where many begin; a text is the same."""
    expected = engine.generate(IDS, max_tokens=9, **PLAIN).ids
    sizes: list[int] = []
    add_burst = Job.add_burst

    def noted(job: Job, tokens: Any, *arguments: Any) -> None:
        sizes.append(len(tokens))
        add_burst(job, tokens, *arguments)

    monkeypatch.setattr(Job, "add_burst", noted)
    assert engine.generate(IDS, max_tokens=9, **PLAIN).ids == expected
    assert sizes == [1, 4, 4]
