"""WKV-5 and WKV-6 with their chunks apart: five kernels, of which two are element-wise recurrences.

A chunk of C steps reads the state that enters and the keys of its own steps (decayed_attention.py). With the sums of
log w over its steps before and after each, and over all, let

    G = r e^{before}      K = k e^{after}      p = e^{total}  [1, N]      A: decayed scores, r_i (u k_i) on the diagonal

Forward these are

    F1  factors     p      Q = V^T K
    F2  states      S <- S p + Q                 chunk after chunk
    F3  outputs     Y = G S^T + A V

and backwards, from the cotangents dY and that of the final state,

    B2  cotangents  dS <- dS p + dY^T G          last chunk first
    B3  gradients   of a chunk, from S at its start, dS at its end, and A, which F3 leaves

        dG = dY S      dK = V dS      dA = dY V^T      dV = A^T dY + K dS^T
        dr = dG e^{before}      dk = dK e^{after}      dbefore = G dG      dafter = K dK      dtotal = p sum(dS S)

        on the diagonal       dr_i += dA_ii u k_i      dk_i += dA_ii u r_i      du = sum_i dA_ii r_i k_i
        among blocks of s     with q = r D, h = k D, D = e^{sum} and the part of dA between neighbors
                              dq = dA h      dh = dA^T q      dr += dq D      dk += dh D      dsum = q dq + h dh

Each sum of log w has a cotangent of its own, which its mask takes to the steps that it sums, as in the forward pass
without differences of longer sums: what decays to nothing within a step has a gradient of nothing, with all its digits.
With several segments in a chunk, rows of G outside the segment of the state that enters and rows of K outside that of
the state that leaves are zero, p is zero unless these are the same, and A is zero between segments.

The decay of WKV-5 is a row [1, N]: steps that do not count do not decay, and its gradient is the sum over steps.

The vectors are loaded and scaled again at each use: memory near by is cheap, and registers are what kernels run out of.
For the same reason B3 has A from F3, and contracts in loops. Columns of dV need nothing of each other, nor do those of
the other gradients, so where a state is too large, B3 is two kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from rwkv_kernels import split_parts
from rwkv_kernels.chunking import SegmentedChunk, masked
from rwkv_kernels.decayed_attention import (
    SMALLEST_LOG,
    earlier_steps,
    later_steps,
    num_levels,
    pairs_across_border,
    steps_to_border,
    with_bonus,
)
from rwkv_kernels.matmul import Matmul, operand
from rwkv_kernels.split_parts import Ref, sums_over_blocks


class Inputs(NamedTuple):
    """A sequence, or a chunk of it."""

    k: Ref  # [C, N]
    v: Ref  # [C, M]
    log_w: Ref
    """[C, N], or [1, N] if it does not depend on the step."""
    local_segments: Ref | None
    """[C]: segment numbers, 0 for that of the chunk's initial state; None if that is the only one."""
    active: Ref | None
    """[C]: 1 where a step counts, else 0; None if all do, or zeros of the inputs say which do not."""
    r: Ref = None
    """[C, N]; F1 does without, and without u."""
    u: Ref = None  # [1, N]


class Factors(NamedTuple):
    """What F1 makes of each chunk, float32."""

    transition: Ref  # p [1, N]
    contribution: Ref  # Q [M, N]


class Outputs(NamedTuple):
    """What F3 makes of each chunk."""

    y: Ref  # Y [C, M], in v's dtype
    reads: Ref  # G [C, N], and
    scores: Ref  # A [C, C], both float32; None where there is no backward pass


class Gradients(NamedTuple):
    """Of `Inputs`, in their dtypes; float32 rows [1, N] of those that all steps share."""

    k: Ref
    v: Ref
    log_w: Ref
    r: Ref
    u: Ref


