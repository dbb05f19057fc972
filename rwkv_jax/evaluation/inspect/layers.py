"""Runs texts layer by layer, and records what each layer's operator was given and what it gave.

The operator is called through an `Implementation` of our own, as the models' configs allow in place of a name, so that
their files know nothing of this. Shape letters: B batch, T time, C width, H heads, N head size (keys), M head size
(values), L layers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from numpy.typing import ArrayLike, NDArray

from rwkv_jax.checks import ConfigError
from rwkv_jax.config import ModelConfig
from rwkv_jax.models import LanguageModel
from rwkv_jax.models.block import Block
from rwkv_jax.models.context import SequenceContext
from rwkv_jax.models.layers import wide_dtype
from rwkv_jax.models.transformer import Attention
from rwkv_kernels import OPERATORS, dispatch

SOFTMAX = "softmax"
"""Name of the Transformer's operator, of q, k and v [B, T, H, N]."""


class Recording(NamedTuple):
    """What one layer's operator read and computed, over texts from their beginning."""

    operator: str
    """wkv4 to wkv7, whose arguments and equations `rwkv_kernels` describes; or softmax."""
    inputs: Mapping[str, NDArray]
    """Its arguments by name, in at least float32: r, k, v and so on [B, T, H, N]; of WKV-4 [B, T, C]. A decay or bonus
    that is a parameter has neither B nor T."""
    output: NDArray
    """y [B, T, H, M], of WKV-4 [B, T, C]: before norm, gate and projection."""


class BlockResult(NamedTuple):
    """Output of one block."""

    x: Array
    """[B, T, C], the residual stream."""
    v_first: Array | None
    """[B, T, C], the first layer's values; only RWKV-7 has them."""
    recorded: dict[str, Array] | None
    """The operator's arguments and, as `y`, its output; None if not asked for."""


def as_tokens(model: LanguageModel, tokens: ArrayLike) -> NDArray:
    """Token ids of texts as int32 [B, T]; one text [T] becomes a batch of one.

    Raises:
      ConfigError: not integers in [0, V) of such a shape, with T from 1.
    """
    ids = np.asarray(tokens)
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or 0 in ids.shape or not np.issubdtype(ids.dtype, np.integer):
        raise ConfigError(f"tokens: {ids.dtype} of shape {ids.shape} must be integers of shape [B, T] or [T], T from 1")
    if ids.min() < 0 or ids.max() >= model.config.vocab_size:
        raise ConfigError(
            f"tokens: from {ids.min()} to {ids.max()} must lie from 0 to V - 1 = {model.config.vocab_size - 1}"
        )
    return ids.astype(np.int32)


def run_block(
    model: LanguageModel, layer: int, x: Array, v_first: Array | None = None, *, record: bool = False
) -> BlockResult:
    """Layer `layer` on residual streams [B, T, C] of texts from their beginning.

    Args:
      v_first: what layer 0 returned; None for layer 0.
    """
    is_stacked = layer > 0 and model.is_stacked
    run = next(run for run in model.layer_runs if layer in run.layers)
    graphdef, params = nnx.split(getattr(model, run.name) if is_stacked else model.block(layer), nnx.Param)
    state = model.initial_layer_states(model.config, x.shape[0])[layer]
    index = layer - run.layers.start if is_stacked else None
    return BlockResult(*_program(graphdef, model.config, record)(params, index, x, state, v_first))


@functools.cache
def _program(graphdef: Any, config: ModelConfig, record: bool) -> Callable[..., Any]:
    """(params of a block, x, state, v_first) -> the fields of its `BlockResult`; with an index, of stacked blocks."""

    def run(params: Any, index: Any, x: Array, state: Any, v_first: Array | None) -> tuple[Array, Array | None, Any]:
        own = params if index is None else jax.tree.map(lambda stacked: stacked[index], params)
        block: Block = nnx.merge(graphdef, own)
        recorded: dict[str, Array] | None = None
        if record:
            recorded = _attention_inputs(block, x) if isinstance(block.att, Attention) else _recording(block, config)
        x, v_first, _ = block(x=x, state=state, v_first=v_first, context=SequenceContext())
        if recorded is not None:
            recorded = {name: array.astype(wide_dtype(array.dtype)) for name, array in recorded.items()}
        return x, v_first, recorded

    return jax.jit(run)


