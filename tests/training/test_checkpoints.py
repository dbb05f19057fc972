"""Checkpoints are whole or not there, damaged ones are stepped over, and a run folder is never mistaken for another."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax.config import ConfigError, DataConfig, ModelConfig, OptimizerConfig, TrainConfig, to_dict
from rwkv_jax.data.corpus import Corpus, prepare_corpus
from rwkv_jax.parallel.processes import Processes
from rwkv_jax.training import checkpoints as ckpt
from rwkv_jax.training.step import TrainState, abstract_state, make_trainer

# Orbax leaves reading tasks behind when a file is damaged; they fail later, in whatever test runs then.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def make_state(step: int, size: int = 64) -> TrainState:
    """A state that differs at each step."""
    values = jax.random.normal(jax.random.key(step), (size, size))
    params = {"emb": values, "blocks": {"w0": values[:, :3] * 2, "k": jnp.bfloat16(values[0])}}
    return TrainState(
        params=params,
        optimizer=(jax.tree.map(jnp.square, params), jnp.float32(step)),
        step=jnp.int32(step),
        key=jax.random.key_data(jax.random.key(0)),
        bad_steps=jnp.int32(0),
        skipped_steps=jnp.int32(step // 2),
    )


def shapes_of(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


LIKE = shapes_of(make_state(0))


def assert_same(left: Any, right: Any) -> None:
    """Bit for bit."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save(run_dir: Path, *steps: int, keep: int = 3) -> None:
    with ckpt.Checkpoints(run_dir, keep, print) as checkpoints:
        for step in steps:
            checkpoints.save(make_state(step), step)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestSaveAndRestore:
    def test_what_is_restored_is_what_was_saved(self, tmp_path: Path) -> None:
        save(tmp_path, 7)
        with ckpt.Checkpoints(tmp_path, 2, print) as checkpoints:
            restored = checkpoints.restore(LIKE)
        assert_same(restored, make_state(7))

    def test_newest_is_restored_and_older_ones_make_room(self, tmp_path: Path) -> None:
        # As text, 10 would come before 8.
        save(tmp_path, 2, 8, 10, keep=2)
        assert names(tmp_path / "checkpoints") == ["10", "8"]
        with ckpt.Checkpoints(tmp_path, 2, print) as checkpoints:
            restored = checkpoints.restore(LIKE)
        assert_same(restored, make_state(10))

    def test_new_run_has_nothing_to_restore(self, tmp_path: Path) -> None:
        with ckpt.Checkpoints(tmp_path, 2, print) as checkpoints:
            assert checkpoints.restore(LIKE) is None
            assert checkpoints.best_loss() == float("inf")

    def test_a_step_that_is_saved_already_stays_as_it_is(self, tmp_path: Path) -> None:
        save(tmp_path, 4)
        with ckpt.Checkpoints(tmp_path, 2, print) as checkpoints:
            checkpoints.save(make_state(5), 4)
            checkpoints.wait()
            restored = checkpoints.restore(LIKE)
        assert_same(restored, make_state(4))

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
            restored = checkpoints.restore(like)
        assert_same(jax.tree.map(np.asarray, restored), expected)

    def test_leftovers_of_killed_saves_are_no_checkpoints_and_are_cleaned_up(self, tmp_path: Path) -> None:
        save(tmp_path, 4)
        leftover = tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp"
        shutil.copytree(tmp_path / "checkpoints" / "4", leftover)
        (leftover / "_CHECKPOINT_METADATA").unlink()
        with ckpt.Checkpoints(tmp_path, 2, print) as checkpoints:
            restored = checkpoints.restore(LIKE)
            checkpoints.save(make_state(6), 6)
        assert_same(restored, make_state(4))
        assert names(tmp_path / "checkpoints") == ["4", "6"]

    def test_things_that_are_no_checkpoints_are_left_alone(self, tmp_path: Path) -> None:
        save(tmp_path, 4)
        (tmp_path / "checkpoints" / "notes").mkdir()
        (tmp_path / "checkpoints" / "readme.txt").write_text("mine")
        with ckpt.Checkpoints(tmp_path, 1, print) as checkpoints:
            restored = checkpoints.restore(LIKE)
            checkpoints.save(make_state(6), 6)
        assert_same(restored, make_state(4))
        assert names(tmp_path / "checkpoints") == ["6", "notes", "readme.txt"]


