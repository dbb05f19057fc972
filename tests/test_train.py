"""`train(config)`: what a run leaves behind, what it refuses before it begins, and what it does with bad steps."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import train
from rwkv_jax.cli import parse_train_config
from rwkv_jax.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    TrainingConfig,
)
from rwkv_jax.data.rows import TrainingRows, training_rows
from rwkv_jax.data.tokenizers import train_sentencepiece
from rwkv_jax.evaluation.held_out import HeldOut, compressed_bits_per_byte
from rwkv_jax.training import checkpoints as ckpt
from rwkv_jax.training import step as step_module
from rwkv_jax.training.journal import NonFiniteError
from rwkv_jax.training.loss import TokenLosses, sum_losses
from rwkv_jax.training.metrics import read_metrics
from rwkv_jax.training.step import TrainState, abstract_state, make_trainer
from rwkv_jax.weights.pretrained import check_initial_weights, convert, from_pretrained, initial_params
from rwkv_jax.weights.torch_file import write_torch_file
from tests.weights.files import random_tensors

# Orbax leaves reading tasks behind when a file is damaged; they fail later, in whatever test runs then.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module", autouse=True)
def compiled_programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps compiled programs on disk: every call of `train` would compile the same ones again, for seconds."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.getbasetemp() / "programs"),  # for all modules
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def write_corpus(folder: Path, factor: int = 1) -> Path:
    """Two dozen files of code; another factor gives other text."""
    folder.mkdir()
    for i in range(24):
        lines = [f"def f{i}_{j}(x):\n    return x * {j} + {factor * i * j}\n" for j in range(20)]
        (folder / f"{i}.py").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run of seconds; its folder is for each test to name."""
    folder = tmp_path_factory.mktemp("data")
    return TrainConfig(
        model=ModelConfig(vocab_size=300, num_layers=2, width=32, head_dim=16),
        data=DataConfig(source=str(write_corpus(folder / "source")), cache_dir=str(folder / "cache"), held_out=0.2),
        # Constant, so that the compiled step does not depend on the number of steps.
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="constant", warmup_steps=3),
        training=TrainingConfig(num_steps=8, batch_size=4, sequence_length=32),
        evaluation=EvaluationConfig(every=3, batches=2, sample_tokens=8, sample_prompts=("def", "x")),
        checkpoint=CheckpointConfig(every=4, keep=2),
        logging=LoggingConfig(every=2),
        profile=(2, 3),
    )


class Run(NamedTuple):
    result: train.TrainResult
    folder: Path
    config: TrainConfig
    output: str
    compiled: Counter[str]
    """How often each function was compiled."""


