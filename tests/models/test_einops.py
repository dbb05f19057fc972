"""Patterns of einops name axes and compute nothing: the jaxpr of a block is that of plain reshapes and transposes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import Array

from rwkv_jax.models import layers, rwkv4, rwkv5, rwkv6, rwkv7, rwkv7a, rwkv7b, transformer
from tests.models.parameters import SMALL, abstract
from tests.models.small_models import FLOAT32
from tests.models.small_transformers import FLOAT32 as TRANSFORMER
from tests.models.small_transformers import LLAMA_FLOAT32

CONFIGS = {**FLOAT32, "transformer": TRANSFORMER, "llama": LLAMA_FLOAT32}

PLAIN: dict[str, Callable[..., Array]] = {
    "B T (D E) -> B T D E": lambda x, size: x.reshape(*x.shape[:2], -1, size),
    "B T N -> B 1 T N": lambda x: x.reshape(x.shape[0], 1, *x.shape[1:]),
    "B 1 T C -> B T C": lambda x: x.reshape(x.shape[0], *x.shape[2:]),
    "... C -> (...) C": lambda x: x if x.ndim == 2 else x.reshape(-1, x.shape[-1]),
    "C -> 1 1 C": lambda x: x.reshape(1, 1, -1),
    "(H N) -> H N": lambda x, size: x.reshape(-1, size),
    "H ... -> H (...)": lambda x: x.reshape(x.shape[0], -1),
    "B T (H N) -> B T H N": lambda x, size: x.reshape(*x.shape[:2], -1, size),
    "B T H N -> B T (H N)": lambda x: x.reshape(*x.shape[:2], -1),
    "B T H N -> B H T N": lambda x: x.swapaxes(1, 2),
    "B H T N -> B T H N": lambda x: x.swapaxes(1, 2),
    "B G T N -> B T G N": lambda x: x.swapaxes(1, 2),
    "B (G R) T N -> B G R T N": lambda x, size: x.reshape(x.shape[0], size, -1, *x.shape[2:]),
    "B G R T N -> B (G R) T N": lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]),
    "B G R T -> B (G R) T": lambda x: x.reshape(x.shape[0], -1, x.shape[3]),
    "B H T N -> B T (H N)": lambda x: x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1),
    "B H (piece T) N -> piece B H T N": lambda x, size: jnp.moveaxis(
        x.reshape(*x.shape[:2], -1, size, x.shape[-1]), 2, 0
    ),
}


def block_jaxprs(generation: str) -> list[str]:
    """Of the initial values, and of the second block's output and all gradients, in packed and ragged rows."""
    config = CONFIGS[generation]
    graphdef, params = abstract(config)
    model = nnx.merge(graphdef, params)
    block_def, block_params = nnx.split(nnx.eval_shape(lambda params: nnx.merge(graphdef, params).block(1), params))
    state = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape[1:], s.dtype), jax.eval_shape(lambda: model.initial_state(2))
    )

    def loss(params: Any, x: Array, state: Any, v_first: Any, segment_ids: Array, lengths: Array) -> Array:
        context = rwkv7.SequenceContext(segment_ids, lengths, segment_ids)
        y, _, state = nnx.merge(block_def, params)(x, state=state, v_first=v_first, context=context)
        return jnp.sum(y) + sum(jnp.sum(leaf) for leaf in jax.tree.leaves(state))

    def first(params: Any, x: Array, state: Any, tokens: Array) -> Any:
        """What layer 0 hands on to all others."""
        block = nnx.merge(graphdef, params).first_block
        return block(x, state=state, v_first=None, context=rwkv7.SequenceContext(tokens=tokens)).v_first

    # Attention of several pieces is mapped over them.
    time = 2 * transformer.PIECE + 3 if config in (TRANSFORMER, LLAMA_FLOAT32) else 5
    x = jax.ShapeDtypeStruct((2, time, config.width), jnp.float32)
    segment_ids, lengths = jax.ShapeDtypeStruct((2, time), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
    v_first = jax.eval_shape(first, params, x, state, segment_ids)
    arguments = (block_params, x, state, v_first, segment_ids, lengths)
    gradient = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(*arguments)
    initial = jax.make_jaxpr(lambda key: nnx.state(model.block_type(config, 1, rngs=nnx.Rngs(key))))(jax.random.key(0))
    return [str(gradient), str(initial)]


@pytest.mark.parametrize(
    "generation", [name for name in SMALL if name not in ("5.0", "5.1")] + ["transformer", "llama"]
)
def test_patterns_add_no_equation(generation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patterns = block_jaxprs(generation)
    used: set[str] = set()

    def plain(x: Array, pattern: str, **sizes: int) -> Array:
        used.add(pattern)
        return PLAIN[pattern](x, *sizes.values())

    for module in (layers, rwkv4, rwkv5, rwkv6, rwkv7, rwkv7a, rwkv7b, transformer):
        if hasattr(module, "rearrange"):
            monkeypatch.setattr(module, "rearrange", plain)
    assert block_jaxprs(generation) == patterns
    assert len(used) >= 2
