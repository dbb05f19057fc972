"""WKV-7 with its chunks apart: five kernels, of which two are short recurrences and three run all chunks at once.

In the scaling of a chunk's middle row (chunked.py) let E = e^m decay the state on its way in and L = e^{c_C - m} on its
way out, and let S~ = S E. What the steps of a chunk remove is linear in the state that enters,

    SA = W S~^T + U        X = (I - strict_tril(a~ b~^T))^{-1}    W = X a~    U = X strict_tril(a~ k~^T) V

so the chunk maps its state by a matrix P [N, N] and adds Q [M, N], and reads it by rows G [C, N]:

    F1  factors     P = E (I + W^T b~) L    Q = (U^T b~ + V^T k~) L
                    G = (r~ + R_b W) E      Y' = R_b U + R_k V         R_b = tril(r~ b~^T), R_k = tril(r~ k~^T)
    F2  states      S <- S P + Q                                       chunk after chunk
    F3  outputs     Y = G S^T + Y'

and backwards, from the cotangents dY and that of the final state,

    B2  cotangents  dS <- dS P^T + dY^T G                              last chunk first
    B3  gradients   of a chunk, from S at its start and dS at its end; with D = dS L

        SA = X (a~ S~^T + A_k V)                        A_k = strict_tril(a~ k~^T)
        dH = X^T (b~ D^T + R_b^T dY)                    the cotangent of a~ S~^T + A_k V
        dV = k~ D^T + A_k^T dH + R_k^T dY
        dA_b, dA_k = strict_tril(dH [SA, V]^T)          dR_b, dR_k = tril(dY [SA, V]^T)
        da~ = dH S~ + dA_b b~ + dA_k k~                 dr~ = dY S~ + dR_b b~ + dR_k k~
        db~ = SA D + dA_b^T a~ + dR_b^T r~              dk~ = V D + dA_k^T a~ + dR_k^T r~
        dlog w_t = sum_{s >= t} (a~ da~ + r~ dr~ - b~ db~ - k~ dk~)_s - (a~ da~)_t + end
        end = sum over rows of dS * (the next chunk's S) = D * S~ + b~ (SA D) + k~ (V D)

F2 and B2 are one product a chunk, and since rows of S do not meet, blocks of rows are programs of their own. With
several segments in a chunk, rows of a~ and r~ outside the segment of the state that enters read none of it, rows of b~
and k~ outside that of the state that leaves write none of it, and scores between segments are zero.

The vectors are loaded and scaled again at each use: memory near by is cheap, and registers are what kernels run out of.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from rwkv_kernels.chunking import packing
from rwkv_kernels.decay_scaling import cumulative_decay, nan_out_of_range
from rwkv_kernels.matmul import Matmul
from rwkv_kernels.ops.wkv7.chunk import inverse_by_doubling

Ref = Any
"""An array in a device's memory, read and written by index; outside kernels, the array."""


class Inputs(NamedTuple):
    """A sequence, or a chunk of it."""

    r: Ref  # [C, N]
    log_w: Ref  # [C, N]
    k: Ref  # [C, N]
    v: Ref  # [C, M]
    a: Ref  # [C, N]
    b: Ref  # [C, N]
    local_segments: Ref | None
    """[C]: segment numbers, 0 for that of the chunk's initial state; None if that is the only one."""


class Factors(NamedTuple):
    """What F1 makes of each chunk, all float32."""

    transition: Ref  # P [N, N]
    contribution: Ref  # Q [M, N]
    reads: Ref  # G [C, N]
    y: Ref  # Y' [C, M]
    inverse: Ref  # X [C, C], or None where there is no backward pass


class Gradients(NamedTuple):
    """Of `Inputs`."""

    r: Ref
    log_w: Ref
    k: Ref
    v: Ref
    a: Ref
    b: Ref


def _operand(ref: Ref) -> Array:
    """bfloat16 stays, for products in fewer passes; all else becomes float32."""
    return ref[...] if ref.dtype == jnp.bfloat16 else ref[...].astype(jnp.float32)


