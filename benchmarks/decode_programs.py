"""What a layer of RWKV-7 launches and moves for each token that it decodes, as XLA compiles it for an H100 here.

Counted in the compiled program by the plan's formulas; nothing is run, and nothing here says how fast it is.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

import deviceless
from rwkv_jax.config import ModelConfig
from rwkv_jax.models import RWKV7, LanguageModel
from rwkv_jax.models.decoding import unstacked
from rwkv_jax.plan.costs import instruction_traffic, is_free
from rwkv_jax.plan.program import Module, parse_module

WIDTH = 2048
_STEPS = 8  # of the loop that decodes


def per_layer(batch: int, output_implementation: Any) -> tuple[float, float]:
    """Kernels that a layer launches for each token of a batch, and bytes that they read and write.

    Args:
      output_implementation: as of `ModelConfig`, or an `Implementation`.
    """
    shallow, deep = (_count(_decode_loop(batch, layers, output_implementation)) for layers in (2, 4))
    kernels, traffic = ((b - a) / (2 * _STEPS) for a, b in zip(shallow, deep, strict=True))
    return kernels, traffic


def _decode_loop(batch: int, num_layers: int, output_implementation: Any) -> Module:
    """Greedy decoding, as in a burst of the engine: all weights in bfloat16, and lengths."""
    config = ModelConfig(
        "7",
        vocab_size=65536,
        num_layers=num_layers,
        width=WIDTH,
        dtype="bfloat16",
        output_implementation=output_implementation,
    )
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
    arguments = jax.tree.map(deviceless.on_h100, (params, whole, state, whole))
    compiled: Any = jax.jit(decode, donate_argnums=2).lower(*arguments).compile()
    return parse_module(compiled.as_text())


def _count(module: Module) -> tuple[int, int]:
    """Kernels launched by the loop, and bytes that they read and write."""
    kernels = traffic = 0
    for computation, instruction, executions in module.running():
        if computation.name not in module.fused and not is_free(instruction) and executions >= _STEPS:
            kernels += executions
            traffic += executions * instruction_traffic(module, computation, instruction)
    return kernels, traffic
