"""Stores of states: whole records by tenant and id, bounded, with versions; a killed writer leaves no half of one."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rwkv_jax.config import ConfigError
from rwkv_jax.serving.states.sqlite import SCHEMA_VERSION, SqliteStateStore
from rwkv_jax.serving.states.store import (
    StateRecord,
    StateStore,
    TooLargeError,
    UnavailableError,
)
from tests.serving.stores import RECORD, check_race, check_records, check_versions


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def opened(path: Path | str, **options: Any) -> SqliteStateStore:
    return SqliteStateStore(path, **{"max_bytes": 10**6, "max_idle_seconds": 100.0} | options)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> Iterator[StateStore]:
    with contextlib.closing(opened(":memory:", clock=clock)) as store:
        yield store


def sized(num_bytes: int) -> StateRecord:
    return StateRecord(bytes(num_bytes - 512), 1, "m", 0.0)  # as it counts, with its row


def test_records(store: StateStore) -> None:
    check_records(store)


def test_versions(store: StateStore) -> None:
    check_versions(store)


def test_threads_that_advance_one_record(store: StateStore) -> None:
    check_race(store)


def test_the_least_recently_used_go_first(clock: Clock) -> None:
    store = opened(":memory:", max_bytes=3000, clock=clock)
    for name in "abc":
        clock.now += 1
        store.put("t", name, sized(1000))
    clock.now += 1
    assert store.get("t", "a") is not None
    clock.now += 1
    store.put("other", "d", sized(1500))
    assert [info.id for info in store.list("t")] == ["a"]
    clock.now += 1
    store.put("t", "a", sized(3000))  # in place of its former self
    assert [info.id for info in store.list("t")] == ["a"]
    assert store.list("other") == []
    with pytest.raises(TooLargeError, match="takes 3001 bytes where all states together may take 3000"):
        store.put("t", "e", sized(3001))
    assert [info.id for info in store.list("t")] == ["a"]


def test_the_unused_expire(clock: Clock) -> None:
    store = opened(":memory:", clock=clock)
    store.put("t", "a", RECORD)
    store.put("t", "b", RECORD)
    clock.now += 60
    assert store.get("t", "a") is not None
    clock.now += 60
    assert store.get("t", "b") is None
    assert [info.id for info in store.list("t")] == ["a"]
    clock.now += 100
    assert not store.delete("t", "a")
    store.put("t", "a", RECORD, expected=0)


def test_a_file_is_kept_and_private(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "folder" / "states.sqlite"
    store = opened(path, clock=clock)
    store.put("secret-key", "x", RECORD)
    modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()}
    assert modes.keys() == {"states.sqlite", "states.sqlite-wal"}
    assert set(modes.values()) == {0o600}
    clock.now += 60
    assert store.get("secret-key", "x") is not None
    store.close()
    store.close()
    with pytest.raises(UnavailableError, match="the server is ending"):
        store.get("secret-key", "x")
    assert b"secret-key" not in path.read_bytes()
    clock.now += 60
    path.chmod(0o644)
    with contextlib.closing(opened(path, clock=clock)) as again:  # with the time of use
        assert again.get("secret-key", "x") is not None
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_is_deleted_is_not_in_the_file(tmp_path: Path) -> None:
    store = opened(tmp_path / "x")
    for _ in range(2):
        store.put("t", "x", StateRecord(b"whispered" * 1000, 1, "m", 0.0))
    store.delete("t", "x")
    store.close()
    assert b"whispered" not in (tmp_path / "x").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_file_has_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rwkv_jax.serving.states.sqlite._LOCK_SECONDS", 0.05)
    with contextlib.closing(opened(tmp_path / "x")), pytest.raises(ConfigError, match="in use by another server"):
        opened(tmp_path / "x")
    opened(tmp_path / "x").close()


def _of_another_version(path: Path) -> None:
    opened(path).close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")


def _of_something_else(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE bookmarks (x)")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_of_another_version, f"is a store of version {SCHEMA_VERSION + 1}, where version {SCHEMA_VERSION} is read"),
        (_of_something_else, "is a database of something else"),
        (lambda path: path.write_bytes(b"text" * 1000), "cannot be used for states .file is not a database"),
        (lambda path: path.mkdir(), "cannot be opened"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    make(tmp_path / "x")
    before = (tmp_path / "x").read_bytes() if (tmp_path / "x").is_file() else b""
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path / "x")
    assert not before or (tmp_path / "x").read_bytes() == before


@pytest.mark.parametrize("options", [{"max_bytes": 0}, {"max_idle_seconds": 0.0}])
def test_bounds_that_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        opened(":memory:", **options)


_WRITER = """
import sys
from rwkv_jax.serving.states.sqlite import SqliteStateStore
from rwkv_jax.serving.states.store import StateRecord
store = SqliteStateStore(sys.argv[1], max_bytes=10**9, max_idle_seconds=1e9)
count = 0
while True:
    count += 1
    store.put("t", "x", StateRecord(count.to_bytes(8, "little") * 100_000, count, "m", 0.0))
    print(count, flush=True)
"""


def test_a_killed_writer_leaves_whole_records(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _WRITER, str(tmp_path / "x")]
    reached = 0
    for wait in (0.0, 0.01, 0.03):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(3):
                reached = int(writer.stdout.readline())
            time.sleep(wait)  # into the midst of some put
            os.kill(writer.pid, signal.SIGKILL)
            reached = max([reached, *map(int, writer.stdout.read().split("\n")[:-1])])
        with contextlib.closing(opened(tmp_path / "x", max_bytes=10**9, max_idle_seconds=1e9)) as store:
            found = store.get("t", "x")
            assert found is not None
            assert found.data == found.num_tokens.to_bytes(8, "little") * 100_000
            # What was answered is there, and perhaps what was just about to be.
            assert reached <= found.num_tokens <= reached + 1
            assert store.delete("t", "x")
