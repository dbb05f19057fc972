"""Checkpoints are whole or not there, and the best one stays."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax.training import checkpoints as ckpt
from tests.small_runs import assert_same_bits, names_in
from tests.training.saved import LIKE, make_state, restore, save, shapes_of

# Orbax leaves reading tasks behind when a file is damaged; they fail later, in whatever test runs then.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class TestSaveAndRestore:
    def test_what_is_restored_is_what_was_saved(self, tmp_path: Path) -> None:
        save(tmp_path, 7)
        with ckpt.Checkpoints(tmp_path, 2, print) as checkpoints:
            restored = restore(checkpoints)
        assert_same_bits(restored, make_state(7))

    def test_newest_is_restored_and_older_ones_make_room(self, tmp_path: Path) -> None:
        # As text, 10 would come before 8.
        save(tmp_path, 2, 8, 10, keep=2)
        assert names_in(tmp_path / "checkpoints") == ["10", "8"]
        with ckpt.Checkpoints(tmp_path, 2, print) as checkpoints:
            restored = restore(checkpoints)
        assert_same_bits(restored, make_state(10))

    def test_new_run_has_nothing_to_restore(self, tmp_path: Path) -> None:
        with ckpt.Checkpoints(tmp_path, 2, print) as checkpoints:
            assert checkpoints.restore(LIKE) is None
            assert checkpoints.best_loss() == float("inf")

    def test_a_step_that_is_saved_already_stays_as_it_is(self, tmp_path: Path) -> None:
        save(tmp_path, 4)
        with ckpt.Checkpoints(tmp_path, 2, print) as checkpoints:
            checkpoints.save(make_state(5), 4)
            checkpoints.wait()
            restored = restore(checkpoints)
        assert_same_bits(restored, make_state(4))

    def test_a_save_in_flight_does_not_see_later_steps(self, tmp_path: Path) -> None:
        """The training step donates the state that is being written."""
        step = jax.jit(lambda state: jax.tree.map(lambda x: x + jnp.ones_like(x), state), donate_argnums=0)
        state = make_state(1, size=1024)
        like, expected = shapes_of(state), jax.tree.map(np.array, state)
        with ckpt.Checkpoints(tmp_path, 2, print) as checkpoints:
            checkpoints.save(state, 1)
            for _ in range(20):
                state = jax.block_until_ready(step(state))
            checkpoints.wait()
            restored = restore(checkpoints, like)
        assert_same_bits(jax.tree.map(np.asarray, restored), expected)

    def test_leftovers_of_killed_saves_are_no_checkpoints_and_are_cleaned_up(self, tmp_path: Path) -> None:
        save(tmp_path, 4)
        leftover = tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp"
        shutil.copytree(tmp_path / "checkpoints" / "4", leftover)
        (leftover / "_CHECKPOINT_METADATA").unlink()
        with ckpt.Checkpoints(tmp_path, 2, print) as checkpoints:
            restored = restore(checkpoints)
            checkpoints.save(make_state(6), 6)
        assert_same_bits(restored, make_state(4))
        assert names_in(tmp_path / "checkpoints") == ["4", "6"]

    def test_things_that_are_no_checkpoints_are_left_alone(self, tmp_path: Path) -> None:
        save(tmp_path, 4)
        (tmp_path / "checkpoints" / "notes").mkdir()
        (tmp_path / "checkpoints" / "readme.txt").write_text("mine")
        with ckpt.Checkpoints(tmp_path, 1, print) as checkpoints:
            restored = restore(checkpoints)
            checkpoints.save(make_state(6), 6)
        assert_same_bits(restored, make_state(4))
        assert names_in(tmp_path / "checkpoints") == ["6", "notes", "readme.txt"]


class TestBest:
    def test_best_replaces_the_one_before_and_remembers_its_loss(self, tmp_path: Path) -> None:
        with ckpt.Checkpoints(tmp_path, 2, print) as checkpoints:
            checkpoints.save_best(make_state(4), 4, 2.5)
            checkpoints.save_best(make_state(8), 8, 1.25)
        assert names_in(tmp_path / "best") == ["8"]
        with ckpt.Checkpoints(tmp_path, 2, print) as checkpoints:
            assert checkpoints.best_loss() == 1.25

    def test_best_may_be_of_an_earlier_step_than_the_one_before(self, tmp_path: Path) -> None:
        """After a damaged checkpoint, and with another learning rate, an earlier step can be better."""
        with ckpt.Checkpoints(tmp_path, 2, print) as checkpoints:
            checkpoints.save_best(make_state(8), 8, 2.5)
            checkpoints.save_best(make_state(4), 4, 1.25)
        with ckpt.Checkpoints(tmp_path, 2, print) as checkpoints:
            assert checkpoints.best_loss() == 1.25
        assert names_in(tmp_path / "best") == ["4"]

    def test_best_is_on_disk_before_the_checkpoint_of_its_step_is_begun(self, tmp_path: Path) -> None:
        """Or a run that is killed between them would go on after the evaluation without its best checkpoint."""
        large = make_state(4, size=2048)
        with ckpt.Checkpoints(tmp_path, 2, print) as checkpoints:
            checkpoints.save_best(large, 4, 2.5)
            checkpoints.save(make_state(4), 4)
            assert "4" in names_in(tmp_path / "best")

    def test_damaged_best_makes_room_for_the_next_one(self, tmp_path: Path) -> None:
        with ckpt.Checkpoints(tmp_path, 2, print) as checkpoints:
            checkpoints.save_best(make_state(4), 4, 2.5)
        shutil.rmtree(tmp_path / "best" / "4")
        (tmp_path / "best" / "4").mkdir()
        with ckpt.Checkpoints(tmp_path, 2, print) as checkpoints:
            assert checkpoints.best_loss() == float("inf")
            checkpoints.save_best(make_state(8), 8, 3.5)
        with ckpt.Checkpoints(tmp_path, 2, print) as checkpoints:
            assert checkpoints.best_loss() == 3.5
