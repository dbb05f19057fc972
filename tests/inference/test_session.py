"""Sessions are their tokens: forks, marks, files, streams and failures never make them anything else."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from rwkv_jax.config import ConfigError
from rwkv_jax.inference.sampling.params import SamplingParams
from rwkv_jax.inference.state.session import Session, SessionBusyError, SessionCancelledError, SessionStream
from rwkv_jax.inference.state.snapshot import Snapshot, StateError
from tests.inference.fake_engine import VOCAB_SIZE, FakeEngine
from tests.inference.operations import Operations, assert_identical

GREEDY = SamplingParams(temperature=0.0)


def _assert_read(session: Session, engine: FakeEngine, ids: list[int]) -> None:
    assert session.num_tokens == len(ids)
    assert_identical(_snapshot(session), engine.prefill(None, ids))


def _snapshot(session: Session) -> Snapshot:
    snapshot = session.snapshot
    assert snapshot is not None
    return snapshot


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def session(engine: FakeEngine) -> Session:
    session = Session(engine)
    session.append("once")
    return session


@pytest.mark.parametrize("seed", range(2))
def test_random_operations_equal_plain_runs(engine: FakeEngine, tmp_path: Path, seed: int) -> None:
    counts = Operations(engine, VOCAB_SIZE, tmp_path, seed=seed).run(1000)
    assert sum(counts.values()) == 1000
    assert len(counts) == 11
    assert min(counts.values()) > 40
    assert len(list(tmp_path.iterdir())) > 40
    assert all(stream.has_ended for stream in engine.streams)


def test_the_comparison_can_fail(engine: FakeEngine, tmp_path: Path) -> None:
    class Forgetful(FakeEngine):
        def prefill(self, snapshot: Snapshot | None, tokens: Any, *, adapter: str | None = None) -> Snapshot:
            assert adapter is None
            return super().prefill(snapshot, tokens if snapshot is None or len(tokens) < 3 else tokens[1:])

    with pytest.raises(AssertionError):
        Operations(Forgetful(), VOCAB_SIZE, tmp_path).run(50)


def test_the_first_text_begins_and_the_next_go_on(engine: FakeEngine) -> None:
    session = Session(engine)
    assert (session.snapshot, session.num_tokens, session.nbytes) == (None, 0, 0)
    session.append("é")
    session.append("b")
    _assert_read(session, engine, [256, 0xC3, 0xA9, ord("b")])


def test_ids_are_taken_as_they_are(engine: FakeEngine) -> None:
    session = Session(engine)
    session.append([5, 6])
    _assert_read(session, engine, [5, 6])


def test_two_calls_say_what_one_would(engine: FakeEngine, session: Session) -> None:
    other = session.fork()
    first = session.generate(max_tokens=5, sampling=GREEDY)
    second = session.generate(max_tokens=6, sampling=GREEDY)
    whole = other.generate(max_tokens=11, sampling=GREEDY)
    assert first.ids + second.ids == whole.ids
    _assert_read(session, engine, [*engine.encode("once", begins=True), *whole.ids])


def test_a_completion_is_all_chunks(engine: FakeEngine, session: Session) -> None:
    other = session.fork()
    completion = session.generate(" upon", max_tokens=7, sampling=GREEDY)
    chunks = list(other.stream(" upon", max_tokens=7, sampling=GREEDY))
    assert len(chunks) == 7
    assert completion.text == "".join(chunk.text for chunk in chunks)
    assert completion.ids == tuple(token for chunk in chunks for token in chunk.ids)
    assert completion.logprobs == (-1.0,) * 7
    assert completion.finish_reason == "length"
    assert completion.num_prompt_tokens == len(" upon")


def test_the_stop_token_is_part_of_the_state(engine: FakeEngine, session: Session) -> None:
    ids = session.fork().generate(max_tokens=3, sampling=GREEDY).ids
    completion = session.generate(max_tokens=9, sampling=GREEDY, stop_ids=[ids[2]])
    assert (completion.ids, completion.finish_reason, completion.stop) == (ids[:2], "stop", ids[2])
    _assert_read(session, engine, [*engine.encode("once", begins=True), *ids])


def test_forks_go_their_own_ways_and_share_what_they_have(session: Session) -> None:
    session.mark("start")
    fork = session.fork()
    assert fork.snapshot is session.snapshot
    before = session.snapshot
    fork.append("!")
    fork.mark("start")
    assert session.snapshot is before
    session.append("?")
    session.rewind("start")
    assert session.snapshot is before


def test_bytes_are_counted_once(session: Session) -> None:
    size = _snapshot(session).nbytes
    session.mark("a")
    session.mark("b")
    assert session.nbytes == size > 0
    session.append("!")
    assert session.nbytes == 2 * size


def test_an_unknown_mark_is_told_from_those_there_are(session: Session) -> None:
    session.mark("first turn")
    session.mark("second turn")
    before = session.snapshot
    with pytest.raises(ConfigError, match=r"'third turn'.*'first turn', 'second turn'"):
        session.rewind("third turn")
    assert session.snapshot is before


def test_nothing_to_go_on_from(engine: FakeEngine) -> None:
    session = Session(engine)
    with pytest.raises(ConfigError, match="empty"):
        session.generate(max_tokens=3, sampling=GREEDY)
    session.generate("now", max_tokens=3, sampling=GREEDY)
    assert session.num_tokens == 4 + 3


@pytest.mark.parametrize("empty", ["", [], ()])
def test_nothing_cannot_be_appended(session: Session, empty: str | list[int]) -> None:
    before = session.snapshot
    with pytest.raises(ConfigError, match="empty"):
        session.append(empty)
    assert session.snapshot is before


USES: dict[str, Any] = {
    "append": lambda session, path: session.append("x"),
    "stream": lambda session, path: session.generate(max_tokens=3, sampling=GREEDY),
    "fork": lambda session, path: session.fork(),
    "mark": lambda session, path: session.mark("x"),
    "rewind": lambda session, path: session.rewind("start"),
    "save": lambda session, path: session.save(path),
    "snapshot": lambda session, path: session.snapshot,
}


@pytest.mark.parametrize("use", USES)
def test_a_session_is_busy_while_a_stream_of_it_runs(session: Session, tmp_path: Path, use: str) -> None:
    session.mark("start")
    num_tokens = session.num_tokens
    stream = session.stream("!", max_tokens=9, sampling=GREEDY)
    for _ in range(2):  # before the first chunk and after it
        with pytest.raises(SessionBusyError, match=rf"^{use}: .*cancel\(\)"):
            USES[use](session, tmp_path / "x")
        assert session.num_tokens == num_tokens  # may be asked for
        next(stream)
    assert not list(tmp_path.iterdir())
    stream.cancel()
    USES[use](session, tmp_path / "x")


def test_a_cancelled_stream_leaves_what_it_said(engine: FakeEngine, session: Session) -> None:
    with session.stream(max_tokens=9, sampling=GREEDY) as stream:
        said = [*next(stream).ids, *next(stream).ids]
    assert engine.streams[-1].has_ended
    _assert_read(session, engine, [*engine.encode("once", begins=True), *said])
    assert next(stream, None) is None
    session.append("!")
    stream.cancel()  # again, and nothing happens
    _assert_read(session, engine, [*engine.encode("once", begins=True), *said, ord("!")])


def test_an_interrupt_within_a_stream_leaves_what_it_said(engine: FakeEngine, session: Session) -> None:
    def read() -> None:
        with session.stream(max_tokens=9, sampling=GREEDY) as stream:
            said.extend(next(stream).ids)
            raise KeyboardInterrupt

    said: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        read()
    _assert_read(session, engine, [*engine.encode("once", begins=True), *said])


def test_an_interrupt_of_the_engine_can_still_be_cancelled(
    engine: FakeEngine, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    with session.stream(max_tokens=9, sampling=GREEDY) as stream:
        said = next(stream).ids

        def interrupted(*_: Any) -> Any:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("tests.inference.fake_engine.FakeStream.__next__", interrupted)
            with pytest.raises(KeyboardInterrupt):
                next(stream)
        with pytest.raises(SessionBusyError):
            session.append("x")
    _assert_read(session, engine, [*engine.encode("once", begins=True), *said])


def test_what_another_thread_cancels_is_named_as_such(
    engine: FakeEngine, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not an error of what was never said; the session stands behind what was."""
    opened = engine.stream

    def stream(*arguments: Any, **options: Any) -> Any:
        stream = opened(*arguments, **options)
        monkeypatch.setattr(stream, "_draw", lambda: session.cancel() or 65)
        return stream

    monkeypatch.setattr(engine, "stream", stream)
    before = session.num_tokens
    with pytest.raises(SessionCancelledError, match=rf"cancelled after 1 tokens; the session has {before}"):
        session.generate(max_tokens=5, sampling=GREEDY)


