"""A run folder is never mistaken for another, and its model is loaded from it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import pytest

from rwkv_jax import run_folder
from rwkv_jax.config import ConfigError, DataConfig, OptimizerConfig, TrainConfig, to_dict
from rwkv_jax.data.corpus import Corpus, prepare_corpus
from rwkv_jax.training import checkpoints as ckpt
from rwkv_jax.training.functions import abstract_state, make_train_functions
from rwkv_jax.training.state import TrainState
from tests.small_runs import CODE, assert_same_bits, names_in
from tests.training.saved import CONFIG, truncate_data

# Orbax leaves reading tasks behind when a file is damaged; they fail later, in whatever test runs then.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class TestIdentity:
    @pytest.mark.parametrize(
        "changes",
        [
            {"optimizer": OptimizerConfig(learning_rate=1e-2, clip_norm=0.0)},
            {"training": dataclasses.replace(CONFIG.training, num_steps=77)},
            {"model": dataclasses.replace(CONFIG.model, dtype="bfloat16", wkv_implementation="scan")},
            {"model": dataclasses.replace(CONFIG.model, output_implementation="xla", step_implementation="xla")},
            # What None stands for, spelled out.
            {"model": CONFIG.model.resolved()},
        ],
    )
    def test_what_may_change(self, changes: dict[str, Any]) -> None:
        saved = run_folder.identity(CONFIG, "corpus", "tokenizer")
        run_folder.refuse_difference(
            saved, run_folder.identity(dataclasses.replace(CONFIG, **changes), "corpus", "tokenizer"), "x"
        )

    def test_optimizer_settings_that_may_change_do_not_change_the_state(self) -> None:
        """Or a whole checkpoint would be taken for a damaged one."""
        changed = dataclasses.replace(
            CONFIG, optimizer=OptimizerConfig(schedule="constant", weight_decay=0.0, clip_norm=0.0, warmup_steps=0)
        )
        states = [abstract_state(make_train_functions(config)) for config in (CONFIG, changed)]
        assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])

    def test_the_table_lists_exactly_what_differs(self) -> None:
        saved = json.loads(json.dumps(run_folder.identity(CONFIG, "aaaa", "tttt")))  # as run.json gives it back
        changed = dataclasses.replace(
            CONFIG,
            seed=5,
            model=dataclasses.replace(CONFIG.model, width=64),
            training=dataclasses.replace(CONFIG.training, batch_size=2),
        )
        with pytest.raises(ConfigError) as error:
            run_folder.refuse_difference(saved, run_folder.identity(changed, "bbbb", "tttt"), "runs/mine")
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
            run_folder.refuse_difference({"seed": 0}, {"seed": 0, "newer": 1}, "x")


class TestRunFolder:
    def test_new_and_empty_folders_are_taken(self, tmp_path: Path) -> None:
        assert run_folder.prepare_run_dir(tmp_path / "new" / "folder") is None
        assert run_folder.prepare_run_dir(tmp_path / "new" / "folder") is None
        assert names_in(tmp_path / "new" / "folder") == []

    def test_hidden_files_do_not_count(self, tmp_path: Path) -> None:
        (tmp_path / ".gitkeep").touch()
        assert run_folder.prepare_run_dir(tmp_path) is None

    def test_a_folder_with_things_of_others_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("years of work")
        with pytest.raises(ConfigError, match=r"thesis\.tex.*new or empty folder"):
            run_folder.prepare_run_dir(tmp_path)
        assert names_in(tmp_path) == ["thesis.tex"]

    @pytest.mark.parametrize("name", ["file", "file/below"])
    def test_a_folder_that_cannot_be_made_is_refused(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match=r"run_dir = .*file.*cannot be written.*name another folder"):
            run_folder.prepare_run_dir(tmp_path / name)

    @pytest.mark.parametrize(
        "content",
        [
            *("", "{", "[]", "3", "{}", '{"config": {}}', "\x00\x01", '{"config": [], "identity": {}}'),
            *('{"config": {}, "identity": {}, "choices": []}', '{"config": {}, "identity": {}, "choices": {"x": [1]}}'),
            *('{"config": {}, "identity": 3}', "[" * 100_000, '{"config": {}, "identity": {}, "config": {}}'),
        ],
        ids=lambda content: content[:40],
    )
    def test_a_damaged_run_file_is_named(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(ConfigError, match=r"run\.json: cannot be read"):
            run_folder.prepare_run_dir(tmp_path)
        assert (tmp_path / "run.json").read_text() == content

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("version https://git-lfs.github.com/spec/v1\noid x\nsize 812\n", "it is a Git LFS pointer to 812 bytes"),
            ("<!doctype html><title>404</title>", r"it is a web page \('404'\)"),
            ('{"error": "not found"}', "it is the error answer of a server"),
            ("", "it is empty: the download or copy did not finish"),
        ],
    )
    def test_what_is_no_run_file_is_named(self, tmp_path: Path, content: str, message: str) -> None:
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(ConfigError, match=rf"run\.json: cannot be read as a run's description .*: {message}"):
            run_folder.read_run_file(tmp_path)

    def test_a_run_file_that_has_changed_is_named(self, corpus: Corpus, tmp_path: Path) -> None:
        run_folder.write_run(tmp_path, CONFIG, {"seed": 0}, corpus.tokenizer)
        path = tmp_path / "run.json"
        saved, content = run_folder.read_run_file(tmp_path), json.loads(path.read_text())
        content["config"]["model"]["head_dim"] += 1
        path.write_text(json.dumps(content))
        with pytest.raises(
            ConfigError, match=r"run\.json: has changed since it was written.*take the digest out of it"
        ):
            run_folder.read_run_file(tmp_path)
        del content["digest"]
        path.write_text(json.dumps(content))
        assert run_folder.read_run_file(tmp_path) == {**saved, "config": content["config"]}

    def test_a_run_is_not_kept_at_an_address(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ConfigError, match=r"run_dir = 'gs:/bucket/run': is a web address, not a path; name a"):
            run_folder.prepare_run_dir(Path("gs://bucket/run"))
        assert names_in(tmp_path) == []

    def test_a_run_that_was_killed_while_it_was_described_is_still_a_run(
        self, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Killed at any of the files that are written: the folder is empty, or known by its run.json."""
        replace_file = run_folder.replace_file
        for files in range(2):
            run_dir = tmp_path / str(files)
            left = iter(range(files))

            def write(path: Path, content: bytes, left: Any = left) -> None:
                if next(left, None) is None:
                    raise KeyboardInterrupt
                replace_file(path, content)

            assert run_folder.prepare_run_dir(run_dir) is None
            monkeypatch.setattr(run_folder, "replace_file", write)
            with pytest.raises(KeyboardInterrupt):
                run_folder.write_run(run_dir, CONFIG, {"seed": 0}, corpus.tokenizer)
            monkeypatch.setattr(run_folder, "replace_file", replace_file)
            saved = run_folder.prepare_run_dir(run_dir)
            assert saved == (None if files == 0 else {"config": as_json(CONFIG), "identity": {"seed": 0}})


