"""Runs kernels of tiles by plain JAX, on any machine: the same planes, passes and memory as on a device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from rwkv_kernels.pallas.tiles import SIZE, Body, Pair, Stored, Tile, Tiles, is_stored


class _Result(NamedTuple):
    """Stands for a result's array."""

    number: int
    shape: tuple[int, ...]


class Interpreted(Tiles):
    """A program with all columns of its tiles; stored arrays are its own, [planes, chunks, 64, 64]."""

    def __init__(self, parts: int, chunks: int) -> None:
        super().__init__(parts, chunks)
        self._memory: dict[int, Array] = {}
        self.sent: dict[int, dict[int, Array]] = {}
        """What was sent, by the result's number and the chunk: [planes, 64, 64]."""

    def _load(self, plane: int) -> Array:
        return self._memory[plane]

    def _store(self, plane: int, x: Array) -> Array:
        self._memory[plane] = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        return self._memory[plane]

    def _multiply(self, pairs: list[Pair]) -> Array:
        contracted = {"nn": (1, 0), "nt": (1, 1), "tn": (0, 0)}
        rights: dict[tuple[int, str], Array] = {}  # sums by what they are multiplied with: fewer products to compile
        for x, y, form in pairs:
            known = rights.get((x, form))
            rights[x, form] = self._memory[y] if known is None else known + self._memory[y]
        total = jnp.zeros((SIZE, SIZE), jnp.float32)
        for (x, form), right in rights.items():
            row, column = contracted[form]
            dimensions = (((row,), (column,)), ((), ()))
            total = total + lax.dot_general(self._memory[x], right, dimensions, precision=lax.Precision.HIGHEST)
        return total

    def _meet(self) -> None:
        pass

    def _begin_fetch(self, stored: Stored, of_stored: int, chunk: int | None, plane: int) -> None:
        self._memory[plane] = stored.array[of_stored, chunk or 0].astype(jnp.float32)

    def _await_fetch(self, plane: int) -> None:
        pass

    def _begin_sends(self, leaving: list[tuple[Stored, Tile, Any]]) -> None:
        for stored, tile, chunk in leaving:
            planes = jnp.stack([self._memory[plane] for plane in tile.planes])
            self.sent.setdefault(stored.array.number, {})[chunk or 0] = planes

    def loop(self, body: Callable[[Any, Array], Array], start: Array) -> Array:
        """All turns, written out."""
        for turn in range(self.chunks):
            start = body(turn, start)
        return start

    def when(self, condition: Any, action: Callable[[], None]) -> None:
        """The condition is known."""
        if condition:
            action()


def _by_head(stored: Stored, batch: int, heads: int, chunks: int) -> Array:
    """[B, H, planes, chunks or 1, 64, 64]."""
    x = stored.array
    if stored.kind == "time":
        return x.reshape(-1, batch, chunks, SIZE, heads, SIZE).transpose(1, 4, 0, 2, 3, 5)
    if stored.kind == "chunks":
        return x.transpose(1, 2, 0, 3, 4, 5)
    if stored.kind == "state":
        return x.transpose(1, 2, 0, 3, 4)[:, :, :, None]
    return jnp.broadcast_to(x.transpose(1, 0, 2, 3, 4)[:, None], (batch, heads, x.shape[0], chunks, SIZE, SIZE))


def _from_heads(x: Array, kind: str) -> Array:
    """The array of which `_by_head` is a view."""
    if kind == "time":
        batch, heads, planes, chunks = x.shape[:4]
        return x.transpose(2, 0, 3, 4, 1, 5).reshape(planes, batch, chunks * SIZE, heads, SIZE)
    if kind == "chunks":
        return x.transpose(2, 0, 1, 3, 4, 5)
    return x[:, :, :, 0].transpose(2, 0, 1, 3, 4)


def program(body: Body, parts: int, inputs: Any, outputs: Any) -> Callable[..., tuple[Interpreted, list[Array]]]:
    """A kernel's program: (its arrays of the inputs, [planes, chunks, 64, 64]) -> itself, and what it sent."""
    (results,) = (jax.tree.leaves(outputs, is_leaf=is_stored),)
    stored, structure = jax.tree.flatten(inputs, is_leaf=is_stored)
    numbered = [Stored(_Result(i, x.array.shape), x.kind) for i, x in enumerate(results)]
    described = jax.tree.unflatten(jax.tree.structure(outputs, is_leaf=is_stored), numbered)

    def run(chunks: int, *arrays: Array) -> tuple[Interpreted, list[Array]]:
        tiles = Interpreted(parts, chunks)
        own = [Stored(x, of.kind) for x, of in zip(arrays, stored, strict=True)]
        body(tiles, jax.tree.unflatten(structure, own), described)
        tiles.share()
        return tiles, [
            jnp.stack([tiles.sent[i][chunk] for chunk in sorted(tiles.sent[i])], axis=1) for i in range(len(results))
        ]

    return run


def call(body: Body, parts: int, by_chunk: bool, sizes: tuple[int, int, int], inputs: Any, outputs: Any) -> Any:
    """Calls a kernel; sizes are B, H and T / 64."""
    batch, heads, chunks = sizes
    run = program(body, parts, inputs, outputs)
    arrays = [_by_head(x, *sizes) for x in jax.tree.leaves(inputs, is_leaf=is_stored)]
    if by_chunk:
        arrays = [jnp.moveaxis(x, 3, 2)[:, :, :, :, None] for x in arrays]
    axes = 3 if by_chunk else 2
    arrays = [x.reshape(math.prod(x.shape[:axes]), *x.shape[axes:]) for x in arrays]
    sent = jax.vmap(lambda *own: run(1 if by_chunk else chunks, *own)[1])(*arrays)
    leaves, structure = jax.tree.flatten(outputs, is_leaf=is_stored)
    results = []
    for x, of in zip(sent, leaves, strict=True):
        x = x.reshape(batch, heads, *((chunks,) if by_chunk else ()), *x.shape[1:])
        x = jnp.moveaxis(x[:, :, :, :, 0], 2, 3) if by_chunk else x
        results.append(_from_heads(x, of.kind).astype(jnp.bfloat16))
    return jax.tree.unflatten(structure, results)


def plan(body: Body, parts: int, by_chunk: bool, inputs: Any, outputs: Any) -> Interpreted:
    """A traced program, which knows how much shared memory it takes."""
    run = program(body, parts, inputs, outputs)
    chunks = 1 if by_chunk else 2  # more turns of a loop take no more
    arrays = [
        jax.ShapeDtypeStruct((x.planes, chunks, SIZE, SIZE), jnp.bfloat16)
        for x in jax.tree.leaves(inputs, is_leaf=is_stored)
    ]
    traced: list[Interpreted] = []

    def trace(*own: Array) -> list[Array]:
        tiles, sent = run(chunks, *own)
        traced.append(tiles)
        return sent

    jax.eval_shape(trace, *arrays)
    return traced[0]
