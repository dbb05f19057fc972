"""Files and folders appear whole, and never in the place of what has come while they were written."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from rwkv_jax.atomic import atomic_rename, new_file, new_folder, replace_file
from rwkv_jax.checks import ConfigError


def _refuse(*_: Path) -> None:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.fixture(params=["hard links", "no hard links"])
def _file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "no hard links":
        monkeypatch.setattr(os, "link", _refuse)


with_and_without_links = pytest.mark.usefixtures("_file_system")


@with_and_without_links
def test_a_file_gets_its_name(tmp_path: Path) -> None:
    temporary = tmp_path / "x.tmp"
    temporary.write_text("new")
    atomic_rename(temporary, tmp_path / "x")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "new")]


@with_and_without_links
@pytest.mark.parametrize(
    "occupy",
    [lambda path: path.write_text("precious"), Path.mkdir, lambda path: path.symlink_to("not there")],
    ids=["a file", "a folder", "a link that leads nowhere"],
)
def test_what_has_the_name_keeps_it(tmp_path: Path, occupy: Callable[[Path], object]) -> None:
    occupy(tmp_path / "x")
    before = (tmp_path / "x").lstat()
    (tmp_path / "x.tmp").write_text("new")
    with pytest.raises(FileExistsError):
        atomic_rename(tmp_path / "x.tmp", tmp_path / "x")
    assert (tmp_path / "x.tmp").read_text() == "new"
    after = (tmp_path / "x").lstat()
    assert (after.st_ino, after.st_size) == (before.st_ino, before.st_size)


@with_and_without_links
def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    (tmp_path / "x.tmp").write_text("new")
    with pytest.raises(FileNotFoundError):
        atomic_rename(tmp_path / "x.tmp", tmp_path / "no" / "x")
    assert (tmp_path / "x.tmp").exists()


def test_of_two_who_save_at_once_one_succeeds(tmp_path: Path) -> None:
    for turn in range(50):
        barrier, saved = threading.Barrier(2), list[int]()

        def save(who: int, turn: int = turn, barrier: threading.Barrier = barrier, saved: list[int] = saved) -> None:
            temporary = tmp_path / f"{turn}.{who}.tmp"
            temporary.write_text(str(who))
            barrier.wait()
            try:
                atomic_rename(temporary, tmp_path / str(turn))
            except FileExistsError:
                return
            saved.append(who)

        threads = [threading.Thread(target=save, args=(who,)) for who in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [int((tmp_path / str(turn)).read_text())] == saved


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x"
    with new_file(path) as file:
        file.write(b"all of it")
        assert not path.exists()
    assert [(found.name, found.read_bytes()) for found in path.parent.iterdir()] == [("x", b"all of it")]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "x"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match=r"file/x: cannot be written \(.*\); name another place"),
        new_file(tmp_path / "file" / "x"),
    ):
        pytest.fail("there is no file to write")


def test_what_is_there_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("precious")
    with (
        pytest.raises(ConfigError, match="x: exists already and is not overwritten; move it away"),
        new_file(tmp_path / "x"),
    ):
        pytest.fail("there is no file to write")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


def test_the_first_of_two_who_save_keeps_the_name(tmp_path: Path) -> None:
    path = tmp_path / "x"

    def save(content: bytes, meanwhile: Callable[[], None]) -> None:
        with new_file(path) as file:
            file.write(content)
            meanwhile()

    with pytest.raises(ConfigError, match="x: exists already and is not overwritten"):
        save(b"late", lambda: save(b"first", lambda: None))
    assert [found.read_bytes() for found in tmp_path.iterdir()] == [b"first"]


def test_what_comes_at_the_very_end_keeps_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def link_too_late(temporary: Path, path: Path) -> None:
        path.write_text("precious")
        link(temporary, path)

    monkeypatch.setattr(os, "link", link_too_late)
    with pytest.raises(ConfigError, match="x: exists already and is not overwritten"), new_file(tmp_path / "x"):
        pass
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


class _OtherError(ConfigError):
    pass


def test_the_error_is_of_the_kind_and_begins_with_the_label_that_were_asked_for(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    for new in (new_file, new_folder):
        with (
            pytest.raises(_OtherError, match=r"^field = 3: exists already and is not overwritten"),
            new(tmp_path / "x", _OtherError, "field = 3"),
        ):
            pytest.fail("there is nothing to write")


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a" / "x") as folder:
        (folder / "inside").write_text("all of it")
        assert not (tmp_path / "a" / "x").exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x"]
    assert (tmp_path / "a" / "x" / "inside").read_text() == "all of it"


def test_a_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "inside").write_text("half of it")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "x") as folder:
        fail(folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exist_ok", [False, True])
def test_the_first_of_two_who_make_a_folder_keeps_the_name(tmp_path: Path, exist_ok: bool) -> None:
    def save(content: str, meanwhile: Callable[[], None]) -> None:
        with new_folder(tmp_path / "x", exist_ok=exist_ok) as folder:
            (folder / "inside").write_text(content)
            meanwhile()

    expected = contextlib.nullcontext() if exist_ok else pytest.raises(ConfigError, match="x: exists already")
    with expected:
        save("late", lambda: save("first", lambda: None))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x" / "inside").read_text() == "first"


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    replace_file(path, b"one")
    replace_file(path, b"two")
    assert path.read_bytes() == b"two"

    def fail(descriptor: int) -> None:
        raise OSError("no space")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space"):
        replace_file(path, b"three")
    assert [(found.name, found.read_bytes()) for found in tmp_path.iterdir()] == [("file", b"two")]


def test_a_file_system_that_cannot_flush_folders_loses_no_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    with new_folder(tmp_path / "x") as folder:
        (folder / "inside").write_text("all of it")
    assert (tmp_path / "x" / "inside").read_text() == "all of it"
