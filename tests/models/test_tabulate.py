"""Flax's table of a model's modules, by which people look at a model first."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rwkv_jax.models import model_type
from rwkv_jax.models.language_model import LanguageModel
from tests.models.small_models import FLOAT32
from tests.models.small_transformers import FLOAT32 as TRANSFORMER
from tests.models.small_transformers import LLAMA_FLOAT32

CONFIGS = {**FLOAT32, "transformer": TRANSFORMER, "llama": LLAMA_FLOAT32}


@functools.cache
def model_of(name: str) -> LanguageModel:
    return model_type(CONFIGS[name])(CONFIGS[name], rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in ("7", "transformer") else pytest.mark.long) for name in CONFIGS],
)
def test_a_model_is_tabulated_and_stays_as_it_was(name: str) -> None:
    config, model, tokens = CONFIGS[name], model_of(name), jnp.ones((2, 5), jnp.int32)
    program = jax.make_jaxpr(lambda tokens: model(tokens))
    before, params = str(program(tokens)), nnx.to_pure_dict(nnx.state(model))
    table = nnx.tabulate(model, tokens, console_kwargs={"force_terminal": False, "width": 200})
    rows = {line.split("│")[1].strip(): line for line in table.splitlines() if line.startswith("│")}
    assert {"hidden", "first_block", "first_block/att/key", "blocks/ffn/key", "ln_out", "logits"} <= set(rows)
    assert f"float32[2,5,{config.width}]" in rows["ln_out"]
    assert f"Total Parameters: {config.num_parameters():,} " in table
    jax.clear_caches()  # or the first program would come back whatever the model has become
    assert str(program(tokens)) == before
    jax.tree.map(np.testing.assert_array_equal, params, nnx.to_pure_dict(nnx.state(model)))


def test_a_layer_alone_is_tabulated() -> None:
    layer = model_of("7").block(1).ffn
    table = nnx.tabulate(layer, jnp.ones((2, 5, 32), jnp.float32), console_kwargs={"force_terminal": False})
    assert "ChannelMix" in table