class TestBest:
    def test_best_replaces_the_one_before_and_remembers_its_loss(self, tmp_path: Path) -> None:
        with ckpt.Checkpoints(tmp_path, 2, print) as checkpoints:
            checkpoints.save_best(make_state(4), 4, 2.5)
            checkpoints.save_best(make_state(8), 8, 1.25)
        assert names(tmp_path / "best") == ["8"]
        with ckpt.Checkpoints(tmp_path, 2, print) as checkpoints:
            assert checkpoints.best_loss() == 1.25

    def test_best_may_be_of_an_earlier_step_than_the_one_before(self, tmp_path: Path) -> None:
        """After a damaged checkpoint, and with another learning rate, an earlier step can be better."""
        with ckpt.Checkpoints(tmp_path, 2, print) as checkpoints:
            checkpoints.save_best(make_state(8), 8, 2.5)
            checkpoints.save_best(make_state(4), 4, 1.25)
        with ckpt.Checkpoints(tmp_path, 2, print) as checkpoints:
            assert checkpoints.best_loss() == 1.25
        assert names(tmp_path / "best") == ["4"]

    def test_best_is_on_disk_before_the_checkpoint_of_its_step_is_begun(self, tmp_path: Path) -> None:
        """Or a run that is killed between them would go on after the evaluation without its best checkpoint."""
        large = make_state(4, size=2048)
        with ckpt.Checkpoints(tmp_path, 2, print) as checkpoints:
            checkpoints.save_best(large, 4, 2.5)
            checkpoints.save(make_state(4), 4)
            assert "4" in names(tmp_path / "best")

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


