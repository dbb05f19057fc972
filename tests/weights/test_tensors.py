"""New files appear whole, and never in the place of what has come while they were written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rwkv_jax.weights.tensors import WeightsError, new_file


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
        pytest.raises(WeightsError, match=r"file/x: cannot be written \(.*\); name another place"),
        new_file(tmp_path / "file" / "x"),
    ):
        pytest.fail("there is no file to write")


def test_what_is_there_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("precious")
    with (
        pytest.raises(WeightsError, match="x: exists already and is not overwritten; move it away"),
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

    with pytest.raises(WeightsError, match="x: exists already and is not overwritten"):
        save(b"late", lambda: save(b"first", lambda: None))
    assert [found.read_bytes() for found in tmp_path.iterdir()] == [b"first"]


def test_what_comes_at_the_very_end_keeps_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def link_too_late(temporary: Path, path: Path) -> None:
        path.write_text("precious")
        link(temporary, path)

    monkeypatch.setattr(os, "link", link_too_late)
    with pytest.raises(WeightsError, match="x: exists already and is not overwritten"), new_file(tmp_path / "x"):
        pass
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]
