"""WKV-7 as the five kernels of split.py through Triton: forward F1, F2 and F3, backward B2 and B3."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from rwkv_kernels.arguments import varying_like
from rwkv_kernels.ops.wkv7 import split
from rwkv_kernels.ops.wkv7.split import Factors, Gradients, Inputs
from rwkv_kernels.pallas.driver import Cotangents, ForwardResult, Launch, Operands
from rwkv_kernels.pallas.triton_split import by_chunk, by_rows, warps_of_products


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

    types = Gradients._make(varying_like(dfinal, x.shape, x.dtype) for x in operands.over_time)
    of_gradients = inputs, dy, inverse, states, dstates
    num_warps = launch.kernel.num_warps_backward
    gradients = by_chunk(launch, "gradients", split.gradients, num_warps, of_gradients, types)
    return Cotangents(gradients, (), dinitial)
