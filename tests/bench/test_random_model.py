"""Models of random weights, and their tokenizer."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from rwkv_jax.bench.random_model import NumberTokenizer, random_model
from rwkv_jax.config import ModelConfig
from rwkv_jax.data.tokenizers import StreamingDecoder, fits_model
from rwkv_jax.weights.quantized import has_packed
from tests.golden import QUICK
from tests.models.parameters import named_config


@pytest.mark.parametrize("generation", ["4", "5.2", "6", "7", "transformer"])
def test_logits_are_of_size_one_and_differ(generation: str) -> None:
    config = named_config(generation, vocab_size=50, num_layers=3, width=32, head_dim=16)
    model = random_model(config)
    graphdef, params = nnx.split(model, nnx.Param)
    run = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens)[0], compiler_options=QUICK)
    logits = np.asarray(run(params, np.random.default_rng(0).integers(0, 50, (1, 64), np.int32)))
    assert np.isfinite(logits).all()
    assert 0.5 < logits.std() < 2
    assert len(set(logits.argmax(-1).ravel().tolist())) > 10


def test_always_alike_and_packed_if_asked() -> None:
    config = ModelConfig(vocab_size=50, num_layers=2, width=64)
    one, same, other = (nnx.state(random_model(config, seed=seed), nnx.Param) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert not np.array_equal(jax.tree.leaves(one)[0], jax.tree.leaves(other)[0])
    assert not has_packed(nnx.to_pure_dict(one))
    assert has_packed(nnx.to_pure_dict(nnx.state(random_model(config, "int8"), nnx.Param)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_are_held_in_the_dtype_of_the_computation(dtype: Any) -> None:
    model = random_model(ModelConfig(vocab_size=50, num_layers=2, width=64, dtype=dtype))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {np.dtype(dtype)}


def test_tokens_are_their_numbers() -> None:
    tokenizer = NumberTokenizer(50)
    assert tokenizer.encode("17 3") == [17, 3]
    assert tokenizer.decode([17, 0, 3]) == "17 3 "
    decoder = StreamingDecoder(tokenizer)
    assert "".join(map(decoder.push, [17, 0, 3])) + decoder.flush() == "17 3 "
    assert fits_model(tokenizer, 50)
    assert [tokenizer.is_named(token) for token in (-1, 0, 49, 50)] == [False, True, True, False]