class _Chunk(SegmentedChunk):
    """A chunk's vectors and decays."""

    def __init__(self, matmul: Matmul, inputs: Inputs) -> None:
        super().__init__(None if inputs.local_segments is None else inputs.local_segments[...][:, None])
        self._matmul, self._inputs = matmul, inputs
        self.size = inputs.k.shape[0]

    def r(self) -> Array:
        return self._inputs.r[...].astype(jnp.float32)

    def k(self) -> Array:
        return self._inputs.k[...].astype(jnp.float32)

    def v(self) -> Array:
        """V [C, M]."""
        return operand(self._inputs.v[...])

    def u(self) -> Array:
        return self._inputs.u[...].astype(jnp.float32)

    def counting(self, x: Array) -> Array:
        """x [C, ...], and zero where a step does not count."""
        return x if self._inputs.active is None else x * self._inputs.active[...][:, None]

    def log_w(self) -> Array:
        """[C, N]."""
        log_w = jnp.maximum(self._inputs.log_w[...].astype(jnp.float32), SMALLEST_LOG)
        return self.counting(jnp.broadcast_to(log_w, self._inputs.k.shape))

    def decay(self, steps: Array) -> Array:
        """e to sums of log w over steps [C, C]: [C, N]."""
        return jnp.exp(self._matmul.masked_sum(steps, self.log_w()))

    def decay_before(self) -> Array:
        return self.decay(earlier_steps(self.size))

    def decay_after(self) -> Array:
        return self.decay(later_steps(self.size))

    def total(self) -> Array:
        """p [1, N]."""
        return self.keeping(jnp.exp(jnp.sum(self.log_w(), axis=0, keepdims=True)))

    def reads(self) -> Array:
        """G [C, N]."""
        return self.reading(self.r() * self.decay_before())

    def keys(self) -> Array:
        """K [C, N]."""
        return self.writing(self.k() * self.decay_after())

    def pairs(self, level: int) -> Array:
        """[C, C]: the pairs of steps that meet among blocks of 2^level."""
        return self.within(pairs_across_border(self.size, level))

    def decay_to_border(self, level: int) -> Array | float:
        """D [C, N] among blocks of 2^level; within blocks of one step there is nothing to sum."""
        return self.decay(steps_to_border(self.size, level)) if level else 1.0

    def scores(self) -> Array:
        """A [C, C]."""
        scores = jnp.zeros((self.size, self.size), jnp.float32)
        for level in range(num_levels(self.size)):
            decay = self.decay_to_border(level)
            scores = scores + masked(self.pairs(level), self._matmul.nt(self.r() * decay, self.k() * decay))
        return with_bonus(scores, self.r(), self.k(), self.u())


def factors(matmul: Matmul, inputs: Inputs, factors: Factors) -> None:
    """F1: a chunk's p and Q."""
    chunk = _Chunk(matmul, inputs)
    factors.transition[...] = chunk.total()
    factors.contribution[...] = matmul.tn(chunk.v(), chunk.keys())


def _decayed(matmul: Matmul, state: Array, transition: Array) -> Array:
    del matmul
    return state * transition


states = functools.partial(split_parts.states, _decayed)
cotangents = functools.partial(split_parts.cotangents, _decayed)
"""F2 and B2."""


def outputs(matmul: Matmul, inputs: Inputs, state: Ref, outputs: Outputs) -> None:
    """F3: a chunk's Y and G from S at its start [M, N]."""
    chunk = _Chunk(matmul, inputs)
    scores = chunk.scores()
    if outputs.scores is not None:
        outputs.scores[...] = scores
    own = matmul.nn(scores, chunk.v())
    reads = chunk.reads()
    if outputs.reads is not None:
        outputs.reads[...] = reads
    outputs.y[...] = (matmul.nt(reads, state[...]) + own).astype(outputs.y.dtype)


def gradients_of_values(matmul: Matmul, inputs: Inputs, dy: Ref, scores: Ref, dstate: Ref, dv: Ref) -> None:
    """The first half of B3: dV [C, M] of a chunk from dY, A [C, C] and dS at the chunk's end [M, N], or some of M."""

    def over_block(keys: Any) -> Iterator[Array]:
        k, log_w = inputs.k.at[:, keys], inputs.log_w.at[:, keys]
        chunk = _Chunk(matmul, inputs._replace(k=k, log_w=log_w, r=None, u=None))
        yield matmul.nt(chunk.keys(), dstate[:, keys])

    (written,) = sums_over_blocks(inputs.k.shape[1], over_block, (dy.shape,))
    dv[...] = (written + matmul.tn(scores[...], operand(dy[...]))).astype(dv.dtype)


