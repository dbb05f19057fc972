"""A small model with random parameters, and a tokenizer trained on a few lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
from flax import nnx

from rwkv_jax.config import ModelConfig
from rwkv_jax.data.tokenizers import SentencePieceTokenizer, train_sentencepiece
from rwkv_jax.models import RWKV7

VOCAB_SIZE = 300


class Small(NamedTuple):
    config: ModelConfig
    model: RWKV7
    graphdef: Any
    params: Any
    tokenizer: SentencePieceTokenizer


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """Random where the official initial values are zero: there, layers would not talk to each other."""
    path: Path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_sentencepiece([f"def f{i}(x):\n    return x * {i} + {i * i}\n" for i in range(200)], VOCAB_SIZE, path)
    config = ModelConfig(vocab_size=VOCAB_SIZE, num_layers=3, width=32, head_dim=8)
    graphdef, params = nnx.split(RWKV7(config, rngs=nnx.Rngs(0)), nnx.Param)
    params = nnx.to_pure_dict(params)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = structure.unflatten(
        [leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    )
    return Small(config, nnx.merge(graphdef, params), graphdef, params, SentencePieceTokenizer.load(path))
