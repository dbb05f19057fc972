"""What `train(config)` refuses before it begins."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import train
from rwkv_jax import run_folder
from rwkv_jax.config import ConfigError, DataConfig, TrainConfig
from rwkv_jax.config.model import IMPLEMENTATIONS
from tests.small_runs import names_in, write_corpus
from tests.train.in_process import Run, content, other_tokenizer, run


def other_corpus(config: TrainConfig, folder: Path) -> TrainConfig:
    source = write_corpus(folder / "other", factor=7)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, source=str(source)))


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


def test_folder_of_others_is_left_alone(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        run(config, tmp_path)
    assert content(tmp_path) == {"thesis.tex": b"years of work"}


def test_folder_that_cannot_be_made(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run_dir = .*cannot be written"):
        run(config, tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, r"data\.source = .*there is no such file or folder"),
        (lambda path: path.mkdir(), r"data\.source = .*no file in .* matches data\.glob"),
        (lambda path: path.write_bytes(b""), r"data\.source = .*the file is empty"),
        (lambda path: path.write_bytes(b"x\xff\xfe"), r"data\.source = .*not UTF-8"),
        (lambda path: path.write_text("x = 1\n" * 9), r"model\.vocab_size = 300: .*give more text"),
    ],
    ids=["missing", "empty folder", "empty file", "not text", "too little for the tokenizer"],
)
def test_corpus_that_cannot_be_used_leaves_no_trace_in_the_run_folder(
    config: TrainConfig, tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    """So that the same command works once the corpus is mended."""
    make(tmp_path / "source")
    bad = dataclasses.replace(
        config, data=DataConfig(source=str(tmp_path / "source"), cache_dir=str(tmp_path / "cache"))
    )
    with pytest.raises(ConfigError, match=message):
        run(bad, tmp_path / "run")
    assert names_in(tmp_path / "run") == []
    assert run_folder.prepare_run_dir(tmp_path / "run") is None


def test_corpus_shorter_than_a_batch(config: TrainConfig, tmp_path: Path) -> None:
    long = dataclasses.replace(config, training=dataclasses.replace(config.training, sequence_length=2**20))
    with pytest.raises(ConfigError, match=r"training\.batch_size = 4: the corpus is shorter.*set training\."):
        run(long, tmp_path / "run")
    assert names_in(tmp_path / "run") == []


def test_tokenizer_of_another_size(config: TrainConfig, tmp_path: Path) -> None:
    data = other_tokenizer(config, tmp_path).data
    bad = dataclasses.replace(config, data=data, model=dataclasses.replace(config.model, vocab_size=512))
    with pytest.raises(ConfigError, match=r"tokenizer = .*300 entries and the model has vocab_size = 512"):
        run(bad, tmp_path / "run")
    assert names_in(tmp_path / "run") == []


@pytest.mark.parametrize("field", IMPLEMENTATIONS)
def test_unknown_implementation_leaves_no_trace_in_the_run_folder(
    config: TrainConfig, tmp_path: Path, field: str
) -> None:
    bad = dataclasses.replace(config, model=dataclasses.replace(config.model, **{field: "scam"}))
    with pytest.raises(ConfigError, match=rf"model\.{field} = 'scam': must be .*, or None"):
        run(bad, tmp_path / "run")
    assert names_in(tmp_path / "run") == []


@pytest.mark.parametrize("field", IMPLEMENTATIONS)
def test_implementation_that_cannot_run_here_leaves_no_trace_in_the_run_folder(
    config: TrainConfig, tmp_path: Path, field: str
) -> None:
    bad = dataclasses.replace(config, model=dataclasses.replace(config.model, **{field: "pallas_triton"}))
    reason = "cannot run on this machine: it needs an NVIDIA GPU, and this is cpu; name "
    with pytest.raises(ConfigError, match=rf"^model\.{field} = 'pallas_triton': {reason}"):
        run(bad, tmp_path / "run")
    assert names_in(tmp_path / "run") == []


def test_command_line_gives_one_message_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    arguments = ["--run-dir", str(run_dir), "--data.source", str(tmp_path / "nothing")]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as exit_:
        train.main()
    assert str(exit_.value.code).startswith("train.py: data.source = ")
    assert capsys.readouterr() == ("", "")