def test_a_stream_that_was_lost_is_cancelled_by_the_session(engine: FakeEngine, session: Session) -> None:
    said: list[int] = []
    for chunk in session.stream(max_tokens=9, sampling=GREEDY):
        said += chunk.ids
        break
    with pytest.raises(SessionBusyError, match=r"cancel\(\)"):
        session.append("!")
    session.cancel()
    _assert_read(session, engine, [*engine.encode("once", begins=True), *said])
    session.cancel()  # nothing is running
    session.append("!")


def test_a_stream_of_before_does_not_touch_the_one_that_runs(engine: FakeEngine, session: Session) -> None:
    first = session.stream(max_tokens=9, sampling=GREEDY)
    session.cancel()
    second = session.stream(max_tokens=9, sampling=GREEDY)
    assert list(first) == []
    first.cancel()
    said = next(second).ids
    second.cancel()
    _assert_read(session, engine, [*engine.encode("once", begins=True), *said])


def test_a_reader_who_learns_of_the_end_too_late_changes_nothing(
    engine: FakeEngine, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = session.stream(max_tokens=9, sampling=GREEDY)

    def next_while_others_act(_: Any) -> Any:
        session.cancel()
        session.append("!")
        later.append(session.stream(max_tokens=9, sampling=GREEDY))
        raise StopIteration

    later: list[SessionStream] = []
    with monkeypatch.context() as patch:
        patch.setattr("tests.inference.fake_engine.FakeStream.__next__", next_while_others_act)
        assert next(first, None) is None
    with pytest.raises(SessionBusyError):
        session.append("?")
    said = next(later[0]).ids
    session.cancel()
    _assert_read(session, engine, [*engine.encode("once", begins=True), ord("!"), *said])


def test_before_the_first_chunk_nothing_was_read(session: Session) -> None:
    before = session.snapshot
    session.stream("!", max_tokens=9, sampling=GREEDY).cancel()
    assert session.snapshot is before


def test_chunks_come_to_other_tasks_as_well(engine: FakeEngine, session: Session) -> None:
    async def read() -> list[int]:
        said: list[int] = []
        async with session.stream(max_tokens=4, sampling=GREEDY) as stream:
            async for chunk in stream:
                said += chunk.ids
        async with session.stream(max_tokens=4, sampling=GREEDY) as stream:
            said += (await anext(stream)).ids
        return said

    said = asyncio.run(read())
    assert len(said) == 5
    _assert_read(session, engine, [*engine.encode("once", begins=True), *said])


def test_a_failed_stream_leaves_the_session_as_it_was(engine: FakeEngine, session: Session) -> None:
    before = session.snapshot
    stream = session.stream("!", max_tokens=9, sampling=GREEDY, fails_after=2)  # pyright: ignore[reportCallIssue]
    next(stream)
    next(stream)
    with pytest.raises(RuntimeError, match="the device is gone"):
        next(stream)
    assert session.snapshot is before
    assert next(stream, None) is None
    session.append("!")


def test_a_refused_stream_leaves_the_session_free(session: Session) -> None:
    before = session.snapshot
    with pytest.raises(ConfigError, match="beyond the vocabulary"):
        session.stream([VOCAB_SIZE], max_tokens=9, sampling=GREEDY)
    with pytest.raises(TypeError, match="color"):
        session.stream(max_tokens=9, sampling=GREEDY, color="red")  # pyright: ignore[reportCallIssue]
    assert session.snapshot is before


def test_another_thread_is_refused_and_may_cancel(engine: FakeEngine, session: Session) -> None:
    stream = session.stream(max_tokens=9, sampling=GREEDY)
    refused: list[Exception] = []
    said = next(stream).ids

    def use() -> None:
        try:
            session.append("x")
        except SessionBusyError as error:
            refused.append(error)
        stream.cancel()

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert len(refused) == 1
    assert list(stream) == []
    _assert_read(session, engine, [*engine.encode("once", begins=True), *said])


def test_a_stream_that_ends_for_reader_and_canceller_at_once_ends_once(session: Session) -> None:
    for _ in range(50):
        stream = session.stream(max_tokens=3, sampling=GREEDY)
        threads = [threading.Thread(target=use) for use in (lambda s=stream: list(s), stream.cancel)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        session.mark("free again")


def test_a_saved_session_goes_on_elsewhere(engine: FakeEngine, session: Session, tmp_path: Path) -> None:
    session.mark("not saved")
    session.save(tmp_path / "new folder" / "state.safetensors")
    loaded = Session.load(FakeEngine(), tmp_path / "new folder" / "state.safetensors")
    assert loaded.num_tokens == session.num_tokens
    options = {"max_tokens": 9, "sampling": SamplingParams(temperature=1.0), "seed": 5}
    assert loaded.generate(**options) == session.generate(**options)
    assert_identical(_snapshot(loaded), _snapshot(session))
    with pytest.raises(ConfigError, match="none"):
        loaded.rewind("not saved")


def test_a_saved_session_of_another_model_is_refused(session: Session, tmp_path: Path) -> None:
    session.save(tmp_path / "x")
    with pytest.raises(StateError, match=r"model: '0+' in the file, '0+1' here"):
        Session.load(FakeEngine(model=1), tmp_path / "x")


def test_no_saved_session_is_overwritten(session: Session, tmp_path: Path) -> None:
    session.save(tmp_path / "x")
    content = (tmp_path / "x").read_bytes()
    session.append("!")
    with pytest.raises(ConfigError, match="exists already"):
        session.save(tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == content
    session.append("and it can be used again")
