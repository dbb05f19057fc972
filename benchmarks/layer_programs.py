"""What a layer of RWKV-7 launches and moves in decoding and training, as XLA compiles it for an H100 that is not there.

Counted in compiled programs by the plan's formulas; nothing is run, and nothing here says how fast it is.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

import deviceless
from rwkv_jax.config import ModelConfig
from rwkv_jax.models import RWKV7, LanguageModel
from rwkv_jax.models.context import SequenceContext
from rwkv_jax.models.decoding import unstacked
from rwkv_jax.models.rwkv7 import TimeMix
from rwkv_jax.plan.costs import instruction_traffic, is_free
from rwkv_jax.plan.program import parse_module
from rwkv_kernels.dispatch import Implementation, anything
from rwkv_kernels.ops.wkv7.pallas import wkv7_pallas_triton

DECODED = functools.partial(ModelConfig, "7", vocab_size=65536, width=2048, dtype="bfloat16")
TRAINED = functools.partial(ModelConfig, "7", vocab_size=65536, num_layers=12, width=768, dtype="bfloat16")
ROWS, TIME = 8, 4096
"""Of the layer that is trained."""

_STEPS = 8  # of the loop that decodes

Counts = tuple[float, float]
"""Kernels launched, and bytes that they read and write."""


def decoding_a_token(batch: int, step_implementation: Any) -> Counts:
    """Of a layer for each token of a batch, decoded greedily with lengths, as by the engine; weights are bfloat16.

    Args:
      step_implementation: as of `ModelConfig`, or an `Implementation`.
    """
    shallow, deep = (
        _count(*_decode_loop(batch, DECODED(num_layers=layers, step_implementation=step_implementation)))
        for layers in (2, 4)
    )
    kernels, traffic = ((b - a) / (2 * _STEPS) for a, b in zip(shallow, deep, strict=True))
    return kernels, traffic


def training_time_mixing(output_implementation: Any) -> Counts:
    """Of a layer's time mixing forward and backward, with the operator's `pallas_triton` kernels and without remat."""
    operator: Any = Implementation(wkv7_pallas_triton, anything)
    config = TRAINED(wkv_implementation=operator, output_implementation=output_implementation)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: TimeMix(config, 1, rngs=nnx.Rngs(0))), nnx.Param)

    def mix(params: Any, x: Array, v_first: Array) -> Array:
        layer = nnx.merge(graphdef, params)
        return layer.mix_with_residual(x, state=layer.initial_state(ROWS), v_first=v_first, context=SequenceContext()).y

    def train(params: Any, x: Array, v_first: Array, dy: Array) -> Any:
        y, pull_back = jax.vjp(mix, params, x, v_first)
        return y, pull_back(dy)

    x = jax.ShapeDtypeStruct((ROWS, TIME, config.width), jnp.bfloat16)
    return _count(jax.jit(train), (params, x, x, x))


def _decode_loop(batch: int, config: ModelConfig) -> tuple[Any, tuple[Any, ...]]:
    """A compiled function and the shapes of its arguments."""
    abstract = nnx.eval_shape(lambda: unstacked(RWKV7(config, rngs=nnx.Rngs(0))))
    graphdef, params = nnx.split(abstract, nnx.Param)

    def model(params: Any) -> LanguageModel:
        return nnx.merge(graphdef, params)

    def decode(params: Any, tokens: Array, state: Any, lengths: Array) -> tuple[Array, Any]:
        def advance(_: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
            tokens, state = carry
            logits, state = model(params)(tokens[:, None], state, lengths=lengths)
            return jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32), state

        return jax.lax.fori_loop(0, _STEPS, advance, (tokens, state))

    state = jax.eval_shape(lambda params: model(params).initial_state(batch), params)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    whole = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return jax.jit(decode, donate_argnums=2), (params, whole, state, whole)


def _count(function: Any, arguments: tuple[Any, ...]) -> Counts:
    """Of a program compiled for an H100."""
    module = parse_module(function.lower(*jax.tree.map(deviceless.on_h100, arguments)).compile().as_text())
    kernels = traffic = 0
    for computation, instruction, executions in module.running():
        if computation.name not in module.fused and not is_free(instruction):
            kernels += executions
            traffic += executions * instruction_traffic(module, computation, instruction)
    return kernels, traffic