class _Chunk:
    """A chunk's scaled vectors and its masks."""

    def __init__(self, matmul: Matmul, inputs: Inputs) -> None:
        self._inputs = inputs
        self._packing = None if inputs.local_segments is None else packing(inputs.local_segments[...][:, None])
        sums = cumulative_decay(matmul, inputs.log_w[...].astype(jnp.float32), self._packing)
        out_of_range = nan_out_of_range(sums, self._packing)
        self._from_middle = sums.from_middle + out_of_range
        self.enter = jnp.exp(sums.log_decay_in + out_of_range)
        """E [1, N]."""
        self.leave = jnp.exp(sums.log_decay_out + out_of_range)
        """L [1, N]."""

    def scale_a(self) -> Array:
        return jnp.exp(self._from_middle - self._inputs.log_w[...].astype(jnp.float32))

    def scale_r(self) -> Array:
        return jnp.exp(self._from_middle)

    def scale_keys(self) -> Array:
        return jnp.exp(-self._from_middle)

    def a(self) -> Array:
        """a~ [C, N]."""
        return self._inputs.a[...].astype(jnp.float32) * self.scale_a()

    def r(self) -> Array:
        """r~ [C, N]."""
        return self._inputs.r[...].astype(jnp.float32) * self.scale_r()

    def b(self) -> Array:
        """b~ [C, N]."""
        return self._inputs.b[...].astype(jnp.float32) * self.scale_keys()

    def k(self) -> Array:
        """k~ [C, N]."""
        return self._inputs.k[...].astype(jnp.float32) * self.scale_keys()

    def v(self) -> Array:
        """V [C, M]."""
        return _operand(self._inputs.v)

    def earlier(self, scores: Array) -> Array:
        """strict_tril(scores [C, C]) within segments."""
        return self._causal(scores, strict=True)

    def own(self, scores: Array) -> Array:
        """tril(scores [C, C]) within segments."""
        return self._causal(scores, strict=False)

    def _causal(self, scores: Array, strict: bool) -> Array:
        return jnp.where(self.mask(strict), scores, 0)

    def mask(self, strict: bool) -> Array:
        """[C, C]: column s may be seen from row t."""
        size = self._from_middle.shape[0]
        row = lax.broadcasted_iota(jnp.int32, (size, size), 0)
        column = lax.broadcasted_iota(jnp.int32, (size, size), 1)
        causal = column < row if strict else column <= row
        return causal if self._packing is None else causal & self._packing.same

    def reading(self, x: Array) -> Array:
        """Rows [C, ...] that read the state which enters."""
        return x if self._packing is None else jnp.where(self._packing.reads, x, 0)

    def writing(self, x: Array) -> Array:
        """Rows [C or 1, ...] that write the state which leaves."""
        return x if self._packing is None else jnp.where(self._packing.writes, x, 0)

    def keeping(self, x: Array) -> Array:
        """x if the state which leaves has the one that enters in it."""
        return x if self._packing is None else jnp.where(self._packing.keeps, x, 0)


def factors(matmul: Matmul, inputs: Inputs, factors: Factors) -> None:
    """F1: a chunk's P, Q, G, Y' and X, in the order that takes the fewest registers."""
    nn, nt, tn = matmul.nn, matmul.nt, matmul.tn
    chunk = _Chunk(matmul, inputs)
    inverse = inverse_by_doubling(matmul, chunk.earlier(nt(chunk.a(), chunk.b())))
    if factors.inverse is not None:
        factors.inverse[...] = inverse
    u = nn(inverse, nn(chunk.earlier(nt(chunk.a(), chunk.k())), chunk.v()))  # [C, M]
    w = nn(inverse, chunk.reading(chunk.a()))  # [C, N]
    scores = chunk.own(nt(chunk.r(), chunk.b()))  # R_b [C, C]
    own = nn(scores, u)
    factors.y[...] = own + nn(chunk.own(nt(chunk.r(), chunk.k())), chunk.v())
    factors.reads[...] = (chunk.reading(chunk.r()) + nn(scores, w)) * chunk.enter

    removed = tn(w * chunk.enter, chunk.writing(chunk.b())) * chunk.leave  # [N, N]
    row, column = (lax.broadcasted_iota(jnp.int32, removed.shape, axis) for axis in (0, 1))
    decay = jnp.where(row == column, chunk.enter * chunk.leave, 0)
    factors.transition[...] = chunk.keeping(decay) + removed
    written = tn(u, chunk.writing(chunk.b()))
    factors.contribution[...] = (written + tn(chunk.v(), chunk.writing(chunk.k()))) * chunk.leave


def states(matmul: Matmul, initial: Ref, transition: Ref, contribution: Ref, states: Ref, final: Ref) -> None:
    """F2: some rows of S at the start of every chunk, [T / C, rows, N], and of the final S, [rows, N]."""

    def advance(index: Array, state: Array) -> Array:
        states[index] = state
        return matmul.nn(state, transition[index]) + contribution[index]

    final[...] = lax.fori_loop(0, states.shape[0], advance, initial[...])


