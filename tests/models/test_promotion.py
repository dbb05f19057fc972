"""Models, forward and backward, say how ranks and dtypes go together: JAX is set to refuse what it would promote."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import Array

from rwkv_jax.models import model_type, rwkv4, rwkv5, rwkv6, rwkv7
from tests.models.parameters import abstract
from tests.models.small_models import FLOAT32
from tests.models.small_transformers import FLOAT32 as TRANSFORMER
from tests.models.small_transformers import LLAMA_FLOAT32

CONFIGS = {**FLOAT32, "transformer": TRANSFORMER, "llama": LLAMA_FLOAT32}

pytestmark = pytest.mark.usefixtures("strict_promotion")


def operator(*inputs: Any, **_: Any) -> tuple[Array, Any]:
    """In the place of a WKV operator, which tests/kernels holds against the same settings."""
    *others, state = inputs
    v = others.pop(3)
    return v + sum(jnp.sum(x).astype(v.dtype) for x in others), state


def shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.long), "bfloat16"])
@pytest.mark.parametrize(
    "generation", [pytest.param(name, marks=() if name in ("4", "7") else pytest.mark.long) for name in CONFIGS]
)
def test_nothing_is_promoted(
    monkeypatch: pytest.MonkeyPatch, generation: str, dtype: Literal["float32", "bfloat16"]
) -> None:
    """Promotion is decided while tracing, so nothing is compiled."""
    for module, name in ((rwkv4, "wkv4"), (rwkv5, "wkv5"), (rwkv6, "wkv6"), (rwkv7, "wkv7")):
        monkeypatch.setattr(module, name, operator)
    config = dataclasses.replace(CONFIGS[generation], dtype=dtype)
    graphdef, params = abstract(config)
    tokens, lengths = jax.ShapeDtypeStruct((2, 5), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
    state = jax.eval_shape(lambda params: nnx.merge(graphdef, params).initial_state(2), params)

    def loss(params: Any, tokens: Array, state: Any, **rows: Array) -> tuple[Array, Any]:
        logits, state = nnx.merge(graphdef, params)(tokens, state, **rows)
        return jnp.sum(logits), state

    gradient = jax.value_and_grad(loss, has_aux=True)
    (_, after), _ = jax.eval_shape(gradient, params, tokens, state)
    assert shapes(after) == shapes(state)
    jax.eval_shape(gradient, params, tokens, state, segment_ids=tokens, lengths=lengths)
    jax.eval_shape(loss, params, jax.ShapeDtypeStruct((2, 1), jnp.int32), state)


@pytest.mark.parametrize("generation", CONFIGS)
def test_no_initial_value_is_promoted(generation: str) -> None:
    config = CONFIGS[generation]
    jax.eval_shape(lambda key: nnx.state(model_type(config)(config, rngs=nnx.Rngs(key))), jax.random.key(0))
