"""RWKV-7 takes kernels around its operator where they are named, and otherwise its own equations."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from rwkv_jax.config import ModelConfig
from rwkv_jax.models.decoding import unstacked, with_implementation
from rwkv_kernels.dispatch import Implementation, anything
from rwkv_kernels.ops.wkv7.output_pallas_triton import NAME as OUTPUT_NAME
from rwkv_kernels.ops.wkv7.output_pallas_triton import wkv7_output_pallas_triton
from rwkv_kernels.ops.wkv7.step_pallas_triton import NAME, wkv7_step_pallas_triton
from tests.golden import QUICK
from tests.models.parameters import in_dtype, merge, random_params
from tests.models.small_models import FLOAT32, ROWS, TIME, TOKENS

PLAIN = FLOAT32["7"]
INTERPRETED: Any = Implementation(functools.partial(wkv7_step_pallas_triton, interpret=True), anything)
OUTPUT: Any = Implementation(functools.partial(wkv7_output_pallas_triton, interpret=True), anything)
KERNEL = dataclasses.replace(PLAIN, step_implementation=INTERPRETED)
LENGTHS = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 0]], np.int32)  # of four tokens


@functools.cache
def program(config: ModelConfig) -> Any:
    """(params, tokens [B, T], state, lengths) -> logits, state."""

    def run(params: Any, tokens: Array, state: Any, lengths: Array) -> Any:
        return merge(config, params)(tokens, state, lengths=lengths)

    return jax.jit(run, compiler_options=QUICK)


def decode(config: ModelConfig) -> Any:
    """Logits of each token and the last state."""
    params = in_dtype(random_params(PLAIN), PLAIN)
    state, logits = merge(config, params).initial_state(ROWS), []
    for token, lengths in zip(TOKENS.T, LENGTHS, strict=False):
        one, state = program(config)(params, token[:, None], state, lengths)
        logits.append(np.where(lengths[:, None, None], one, 0))
    return np.concatenate(logits, axis=1), jax.device_get(state)


def kernels_in(config: ModelConfig, time: int, name: str = f"name={NAME}\n") -> int:
    params = in_dtype(random_params(PLAIN), PLAIN)
    state = jax.eval_shape(lambda: merge(config, params).initial_state(ROWS))
    arguments = params, jnp.asarray(TOKENS[:, :time]), state, jnp.ones(ROWS, jnp.int32)
    return str(program(config).trace(*arguments).jaxpr).count(name)


def test_a_text_decoded_with_the_kernel_is_the_same() -> None:
    (logits, state), (expected, expected_state) = decode(KERNEL), decode(PLAIN)
    np.testing.assert_allclose(logits, expected, atol=3e-5 * np.abs(expected).max())
    for found, exact in zip(jax.tree.leaves(state), jax.tree.leaves(expected_state), strict=True):
        np.testing.assert_allclose(found, exact, atol=1e-5 * np.abs(exact).max())


def test_only_one_token_by_name_takes_the_kernel() -> None:
    assert kernels_in(KERNEL, 1) == 2  # the first layer, and those that are scanned
    assert kernels_in(KERNEL, TIME) == kernels_in(PLAIN, 1) == 0


def test_a_name_that_cannot_run_here_is_refused() -> None:
    config = dataclasses.replace(PLAIN, step_implementation="pallas_triton")
    with pytest.raises(ValueError, match=r"implementation = 'pallas_triton': wkv7_step cannot run it here.*use 'xla'"):
        kernels_in(config, 1)


def test_a_model_for_decoding_keeps_what_is_named_of_each() -> None:
    model = unstacked(merge(PLAIN, in_dtype(random_params(PLAIN), PLAIN)))
    named = with_implementation(with_implementation(model, output="xla", step="xla"), "scan")
    configs = {part.config for part in (named, named.first_block.att, named.blocks[1].att)}
    wkv = {"wkv_implementation": "scan", "output_implementation": "xla", "step_implementation": "xla"}
    assert configs == {dataclasses.replace(PLAIN, **wkv)}


def test_a_model_with_a_named_output_has_the_same_gradients() -> None:
    params = in_dtype(random_params(PLAIN), PLAIN)

    def gradients(config: ModelConfig) -> Any:
        def loss(params: Any) -> Array:
            logits, _ = merge(config, params)(jnp.asarray(TOKENS))
            return jnp.mean(jnp.square(logits))

        return jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(params)

    plain = dataclasses.replace(PLAIN, wkv_implementation="scan")  # which compiles soonest
    found, expected = map(gradients, (dataclasses.replace(plain, output_implementation=OUTPUT), plain))
    for path, exact in jax.tree.leaves_with_path(expected):
        error = np.linalg.norm(dict(jax.tree.leaves_with_path(found))[path] - exact)
        assert error <= 1e-4 * np.linalg.norm(exact), jax.tree_util.keystr(path)


def test_only_a_named_output_takes_its_kernels() -> None:
    named, name = dataclasses.replace(PLAIN, output_implementation=OUTPUT), f"name={OUTPUT_NAME}_forward\n"
    assert kernels_in(named, TIME, name) == 2
    assert kernels_in(PLAIN, TIME, name) == kernels_in(KERNEL, 1, name) == 0