def run(config: TrainConfig, folder: Path) -> Run:
    """Trains in this process."""
    config = dataclasses.replace(config, run_dir=str(folder))
    compiled: Counter[str] = Counter()

    class Count(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if isinstance(record.args, tuple) and str(record.msg).startswith("Compiling %s with"):
                compiled[str(record.args[0])] += 1

    counter, logger = Count(), logging.getLogger("jax._src.interpreters.pxla")
    logger.addHandler(counter)
    try:
        with jax.log_compiles(), contextlib.redirect_stdout(io.StringIO()) as output:
            result = train.train(config)
    finally:
        logger.removeHandler(counter)
    return Run(result, folder, config, output.getvalue(), compiled)


@pytest.fixture(scope="module")
def finished(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run from beginning to end; not to be changed."""
    return run(config, tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def copy(finished: Run, tmp_path: Path) -> Path:
    """A copy of that run's folder."""
    return Path(shutil.copytree(finished.folder, tmp_path / "copy"))


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def figures(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the one figure that depends on the clock."""
    records = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name != "tokens_per_second"} for record in records]


def steps_of(folder: Path, kind: str) -> list[int]:
    return [record["step"] for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == kind]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_same(left: Any, right: Any) -> None:
    """Bit for bit."""
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def restore(config: TrainConfig, folder: Path, step: int | None = None) -> TrainState:
    """The newest checkpoint, or that of a step."""
    if step is not None:
        folder = Path(shutil.copytree(folder, folder.with_name(f"only-{step}")))
        for name in names(folder / "checkpoints"):
            if name != str(step):
                shutil.rmtree(folder / "checkpoints" / name)
    with ckpt.Checkpoints(folder, config.checkpoint.keep, pytest.fail) as checkpoints:
        state = checkpoints.restore(abstract_state(make_trainer(config)))
    assert state is not None
    return state


class TestFinishedRun:
    def test_folder_holds_all_that_a_run_leaves(self, finished: Run) -> None:
        expected = ["best", "checkpoints", "loss.png", "metrics.jsonl", "profile", "run.json", "tokenizer.model"]
        assert names(finished.folder) == expected
        assert names(finished.folder / "checkpoints") == ["4", "8"]

    def test_metrics_have_every_interval_evaluation_and_sample(self, finished: Run) -> None:
        assert steps_of(finished.folder, "train") == [2, 4, 6, 8]
        assert steps_of(finished.folder, "evaluation") == [3, 6, 8]
        samples = [record for record in read_metrics(finished.folder / "metrics.jsonl") if record["kind"] == "sample"]
        # One prompt in turn at each evaluation, all of them at the end.
        assert [(record["step"], record["prompt"]) for record in samples] == [
            (3, "x"),
            (6, "def"),
            (8, "def"),
            (8, "x"),
        ]
        assert all(record["text"] for record in samples)

    def test_model_learns(self, finished: Run) -> None:
        losses = [
            record["loss"] for record in read_metrics(finished.folder / "metrics.jsonl") if record["kind"] == "train"
        ]
        assert losses[-1] < losses[0] - 0.5

    def test_best_checkpoint_is_of_the_lowest_held_out_loss(self, finished: Run) -> None:
        records = read_metrics(finished.folder / "metrics.jsonl")
        losses = {record["step"]: record["loss"] for record in records if record["kind"] == "evaluation"}
        (best,) = names(finished.folder / "best")
        assert losses[int(best)] == min(losses.values())
        with ckpt.Checkpoints(finished.folder, 2, pytest.fail) as checkpoints:
            assert checkpoints.best_loss() == min(losses.values())

    def test_result_is_the_saved_state_and_the_loss_of_all_held_out_text(self, finished: Run) -> None:
        assert_same(restore(finished.config, finished.folder), finished.result.state)
        held_out = finished.result.held_out
        assert held_out is not None
        assert f"all held-out text: loss {held_out.loss:.4f} nats" in finished.output
        assert f"this model {held_out.bits_per_byte:.3f}" in finished.output

    def test_compressors_are_measured_on_the_held_out_text(self, finished: Run) -> None:
        corpus = train.prepare_corpus(finished.config.data, 300, lambda line: None)
        for name, value in compressed_bits_per_byte(corpus.held_out_bytes()).items():
            assert f"{name} {value:.3f}" in finished.output

    @pytest.mark.parametrize("function", ["train_step", "eval_step", "_advance_some", "init"])
    def test_each_program_is_compiled_once(self, finished: Run, function: str) -> None:
        compiled = {name: count for name, count in finished.compiled.items() if function in name}
        assert list(compiled.values()) == [1], finished.compiled

    def test_the_steps_asked_for_are_traced(self, finished: Run) -> None:
        assert "trace of steps (2, 3) written to" in finished.output
        traces = [path for path in (finished.folder / "profile").rglob("*") if path.is_file()]
        assert traces
        assert all(path.stat().st_size > 0 for path in traces)

    def test_run_file_tells_the_config(self, finished: Run) -> None:
        saved = json.loads((finished.folder / "run.json").read_text())
        assert train.to_dict(finished.config) == train.to_dict(
            dataclasses.replace(finished.config, **{"profile": tuple(saved["config"]["profile"])})
        )
        assert saved["config"]["model"]["width"] == 32
        assert saved["config"]["run_dir"] == str(finished.folder)


class TestGoingOn:
    def test_running_a_finished_run_again_changes_nothing(self, finished: Run, copy: Path) -> None:
        before = content(copy)
        again = run(finished.config, copy)
        assert again.result.held_out == finished.result.held_out
        assert_same(again.result.state, finished.result.state)
        after = content(copy)
        assert before.keys() == after.keys()
        # run.json now names the copy; a picture may differ in its date.
        changed = {name for name in after if before[name] != after[name]}
        assert changed <= {"run.json", "loss.png"}

    def test_more_steps_extend_the_run(self, finished: Run, copy: Path) -> None:
        longer = dataclasses.replace(
            finished.config,
            training=dataclasses.replace(finished.config.training, num_steps=10),
            evaluation=dataclasses.replace(finished.config.evaluation, sample_prompts=()),
        )
        extended = run(longer, copy)
        assert "resuming after step 8" in extended.output
        assert int(extended.result.state.step) == 10
        assert figures(copy)[: len(figures(finished.folder))] == figures(finished.folder)
        assert steps_of(copy, "train") == [2, 4, 6, 8, 10]
        assert steps_of(copy, "evaluation") == [3, 6, 8, 9, 10]
        assert steps_of(copy, "sample") == [3, 6, 8, 8]  # without prompts, there is nothing to sample
        assert json.loads((copy / "run.json").read_text())["config"]["training"]["num_steps"] == 10

    def test_best_checkpoint_stays_when_later_losses_are_higher(
        self, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Each run's last figure is that of all held-out text, which decides nothing.
        losses = iter([2.0, 1.0, 3.0, 0.1, 1.5, 1.2, 0.1])
        monkeypatch.setattr(train, "evaluate", lambda *_: HeldOut(next(losses), 1.0))
        for num_steps in (8, 10):
            training = dataclasses.replace(config.training, num_steps=num_steps)
            run(dataclasses.replace(config, training=training, profile=None), tmp_path / "run")
            assert names(tmp_path / "run" / "best") == ["6"]
        evaluations = [r["loss"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "evaluation"]
        assert evaluations == [2.0, 1.0, 3.0, 1.5, 1.2]

    def test_fewer_steps_than_the_run_has_taken_are_refused(self, finished: Run, copy: Path) -> None:
        shorter = dataclasses.replace(
            finished.config, training=dataclasses.replace(finished.config.training, num_steps=5)
        )
        before = content(copy)
        with pytest.raises(ConfigError, match=r"training\.num_steps = 5: the run has taken 8 steps"):
            run(shorter, copy)
        after = content(copy)
        assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} == {"run.json"}

    def test_damaged_newest_checkpoint_is_stepped_over_and_the_end_is_the_same(self, finished: Run, copy: Path) -> None:
        for path in (copy / "checkpoints" / "8" / "state").rglob("d/*"):
            path.write_bytes(path.read_bytes()[:100])
        again = run(finished.config, copy)
        assert "checkpoint of step 8 is damaged" in again.output
        assert "resuming after step 4" in again.output
        assert_same(again.result.state, finished.result.state)
        assert_same(restore(finished.config, copy), finished.result.state)
        assert figures(copy) == figures(finished.folder)
        four, eight, aside = names(copy / "checkpoints")
        assert (four, eight, aside.startswith("damaged-8-")) == ("4", "8", True)

    def test_run_whose_only_checkpoint_is_damaged_starts_anew(self, finished: Run, copy: Path) -> None:
        shutil.rmtree(copy / "checkpoints" / "4")
        (copy / "checkpoints" / "8" / "state" / "_METADATA").unlink()
        again = run(finished.config, copy)
        assert "checkpoint of step 8 is damaged" in again.output
        assert "starting: 8 steps" in again.output
        assert_same(again.result.state, finished.result.state)
        assert figures(copy) == figures(finished.folder)
        assert names(copy / "best") == names(finished.folder / "best")


def other_corpus(config: TrainConfig, folder: Path) -> TrainConfig:
    source = write_corpus(folder / "other", factor=7)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, source=str(source)))


def other_tokenizer(config: TrainConfig, folder: Path) -> TrainConfig:
    train_sentencepiece([f"import module{i} as m{i % 9}\n" for i in range(999)], 300, folder / "other.model")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(folder / "other.model")))


@pytest.fixture(scope="module")
def model_of_300(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of as many entries that was trained on other text."""
    path = tmp_path_factory.mktemp("tokenizer") / "other.model"
    train_sentencepiece((f"import m{i}\nm{i}.call({i * i})\n" for i in range(300)), 300, path)
    return path


@pytest.fixture(scope="module")
def weights(finished: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run's newest parameters as an official file."""
    path = tmp_path_factory.mktemp("weights") / "finished.pth"
    convert(finished.folder, path)
    return path


class TestStartingFromWeights:
    def test_the_parameters_are_those_of_the_weights(self, finished: Run, weights: Path) -> None:
        params = finished.result.state.params
        for source in (weights, finished.folder):
            assert_same(initial_params(source, finished.config.model), params)

    @pytest.mark.long
    def test_the_first_steps_are_those_of_the_weights(self, finished: Run, weights: Path, tmp_path: Path) -> None:
        # A step so small that the parameters, rounded to float32, stay what they are.
        still = dataclasses.replace(finished.config.optimizer, learning_rate=1e-30, final_learning_rate=1e-30)
        training = dataclasses.replace(finished.config.training, num_steps=4)
        source = shutil.copy(weights, tmp_path)
        data = dataclasses.replace(finished.config.data, tokenizer=str(finished.folder))
        config = dataclasses.replace(
            finished.config, initial_weights=source, data=data, optimizer=still, training=training
        )
        tuned = run(config, tmp_path / "tuned")
        assert_same(tuned.result.state.params, finished.result.state.params)
        assert tuned.result.held_out == finished.result.held_out
        # The run goes on from its own checkpoints.
        Path(source).unlink()
        longer = dataclasses.replace(config, training=dataclasses.replace(training, num_steps=5))
        assert int(run(longer, tmp_path / "tuned").result.state.step) == 5

    def test_weights_of_another_model_are_refused_with_the_flags_that_fit(self, finished: Run, tmp_path: Path) -> None:
        model = dataclasses.replace(finished.config.model, num_layers=3, head_dim=8, ffn_width=64)
        data = dataclasses.replace(finished.config.data, tokenizer=str(finished.folder))
        config = dataclasses.replace(finished.config, model=model, data=data, initial_weights=str(finished.folder))
        with pytest.raises(ConfigError) as caught:
            run(config, tmp_path / "run")
        message = str(caught.value)
        assert "model.num_layers = 3 here and 2 there" in message
        assert message.endswith("--model.num-layers 2 --model.head-dim 16 --model.ffn-width 128")
        assert not names(tmp_path / "run")

    def test_other_weights_are_refused_when_a_run_goes_on(self, finished: Run, copy: Path, weights: Path) -> None:
        data = dataclasses.replace(finished.config.data, tokenizer=str(finished.folder))
        config = dataclasses.replace(finished.config, data=data, initial_weights=str(weights))
        with pytest.raises(ConfigError, match=r"initial_weights +- +.*finished\.pth"):
            run(config, copy)

    def test_the_flags_that_fit_make_the_config_fit(self, finished: Run, weights: Path, tmp_path: Path) -> None:
        official = from_pretrained(weights)
        with_unused = dataclasses.replace(official.config, unused_value_residual=True)
        write_torch_file(tmp_path / "official.pth", random_tensors(with_unused))
        tokenizer = ckpt.load_run_tokenizer(finished.folder)
        with pytest.raises(ConfigError, match=r"to start from them: (.*)$") as caught:
            check_initial_weights(tmp_path / "official.pth", official.config, tokenizer)
        flags = str(caught.value).rpartition("to start from them: ")[2].split()
        assert flags == ["--model.unused-value-residual"]
        asked = parse_train_config(["--model.width", "64", *flags])
        assert asked.model.unused_value_residual

    def test_the_tokenizer_must_be_that_of_the_weights(
        self, finished: Run, weights: Path, tmp_path: Path, model_of_300: Path
    ) -> None:
        with pytest.raises(ConfigError, match=r"data\.tokenizer = None: initial_weights .* name it, or its folder"):
            dataclasses.replace(finished.config, initial_weights=str(weights))
        data = dataclasses.replace(finished.config.data, tokenizer=str(model_of_300))
        config = dataclasses.replace(finished.config, data=data, initial_weights=str(finished.folder))
        with pytest.raises(ConfigError, match=r"was trained with the tokenizer that lies beside it.*--data\.tokenizer"):
            run(config, tmp_path / "run")
        assert not names(tmp_path / "run")


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "fields"),
        [
            (
                lambda config, _: dataclasses.replace(config, model=dataclasses.replace(config.model, width=64)),
                ["model.ffn_width", "model.width"],
            ),
            (
                lambda config, _: dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=3)),
                ["model.num_layers"],
            ),
            (
                lambda config, _: dataclasses.replace(
                    config, training=dataclasses.replace(config.training, batch_size=2, sequence_length=16)
                ),
                ["training.batch_size", "training.sequence_length"],
            ),
            (lambda config, _: dataclasses.replace(config, seed=1), ["seed"]),
            (other_corpus, ["corpus", "tokenizer"]),
            (other_tokenizer, ["corpus", "tokenizer"]),
        ],
        ids=["width", "layers", "batch", "seed", "corpus", "tokenizer"],
    )
    def test_resuming_with_other_settings_shows_them_and_changes_nothing(
        self,
        finished: Run,
        copy: Path,
        tmp_path: Path,
        change: Callable[[TrainConfig, Path], TrainConfig],
        fields: list[str],
    ) -> None:
        before = content(copy)
        with pytest.raises(ConfigError, match="holds another run") as error:
            run(change(finished.config, tmp_path), copy)
        assert [line.split()[0] for line in str(error.value).splitlines()[2:]] == fields
        assert content(copy) == before

    def test_folder_of_others_is_left_alone(self, config: TrainConfig, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("years of work")
        with pytest.raises(ConfigError, match=r"thesis\.tex"):
            run(config, tmp_path)
        assert content(tmp_path) == {"thesis.tex": b"years of work"}

    def test_folder_that_cannot_be_made(self, config: TrainConfig, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match=r"run_dir = .*cannot be written"):
            run(config, tmp_path / "file" / "run")

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda path: None, r"data\.source = .*there is no such file or folder"),
            (lambda path: path.mkdir(), r"data\.source = .*no file in .* matches data\.glob"),
            (lambda path: path.write_bytes(b""), r"data\.source = .*the file is empty"),
            (lambda path: path.write_bytes(b"\xff\xfe"), r"data\.source = .*not UTF-8"),
            (lambda path: path.write_text("x = 1\n" * 9), r"model\.vocab_size = 300: .*give more text"),
        ],
        ids=["missing", "empty folder", "empty file", "not text", "too little for the tokenizer"],
    )
    def test_corpus_that_cannot_be_used_leaves_no_trace_in_the_run_folder(
        self, config: TrainConfig, tmp_path: Path, make: Callable[[Path], object], message: str
    ) -> None:
        """So that the same command works once the corpus is mended."""
        make(tmp_path / "source")
        bad = dataclasses.replace(
            config, data=DataConfig(source=str(tmp_path / "source"), cache_dir=str(tmp_path / "cache"))
        )
        with pytest.raises(ConfigError, match=message):
            run(bad, tmp_path / "run")
        assert names(tmp_path / "run") == []
        assert ckpt.prepare_run_dir(tmp_path / "run") is None

    def test_corpus_shorter_than_a_batch(self, config: TrainConfig, tmp_path: Path) -> None:
        long = dataclasses.replace(config, training=dataclasses.replace(config.training, sequence_length=2**20))
        with pytest.raises(ConfigError, match=r"training\.batch_size = 4: the corpus is shorter.*set training\."):
            run(long, tmp_path / "run")
        assert names(tmp_path / "run") == []

    def test_tokenizer_of_another_size(self, config: TrainConfig, tmp_path: Path) -> None:
        data = other_tokenizer(config, tmp_path).data
        bad = dataclasses.replace(config, data=data, model=dataclasses.replace(config.model, vocab_size=512))
        with pytest.raises(ConfigError, match=r"tokenizer = .*300 entries and the model has vocab_size = 512"):
            run(bad, tmp_path / "run")
        assert names(tmp_path / "run") == []

    def test_command_line_gives_one_message_and_fails(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run_dir = tmp_path / "run"
        arguments = ["--run-dir", str(run_dir), "--data.source", str(tmp_path / "nothing")]
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        with pytest.raises(SystemExit) as exit_:
            train.main()
        assert str(exit_.value.code).startswith("train.py: data.source = ")
        assert capsys.readouterr() == ("", "")


BAD_TOKEN = 7


@pytest.fixture
def bad_steps(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Steps whose loss, and so whose gradient, is not a number; to be filled by the test."""
    steps: set[int] = set()
    read_rows = TrainingRows.read

    def read(self: TrainingRows, step: int, rows: slice = slice(None)) -> np.ndarray:
        tokens = read_rows(self, step, rows)
        return np.full_like(tokens, BAD_TOKEN) if step in steps else tokens

    def losses(logits_of: Any, hidden: Any, targets: Any, *options: Any) -> TokenLosses:
        total = sum_losses(logits_of, hidden, targets, *options)
        return total._replace(nll=total.nll * jnp.where(jnp.all(targets == BAD_TOKEN), jnp.nan, 1))

    monkeypatch.setattr(TrainingRows, "read", read)
    monkeypatch.setattr(step_module, "sum_losses", losses)
    return steps


class TestBadSteps:
    def test_bad_step_is_skipped_and_counted(self, config: TrainConfig, tmp_path: Path, bad_steps: set[int]) -> None:
        bad_steps |= {3, 4}
        every_step = dataclasses.replace(config, checkpoint=CheckpointConfig(every=1, keep=9), profile=None)
        done = run(every_step, tmp_path / "run")
        state = done.result.state
        assert (int(state.step), int(state.skipped_steps), int(state.bad_steps)) == (8, 2, 0)
        assert "step 3: loss nan" in done.output
        lines = [record for record in read_metrics(done.folder / "metrics.jsonl") if record["kind"] == "train"]
        assert {record["step"]: record["skipped_steps"] for record in lines} == {2: 0, 4: 1, 6: 1, 8: 0}
        assert all(record["loss"] is not None for record in lines)
        # Nothing that trains moves in a skipped step.
        before, skipped, after = (restore(done.config, done.folder, step) for step in (3, 5, 6))
        assert_same((before.params, before.optimizer), (skipped.params, skipped.optimizer))
        assert (int(skipped.step), int(skipped.bad_steps)) == (5, 2)
        assert not np.array_equal(skipped.params["head"]["weight"], after.params["head"]["weight"])

    @pytest.mark.parametrize("evaluate_every", [100, 7])
    def test_too_many_bad_steps_in_a_row_end_the_run_with_the_last_good_state_saved(
        self, config: TrainConfig, tmp_path: Path, bad_steps: set[int], evaluate_every: int
    ) -> None:
        """Whether the last of them is looked at when the next step is taken, or at once since it is evaluated."""
        bad_steps |= {4, 5, 6, 7}
        bad = dataclasses.replace(
            config,
            training=dataclasses.replace(config.training, max_bad_steps=3),
            evaluation=dataclasses.replace(config.evaluation, every=evaluate_every),
            profile=None,
        )
        with pytest.raises(NonFiniteError) as error:
            run(bad, tmp_path / "run")
        corpus = train.prepare_corpus(config.data, 300, lambda line: None)
        rows = training_rows(corpus, order="windows", seed=config.seed, batch_size=4, sequence_length=32)
        for step in (4, 5, 6):
            assert f"step {step}: {'; '.join(rows.places(step))}" in str(error.value)
        last = 8 if evaluate_every == 100 else 7
        assert names(tmp_path / "run" / "checkpoints") == ["4", str(last)]
        good, saved = (restore(bad, tmp_path / "run", step) for step in (4, last))
        assert_same((good.params, good.optimizer), (saved.params, saved.optimizer))
        assert (int(saved.step), int(saved.skipped_steps)) == (last, last - 4)