def truncate_data(folder: Path) -> None:
    for path in (folder / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


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
            restored = checkpoints.restore(LIKE)
        assert_same(restored, make_state(6))
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
            restored = checkpoints.restore(LIKE)
        assert_same(restored, make_state(8))

    def test_two_damaged_checkpoints_are_both_stepped_over(self, tmp_path: Path) -> None:
        save(tmp_path, 4, 6, 8)
        truncate_data(tmp_path / "checkpoints" / "8")
        empty_folder(tmp_path / "checkpoints" / "6")
        said: list[str] = []
        with ckpt.Checkpoints(tmp_path, 3, said.append) as checkpoints:
            restored = checkpoints.restore(LIKE)
        assert_same(restored, make_state(4))
        assert len(said) == 2

    def test_if_the_only_checkpoint_is_damaged_there_is_none(self, tmp_path: Path) -> None:
        save(tmp_path, 8)
        truncate_data(tmp_path / "checkpoints" / "8")
        said: list[str] = []
        with ckpt.Checkpoints(tmp_path, 3, said.append) as checkpoints:
            assert checkpoints.restore(LIKE) is None
            checkpoints.save(make_state(2), 2)
        assert len(said) == 1
        assert [name for name in names(tmp_path / "checkpoints") if not name.startswith("damaged")] == ["2"]


CONFIG = TrainConfig(model=ModelConfig(vocab_size=300, num_layers=2, width=32, head_dim=16))


class TestSeveralProcesses:
    """What the other process says is made up; tests/test_meshes.py has real ones."""

    def test_a_share_that_is_damaged_for_another_process_is_no_checkpoint_here(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save(tmp_path, 4, 6)
        other = {"what checkpoint 6 holds": "unexpected end of file"}
        monkeypatch.setattr(ckpt, "gather", lambda _, subject, text: [text, other.get(subject, text)])
        said: list[str] = []
        with ckpt.Checkpoints(tmp_path, 3, said.append) as checkpoints:
            restored = checkpoints.restore(LIKE)
        assert_same(restored, make_state(4))
        (line,) = said
        assert line.startswith("checkpoint of step 6 is damaged (unexpected end of file)")

    def test_only_the_first_process_moves_a_damaged_checkpoint(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save(tmp_path, 4)
        empty_folder(tmp_path / "checkpoints" / "4")
        monkeypatch.setattr(ckpt, "gather", lambda _, subject, text: [text, text])
        with ckpt.Checkpoints(tmp_path, 3, pytest.fail, Processes(1, 2)) as checkpoints:
            assert checkpoints.restore(LIKE) is None
        assert names(tmp_path / "checkpoints") == ["4"]

    def test_processes_that_see_different_folders_are_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save(tmp_path, 4, 6)
        monkeypatch.setattr(ckpt, "gather", lambda _, subject, text: [text, "[]"])
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
        monkeypatch.setattr(ckpt, "gather", lambda _, subject, text: ["1.25", text])
        with ckpt.Checkpoints(tmp_path, 3, print) as checkpoints:
            assert checkpoints.best_loss() == 1.25


class TestIdentity:
    @pytest.mark.parametrize(
        "changes",
        [
            {"optimizer": OptimizerConfig(learning_rate=1e-2, clip_norm=0.0)},
            {"training": dataclasses.replace(CONFIG.training, num_steps=77)},
            {"model": dataclasses.replace(CONFIG.model, dtype="bfloat16", wkv_implementation="scan")},
            # What None stands for, spelled out.
            {"model": CONFIG.model.resolved()},
        ],
    )
    def test_what_may_change(self, changes: dict[str, Any]) -> None:
        saved = ckpt.identity(CONFIG, "corpus", "tokenizer")
        ckpt.refuse_difference(saved, ckpt.identity(dataclasses.replace(CONFIG, **changes), "corpus", "tokenizer"), "x")

    def test_optimizer_settings_that_may_change_do_not_change_the_state(self) -> None:
        """Or a whole checkpoint would be taken for a damaged one."""
        changed = dataclasses.replace(
            CONFIG, optimizer=OptimizerConfig(schedule="constant", weight_decay=0.0, clip_norm=0.0, warmup_steps=0)
        )
        states = [abstract_state(make_trainer(config)) for config in (CONFIG, changed)]
        assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])

    def test_the_table_lists_exactly_what_differs(self) -> None:
        saved = json.loads(json.dumps(ckpt.identity(CONFIG, "aaaa", "tttt")))  # as run.json gives it back
        changed = dataclasses.replace(
            CONFIG,
            seed=5,
            model=dataclasses.replace(CONFIG.model, width=64),
            training=dataclasses.replace(CONFIG.training, batch_size=2),
        )
        with pytest.raises(ConfigError) as error:
            ckpt.refuse_difference(saved, ckpt.identity(changed, "bbbb", "tttt"), "runs/mine")
        first, head, *rows = str(error.value).splitlines()
        assert first.startswith("runs/mine holds another run")
        assert head.split() == ["field", "saved", "now"]
        assert [row.split() for row in rows] == [
            ["corpus", "aaaa", "bbbb"],
            ["model.ffn_width", "128", "256"],
            ["model.width", "32", "64"],
            ["seed", "0", "5"],
            ["training.batch_size", "8", "2"],
        ]

    def test_a_field_that_only_one_side_has_is_a_difference(self) -> None:
        with pytest.raises(ConfigError, match=r"newer +- +1"):
            ckpt.refuse_difference({"seed": 0}, {"seed": 0, "newer": 1}, "x")


class TestRunFolder:
    def test_new_and_empty_folders_are_taken(self, tmp_path: Path) -> None:
        assert ckpt.prepare_run_dir(tmp_path / "new" / "folder") is None
        assert ckpt.prepare_run_dir(tmp_path / "new" / "folder") is None
        assert names(tmp_path / "new" / "folder") == []

    def test_hidden_files_do_not_count(self, tmp_path: Path) -> None:
        (tmp_path / ".gitkeep").touch()
        assert ckpt.prepare_run_dir(tmp_path) is None

    def test_a_folder_with_things_of_others_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("years of work")
        with pytest.raises(ConfigError, match=r"thesis\.tex.*new or empty folder"):
            ckpt.prepare_run_dir(tmp_path)
        assert names(tmp_path) == ["thesis.tex"]

    @pytest.mark.parametrize("name", ["file", "file/below"])
    def test_a_folder_that_cannot_be_made_is_refused(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match=r"run_dir = .*file.*cannot be written.*name another folder"):
            ckpt.prepare_run_dir(tmp_path / name)

    @pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}", '{"config": {}}', "\x00\x01"])
    def test_a_damaged_run_file_is_named(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(ConfigError, match=r"run\.json: cannot be read"):
            ckpt.prepare_run_dir(tmp_path)
        assert (tmp_path / "run.json").read_text() == content

    def test_a_run_that_was_killed_while_it_was_described_is_still_a_run(
        self, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Killed at any of the files that are written: the folder is empty, or known by its run.json."""
        write_file = ckpt.write_file
        for files in range(2):
            run_dir = tmp_path / str(files)
            left = iter(range(files))

            def write(path: Path, content: bytes, left: Any = left) -> None:
                if next(left, None) is None:
                    raise KeyboardInterrupt
                write_file(path, content)

            assert ckpt.prepare_run_dir(run_dir) is None
            monkeypatch.setattr(ckpt, "write_file", write)
            with pytest.raises(KeyboardInterrupt):
                ckpt.write_run(run_dir, CONFIG, {"seed": 0}, corpus)
            monkeypatch.setattr(ckpt, "write_file", write_file)
            saved = ckpt.prepare_run_dir(run_dir)
            assert saved == (None if files == 0 else {"config": as_json(CONFIG), "identity": {"seed": 0}})

    def test_a_file_is_replaced_whole(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "file"
        ckpt.write_file(path, b"one")
        ckpt.write_file(path, b"two")
        assert path.read_bytes() == b"two"

        def fail(descriptor: int) -> None:
            raise OSError("no space")

        monkeypatch.setattr(ckpt.os, "fsync", fail)
        with pytest.raises(OSError, match="no space"):
            ckpt.write_file(path, b"three")
        assert path.read_bytes() == b"two"


def as_json(config: TrainConfig) -> dict[str, Any]:
    return json.loads(json.dumps(to_dict(config)))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Some lines of code and a tokenizer of 300 entries."""
    folder = tmp_path_factory.mktemp("corpus")
    source = folder / "source.py"
    source.write_text("".join(f"def f{i}(x):\n    return x * {i} + {i * i}\n\n" for i in range(200)))
    return prepare_corpus(DataConfig(source=str(source), cache_dir=str(folder / "cache")), 300, lambda line: None)


@pytest.fixture(scope="module")
def saved_run(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 6 and 8, and a best one of step 4."""
    run_dir = tmp_path_factory.mktemp("saved") / "run"
    ckpt.prepare_run_dir(run_dir)
    ckpt.write_run(run_dir, CONFIG, {}, corpus)
    with ckpt.Checkpoints(run_dir, 2, print) as checkpoints:
        checkpoints.save_best(model_state(4), 4, 2.0)
        checkpoints.save(model_state(6), 6)
        checkpoints.save(model_state(8), 8)
    return run_dir


@pytest.fixture
def run_dir(saved_run: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(saved_run, tmp_path / "run"))


def model_state(step: int) -> TrainState:
    """The shapes of a model's state, filled with numbers that differ at each step."""
    like = abstract_state(make_trainer(CONFIG))
    return jax.tree.map(lambda x: jnp.full(x.shape, step, x.dtype), like)


class TestLoadModel:
    @pytest.mark.parametrize(("which", "step"), [("newest", 8), ("best", 4)])
    def test_loads_the_parameters_of_the_checkpoint_asked_for(
        self, run_dir: Path, corpus: Corpus, which: Literal["newest", "best"], step: int
    ) -> None:
        loaded = ckpt.load_model(run_dir, which)
        assert loaded.step == step
        assert loaded.config.model == CONFIG.model
        assert ckpt.load_run_tokenizer(run_dir).fingerprint == corpus.tokenizer.fingerprint
        assert_same(loaded.params, model_state(step).params)

    def test_reads_without_disturbing_a_run_in_progress(self, run_dir: Path) -> None:
        in_progress = run_dir / "checkpoints" / "10.orbax-checkpoint-tmp"
        in_progress.mkdir()
        before = names(run_dir / "checkpoints")
        assert ckpt.load_model(run_dir, "newest").step == 8
        assert names(run_dir / "checkpoints") == before

    def test_damaged_checkpoint_is_named(self, run_dir: Path) -> None:
        truncate_data(run_dir / "checkpoints" / "8")
        with pytest.raises(ConfigError, match=r"checkpoints/8: cannot be read"):
            ckpt.load_model(run_dir, "newest")
        assert names(run_dir / "checkpoints") == ["6", "8"]

    @pytest.mark.parametrize("which", ["newest", "best"])
    @pytest.mark.parametrize("emptied", [False, True])
    def test_run_without_checkpoints(self, run_dir: Path, which: Literal["newest", "best"], emptied: bool) -> None:
        for folder in (run_dir / "checkpoints", run_dir / "best"):
            shutil.rmtree(folder)
            if emptied:
                folder.mkdir()
        with pytest.raises(ConfigError, match="holds no checkpoint yet; train the run first"):
            ckpt.load_model(run_dir, which)

    def test_a_folder_that_is_no_run(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"is no run folder, it has no run\.json"):
            ckpt.load_model(tmp_path / "nothing", "newest")
        assert names(tmp_path) == []