def outputs(matmul: Matmul, reads: Ref, own: Ref, state: Ref, y: Ref) -> None:
    """F3: a chunk's Y [C, M] from G [C, N], Y' [C, M] and S [M, N]."""
    y[...] = (matmul.nt(reads[...], state[...]) + own[...]).astype(y.dtype)


def cotangents(matmul: Matmul, dfinal: Ref, transition: Ref, reads: Ref, dy: Ref, dstates: Ref, dinitial: Ref) -> None:
    """B2: some rows of dS at the end of every chunk, [T / C, rows, N], and of dS at the start, [rows, N].

    G [T, N] and dY [T, rows] are those of all chunks.
    """
    count = dstates.shape[0]
    size = reads.shape[0] // count

    def retreat(backwards: Array, dstate: Array) -> Array:
        index = count - 1 - backwards
        dstates[index] = dstate
        here = pl.ds(index * size, size)
        return matmul.nt(dstate, transition[index]) + matmul.tn(_operand(dy.at[here, :]), reads[here, :])

    dinitial[...] = lax.fori_loop(0, count, retreat, dfinal[...])


def gradients(
    matmul: Matmul, inputs: Inputs, dy: Ref, inverse: Ref, state: Ref, dstate: Ref, gradients: Gradients
) -> None:
    """B3: a chunk's gradients, from dY [C, M], X [C, C], S at its start and dS at its end [M, N]."""
    nn, nt, tn = matmul.nn, matmul.nt, matmul.tn
    chunk = _Chunk(matmul, inputs)

    def state_in() -> Array:
        """S~."""
        return state[...] * chunk.enter

    def dstate_out() -> Array:
        """D."""
        return dstate[...] * chunk.leave

    scores = chunk.earlier(nt(chunk.a(), chunk.k()))  # A_k [C, C]
    wanted = chunk.reading(nt(chunk.a(), state_in()))
    removed = nn(inverse[...], wanted + nn(scores, chunk.v()))  # SA [C, M]
    dremoved = chunk.writing(nt(chunk.b(), dstate_out()))
    dremoved = dremoved + tn(chunk.own(nt(chunk.r(), chunk.b())), _operand(dy))
    dwanted = tn(inverse[...], dremoved)  # dH [C, M]
    dv = chunk.writing(nt(chunk.k(), dstate_out())) + tn(scores, dwanted)
    dv = dv + tn(chunk.own(nt(chunk.r(), chunk.k())), _operand(dy))
    gradients.v[...] = dv.astype(gradients.v.dtype)

    dscores_ab = chunk.earlier(nt(dwanted, removed))
    dscores_ak = chunk.earlier(nt(dwanted, chunk.v()))
    da = chunk.reading(nn(dwanted, state_in())) + nn(dscores_ab, chunk.b())
    da = da + nn(dscores_ak, chunk.k())
    gradients.a[...] = (da * chunk.scale_a()).astype(gradients.a.dtype)
    from_a = da * chunk.a()

    dscores_rb = chunk.own(nt(_operand(dy), removed))
    dscores_rk = chunk.own(nt(_operand(dy), chunk.v()))
    dr = chunk.reading(nn(_operand(dy), state_in())) + nn(dscores_rb, chunk.b())
    dr = dr + nn(dscores_rk, chunk.k())
    gradients.r[...] = (dr * chunk.scale_r()).astype(gradients.r.dtype)
    from_rows = from_a + dr * chunk.r()

    end = chunk.keeping(jnp.sum(dstate_out() * state_in(), axis=0, keepdims=True))  # [1, N]
    db = chunk.writing(nn(removed, dstate_out()))
    end = end + jnp.sum(db * chunk.b(), axis=0, keepdims=True)
    db = db + tn(dscores_ab, chunk.a())
    db = db + tn(dscores_rb, chunk.r())
    gradients.b[...] = (db * chunk.scale_keys()).astype(gradients.b.dtype)
    from_rows = from_rows - db * chunk.b()

    dk = chunk.writing(nn(chunk.v(), dstate_out()))
    end = end + jnp.sum(dk * chunk.k(), axis=0, keepdims=True)
    dk = dk + tn(dscores_ak, chunk.a())
    dk = dk + tn(dscores_rk, chunk.r())
    gradients.k[...] = (dk * chunk.scale_keys()).astype(gradients.k.dtype)
    from_rows = from_rows - dk * chunk.k()

    mask = jnp.where(chunk.mask(strict=False), 1.0, 0.0)
    later = matmul.exact(mask, from_rows, "tn")  # row t: the sum over s >= t
    gradients.log_w[...] = (later + chunk.writing(end) - from_a).astype(gradients.log_w.dtype)
