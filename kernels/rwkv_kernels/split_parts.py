"""What operators whose chunks are apart have in common: the recurrences between chunks, and large heads in blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from rwkv_kernels.matmul import Matmul, operand

BLOCK = 64
"""Largest N and M of which one program of B3 has all; of larger ones, what a program has."""

STEP = 32
"""What a program goes through at a time where it contracts in a loop. At N = M = 128, WKV-7's B3 spills up to 24 bytes
with it and up to 752 with 64."""

Ref = Any
"""An array in a device's memory, read and written by index; outside kernels, the array."""

Act = Callable[[Matmul, Array, Array], Array]
"""(matmul, rows of a state [rows, N], a chunk's P) -> the rows after the chunk, without what it adds to them."""


def states(act: Act, matmul: Matmul, initial: Ref, transition: Ref, contribution: Ref, states: Ref, final: Ref) -> None:
    """F2: some rows of S at the start of every chunk, [T / C, rows, N], and of the final S, [rows, N]."""

    def advance(index: Array, state: Array) -> Array:
        states[index] = state
        return act(matmul, state, transition[index]) + contribution[index]

    final[...] = lax.fori_loop(0, states.shape[0], advance, initial[...])


def cotangents(
    act: Act, matmul: Matmul, dfinal: Ref, transition: Ref, reads: Ref, dy: Ref, dstates: Ref, dinitial: Ref
) -> None:
    """B2: some rows of dS at the end of every chunk, [T / C, rows, N], and of dS at the start, [rows, N].

    `act` is what the transition does to them, backwards. G [T, N] and dY [T, rows] are those of all chunks.
    """
    count = dstates.shape[0]
    size = reads.shape[0] // count

    def retreat(backwards: Array, dstate: Array) -> Array:
        index = count - 1 - backwards
        dstates[index] = dstate
        here = pl.ds(index * size, size)
        return act(matmul, dstate, transition[index]) + matmul.tn(operand(dy[here, :]), reads[here, :])

    dinitial[...] = lax.fori_loop(0, count, retreat, dfinal[...])


def sums_over_blocks(
    size: int, terms: Callable[[Any], Iterable[Array]], shapes: Iterable[tuple[int, ...]]
) -> tuple[Array, ...]:
    """Sums over all of an axis, a block after the other: a loop keeps their operands out of each other's way.

    Args:
      size: of the axis.
      terms: (indices of a block) -> its terms, each computed when it is asked for.
      shapes: of the terms, float32.
    """
    width = min(STEP, size)

    def add(index: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        found = terms(pl.ds(index * width, width))
        return tuple(x + term for x, term in zip(sums, found, strict=True))

    return lax.fori_loop(0, size // width, add, tuple(jnp.zeros(shape, jnp.float32) for shape in shapes))
