"""A run folder keeps its tokenizer, of whatever kind, and notices when it is another one."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from rwkv_jax import run_folder
from rwkv_jax.config import ConfigError, DataConfig, ModelConfig, TrainConfig
from rwkv_jax.data.corpus import prepare_corpus
from rwkv_jax.data.tokenizers import train_sentencepiece
from rwkv_jax.training import checkpoints as ckpt
from rwkv_jax.training.functions import abstract_state, make_train_functions
from tests.small_runs import CODE


def make_run(tmp_path: Path, tokenizer: str, vocab_size: int) -> Path:
    """A run with a checkpoint, whose corpus was made with a given tokenizer."""
    (tmp_path / "source.py").write_text(CODE)
    data = DataConfig(source=str(tmp_path / "source.py"), tokenizer=tokenizer, cache_dir=str(tmp_path / "cache"))
    corpus = prepare_corpus(data, vocab_size, lambda line: None)
    model = ModelConfig(vocab_size=vocab_size, num_layers=2, width=16, head_dim=8)
    config, run_dir = TrainConfig(model=model, data=data), tmp_path / "run"
    run_folder.prepare_run_dir(run_dir)
    identity = run_folder.identity(config, corpus.fingerprint, corpus.tokenizer.fingerprint)
    run_folder.write_run(run_dir, config, identity, corpus.tokenizer)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract_state(make_train_functions(config)))
    with ckpt.Checkpoints(run_dir, 1, print) as checkpoints:
        checkpoints.save(state, 1)
    return run_dir


@pytest.mark.parametrize(
    ("tokenizer", "vocab_size", "file"),
    [("bytes", 257, "tokenizer.kind.json"), ("world", 65536, "tokenizer.kind.json"), ("model", 300, "tokenizer.model")],
)
def test_a_run_has_its_tokenizer(tmp_path: Path, tokenizer: str, vocab_size: int, file: str) -> None:
    if tokenizer == "model":
        tokenizer = str(tmp_path / "given.model")
        train_sentencepiece([CODE], vocab_size, tokenizer)
    run_dir = make_run(tmp_path, tokenizer, vocab_size)
    assert sorted(path.name for path in run_dir.iterdir()) == ["best", "checkpoints", "run.json", file]
    loaded = run_folder.load_run_tokenizer(run_dir)
    assert loaded.vocab_size == vocab_size
    assert loaded.decode(loaded.encode(CODE)) == CODE


def test_another_tokenizer_of_the_same_size_is_noticed(tmp_path: Path) -> None:
    """It would give text, but not what the model means."""
    train_sentencepiece([CODE], 300, tmp_path / "given.model")
    run_dir = make_run(tmp_path, str(tmp_path / "given.model"), 300)
    train_sentencepiece([CODE.upper()], 300, tmp_path / "other.model")
    (run_dir / "tokenizer.model").write_bytes((tmp_path / "other.model").read_bytes())
    with pytest.raises(ConfigError, match=r"tokenizer\.model: has changed since the run was begun; put back"):
        run_folder.load_run_tokenizer(run_dir)
