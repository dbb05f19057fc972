"""WKV-5 and WKV-6 as the kernels of decayed_attention_split.py through Triton: F1, F2, F3, B2, B3."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rwkv_kernels import decayed_attention_split as split
from rwkv_kernels.arguments import varying_like
from rwkv_kernels.decayed_attention_split import Factors, Gradients, Inputs, Outputs
from rwkv_kernels.pallas.driver import Cotangents, ForwardResult, Launch, Operands
from rwkv_kernels.pallas.triton_split import Blocks, by_chunk, by_rows, warps_of_products
from rwkv_kernels.split_parts import BLOCK


class _Residuals(NamedTuple):
    """What the backward pass starts from besides the inputs, all float32."""

    transition: Array
    """p of all chunks, [B, H, T / C, 1, N]."""
    reads: Array
    """G, [B, T, H, N]."""
    scores: Array
    """A of all chunks, [B, H, T / C, C, C]."""
    states: Array
    """S at the start of every chunk, [B, H, T / C, M, N]."""


def _inputs(launch: Launch, operands: Operands) -> Inputs:
    per_head = [x[:, None] for x in operands.per_head]  # [H, 1, N]
    if launch.kernel.fixed_decay:
        (r, k, v), (log_w, u) = operands.over_time, per_head
    else:
        (r, log_w, k, v), (u,) = operands.over_time, per_head
    return Inputs(k, v, log_w, operands.local_segments, operands.active, r, u)


def forward(launch: Launch, operands: Operands, state: Array, with_residuals: bool) -> ForwardResult:
    """y and the final state: what each chunk adds to the state, the states between them, then y of all chunks."""
    inputs = _inputs(launch, operands)
    batch, time, heads, value_dim = inputs.v.shape
    key_dim, of_chunks = inputs.k.shape[-1], (batch, heads, time // launch.size)
    array = functools.partial(varying_like, state)
    in_float32 = functools.partial(array, dtype=jnp.float32)

    without_reads = (inputs._replace(r=None, u=None),)
    types = Factors(in_float32((*of_chunks, 1, key_dim)), in_float32((*of_chunks, value_dim, key_dim)))
    num_warps = warps_of_products(key_dim)
    factors: Factors = by_chunk(launch, "factors", split.factors, num_warps, without_reads, types)

    of_states = (state, "rows"), (factors.transition, "whole"), (factors.contribution, "rows")
    states, final = by_rows(launch, "states", split.states, of_states, factors.contribution.shape)

    types_of_outputs = Outputs(array(inputs.v.shape, dtype=inputs.v.dtype), None, None)
    if with_residuals:
        reads, scores = in_float32(inputs.k.shape), in_float32((*of_chunks, launch.size, launch.size))
        types_of_outputs = types_of_outputs._replace(reads=reads, scores=scores)
    name = "outputs_with_scores" if with_residuals else "outputs"
    of_outputs = inputs, states
    outputs: Outputs = by_chunk(launch, name, split.outputs, launch.kernel.num_warps, of_outputs, types_of_outputs)
    if not with_residuals:
        return ForwardResult(outputs.y, final)
    return ForwardResult(outputs.y, final, _Residuals(factors.transition, outputs.reads, outputs.scores, states))


def backward(launch: Launch, operands: Operands, residuals: _Residuals, dy: Array, dfinal: Array) -> Cotangents:
    """The cotangents of the states between chunks, then the gradients of all chunks."""
    transition, reads, scores, states = residuals
    of_cotangents = (dfinal, "rows"), (transition, "whole"), (reads, "keys"), (dy, "values")
    dstates, dinitial = by_rows(launch, "cotangents", split.cotangents, of_cotangents, states.shape)

    fixed_decay = launch.kernel.fixed_decay
    if max(states.shape[-2:]) > BLOCK:
        found = _in_two_kernels(launch, operands, dy, scores, states, dstates)
    else:
        of_gradients, types = (_inputs(launch, operands), dy, scores, states, dstates), _types(launch, operands, states)
        num_warps = launch.kernel.num_warps_backward
        found = by_chunk(launch, "gradients", split.gradients, num_warps, of_gradients, types)
    du = jnp.sum(found.u, axis=(2, 3))
    if fixed_decay:
        return Cotangents((found.r, found.k, found.v), (jnp.sum(found.log_w, axis=(2, 3)), du), dinitial)
    return Cotangents((found.r, found.log_w, found.k, found.v), (du,), dinitial)


def _types(launch: Launch, operands: Operands, states: Array) -> Gradients:
    inputs = _inputs(launch, operands)
    k, v, log_w, r = (varying_like(states, x.shape, x.dtype) for x in (inputs.k, inputs.v, inputs.log_w, inputs.r))
    shared = varying_like(states, (*states.shape[:3], 1, states.shape[-1]), jnp.float32)  # a row of each chunk
    return Gradients(k, v, shared if launch.kernel.fixed_decay else log_w, r, shared)


def _in_two_kernels(
    launch: Launch, operands: Operands, dy: Array, scores: Array, states: Array, dstates: Array
) -> Gradients:
    """The gradients of all chunks, by programs with some columns of V and then with some of the other inputs."""
    inputs, types = _inputs(launch, operands), _types(launch, operands, states)
    call = functools.partial(by_chunk, launch, num_warps=launch.kernel.num_warps_backward)
    value_dim, key_dim = states.shape[-2:]

    used = inputs._replace(v=None, r=None, u=None)
    parts = jax.tree.map(lambda _: "whole", used), "columns", "whole", "rows"
    blocks = Blocks(-(-value_dim // BLOCK), (parts, ("columns",)))
    arrays = used, dy, scores, dstates
    name = "gradients_of_values"
    dv = call(name, split.gradients_of_values, inputs=arrays, outputs=types.v, blocks=blocks)

    of_inputs = jax.tree.map(lambda _: "whole", inputs)
    of_inputs = of_inputs._replace(k="columns", log_w="columns", r="columns", u="columns")
    parts = of_inputs, "whole", "columns", "columns"
    blocks = Blocks(-(-key_dim // BLOCK), (parts, (Gradients("columns", None, "columns", "columns", "columns"),)))
    arrays, types = (inputs, dy, states, dstates), types._replace(v=None)
    name = "gradients_of_keys"
    found: Gradients = call(name, split.gradients_of_keys, inputs=arrays, outputs=types, blocks=blocks)
    return found._replace(v=dv)
