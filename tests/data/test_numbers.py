"""Whole numbers as data: ids, names, what is held out, what is refused, and a run."""

from __future__ import annotations

import dataclasses
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.bases import make
from rwkv_jax.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    StepConfig,
    TrainConfig,
)
from rwkv_jax.data.corpus import prepare_corpus
from rwkv_jax.run_folder import load_run_tokenizer
from rwkv_jax.training.loop import train


def saved(folder: Path, values: Any, names: str | None = None) -> str:
    np.save(folder / "numbers.npy", values)
    if names is not None:
        (folder / "numbers.txt").write_text(names)
    return str(folder / "numbers.npy")


def prepare(source: str, held_out: float = 0.25, vocab_size: int = 16) -> Any:
    return prepare_corpus(DataConfig(source=source, held_out=held_out), vocab_size, lambda line: None)


def test_one_sequence(tmp_path: Path) -> None:
    corpus = prepare(saved(tmp_path, np.array([3, 1, 4, 1, 5, 9, 2, 6], np.int64)))
    assert corpus.train.tokens.tolist() == [0, 4, 2, 5, 2, 6, 10, 0]
    assert corpus.held_out.tokens.tolist() == [0, 3, 7, 0]
    assert corpus.held_out_bytes() == bytes([2, 6])
    assert corpus.train.bytes_per_token == 6 / 7
    assert corpus.tokenizer.decode([4, 2, 5]) == " 3 1 4"
    assert corpus.tokenizer.encode("3 1 4") == [4, 2, 5]


def test_rows_are_sequences(tmp_path: Path) -> None:
    corpus = prepare(saved(tmp_path, np.array([[0, 300], [2, 3], [4, 5]], np.uint16)), vocab_size=400)
    assert corpus.train.tokens.tolist() == [0, 1, 301, 0, 3, 4, 0]
    assert corpus.train.num_documents == 2
    assert corpus.held_out.tokens.tolist() == [0, 5, 6, 0]
    assert corpus.held_out_bytes() == bytes([4, 0, 5, 0])  # two bytes each


def test_the_largest_id_of_two_bytes_fits(tmp_path: Path) -> None:
    corpus = prepare(saved(tmp_path, np.array([2**16 - 2, 0, 2**16 - 1, 1])), held_out=0, vocab_size=2**17)
    assert corpus.train.tokens.tolist() == [0, 2**16 - 1, 1, 2**16, 2, 0]


def test_numbers_have_names(tmp_path: Path) -> None:
    corpus = prepare(saved(tmp_path, [0, 3, 1, 2], "A\nC\nG\nT\nN\n"))
    assert corpus.tokenizer.decode([1, 4, 5]) == " A T N"
    assert corpus.tokenizer.vocab_size == 6


def test_fingerprints_tell_content_and_shape(tmp_path: Path) -> None:
    sources = [[1, 2, 3, 4], [1, 2, 3, 5], [[1, 2], [3, 4]]]
    prints = [prepare(saved(tmp_path, values)).fingerprint for values in sources]
    again = prepare(saved(tmp_path, np.array([1, 2, 3, 4], np.uint8))).fingerprint
    assert len(set(prints)) == 3
    assert again == prints[0]


@pytest.mark.parametrize(
    ("values", "names", "message"),
    [
        ([1.5, 2], None, r"is float64 of shape \(2,\); it must be whole numbers"),
        (np.zeros((2, 2, 2), int), None, r"of shape \(2, 2, 2\)"),
        (np.zeros(0, int), None, r"of shape \(0,\)"),
        ([3, -2], None, "has the number -2; numbers begin at 0, so add 2 to all"),
        ([1, 15], None, "model.vocab_size = 16: .* are 17 ids with end of text; set it to 17 or more"),
        ([1, 2], "a\nb\n", "names 2 numbers, and numbers.npy has 2; name all, from 0"),
        ([1, 2], "a\nb b\nc\n", "'b b' is empty or has a blank in it"),
        ([7], None, "has nothing left to train on"),
        ([1, 2**40], None, "has the number 1099511627776; at most 16777214"),
        (np.array([object()]), None, "cannot be read as an array of NumPy"),
    ],
)
def test_refusals(values: Any, names: str | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(saved(tmp_path, values, names))


def test_files_that_are_no_arrays(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        prepare(str(tmp_path / "none.npy"))
    (tmp_path / "text.npy").write_text("hello")
    with pytest.raises(ConfigError, match="cannot be read as an array of NumPy"):
        prepare(str(tmp_path / "text.npy"))
    whole = Path(saved(tmp_path, np.arange(100))).read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:300])
    with pytest.raises(ConfigError, match="cannot be read as an array of NumPy"):
        prepare(str(tmp_path / "cut.npy"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "bytes"}, "data.tokenizer = 'bytes': n.npy holds numbers"),
        ({"source": "python-stdlib", "mixture": (("n.npy", 1.0),), "tokenizer": "bytes"}, "numbers are no part"),
    ],
)
def test_what_numbers_do_not_have(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(DataConfig(source="n.npy"), **changes)


def test_a_run_learns_what_compressors_do_not_see(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counting up to 11 again and again, from where each row begins."""
    values = np.arange(3000) % 12
    config = TrainConfig(
        run_dir=str(tmp_path / "run"),
        model=ModelConfig(vocab_size=16, num_layers=2, width=32, head_dim=16),
        data=DataConfig(source=saved(tmp_path, values)),
        training=StepConfig(batch_size=8, sequence_length=32, num_steps=30),
        evaluation=EvaluationConfig(every=30, batches=1, sample_tokens=8),
        checkpoint=CheckpointConfig(every=30),
        logging=LoggingConfig(every=10),
    )
    result = train(config)
    assert result.held_out is not None
    assert result.held_out.bits_per_byte == pytest.approx(result.held_out.loss / np.log(2) * 151 / 150, rel=1e-6)
    assert result.held_out.loss < 1.5 < np.log(12)
    printed = capsys.readouterr().out
    held_out = values[-150:].astype(np.uint8).tobytes()
    assert f"gzip -9 {8 * len(gzip.compress(held_out, 9)) / 150:.3f}" in printed
    assert "--prompt ''" in printed
    assert load_run_tokenizer(tmp_path / "run").encode("11 0") == [12, 1]


def test_the_example_draws_what_its_entropy_says() -> None:
    """The mean -log2 p of what was drawn, given the chances, is near the entropy; so is no other distance's."""
    chance = make.chances()
    drawn = make.draw(chance, 40_000).astype(int)
    bits = -np.log2(chance[drawn[:-6], drawn[5:-1], drawn[6:]])
    assert np.mean(bits) == pytest.approx(make.entropy(chance), abs=0.02)
    wrong = -np.log2(chance[drawn[1:-6], drawn[5:-2], drawn[6:-1]])
    assert np.mean(wrong) > make.entropy(chance) + 0.3
