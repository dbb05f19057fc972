"""The five kernels of split.py on tiles of 64 x 64: chunks of 64, heads of 64, and products of bfloat16 planes.

Equations and names are split.py's. What differs is where things are: operands are tiles in shared memory (tiles.py),
which is small, so vectors are fetched and scaled when they are needed; registers hold what is being summed. E and L, a
row in split.py, are here tiles of equal rows, and so are sums over steps.

Masks come from memory, one tile for all heads: 0, 1 and -1 to multiply by, and one whose bits are what selects.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from rwkv_kernels.chunking import packing
from rwkv_kernels.pallas.tiles import EXACT, SIZE, Stored, Tile, Tiles

BITS, FROM_MIDDLE, ENTER, LEAVE, OWN, WRITING = range(6)
"""Masks: bits, below; those whose product with log w is its sum from the middle row, from the start to it, and from it
to the end; steps that a row sees; and steps that the state which leaves sees."""

_EARLIER, _OWN, _READS, _WRITES, _KEEPS, _LEVEL = 1, 2, 4, 8, 16, 32
"""Bits: a column is an earlier step than its row, or that or the same, in the row's segment; a row reads the state that
enters; it writes the one that leaves; the latter has the former in it. From the last bit on, a number: the length of
row ^ column in bits, which says when `_inverse` joins their blocks."""

_SMALLEST = -math.log(float(jnp.finfo(jnp.float32).eps / jnp.finfo(jnp.float32).tiny))
"""A log decay below which a state of size 1 would silently lose digits to underflow."""


class Inputs(NamedTuple):
    """A sequence."""

    r: Stored
    log_w: Stored
    k: Stored
    v: Stored
    a: Stored
    b: Stored
    masks: Stored


class Factors(NamedTuple):
    """What F1 makes of each chunk: P, Q, G, Y', and X, or None where there is no backward pass."""

    transition: Stored
    contribution: Stored
    reads: Stored
    y: Stored
    inverse: Stored | None


class Gradients(NamedTuple):
    """Of `Inputs`."""

    r: Stored
    log_w: Stored
    k: Stored
    v: Stored
    a: Stored
    b: Stored


