"""`wkv7_output` as Triton kernels, for NVIDIA GPUs: one forward and one for all gradients."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from rwkv_kernels.arguments import varying_like
from rwkv_kernels.ops.wkv7.output import gated_output
from rwkv_kernels.pallas.driver import as_float32
from rwkv_kernels.pallas.triton import compiler_params

NAME = "wkv7_output"
"""What the kernels' names in profiles and compiled programs begin with."""

NUM_WARPS = 4
TILE, TILE_BACKWARD = 2048, 1024
"""Numbers of an array that a program works on at once: 16 and 8 for each thread."""

MOST_TILES = 16
"""Tiles that a program of the backward pass goes through: it adds up their gradients of the parameters."""


def _sum(x: Array) -> Array:
    return jnp.sum(x, axis=-1, keepdims=True)


def _mean(x: Array) -> Array:
    return jnp.mean(x, axis=-1, keepdims=True)


def gradients(
    do: Array, y: Array, r: Array, k: Array, v: Array, g: Array, r_k: Array, weight: Array, bias: Array, epsilon: float
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Gradients of `gated_output` for rows [R, N] of one head, given that of its result, do.

    Returns:
      Those of y, r, k, v and g [R, N], and each row's part of those of r_k, weight and bias.
    """
    centered = y - _mean(y)
    scale = lax.rsqrt(_mean(jnp.square(centered)) + epsilon)
    normalized, product = centered * scale, _sum(r * r_k * k)
    dg = do * (normalized * weight + bias + product * v)
    dsum = do * g
    dnormalized, dproduct = dsum * weight, _sum(dsum * v)
    dy = scale * (dnormalized - _mean(dnormalized) - normalized * _mean(dnormalized * normalized))
    over_rows = dy, dproduct * r_k * k, dproduct * r_k * r, dsum * product, dg
    return over_rows, (dproduct * r * k, dsum * normalized, dsum)


def _tokens(x: Array, multiple: int) -> Array:
    """[B, T, H, N] as [B T, H, N], with zeros up to a multiple of a number of rows."""
    x = x.reshape(-1, *x.shape[2:])
    return x if x.shape[0] % multiple == 0 else jnp.pad(x, ((0, -x.shape[0] % multiple), (0, 0), (0, 0)))


def _per_head(x: Array) -> pl.BlockSpec:
    return pl.BlockSpec((None, x.shape[-1]), lambda i, h: (h, 0))


def _loaded(refs: Sequence[Any]) -> list[Array]:
    """Parameters of a head, as rows."""
    return [as_float32(ref[...])[None, :] for ref in refs]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(epsilon: float, interpret: bool, over_time: tuple[Array, ...], per_head: tuple[Array, ...]) -> Array:
    batch, time, heads, size = over_time[0].shape
    rows = TILE // size
    over_time = tuple(_tokens(x, rows) for x in over_time)

    def body(*refs: Any) -> None:
        tiles = (as_float32(ref[...]) for ref in refs[:5])
        refs[-1][...] = gated_output(*tiles, *_loaded(refs[5:8]), epsilon=epsilon).astype(refs[-1].dtype)

    tile = pl.BlockSpec((rows, None, size), lambda i, h: (i, h, 0))
    o = pl.pallas_call(
        body,
        grid=(over_time[0].shape[0] // rows, heads),
        in_specs=[tile] * 5 + [_per_head(x) for x in per_head],
        out_specs=tile,
        out_shape=varying_like(over_time[0], over_time[0].shape, over_time[3].dtype),
        compiler_params=compiler_params(NUM_WARPS),
        interpret=interpret,
        name=f"{NAME}_forward",
    )(*over_time, *per_head)
    return o[: batch * time].reshape(batch, time, heads, size)


def _run_forward(epsilon: float, interpret: bool, over_time: Any, per_head: Any) -> tuple[Array, tuple[Any, Any]]:
    return _run(epsilon, interpret, over_time, per_head), (over_time, per_head)


def _run_backward(
    epsilon: float, interpret: bool, saved: tuple[tuple[Array, ...], tuple[Array, ...]], do: Array
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    over_time, per_head = saved
    batch, time, heads, size = do.shape
    rows = TILE_BACKWARD // size
    arrays = [_tokens(x, rows) for x in (*over_time, do)]
    tokens = arrays[0].shape[0]
    num_tiles = MOST_TILES
    while tokens % (rows * num_tiles):
        num_tiles //= 2

    def body(*refs: Any) -> None:
        time_refs, head_refs, out_refs, sum_refs = refs[:6], refs[6:9], refs[9:14], refs[14:]
        parameters = _loaded(head_refs)

        def one(index: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            here = pl.ds(index * rows, rows)
            *inputs, do = (as_float32(ref[here, :]) for ref in time_refs)
            of_inputs, of_parameters = gradients(do, *inputs, *parameters, epsilon=epsilon)
            for ref, x in zip(out_refs, of_inputs, strict=True):
                ref[here, :] = x.astype(ref.dtype)
            return tuple(total + x for total, x in zip(sums, of_parameters, strict=True))

        zeros = (jnp.zeros((rows, size), jnp.float32),) * 3
        sums = lax.fori_loop(0, num_tiles, one, zeros)
        for ref, total in zip(sum_refs, sums, strict=True):
            ref[...] = jnp.sum(total, axis=0)

    programs = tokens // (rows * num_tiles)
    tiles = pl.BlockSpec((rows * num_tiles, None, size), lambda i, h: (i, h, 0))
    sums = pl.BlockSpec((None, None, size), lambda i, h: (i, h, 0))
    struct = functools.partial(varying_like, do)
    *of_inputs, d_r_k, dweight, dbias = pl.pallas_call(
        body,
        grid=(programs, heads),
        in_specs=[tiles] * 6 + [_per_head(x) for x in per_head],
        out_specs=[tiles] * 5 + [sums] * 3,
        out_shape=[struct(x.shape, x.dtype) for x in arrays[:5]] + [struct((programs, heads, size), jnp.float32)] * 3,
        compiler_params=compiler_params(NUM_WARPS),
        interpret=interpret,
        name=f"{NAME}_backward",
    )(*arrays, *per_head)
    return (
        tuple(x[: batch * time].reshape(do.shape) for x in of_inputs),
        tuple(jnp.sum(d, axis=0).astype(x.dtype) for d, x in zip((d_r_k, dweight, dbias), per_head, strict=True)),
    )


_run.defvjp(_run_forward, _run_backward)


def wkv7_output_pallas_triton(*arrays: Array, epsilon: float, interpret: bool = False) -> Array:
    """The kernels; arrays as of `wkv7_output`, in order. `interpret` is Pallas' interpret mode, for tests."""
    return _run(epsilon, interpret, arrays[:5], arrays[5:])
