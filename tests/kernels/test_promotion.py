"""Operators under JAX's strictest settings: no axis and no dtype is promoted without being asked for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_kernels.testing.cases import Shape
from tests.kernels.operators import Way, as_jax, each_way_but_briefly, with_gradients

SHAPE = Shape(2, 9, 2, 6, 6)


@each_way_but_briefly("scan", "chunked", "wkv7-pallas_triton", "wkv7-pallas_triton_split")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("packed", [False, True])
def test_nothing_is_promoted_implicitly(way: Way, dtype: str, packed: bool) -> None:
    inputs = as_jax(way.operator.make_inputs(way.operator.cases[0], SHAPE), dtype)
    inputs["state"] = as_jax(inputs["state"], "float32")
    options = {}
    if packed:
        options = {
            "segment_ids": np.array([[0] * 4 + [1] * 5, [0] * 9], np.int32),
            "lengths": np.array([9, 5], np.int32),
        }
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        cotangents = jax.tree.map(
            lambda x: jnp.ones(x.shape, x.dtype), jax.eval_shape(lambda inputs: way.run(**inputs, **options), inputs)
        )
        jax.eval_shape(with_gradients.__wrapped__(way), inputs, cotangents, options)
