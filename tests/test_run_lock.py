"""A run folder has one writer at a time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filelock import FileLock

from rwkv_jax.config import ConfigError
from rwkv_jax.run_lock import LOCK_FILE, OWNER_FILE, lock_run


def test_the_second_is_refused_and_told_who_is_there(tmp_path: Path) -> None:
    with (
        lock_run(tmp_path, pytest.fail),
        pytest.raises(ConfigError, match=rf"run_dir = '.*': process {os.getpid()} of \S+, since 20\S+ \S+, is writing"),
        lock_run(tmp_path, pytest.fail),
    ):
        pytest.fail("both have it")
    with lock_run(tmp_path, pytest.fail):
        pass
    assert not list(tmp_path.iterdir())
    (tmp_path / "run.json").touch()
    with lock_run(tmp_path, pytest.fail):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK_FILE, "run.json"]


def test_an_owner_that_cannot_be_read_is_another_process(tmp_path: Path) -> None:
    with lock_run(tmp_path, pytest.fail):
        (tmp_path / OWNER_FILE).write_bytes(b"\xff[")
        with pytest.raises(ConfigError, match="another process is writing there"), lock_run(tmp_path, pytest.fail):
            pass


def test_what_a_killed_process_left_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).touch()
    (tmp_path / OWNER_FILE).write_text('{"host": "elsewhere", "pid": 1, "since": "yesterday"}')
    with lock_run(tmp_path, pytest.fail):
        assert str(os.getpid()) in (tmp_path / OWNER_FILE).read_text()


def test_an_error_within_stays_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a folder made read-only meanwhile, where the owner's file cannot be deleted."""

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    with pytest.raises(KeyError), lock_run(tmp_path, pytest.fail):  # noqa: PT012
        monkeypatch.setattr(Path, "unlink", refuse)
        raise KeyError("the error")
    monkeypatch.undo()
    with lock_run(tmp_path, pytest.fail):
        pass


def test_a_lock_that_may_not_be_taken_is_no_missing_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: FileLock) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(FileLock, "_acquire", refuse)
    with pytest.raises(ConfigError, match=r"cannot be locked .*Permission denied"), lock_run(tmp_path, pytest.fail):
        pass


def test_a_file_system_without_locks_is_said_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: FileLock) -> None:
        raise NotImplementedError("no flock here")

    monkeypatch.setattr(FileLock, "_acquire", refuse)
    said: list[str] = []
    with lock_run(tmp_path, said.append):
        pass
    assert said == [
        f"{tmp_path}: this file system has no locks (no flock here), so see to it that no other run writes there"
    ]
