"""Flax's table of a model's modules, by which people look at a model first."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rwkv_jax.models import model_type
from tests.models.small_models import FLOAT32
from tests.models.small_transformers import FLOAT32 as TRANSFORMER

CONFIGS = {**FLOAT32, "transformer": TRANSFORMER}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in ("7", "transformer") else pytest.mark.long) for name in CONFIGS],
)
def test_a_model_is_tabulated_and_stays_as_it_was(name: str) -> None:
    config = CONFIGS[name]
    model, tokens = model_type(config)(config, rngs=nnx.Rngs(0)), jnp.ones((2, 5), jnp.int32)
    before = jax.tree.leaves(model(tokens))
    table = nnx.tabulate(model, tokens, console_kwargs={"force_terminal": False, "width": 200})
    rows = {line.split("│")[1].strip(): line for line in table.splitlines() if line.startswith("│")}
    assert {"hidden", "first_block", "first_block/att/key", "blocks/ffn/key", "ln_out", "logits"} <= set(rows)
    assert f"float32[2,5,{config.width}]" in rows["ln_out"]
    assert f"Total Parameters: {config.num_parameters():,} " in table
    for x, y in zip(before, jax.tree.leaves(model(tokens)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_layer_alone_is_tabulated() -> None:
    layer = model_type(FLOAT32["7"])(FLOAT32["7"], rngs=nnx.Rngs(0)).block(1).ffn
    table = nnx.tabulate(layer, jnp.ones((2, 5, 32), jnp.float32), console_kwargs={"force_terminal": False})
    assert "ChannelMix" in table
