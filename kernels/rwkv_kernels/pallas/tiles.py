"""Square tiles in a GPU's shared memory, each the sum of planes of bfloat16, and what kernels do with them.

A kernel is a function of a `Tiles`: it fetches tiles from the device's memory, multiplies them, writes new ones and
sends results. mosaic_gpu.py runs it on a device, where several warpgroups each have some columns of every tile in their
registers; interpreted_tiles.py by plain JAX.

Shared memory is given out while a kernel is traced, by rules that keep one warpgroup off what another still reads:
what was written is multiplied only after a `share`, where all wait for each other, and memory that was given back is
given out again only after one.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from rwkv_kernels.matmul import Form

SIZE = 64
"""Rows and columns of a tile: what a warpgroup's tensor-core instruction takes."""

EXACT = 3
"""Planes that hold all digits of a float32."""

Kind = Literal["time", "chunks", "state", "masks"]
"""Where the tiles of an array [planes, ...] are: [B, T, H, 64], a tile being a chunk of it; [B, H, T / 64, 64, 64];
[B, H, 64, 64]; or [B or 1, T / 64 or 1, 64, 64], of which each plane is a tile of its own."""


class Stored(NamedTuple):
    """An array of tiles in the device's memory."""

    array: Any
    """bfloat16, or a reference to it; in the description of a result, its shape and dtype."""
    kind: Kind

    @property
    def planes(self) -> int:
        """Whose sum a tile is."""
        return self.array.shape[0]


class Tile(NamedTuple):
    """A tile in shared memory: numbers of its planes, the largest first."""

    planes: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Ring:
    """Two tiles in turn, for loops: one is used while the other arrives, or leaves."""

    first: int
    """Of its planes, which are consecutive."""
    planes: int

    def at(self, turn: Any) -> Tile:
        """The tile of a turn of the loop."""
        return Tile(tuple(self.first + (turn % 2) * self.planes + plane for plane in range(self.planes)))


def is_stored(x: Any) -> bool:
    """Whether it is a leaf of a kernel's inputs and results."""
    return isinstance(x, Stored)


Pair = tuple[Any, Any, Form]
"""Numbers of two planes to multiply."""