def _recording(block: Block, config: ModelConfig) -> dict[str, Array]:
    """A dict that is filled when the block runs: its operator's arguments by name, and `y`."""
    recorded: dict[str, Array] = {}
    assert config.spec.operator is not None
    operator = OPERATORS[config.spec.operator]
    definition = operator.implementations["scan"]

    def run(*arguments: Any, **options: Any) -> tuple[Array, Any]:
        y, state = definition.run(*arguments, **options)
        recorded.update(zip(operator.axes, arguments, strict=False))  # the state comes last
        recorded["y"] = y
        return y, state

    recorder = dispatch.Implementation(run, dispatch.anything)
    for _, module in nnx.iter_modules(block):
        if isinstance(own := getattr(module, "config", None), ModelConfig):
            # A fused step of one token would go past the operator.
            own = dataclasses.replace(own, wkv_implementation=recorder, step_implementation=None)  # pyright: ignore
            module.config = own  # pyright: ignore[reportAttributeAccessIssue]
    return recorded


def _attention_inputs(block: Block, x: Array) -> dict[str, Array]:
    """q, k and v [B, T, H, N] of a Transformer's attention, q and k rotated, and its output y.

    Keys and values that several queries share are repeated.
    """
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    q, k, v = (z.astype(wide_dtype(z.dtype)) for z in block.att.project(block.ln1(x), positions))
    k, v = (jnp.repeat(z, q.shape[2] // z.shape[2], axis=2) for z in (k, v))
    return {"q": q, "k": k, "v": v, "y": jnp.einsum("BHTS,BSHN->BTHN", softmax_weights(q, k), v)}


def softmax_weights(q: Array, k: Array) -> Array:
    """The Transformer's attention weights [B, H, T, T] of q and k [B, T, H, N]."""
    scores = jnp.einsum("BTHN,BSHN->BHTS", q, k, precision="highest") / math.sqrt(q.shape[-1])
    is_visible = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    return jax.nn.softmax(jnp.where(is_visible, scores, -jnp.inf), axis=-1)


def record(model: LanguageModel, tokens: ArrayLike) -> list[Recording]:
    """Runs texts, and records every layer's operator; arrays are on the host.

    Args:
      tokens: [B, T], or [T] for one text.

    Raises:
      ConfigError: as `as_tokens`; a model without an operator of `rwkv_kernels` that is no Transformer either.
    """
    config = model.config
    if config.spec.operator is None and not isinstance(model.first_block.att, Attention):
        raise ConfigError(
            f"model: {config.title} has no operator that can be recorded ({', '.join(OPERATORS)}, {SOFTMAX}); "
            "take an RWKV or a Transformer"
        )
    x, v_first = model.emb(jnp.asarray(as_tokens(model, tokens)), config.dtype), None
    recordings = []
    for layer in range(config.num_layers):
        x, v_first, recorded = run_block(model, layer, x, v_first, record=True)
        inputs = jax.device_get(recorded)
        assert inputs is not None
        output = inputs.pop("y")
        operator = None if isinstance(model.block(layer).att, Attention) else config.spec.operator
        recordings.append(Recording(operator or SOFTMAX, inputs, output))
    return recordings


def beginning(recording: Recording, count: int) -> Recording:
    """The same of the first `count` tokens alone, since no token sees later ones."""
    over_time = recording.output.ndim
    inputs = {name: x[:, :count] if x.ndim == over_time else x for name, x in recording.inputs.items()}
    return Recording(recording.operator, inputs, recording.output[:, :count])
