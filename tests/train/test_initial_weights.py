"""`train(config)` from weights: they are where it starts, and what does not fit them is refused."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from rwkv_jax import run_folder
from rwkv_jax.cli import parse_train_config
from rwkv_jax.config import ConfigError, LoggingConfig, TrainConfig
from rwkv_jax.data.tokenizers import train_sentencepiece
from rwkv_jax.data.tokens.rows import Rows, TrainingRows
from rwkv_jax.training.reporting.metrics import read_metrics
from rwkv_jax.weights.pretrained import check_initial_weights, convert, from_pretrained, initial_params
from tests.small_runs import assert_same_bits, names_in
from tests.train.in_process import Run, run


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


def test_the_parameters_are_those_of_the_weights(finished: Run, weights: Path) -> None:
    params = finished.result.state.params
    for source in (weights, finished.folder):
        assert_same_bits(initial_params(source, finished.config.model), params)


@pytest.mark.long
def test_a_run_takes_up_at_the_step_where_its_weights_stood(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps_read, read = set(), TrainingRows.read

    def spy(rows: TrainingRows, step: int, selected: slice = slice(None)) -> Rows:
        steps_read.add(step)
        return read(rows, step, selected)

    def upto(num_steps: int) -> TrainConfig:
        training = dataclasses.replace(finished.config.training, first_step=8, num_steps=num_steps)
        evaluation = dataclasses.replace(finished.config.evaluation, sample_prompts=())
        data = dataclasses.replace(finished.config.data, tokenizer=str(finished.folder))
        return dataclasses.replace(
            finished.config,
            initial_weights=str(finished.folder),
            training=training,
            evaluation=evaluation,
            data=data,
            logging=LoggingConfig(every=1),
            profile=None,
        )

    monkeypatch.setattr(TrainingRows, "read", spy)
    whole = run(upto(13), tmp_path / "whole")
    assert steps_read == {8, 9, 10, 11, 12}
    assert "starting after step 8: 13 steps" in whole.output
    records = [record for record in read_metrics(whole.folder / "metrics.jsonl") if record["kind"] == "train"]
    assert [record["step"] for record in records] == [9, 10, 11, 12, 13]
    warmup = [0.01, 0.34, 0.67, 1, 1]  # three steps, as in any run that begins
    assert [record["learning_rate"] for record in records] == pytest.approx([3e-3 * share for share in warmup])

    steps_read.clear()
    run(upto(11), tmp_path / "parts")
    resumed = run(upto(13), tmp_path / "parts")
    assert steps_read == {8, 9, 10, 11, 12}
    assert_same_bits(resumed.result.state, whole.result.state)


@pytest.mark.long
def test_the_first_steps_are_those_of_the_weights(finished: Run, weights: Path, tmp_path: Path) -> None:
    # A step so small that the parameters, rounded to float32, stay what they are.
    still = dataclasses.replace(finished.config.optimizer, learning_rate=1e-30, final_learning_rate=1e-30)
    training = dataclasses.replace(finished.config.training, num_steps=4)
    source = shutil.copy(weights, tmp_path)
    data = dataclasses.replace(finished.config.data, tokenizer=str(finished.folder))
    config = dataclasses.replace(finished.config, initial_weights=source, data=data, optimizer=still, training=training)
    tuned = run(config, tmp_path / "tuned")
    assert_same_bits(tuned.result.state.params, finished.result.state.params)
    assert tuned.result.held_out == finished.result.held_out
    # The run goes on from its own checkpoints.
    Path(source).unlink()
    longer = dataclasses.replace(config, training=dataclasses.replace(training, num_steps=5))
    assert int(run(longer, tmp_path / "tuned").result.state.step) == 5


def test_weights_of_another_model_are_refused_with_the_flags_that_fit(finished: Run, tmp_path: Path) -> None:
    model = dataclasses.replace(finished.config.model, num_layers=3, head_dim=8, ffn_width=64)
    data = dataclasses.replace(finished.config.data, tokenizer=str(finished.folder))
    config = dataclasses.replace(finished.config, model=model, data=data, initial_weights=str(finished.folder))
    with pytest.raises(ConfigError) as caught:
        run(config, tmp_path / "run")
    message = str(caught.value)
    assert "model.num_layers = 3 here and 2 there" in message
    assert message.endswith("--model.num-layers 2 --model.head-dim 16 --model.ffn-width 128")
    assert not names_in(tmp_path / "run")


def test_other_weights_are_refused_when_a_run_goes_on(finished: Run, copy: Path, weights: Path) -> None:
    data = dataclasses.replace(finished.config.data, tokenizer=str(finished.folder))
    config = dataclasses.replace(finished.config, data=data, initial_weights=str(weights))
    with pytest.raises(ConfigError, match=r"initial_weights +- +.*finished\.pth"):
        run(config, copy)


def test_the_flags_that_fit_make_the_config_fit(finished: Run, weights: Path) -> None:
    official = from_pretrained(weights).config
    tokenizer = run_folder.load_run_tokenizer(finished.folder)
    with pytest.raises(ConfigError, match=r"to start from them: (.*)$") as caught:
        check_initial_weights(weights, dataclasses.replace(official, decay_rank=9, num_layers=5), tokenizer)
    flags = str(caught.value).rpartition("to start from them: ")[2].split()
    asked = parse_train_config(["--model.width", "64", *flags]).model
    assert (asked.decay_rank, asked.num_layers) == (official.resolved().decay_rank, official.num_layers)


def test_a_file_of_the_official_trainer_needs_no_flag(finished: Run, weights: Path, tmp_path: Path) -> None:
    config = from_pretrained(weights).config
    with_unused = dataclasses.replace(config, unused_value_residual=True)
    tokenizer = run_folder.load_run_tokenizer(finished.folder)
    convert(weights, tmp_path / "theirs.pth", with_unused=True)
    for source in (weights, tmp_path / "theirs.pth"):
        check_initial_weights(source, config, tokenizer)
        assert_same_bits(initial_params(source, config), initial_params(weights, config))
        # And a run that asks for them has them, zeros where the file has none.
        check_initial_weights(source, with_unused, tokenizer)
        assert_same_bits(initial_params(source, with_unused), initial_params(tmp_path / "theirs.pth", with_unused))


def test_the_tokenizer_must_be_that_of_the_weights(
    finished: Run, weights: Path, tmp_path: Path, model_of_300: Path
) -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer = None: initial_weights .* name it, or its folder"):
        dataclasses.replace(finished.config, initial_weights=str(weights))
    data = dataclasses.replace(finished.config.data, tokenizer=str(model_of_300))
    config = dataclasses.replace(finished.config, data=data, initial_weights=str(finished.folder))
    with pytest.raises(ConfigError, match=r"was trained with the tokenizer that lies beside it.*--data\.tokenizer"):
        run(config, tmp_path / "run")
    assert not names_in(tmp_path / "run")