class Tiles(abc.ABC):
    """Shared memory and what a program does with it. Arrays are this warpgroup's columns of a tile, float32."""

    def __init__(self, parts: int, chunks: int) -> None:
        self.parts = parts
        """Planes of a tile that is written, if not said otherwise."""
        self.chunks = chunks
        """Chunks that the program goes through."""
        self.count = 0
        """Planes of shared memory that were needed at once."""
        self._free: list[int] = []
        self._returned: list[int] = []
        self._unshared: set[int] = set()
        self._leaving: list[tuple[Stored, Tile, Any]] = []
        self._returning: list[int] = []
        self._arriving: set[int] = set()

    # Memory

    def _take(self, planes: int) -> Tile:
        taken = self._free[:planes]
        self._free = self._free[planes:]
        more = planes - len(taken)
        taken += range(self.count, self.count + more)
        self.count += more
        return Tile(tuple(taken))

    def free(self, *tiles: Tile) -> None:
        """Gives memory back, to be given out after the next `share`."""
        self._returned += [plane for tile in tiles for plane in tile.planes]

    def share(self) -> None:
        """Lets all warpgroups see what each has written, and what was freed be written again; sends tiles."""
        self._meet()
        self._free = sorted(self._free + self._returned)
        self._returned, self._returning = self._returning, []
        self._unshared.clear()
        if self._leaving:
            self._begin_sends(self._leaving)
        self._leaving = []

    def ring(self, planes: int) -> Ring:
        """Two tiles for a loop."""
        ring = Ring(self.count, planes)
        self.count += 2 * planes
        return ring

    # Tiles and arrays

    def read(self, tile: Tile) -> Array:
        """The sum of a tile's planes."""
        self._await(tile.planes)
        total = self._load(tile.planes[-1])
        for plane in reversed(tile.planes[:-1]):
            total = total + self._load(plane)
        return total

    def new(self, x: Array, planes: int | None = None) -> Tile:
        """A tile of x, rounded to that many planes."""
        return self.write(self._take(planes or self.parts), x)

    def write(self, tile: Tile, x: Array) -> Tile:
        """Writes x over a tile that nothing else has read since it was fetched or given out."""
        for plane in tile.planes:
            x = x - self._store(plane, x)
            if isinstance(plane, int):
                self._unshared.add(plane)
        return tile

    def product(self, *terms: tuple[Tile, Tile, Form], exact: bool = False) -> Array:
        """The sum of products, each in as many passes as its planes and the precision ask for; all passes if exact."""
        pairs: list[tuple[int, Pair]] = []
        for left, right, form in terms:
            self._await((*left.planes, *right.planes))
            assert not self._unshared.intersection(x for x in (*left.planes, *right.planes) if isinstance(x, int))
            for i, x in enumerate(left.planes):
                for j, y in enumerate(right.planes):
                    if exact or i + j < self.parts:
                        pairs.append((i + j, (x, y, form)))
        return self._multiply([pair for _, pair in sorted(pairs, key=lambda pair: -pair[0])])  # the smallest first

    # The device's memory

    def fetch(
        self, stored: Stored, chunk: Any = None, *, only: Iterable[int] | None = None, room: int = 0
    ) -> tuple[Tile, Tile]:
        """Begins to fetch a tile.

        Args:
          chunk: which; None is the program's own.
          only: its planes; None is all.
          room: planes to have at least, to write over it.

        Returns:
          the tile, and one with all of its room.
        """
        planes = tuple(range(stored.planes) if only is None else only)
        taken = self._take(max(len(planes), room))
        arriving = taken.planes[: len(planes)]
        for plane, of_stored in zip(arriving, planes, strict=True):
            self._begin_fetch(stored, of_stored, chunk, plane)
            self._arriving.add(plane)
        return Tile(arriving), taken

    def fetch_into(self, ring: Ring, turn: Any, stored: Stored, chunk: Any) -> None:
        """Begins to fetch a turn's tile."""
        for of_stored, plane in enumerate(ring.at(turn).planes):
            self._begin_fetch(stored, of_stored, chunk, plane)

    def fetched(self, ring: Ring, turn: Any) -> Tile:
        """A turn's tile, when it is there."""
        for plane in ring.at(turn).planes:
            self._await_fetch(plane)
        return ring.at(turn)

    def _await(self, planes: Iterable[Any]) -> None:
        for plane in planes:
            if isinstance(plane, int) and plane in self._arriving:
                self._arriving.remove(plane)
                self._await_fetch(plane)

    def send(self, stored: Stored, x: Array) -> None:
        """Sends x to the program's tile of a result, at the next `share`."""
        tile = self.new(x, stored.planes)
        self.send_tile(stored, tile)
        self._returning += tile.planes  # free at the `share` after that

    def send_tile(self, stored: Stored, tile: Tile, chunk: Any = None) -> None:
        """Sends a tile at the next `share`; it may be freed after that."""
        self._leaving.append((stored, tile, chunk))

    # What devices differ in

    @abc.abstractmethod
    def _load(self, plane: Any) -> Array: ...

    @abc.abstractmethod
    def _store(self, plane: Any, x: Array) -> Array:
        """Writes x, and returns it as it was rounded."""

    @abc.abstractmethod
    def _multiply(self, pairs: list[Pair]) -> Array: ...

    @abc.abstractmethod
    def _meet(self) -> None:
        """Waits until all warpgroups are here, and have their tiles sent."""

    @abc.abstractmethod
    def _begin_sends(self, leaving: list[tuple[Stored, Tile, Any]]) -> None: ...

    @abc.abstractmethod
    def _begin_fetch(self, stored: Stored, of_stored: int, chunk: Any, plane: Any) -> None: ...

    @abc.abstractmethod
    def _await_fetch(self, plane: Any) -> None: ...

    @abc.abstractmethod
    def loop(self, body: Callable[[Any, Array], Array], start: Array) -> Array:
        """Calls body(turn, carry) for every chunk in turn."""

    @abc.abstractmethod
    def when(self, condition: Any, action: Callable[[], None]) -> None:
        """Calls action() if the condition holds."""


def split(x: Array, planes: int) -> Array:
    """An array as the sum of [planes, ...] bfloat16, the largest first; for XLA, which would cancel casts there."""
    pieces = []
    for _ in range(planes):
        pieces.append(lax.reduce_precision(x.astype(jnp.float32), exponent_bits=8, mantissa_bits=7))
        x = x - pieces[-1]
    return jnp.stack(pieces).astype(jnp.bfloat16)


def join(planes: Array, dtype: Any) -> Array:
    """The array that `split` took apart."""
    if planes.shape[0] == 1:
        return planes[0].astype(dtype)
    return jnp.sum(planes[::-1].astype(jnp.float32), axis=0).astype(dtype)


Body = Callable[[Tiles, Any, Any], None]
"""(tiles, inputs, results), the latter two trees of `Stored`: a kernel."""
