"""A finished file gets its name, and whatever had that name before keeps it."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from rwkv_jax.data.files import publish


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
    publish(temporary, tmp_path / "x")
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
        publish(tmp_path / "x.tmp", tmp_path / "x")
    assert (tmp_path / "x.tmp").read_text() == "new"
    after = (tmp_path / "x").lstat()
    assert (after.st_ino, after.st_size) == (before.st_ino, before.st_size)


@with_and_without_links
def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    (tmp_path / "x.tmp").write_text("new")
    with pytest.raises(FileNotFoundError):
        publish(tmp_path / "x.tmp", tmp_path / "no" / "x")
    assert (tmp_path / "x.tmp").exists()


def test_of_two_who_save_at_once_one_succeeds(tmp_path: Path) -> None:
    for turn in range(50):
        barrier, saved = threading.Barrier(2), list[int]()

        def save(who: int, turn: int = turn, barrier: threading.Barrier = barrier, saved: list[int] = saved) -> None:
            temporary = tmp_path / f"{turn}.{who}.tmp"
            temporary.write_text(str(who))
            barrier.wait()
            try:
                publish(temporary, tmp_path / str(turn))
            except FileExistsError:
                return
            saved.append(who)

        threads = [threading.Thread(target=save, args=(who,)) for who in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [int((tmp_path / str(turn)).read_text())] == saved