def as_json(config: TrainConfig) -> dict[str, Any]:
    return json.loads(json.dumps(to_dict(config)))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Some lines of code and a tokenizer of 300 entries."""
    folder = tmp_path_factory.mktemp("corpus")
    source = folder / "source.py"
    source.write_text(CODE)
    return prepare_corpus(DataConfig(source=str(source), cache_dir=str(folder / "cache")), 300, lambda line: None)


@pytest.fixture(scope="module")
def saved_run(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 6 and 8, and a best one of step 4."""
    run_dir = tmp_path_factory.mktemp("saved") / "run"
    run_folder.prepare_run_dir(run_dir)
    run_folder.write_run(run_dir, CONFIG, {}, corpus.tokenizer)
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
    like = abstract_state(make_train_functions(CONFIG))
    return jax.tree.map(lambda x: jnp.full(x.shape, step, x.dtype), like)


class TestLoadModel:
    @pytest.mark.parametrize(("which", "step"), [("newest", 8), ("best", 4)])
    def test_loads_the_parameters_of_the_checkpoint_asked_for(
        self, run_dir: Path, corpus: Corpus, which: Literal["newest", "best"], step: int
    ) -> None:
        loaded = run_folder.load_model(run_dir, which)
        assert loaded.step == step
        assert loaded.config.model == CONFIG.model
        assert run_folder.load_run_tokenizer(run_dir).fingerprint == corpus.tokenizer.fingerprint
        assert_same_bits(loaded.params, model_state(step).params)

    def test_reads_without_disturbing_a_run_in_progress(self, run_dir: Path) -> None:
        in_progress = run_dir / "checkpoints" / "10.orbax-checkpoint-tmp"
        in_progress.mkdir()
        before = names_in(run_dir / "checkpoints")
        assert run_folder.load_model(run_dir, "newest").step == 8
        assert names_in(run_dir / "checkpoints") == before

    def test_damaged_checkpoint_is_named(self, run_dir: Path) -> None:
        truncate_data(run_dir / "checkpoints" / "8")
        with pytest.raises(ConfigError, match=r"checkpoints/8: cannot be read"):
            run_folder.load_model(run_dir, "newest")
        assert names_in(run_dir / "checkpoints") == ["6", "8"]

    def test_a_checkpoint_cloned_without_git_lfs_says_so(self, run_dir: Path) -> None:
        for path in (run_dir / "checkpoints" / "8" / "state").rglob("*ocdbt*"):
            if path.is_file():
                path.write_text("version https://git-lfs.github.com/spec/v1\noid x\nsize 812\n")
        message = r"(?s)checkpoints/8: cannot be read .*ocdbt is a Git LFS pointer to 812 bytes.*git lfs pull"
        with pytest.raises(ConfigError, match=message):
            run_folder.load_model(run_dir, "newest")

    @pytest.mark.parametrize("which", ["newest", "best"])
    @pytest.mark.parametrize("emptied", [False, True])
    def test_run_without_checkpoints(self, run_dir: Path, which: Literal["newest", "best"], emptied: bool) -> None:
        for folder in (run_dir / "checkpoints", run_dir / "best"):
            shutil.rmtree(folder)
            if emptied:
                folder.mkdir()
        with pytest.raises(ConfigError, match="holds no checkpoint yet; train the run first"):
            run_folder.load_model(run_dir, which)

    def test_a_folder_that_is_no_run(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"is no run folder, it has no run\.json"):
            run_folder.load_model(tmp_path / "nothing", "newest")
        assert names_in(tmp_path) == []
