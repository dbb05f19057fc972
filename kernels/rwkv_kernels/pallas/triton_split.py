"""Calls the kernels of an operator whose chunks are apart: a program for a chunk, or for a block of the state's rows.

The one-loop kernels (triton.py) have a program for each row and head and walk through time with the state in registers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from rwkv_kernels.arguments import varying_like
from rwkv_kernels.matmul import Form, Matmul
from rwkv_kernels.pallas.driver import Launch
from rwkv_kernels.pallas.triton import compiler_params

Body = Callable[..., None]
"""(matmul, *references to inputs, *references to outputs)."""

PROGRAMS = 128
"""Fewer leave a GPU without work: an H100 has 132 multiprocessors, an A100 108."""

ROWS, FEWEST_ROWS = 64, 16
"""Rows of the state that a program walks through time with, and as few as tensor cores take."""


def warps_of_products(key_dim: int) -> int:
    """Warps a program of kernels that do little but one product at a time."""
    return 4 if key_dim <= 64 else 8


def _matmul(launch: Launch) -> Matmul:
    return launch.matmul._replace(own_derivatives=False)


def _fenced(matmul: Matmul) -> Matmul:
    """With a barrier after each product, without which compilers load the operands of all at once, and spill them."""
    from jax.experimental.pallas import triton  # here: importing it warns where it is deprecated

    def multiply(x: Array, y: Array, form: Form) -> Array:
        z = matmul.multiply(x, y, form)
        triton.debug_barrier()
        return z

    return matmul._replace(multiply=multiply)


def by_chunk(launch: Launch, name: str, body: Body, num_warps: int, inputs: tuple, outputs: Any) -> Any:
    """Calls a kernel with one program per chunk, row and head; returns what `outputs`, a tree of types, describes.

    A program gets the chunk's part of every array: of steps [B, T] it is [C], of arrays over time [B, T, H, ...] it is
    [C, ...], and of arrays of chunks [B, H, T / C, ...] it is [...].
    """
    size = launch.size

    def spec(x: Any) -> pl.BlockSpec:
        if x.ndim == 2:
            return pl.BlockSpec((None, size), lambda i, b, h: (b, i))
        if x.ndim == 4:
            return pl.BlockSpec((None, size, None, x.shape[3]), lambda i, b, h: (b, i, h, 0))
        return pl.BlockSpec((None, None, None, *x.shape[3:]), lambda i, b, h: (b, h, i, 0, 0))

    batch, time, heads = jax.tree.leaves(inputs)[0].shape[:3]
    matmul = _matmul(launch) if launch.interpret else _fenced(_matmul(launch))
    grid, specs = (time // size, batch, heads), jax.tree.map(spec, (inputs, (outputs,)))
    (results,) = _call(launch, name, functools.partial(body, matmul), num_warps, grid, inputs, (outputs,), specs)
    return results


def by_rows(
    launch: Launch, name: str, body: Body, inputs: tuple[tuple[Array, str], ...], shape: tuple[int, ...]
) -> tuple[Array, Array]:
    """Calls a kernel that goes through all chunks, with one program per block of rows of the state, row and head.

    Args:
      inputs: with what a program gets of each: `rows` of [B, H, M, N] or [B, H, T / C, M, N], the `whole` of
        [B, H, T / C, N, N], all steps of `keys` [B, T, H, N], or all steps of some columns of `values` [B, T, H, M].
        A state [B, H, M, N] comes first.
      shape: [B, H, T / C, M, N].

    Returns:
      The states of all chunks, of that shape, and another state [B, H, M, N], float32.
    """
    state = inputs[0][0]
    batch, heads, value_dim, key_dim = state.shape
    rows = ROWS if batch * heads * value_dim >= PROGRAMS * ROWS else FEWEST_ROWS
    rows = min(rows, value_dim)

    def spec(x: Any, kind: str) -> pl.BlockSpec:
        if kind == "rows" and x.ndim == 4:
            return pl.BlockSpec((None, None, rows, key_dim), lambda m, b, h: (b, h, m, 0))
        if kind == "rows":
            return pl.BlockSpec((None, None, x.shape[2], rows, key_dim), lambda m, b, h: (b, h, 0, m, 0))
        if kind == "whole":
            return pl.BlockSpec((None, None, *x.shape[2:]), lambda m, b, h: (b, h, 0, 0, 0))
        if kind == "keys":
            return pl.BlockSpec((None, x.shape[1], None, key_dim), lambda m, b, h: (b, 0, h, 0))
        return pl.BlockSpec((None, x.shape[1], None, rows), lambda m, b, h: (b, 0, h, m))

    outputs = tuple(varying_like(state, x, jnp.float32) for x in (shape, state.shape))
    specs = tuple(spec(x, kind) for x, kind in inputs), tuple(spec(x, "rows") for x in outputs)
    grid, arrays = (value_dim // rows, batch, heads), tuple(x for x, _ in inputs)
    body = functools.partial(body, _matmul(launch))
    return _call(launch, name, body, warps_of_products(key_dim), grid, arrays, outputs, specs)


def _call(
    launch: Launch,
    name: str,
    body: Callable[..., None],
    num_warps: int,
    grid: tuple[int, ...],
    inputs: tuple,
    outputs: tuple,
    specs: tuple[Any, Any],
) -> Any:
    return pl.pallas_call(
        body,
        grid=grid,
        in_specs=specs[0],
        out_specs=specs[1],
        out_shape=outputs,
        compiler_params=compiler_params(num_warps),
        interpret=launch.interpret,
        name=f"{launch.kernel.name}_{name}",
    )(*inputs)
