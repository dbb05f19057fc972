"""WKV-7 as the kernels of split.py through Triton: forward F1, F2 and F3, backward B2 and B3, large heads in two."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from rwkv_kernels.arguments import varying_like
from rwkv_kernels.ops.wkv7 import split
from rwkv_kernels.ops.wkv7.split import Factors, Gradients, Inputs, OfValues
from rwkv_kernels.pallas.driver import Cotangents, ForwardResult, Launch, Operands
from rwkv_kernels.pallas.triton_split import Blocks, by_chunk, by_rows, warps_of_products
from rwkv_kernels.split_parts import BLOCK


class _Residuals(NamedTuple):
    """What the backward pass starts from besides the inputs, all float32."""

    transition: Array
    """P of all chunks, [B, H, T / C, N, N]."""
    reads: Array
    """G, [B, T, H, N]."""
    inverse: Array
    """X of all chunks, [B, H, T / C, C, C]."""
    states: Array
    """S at the start of every chunk, [B, H, T / C, M, N]."""


def _inputs(operands: Operands) -> Inputs:
    r, log_w, k, v, a, b = operands.over_time
    return Inputs(r, log_w, k, v, a, b, operands.local_segments)


def _types_of_factors(launch: Launch, inputs: Inputs, with_inverse: bool) -> Factors:
    (batch, time, heads, key_dim), value_dim = inputs.r.shape, inputs.v.shape[-1]
    of_chunks, size = (batch, heads, time // launch.size), launch.size
    array = functools.partial(varying_like, inputs.r, dtype=jnp.float32)
    return Factors(
        transition=array((*of_chunks, key_dim, key_dim)),
        contribution=array((*of_chunks, value_dim, key_dim)),
        reads=array((batch, time, heads, key_dim)),
        y=array((batch, time, heads, value_dim)),
        inverse=array((*of_chunks, size, size)) if with_inverse else None,
    )


def forward(launch: Launch, operands: Operands, state: Array, with_residuals: bool) -> ForwardResult:
    """y and the final state: factors of all chunks, the states between them, then y of all chunks."""
    inputs = _inputs(operands)
    types = _types_of_factors(launch, inputs, with_residuals)
    name = "factors_with_inverse" if with_residuals else "factors"
    factors: Factors = by_chunk(launch, name, split.factors, launch.kernel.num_warps, (inputs,), types)

    of_states = (state, "rows"), (factors.transition, "whole"), (factors.contribution, "rows")
    states, final = by_rows(launch, "states", split.states, of_states, factors.contribution.shape)

    of_outputs = factors.reads, factors.y, states
    type_of_y = varying_like(state, factors.y.shape, inputs.v.dtype)
    y = by_chunk(launch, "outputs", split.outputs, warps_of_products(state.shape[-1]), of_outputs, type_of_y)
    if not with_residuals:
        return ForwardResult(y, final)
    return ForwardResult(y, final, _Residuals(factors.transition, factors.reads, factors.inverse, states))


def backward(launch: Launch, operands: Operands, residuals: _Residuals, dy: Array, dfinal: Array) -> Cotangents:
    """The cotangents of the states between chunks, then the gradients of all chunks."""
    inputs = _inputs(operands)
    transition, reads, inverse, states = residuals
    of_cotangents = (dfinal, "rows"), (transition, "whole"), (reads, "keys"), (dy, "values")
    dstates, dinitial = by_rows(launch, "cotangents", split.cotangents, of_cotangents, states.shape)

    if max(states.shape[-2:]) > BLOCK:
        gradients = _in_two_kernels(launch, operands, dy, inverse, states, dstates)
    else:
        of_gradients = inputs, dy, inverse, states, dstates
        num_warps = launch.kernel.num_warps_backward
        gradients = by_chunk(launch, "gradients", split.gradients, num_warps, of_gradients, _types(operands))
    return Cotangents(gradients, (), dinitial)


def _types(operands: Operands) -> Gradients:
    return Gradients._make(varying_like(x, x.shape, x.dtype) for x in operands.over_time)


def _in_two_kernels(
    launch: Launch, operands: Operands, dy: Array, inverse: Array, states: Array, dstates: Array
) -> Gradients:
    """The gradients of all chunks, by programs with some columns of V and then with some of the other inputs."""
    inputs, types, num_warps = _inputs(operands), _types(operands), launch.kernel.num_warps_backward
    value_dim, key_dim = states.shape[-2:]
    wide = varying_like(dy, dy.shape, jnp.float32)

    parts = _parts(inputs, "whole", "columns"), "columns", "whole", "rows", "rows"
    blocks = Blocks(-(-value_dim // BLOCK), (parts, (OfValues("columns", "columns", "columns"),)))
    arrays = inputs, dy, inverse, states, dstates
    outputs = OfValues(wide, wide, types.v)
    name = "gradients_of_values"
    removed, dwanted, dv = by_chunk(launch, name, split.gradients_of_values, num_warps, arrays, outputs, blocks)

    without_v = Gradients("columns", "columns", "columns", None, "columns", "columns")
    parts = _parts(inputs, "columns", "whole"), "whole", "whole", "whole", "columns", "columns"
    blocks = Blocks(-(-key_dim // BLOCK), (parts, (without_v,)))
    arrays, outputs = (inputs, dy, removed, dwanted, states, dstates), types._replace(v=None)
    name = "gradients_of_keys"
    return by_chunk(launch, name, split.gradients_of_keys, num_warps, arrays, outputs, blocks)._replace(v=dv)


def _parts(inputs: Inputs, of_keys: str, of_values: str) -> Inputs:
    """What a program gets of each input."""
    parts = Inputs(*[of_keys] * 6, local_segments=None if inputs.local_segments is None else "whole")
    return parts._replace(v=of_values)