def masks(local_segments: Array | None) -> Array:
    """All masks [6, B, T / 64, 64, 64] from segments [B, T], or [6, 1, 1, 64, 64] where a chunk has only one."""
    segments = jnp.zeros((1, SIZE), jnp.int32) if local_segments is None else local_segments
    packed = packing(segments.reshape(segments.shape[0], -1, SIZE, 1))
    row, column = np.indices((SIZE, SIZE))
    middle = (SIZE - 1) // 2
    reads_by_column, writes_by_column = (x.swapaxes(-1, -2) for x in (packed.reads, packed.writes))
    after, before = ((column <= row) & (column > middle)), ((column > row) & (column <= middle))
    bits = _LEVEL * np.frexp(row ^ column)[1]
    for bit, mask in (
        (_EARLIER, packed.same & (column < row)),
        (_OWN, packed.same & (column <= row)),
        (_READS, packed.reads),
        (_WRITES, packed.writes),
        (_KEEPS, packed.keeps),
    ):
        bits = bits + bit * mask
    of_sums = (
        jnp.where(packed.same, after.astype(int) - before.astype(int), 0),
        reads_by_column & (column <= middle),
        writes_by_column & (column > middle),
        packed.same & (column <= row),
        packed.writes,
    )
    shape = (*segments.shape[:1], segments.shape[1] // SIZE, SIZE, SIZE)
    return jnp.stack([jnp.broadcast_to(x, shape).astype(jnp.bfloat16) for x in (bits, *of_sums)])


class _Chunk:
    """A chunk's scaled vectors and its masks."""

    def __init__(self, tiles: Tiles, inputs: Inputs, is_packed: bool) -> None:
        self._tiles, self._inputs, self._is_packed = tiles, inputs, is_packed
        self._bits = self.mask(BITS)
        of_rows, of_enter, of_leave, log_w = self._sums(FROM_MIDDLE, ENTER, LEAVE)
        out_of_range = _nan_out_of_range(of_enter, of_leave)
        if is_packed:  # the sums for the states are those of the first and of the last segment
            out_of_range = out_of_range + _nan_out_of_range(of_rows, -of_rows)
        self._log_scale = of_rows + out_of_range
        self._log_scale_of_a = self._log_scale - log_w

    def decays(self) -> tuple[Array, Array]:
        """E and L; computed when they are needed, since they would take a quarter of the registers."""
        of_enter, of_leave, _ = self._sums(ENTER, LEAVE)
        out_of_range = _nan_out_of_range(of_enter, of_leave)
        return jnp.exp(of_enter + out_of_range), jnp.exp(of_leave + out_of_range)

    def _sums(self, *numbers: int) -> list[Array]:
        """Sums of log w that masks choose, and log w."""
        (log_w, _), masks = self._tiles.fetch(self._inputs.log_w), [self.mask(number) for number in numbers]
        sums = [self._tiles.product((mask, log_w, "nn"), exact=True) for mask in masks]
        self._tiles.free(*masks, log_w)
        return [*sums, self._tiles.read(log_w)]

    def mask(self, number: int) -> Tile:
        """One of the masks."""
        return self._tiles.fetch(self._inputs.masks, only=(number,))[0]

    def scale_a(self) -> Array:
        return jnp.exp(self._log_scale_of_a)

    def scale_r(self) -> Array:
        return jnp.exp(self._log_scale)

    def scale_keys(self) -> Array:
        return jnp.exp(-self._log_scale)

    def a(self) -> Tile:
        """a~."""
        return scaled(self._tiles, self._inputs.a, self.scale_a())

    def r(self) -> Tile:
        """r~."""
        return scaled(self._tiles, self._inputs.r, self.scale_r())

    def b(self) -> Tile:
        """b~."""
        return scaled(self._tiles, self._inputs.b, self.scale_keys())

    def k(self) -> Tile:
        """k~."""
        return scaled(self._tiles, self._inputs.k, self.scale_keys())

    def earlier(self, scores: Array) -> Array:
        """strict_tril(scores) within segments."""
        return jnp.where(self._has(_EARLIER), scores, 0.0)

    def own(self, scores: Array) -> Array:
        """tril(scores) within segments."""
        return jnp.where(self._has(_OWN), scores, 0.0)

    def reading(self, x: Array) -> Array:
        """Rows that read the state which enters."""
        return jnp.where(self._has(_READS), x, 0.0) if self._is_packed else x

    def writing(self, x: Array) -> Array:
        """Rows that write the state which leaves."""
        return jnp.where(self._has(_WRITES), x, 0.0) if self._is_packed else x

    def keeping(self, x: Array) -> Array:
        """x if the state which leaves has the one that enters in it."""
        return jnp.where(self._has(_KEEPS), x, 0.0) if self._is_packed else x

    def rewritten(self, tile: Tile, select: str) -> Tile:
        """The `reading` or `writing` rows of a tile, in its place or as another."""
        if not self._is_packed:
            return tile
        self._tiles.free(tile)
        return self._tiles.new(getattr(self, select)(self._tiles.read(tile)))

    def _has(self, bit: int) -> Array:
        return (self._tiles.read(self._bits).astype(jnp.int32) & bit) != 0

    def level(self) -> Array:
        """The length in bits of row ^ column."""
        return self._tiles.read(self._bits).astype(jnp.int32) >> (_LEVEL.bit_length() - 1)


def _nan_out_of_range(*sums: Array) -> Array:
    """0, or NaN where decays are out of float32's range."""
    return jnp.where(jnp.minimum(*sums) >= _SMALLEST, 0.0, jnp.nan)


def scaled(tiles: Tiles, stored: Stored, scale: Array) -> Tile:
    """A stored tile times an array, in as many planes as the precision asks for."""
    tile, room = tiles.fetch(stored, room=tiles.parts)
    return tiles.write(room, tiles.read(tile) * scale)


def _inverse(tiles: Tiles, chunk: _Chunk, triangle: Array) -> Tile:
    """(I - M)^{-1} for a strictly triangular M, by doubling the size of inverted diagonal blocks."""
    level = chunk.level  # read each time: registers are scarce
    inverse = tiles.new(jnp.where(level() == 0, 1.0, jnp.where(level() == 1, triangle, 0.0)))  # blocks of two
    joins = tiles.new(jnp.where(level() == 2, triangle, 0.0))
    tiles.share()
    last = SIZE.bit_length() - 1
    for joined in range(2, last + 1):
        product = tiles.new(tiles.product((inverse, joins, "nn")))
        tiles.free(joins)
        tiles.share()
        if joined < last:
            joins = tiles.new(jnp.where(level() == joined + 1, triangle, 0.0))
        larger = tiles.new(tiles.read(inverse) + tiles.product((product, inverse, "nn")))
        tiles.free(product, inverse)
        inverse = larger
        tiles.share()
    return inverse


def factors(tiles: Tiles, inputs: Inputs, factors: Factors, *, is_packed: bool) -> None:
    """F1: a chunk's P, Q, G, Y' and X."""
    product = tiles.product
    chunk = _Chunk(tiles, inputs, is_packed)
    a, b = chunk.a(), chunk.b()
    tiles.share()
    inverse = _inverse(tiles, chunk, chunk.earlier(product((a, b, "nt"))))
    if factors.inverse is not None:
        tiles.send_tile(factors.inverse, inverse)
    k, (v, _) = chunk.k(), tiles.fetch(inputs.v)
    tiles.share()
    scores = tiles.new(chunk.earlier(product((a, k, "nt"))))  # A_k
    tiles.share()
    wanted = tiles.new(product((scores, v, "nn")))
    a = chunk.rewritten(a, "reading")
    tiles.free(scores)
    tiles.share()
    u, w = tiles.new(product((inverse, wanted, "nn"))), tiles.new(product((inverse, a, "nn")))
    tiles.free(wanted, inverse, a)
    tiles.share()
    enter, leave = chunk.decays()
    r = chunk.r()
    tiles.share()
    of_b = tiles.new(chunk.own(product((r, b, "nt"))))  # R_b
    of_k = tiles.new(chunk.own(product((r, k, "nt"))))  # R_k
    tiles.share()
    tiles.send(factors.y, product((of_b, u, "nn"), (of_k, v, "nn")))
    tiles.free(of_k)
    tiles.share()
    tiles.send(factors.reads, (chunk.reading(tiles.read(r)) + product((of_b, w, "nn"))) * enter)
    tiles.free(r, of_b)
    tiles.share()

    entered = tiles.new(tiles.read(w) * enter)
    b, k = chunk.rewritten(b, "writing"), chunk.rewritten(k, "writing")
    tiles.free(w)
    tiles.share()
    removed = product((entered, b, "tn")) * leave
    decay = jnp.where(chunk.level() == 0, enter * leave, 0.0)
    tiles.send(factors.transition, chunk.keeping(decay) + removed)
    tiles.send(factors.contribution, product((u, b, "tn"), (v, k, "tn")) * leave)


class OfStates(NamedTuple):
    """What F2 starts from: S at the start, P and Q of all chunks."""

    initial: Stored
    transition: Stored
    contribution: Stored


class States(NamedTuple):
    """What F2 makes: S at the start of every chunk, and at the end."""

    states: Stored
    final: Stored


def states(tiles: Tiles, inputs: OfStates, results: States) -> None:
    """F2: S through all chunks."""
    transition, contribution = (tiles.ring(x.planes) for x in (inputs.transition, inputs.contribution))
    own = tiles.ring(results.states.planes)

    def begin(turn: Array | int) -> None:
        tiles.fetch_into(transition, turn, inputs.transition, turn)
        tiles.fetch_into(contribution, turn, inputs.contribution, turn)

    def advance(turn: Array, state: Array) -> Array:
        here = tiles.write(own.at(turn), state)
        tiles.send_tile(results.states, here, turn)
        tiles.share()  # and the other tiles are read
        tiles.when(turn + 1 < tiles.chunks, lambda: begin(turn + 1))
        moved = tiles.product((here, tiles.fetched(transition, turn), "nn"))
        return moved + tiles.read(tiles.fetched(contribution, turn))

    initial, _ = tiles.fetch(inputs.initial)
    begin(0)
    final = tiles.loop(advance, tiles.read(initial))
    tiles.free(initial)
    tiles.share()
    tiles.send(results.final, final)


class OfOutputs(NamedTuple):
    """What F3 starts from: G, Y' and S at the start of every chunk."""

    reads: Stored
    y: Stored
    states: Stored


def outputs(tiles: Tiles, inputs: OfOutputs, y: Stored) -> None:
    """F3: a chunk's Y."""
    (reads, _), (own, _), (state, _) = (tiles.fetch(x) for x in inputs)
    tiles.send(y, tiles.product((reads, state, "nt")) + tiles.read(own))


class OfCotangents(NamedTuple):
    """What B2 starts from: dS at the end, P, G and dY of all chunks."""

    dfinal: Stored
    transition: Stored
    reads: Stored
    dy: Stored


class StateCotangents(NamedTuple):
    """What B2 makes: dS at the end of every chunk, and at the start."""

    dstates: Stored
    dinitial: Stored


def cotangents(tiles: Tiles, inputs: OfCotangents, results: StateCotangents) -> None:
    """B2: dS through all chunks, the last one first."""
    transition, reads, dy = (tiles.ring(x.planes) for x in (inputs.transition, inputs.reads, inputs.dy))
    own = tiles.ring(results.dstates.planes)

    def begin(turn: Array | int) -> None:
        chunk = tiles.chunks - 1 - turn
        tiles.fetch_into(transition, turn, inputs.transition, chunk)
        tiles.fetch_into(reads, turn, inputs.reads, chunk)
        tiles.fetch_into(dy, turn, inputs.dy, chunk)

    def retreat(turn: Array, dstate: Array) -> Array:
        here = tiles.write(own.at(turn), dstate)
        tiles.send_tile(results.dstates, here, tiles.chunks - 1 - turn)
        tiles.share()  # and the other tiles are read
        tiles.when(turn + 1 < tiles.chunks, lambda: begin(turn + 1))
        moved = here, tiles.fetched(transition, turn), "nt"
        return tiles.product(moved, (tiles.fetched(dy, turn), tiles.fetched(reads, turn), "tn"))

    dfinal, _ = tiles.fetch(inputs.dfinal)
    begin(0)
    dinitial = tiles.loop(retreat, tiles.read(dfinal))
    tiles.free(dfinal)
    tiles.share()
    tiles.send(results.dinitial, dinitial)


class OfGradients(NamedTuple):
    """What B3 starts from: the sequence, dY, X, S at the start and dS at the end of every chunk."""

    inputs: Inputs
    dy: Stored
    inverse: Stored
    states: Stored
    dstates: Stored


def gradients(tiles: Tiles, inputs: OfGradients, gradients: Gradients, *, is_packed: bool) -> None:
    """B3: a chunk's gradients."""
    product, new = tiles.product, tiles.new
    chunk = _Chunk(tiles, inputs.inputs, is_packed)
    enter, leave = chunk.decays()
    tiles.share()
    state = scaled(tiles, inputs.states, enter)  # S~
    dstate = scaled(tiles, inputs.dstates, leave)  # D
    (inverse, _), (dy, _), (v, _) = (tiles.fetch(x) for x in (inputs.inverse, inputs.dy, inputs.inputs.v))
    a, k = chunk.a(), chunk.k()
    tiles.share()
    scores = new(chunk.earlier(product((a, k, "nt"))))  # A_k
    of_state = chunk.reading(product((a, state, "nt")))
    tiles.free(k)
    tiles.share()
    wanted = new(of_state + product((scores, v, "nn")))
    tiles.free(a)
    tiles.share()
    removed = new(product((inverse, wanted, "nn")))  # SA
    tiles.free(wanted)
    tiles.share()
    own, of_dstate = _own_and_of_dstate(tiles, chunk, chunk.b, dstate)  # R_b
    wanted = new(of_dstate + product((own, dy, "tn")))
    tiles.free(own)
    tiles.share()
    dwanted = new(product((inverse, wanted, "tn")))  # dH
    tiles.free(wanted, inverse)
    tiles.share()
    own, of_dstate = _own_and_of_dstate(tiles, chunk, chunk.k, dstate)  # R_k
    tiles.send(gradients.v, of_dstate + product((scores, dwanted, "tn"), (own, dy, "tn")))
    tiles.free(own, scores)
    tiles.share()

    da, dr = chunk.reading(product((dwanted, state, "nn"))), chunk.reading(product((dy, state, "nn")))
    end = chunk.keeping(tiles.read(dstate) * tiles.read(state))
    tiles.free(state)
    tiles.share()
    of_ab = new(chunk.earlier(product((dwanted, removed, "nt"))))
    of_ak = new(chunk.earlier(product((dwanted, v, "nt"))))
    of_rb = new(chunk.own(product((dy, removed, "nt"))))
    of_rk = new(chunk.own(product((dy, v, "nt"))))
    tiles.free(dwanted, dy)
    tiles.share()
    b, k = chunk.b(), chunk.k()
    tiles.share()
    da = da + product((of_ab, b, "nn"), (of_ak, k, "nn"))
    dr = dr + product((of_rb, b, "nn"), (of_rk, k, "nn"))
    db, dk = chunk.writing(product((removed, dstate, "nn"))), chunk.writing(product((v, dstate, "nn")))
    end = end + db * tiles.read(b) + dk * tiles.read(k)
    tiles.free(removed, dstate, v)
    tiles.share()
    ends = new(end, EXACT)
    a, r = chunk.a(), chunk.r()
    tiles.share()
    from_a = da * tiles.read(a)
    from_rows = from_a + dr * tiles.read(r)
    db = db + product((of_ab, a, "tn"), (of_rb, r, "tn"))
    dk = dk + product((of_ak, a, "tn"), (of_rk, r, "tn"))
    from_rows = from_rows - db * tiles.read(b) - dk * tiles.read(k)
    tiles.free(of_ab, of_ak, of_rb, of_rk, a, r, b, k)
    tiles.share()
    rows, own, writing = new(from_rows, EXACT), chunk.mask(OWN), chunk.mask(WRITING)
    results = gradients.a, gradients.r, gradients.b, gradients.k
    scales = chunk.scale_a(), chunk.scale_r(), chunk.scale_keys(), chunk.scale_keys()
    for result, x, scale in zip(results, (da, dr, db, dk), scales, strict=True):
        tiles.send(result, x * scale)
        tiles.share()
    later = product((own, rows, "tn"), (writing, ends, "nn"), exact=True)  # row t: the sum over s >= t, and the end
    tiles.send(gradients.log_w, later - from_a)


def _own_and_of_dstate(tiles: Tiles, chunk: _Chunk, keys: Callable[[], Tile], dstate: Tile) -> tuple[Tile, Array]:
    """tril(r~ keys^T), and keys D^T."""
    r, key = chunk.r(), keys()
    tiles.share()
    own = chunk.own(tiles.product((r, key, "nt")))
    of_dstate = chunk.writing(tiles.product((key, dstate, "nt")))
    tiles.free(r, key)
    tiles.share()
    tile = tiles.new(own)
    tiles.share()
    return tile, of_dstate
