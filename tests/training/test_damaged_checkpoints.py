"""Damaged checkpoints are stepped over and kept aside, by one process and by several."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rwkv_jax.config import ConfigError
from rwkv_jax.parallel.processes import Processes
from rwkv_jax.training import checkpoints as ckpt
from tests.small_runs import assert_same_bits, names_in
from tests.training.saved import LIKE, make_state, restore, save, truncate_data

# Orbax leaves reading tasks behind when a file is damaged; they fail later, in whatever test runs then.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def flip_bits(folder: Path) -> None:
    for path in (folder / "state").rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)


def delete_data(folder: Path) -> None:
    for path in (folder / "state").rglob("d/*"):
        path.unlink()


def delete_metadata(folder: Path) -> None:
    (folder / "state" / "_METADATA").unlink()


def empty_manifest(folder: Path) -> None:
    (folder / "state" / "manifest.ocdbt").write_bytes(b"")


def empty_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = [truncate_data, flip_bits, delete_data, delete_metadata, empty_manifest, empty_folder]


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGES)
    def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
        self, tmp_path: Path, damage: Callable[[Path], None]
    ) -> None:
        save(tmp_path, 4, 6, 8)
        damage(tmp_path / "checkpoints" / "8")
        left = sorted(path.name for path in (tmp_path / "checkpoints" / "8").rglob("*"))
        said: list[str] = []
        with ckpt.Checkpoints(tmp_path, 3, said.append) as checkpoints:
            restored = restore(checkpoints)
        assert_same_bits(restored, make_state(6))
        (line,) = said
        assert line.startswith("checkpoint of step 8 is damaged")
        (aside,) = (path for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith("damaged-8"))
        assert str(aside) in line
        assert sorted(path.name for path in aside.rglob("*")) == left

    def test_the_step_of_a_damaged_checkpoint_is_saved_again(self, tmp_path: Path) -> None:
        save(tmp_path, 6, 8)
        empty_folder(tmp_path / "checkpoints" / "8")
        with ckpt.Checkpoints(tmp_path, 3, print) as checkpoints:
            checkpoints.restore(LIKE)
            checkpoints.save(make_state(8), 8)
        with ckpt.Checkpoints(tmp_path, 3, print) as checkpoints:
            restored = restore(checkpoints)
        assert_same_bits(restored, make_state(8))

    def test_two_damaged_checkpoints_are_both_stepped_over(self, tmp_path: Path) -> None:
        save(tmp_path, 4, 6, 8)
        truncate_data(tmp_path / "checkpoints" / "8")
        empty_folder(tmp_path / "checkpoints" / "6")
        said: list[str] = []
        with ckpt.Checkpoints(tmp_path, 3, said.append) as checkpoints:
            restored = restore(checkpoints)
        assert_same_bits(restored, make_state(4))
        assert len(said) == 2

    def test_if_none_is_intact_that_is_an_error_until_one_is(self, tmp_path: Path) -> None:
        save(tmp_path, 6, 8)
        for step in (6, 8):
            truncate_data(tmp_path / "checkpoints" / str(step))
        for _ in range(2):
            with (
                pytest.raises(ConfigError, match=r"none of its checkpoints is intact: 8 \(.*\) 6 \(.*\)\. Put"),
                ckpt.Checkpoints(tmp_path, 3, pytest.fail) as checkpoints,
            ):
                checkpoints.restore(LIKE)
        assert names_in(tmp_path / "checkpoints") == ["6", "8"]


class TestSeveralProcesses:
    """What the other process says is made up; tests/test_meshes.py has real ones."""

    def test_a_share_that_is_damaged_for_another_process_is_no_checkpoint_here(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save(tmp_path, 4, 6)
        other = {"what checkpoint 6 holds": json.dumps(["unexpected end of file", ""])}
        monkeypatch.setattr(ckpt, "allgather_text", lambda _, subject, text: [text, other.get(subject, text)])
        said: list[str] = []
        with ckpt.Checkpoints(tmp_path, 3, said.append) as checkpoints:
            restored = restore(checkpoints)
        assert_same_bits(restored, make_state(4))
        (line,) = said
        assert line.startswith("checkpoint of step 6 is damaged (unexpected end of file)")

    def test_only_the_first_process_moves_a_damaged_checkpoint(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save(tmp_path, 4, 6)
        empty_folder(tmp_path / "checkpoints" / "6")
        monkeypatch.setattr(ckpt, "allgather_text", lambda _, subject, text: [text, text])
        with ckpt.Checkpoints(tmp_path, 3, pytest.fail, Processes(1, 2)) as checkpoints:
            assert int(restore(checkpoints).step) == 4
        assert names_in(tmp_path / "checkpoints") == ["4", "6"]

    def test_a_digest_that_differs_for_another_process_is_damage_here(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save(tmp_path, 4, 6)
        other = {"digests of checkpoint 6": json.dumps(["step has other bits than were saved", ""])}
        monkeypatch.setattr(ckpt, "allgather_text", lambda _, subject, text: [text, other.get(subject, text)])
        said: list[str] = []
        with ckpt.Checkpoints(tmp_path, 3, said.append) as checkpoints:
            assert int(restore(checkpoints).step) == 4
        assert said[0].startswith("checkpoint of step 6 is damaged (step has other bits than were saved)")

    def test_processes_that_see_different_folders_are_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save(tmp_path, 4, 6)
        monkeypatch.setattr(ckpt, "allgather_text", lambda _, subject, text: [text, "[]"])
        with (
            ckpt.Checkpoints(tmp_path, 3, print) as checkpoints,
            pytest.raises(
                ConfigError, match=r"on a disk that all share:\n.*\n  steps  \[6, 4\]  0\n  steps  \[\]      1$"
            ),
        ):
            checkpoints.restore(LIKE)

    def test_the_best_loss_is_what_the_first_process_reads(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ckpt, "allgather_text", lambda _, subject, text: ["1.25", text])
        with ckpt.Checkpoints(tmp_path, 3, print) as checkpoints:
            assert checkpoints.best_loss() == 1.25