class _OverValues(NamedTuple):
    """Sums over columns of V."""

    scores: Array
    """dY V^T [C, C], of which dA is the lower triangle within segments."""
    reads: Array
    """dY S [C, N]."""
    keys: Array
    """V dS [C, N]."""
    own: Array
    """The diagonal of dA, [C, 1]."""
    transition: Array
    """sum(dS S) [1, N]."""


def gradients_of_keys(matmul: Matmul, inputs: Inputs, dy: Ref, state: Ref, dstate: Ref, gradients: Gradients) -> None:
    """The second half of B3, for all or some columns of r, log w, k and u, and their columns of S and dS [M, N]."""
    nn, tn = matmul.nn, matmul.tn
    chunk = _Chunk(matmul, inputs)
    over_values = _sums_over_values(matmul, inputs, dy, state, dstate)

    def to_steps(steps: Array, dsums: Array) -> Array:
        """The cotangent of log w, from that of its sums over steps [C, C]."""
        return matmul.exact(jnp.where(steps, 1.0, 0.0), dsums, "tn")

    dr = chunk.reading(over_values.reads) * chunk.decay_before()
    dlog_w = to_steps(earlier_steps(chunk.size), dr * chunk.r())
    dk = chunk.writing(over_values.keys) * chunk.decay_after()
    dlog_w = dlog_w + to_steps(later_steps(chunk.size), dk * chunk.k())
    dlog_w = dlog_w + chunk.total() * over_values.transition

    own = over_values.own
    gradients.u[...] = jnp.sum(own * chunk.r() * chunk.k(), axis=0, keepdims=True)
    dr, dk = dr + own * chunk.u() * chunk.k(), dk + own * chunk.u() * chunk.r()

    for level in range(num_levels(chunk.size)):
        decay, pairs = chunk.decay_to_border(level), chunk.pairs(level)
        dqueries = nn(masked(pairs, over_values.scores), chunk.k() * decay) * decay
        dkeys = tn(masked(pairs, over_values.scores), chunk.r() * decay) * decay
        if level:
            between = steps_to_border(chunk.size, level)
            dlog_w = dlog_w + to_steps(between, chunk.r() * dqueries + chunk.k() * dkeys)
        dr, dk = dr + dqueries, dk + dkeys

    gradients.r[...] = dr.astype(gradients.r.dtype)
    gradients.k[...] = dk.astype(gradients.k.dtype)
    dlog_w = chunk.counting(dlog_w)
    if gradients.log_w.shape != dlog_w.shape:  # all steps share it
        dlog_w = jnp.sum(dlog_w, axis=0, keepdims=True)
    gradients.log_w[...] = dlog_w.astype(gradients.log_w.dtype)


def _sums_over_values(matmul: Matmul, inputs: Inputs, dy: Ref, state: Ref, dstate: Ref) -> _OverValues:
    def over_block(values: Any) -> Iterator[Array]:
        def of_y() -> Array:
            return operand(dy[:, values])

        def v() -> Array:
            return operand(inputs.v[:, values])

        yield matmul.nt(of_y(), v())
        yield matmul.nn(of_y(), state[values, :])
        yield matmul.nn(v(), dstate[values, :])
        yield jnp.sum(of_y().astype(jnp.float32) * v().astype(jnp.float32), axis=1, keepdims=True)
        yield jnp.sum(dstate[values, :] * state[values, :], axis=0, keepdims=True)

    size, key_dim = inputs.k.shape
    shapes = (size, size), (size, key_dim), (size, key_dim), (size, 1), (1, key_dim)
    return _OverValues(*sums_over_blocks(inputs.v.shape[1], over_block, shapes))


def gradients(
    matmul: Matmul, inputs: Inputs, dy: Ref, scores: Ref, state: Ref, dstate: Ref, gradients: Gradients
) -> None:
    """B3: a chunk's gradients, from dY [C, M], A [C, C], S at its start and dS at its end [M, N]."""
    gradients_of_values(matmul, inputs, dy, scores, dstate, gradients.v)
    gradients_of_keys(matmul, inputs, dy, state, dstate, gradients)
