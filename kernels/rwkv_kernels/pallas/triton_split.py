"""Calls the kernels of an operator whose chunks are apart: a program for a chunk, or for a block of the state's rows.

The one-loop kernels (triton.py) have a program for each row and head and walk through time with the state in registers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

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


class Blocks(NamedTuple):
    """How a chunk is shared among programs."""

    count: int
    of: Any
    """Trees as inputs and outputs are, of what a program gets of each array: the `whole`, or some of the `columns` of
    its last axis or of the `rows` before."""


def by_chunk(
    launch: Launch, name: str, body: Body, num_warps: int, inputs: tuple, outputs: Any, blocks: Blocks | None = None
) -> Any:
    """Calls a kernel with one program per chunk, row and head; returns what `outputs`, a tree of types, describes.

    A program gets its part of every array: of steps [B, T] it is [C], of rows of all heads [H, 1, N] it is [1, N], of
    arrays over time [B, T, H, ...] it is [C, ...], and of arrays of chunks [B, H, T / C, ...] it is [...]. With
    `blocks` a chunk has several programs. The first input is over time.
    """
    size = launch.size
    batch, time, heads = jax.tree.leaves(inputs)[0].shape[:3]
    grid = time // size, batch, heads
    count = 1 if blocks is None else blocks.count

    def spec(x: Any, part: str = "whole") -> pl.BlockSpec:
        of_rows, of_columns = part == "rows", part == "columns"

        def place(*at: Any) -> tuple[Any, ...]:
            block, i, b, h = (0, *at) if blocks is None else at
            row, column = block if of_rows else 0, block if of_columns else 0
            return {2: (b, i), 3: (h, row, column), 4: (b, i, h, column), 5: (b, h, i, row, column)}[x.ndim]

        rows, columns = x.shape[-2] // (count if of_rows else 1), x.shape[-1] // (count if of_columns else 1)
        shapes = {2: (size,), 3: (rows, columns), 4: (size, None, columns), 5: (None, None, rows, columns)}
        return pl.BlockSpec((None, *shapes[x.ndim]), place)

    matmul = _matmul(launch) if launch.interpret else _fenced(_matmul(launch))
    arrays = inputs, (outputs,)
    if blocks is None:
        specs = jax.tree.map(spec, arrays)
    else:
        grid, specs = (count, *grid), jax.tree.map(spec, arrays, blocks.of)
    (results,) = _call(launch, name, functools.partial(body, matmul), num_warps, grid, inputs, (outputs,), specs)
    return results


def by_rows(
    launch: Launch, name: str, body: Body, inputs: tuple[tuple[Array, str], ...], shape: tuple[int, ...]
) -> tuple[Array, Array]:
    """Calls a kernel that goes through all chunks, with one program per block of rows of the state, row and head.

    Args:
      inputs: with what a program gets of each: `rows` of [B, H, M, N] or [B, H, T / C, M, N], the `whole` of
        [B, H, T / C, ..., N], all steps of `keys` [B, T, H, N], or all steps of some columns of `values` [B, T, H, M].
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
