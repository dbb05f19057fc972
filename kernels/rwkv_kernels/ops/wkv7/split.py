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
B3's first three lines need all of N, but columns of V, dY, SA and dH by themselves; the rest needs all of M, but
columns of the others by themselves. So where a state is too large, B3 is two kernels, with programs for some columns.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from rwkv_kernels import split_parts
from rwkv_kernels.chunking import SegmentedChunk
from rwkv_kernels.decay_scaling import cumulative_decay, nan_out_of_range
from rwkv_kernels.matmul import Matmul, operand
from rwkv_kernels.ops.wkv7.chunk import inverse_by_doubling
from rwkv_kernels.split_parts import Ref, sums_over_blocks

Product = Callable[[], Array]
"""Computes an operand or a product, or has it."""


class Inputs(NamedTuple):
    """A sequence, or a chunk of it."""

    r: Ref  # [C, N]
    log_w: Ref  # [C, N]
    k: Ref  # [C, N]
    v: Ref  # [C, M]
    a: Ref  # [C, N]
    b: Ref  # [C, N]
    local_segments: Ref | None
    """[C] or [C, 1]: segment numbers, 0 for that of the chunk's initial state; None if that is the only one."""


class Factors(NamedTuple):
    """What F1 makes of each chunk, all float32."""

    transition: Ref  # P [N, N]
    contribution: Ref  # Q [M, N]
    reads: Ref  # G [C, N]
    y: Ref  # Y' [C, M]
    inverse: Ref  # X [C, C], or None where there is no backward pass


class Gradients(NamedTuple):
    """Of `Inputs`; dV is None in the second half of B3."""

    r: Ref
    log_w: Ref
    k: Ref
    v: Ref
    a: Ref
    b: Ref


class OverKeys(NamedTuple):
    """Products that contract the keys."""

    ak: Product
    rb: Product
    rk: Product
    """a~ k~^T, r~ b~^T and r~ k~^T [C, C]."""
    a_state: Product
    b_dstate: Product
    k_dstate: Product
    """a~ S~^T, b~ D^T and k~ D^T [C, M]."""


class OverValues(NamedTuple):
    """Products that contract the values."""

    ab: Product
    ak: Product
    rb: Product
    rk: Product
    """dH SA^T, dH V^T, dY SA^T and dY V^T [C, C]."""
    a: Product
    r: Product
    b: Product
    k: Product
    """dH S~, dY S~, SA D and V D [C, N]."""
    end: Product
    """The sums over rows of D * S~, [1, N]."""


class OfValues(NamedTuple):
    """What the first half of B3 makes of each chunk: SA and dH in float32, and dV, all [C, M]."""

    removed: Ref
    dwanted: Ref
    dv: Ref


def _load(ref: Ref) -> Array:
    """An array as products take it."""
    return operand(ref[...])


class _Rows(SegmentedChunk):
    """A chunk's values, and which of its rows see which."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        segments = None if inputs.local_segments is None else inputs.local_segments[...]
        if segments is not None and segments.ndim == 1:
            segments = segments[:, None]
        super().__init__(segments)

    def v(self) -> Array:
        """V [C, M]."""
        return _load(self._inputs.v)

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
        size = self._inputs.v.shape[0]
        row = lax.broadcasted_iota(jnp.int32, (size, size), 0)
        column = lax.broadcasted_iota(jnp.int32, (size, size), 1)
        causal = column < row if strict else column <= row
        return self.within(causal)


class _Chunk(_Rows):
    """A chunk's scaled vectors, besides."""

    def __init__(self, matmul: Matmul, inputs: Inputs) -> None:
        super().__init__(inputs)
        sums = cumulative_decay(matmul, inputs.log_w[...].astype(jnp.float32), self.packing)
        out_of_range = nan_out_of_range(sums, self.packing)
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

    def state_in(self, state: Ref) -> Array:
        """S~, of S at the chunk's start [M, N]."""
        return state[...] * self.enter

    def dstate_out(self, dstate: Ref) -> Array:
        """D, of dS at the chunk's end [M, N]."""
        return dstate[...] * self.leave


def factors(matmul: Matmul, inputs: Inputs, factors: Factors) -> None:
    """F1: a chunk's P, Q, G, Y' and X, in the order that takes the fewest registers."""
    nn, nt, tn = matmul.nn, matmul.nt, matmul.tn
    chunk = _Chunk(matmul, inputs)
    inverse = inverse_by_doubling(nn, chunk.earlier(nt(chunk.a(), chunk.b())))
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


states = functools.partial(split_parts.states, lambda matmul, state, transition: matmul.nn(state, transition))
"""F2."""


def outputs(matmul: Matmul, reads: Ref, own: Ref, state: Ref, y: Ref) -> None:
    """F3: a chunk's Y [C, M] from G [C, N], Y' [C, M] and S [M, N]."""
    y[...] = (matmul.nt(reads[...], state[...]) + own[...]).astype(y.dtype)


cotangents = functools.partial(split_parts.cotangents, lambda matmul, dstate, p: matmul.nt(dstate, p))
"""B2."""


def gradients(
    matmul: Matmul,
    inputs: Inputs,
    dy: Ref,
    inverse: Ref,
    state: Ref,
    dstate: Ref,
    gradients: Gradients,
    dinitial: Ref | None = None,
) -> None:
    """B3: a chunk's gradients, from dY [C, M], X [C, C], S at its start and dS at its end [M, N].

    For loops that have no P and G also dS at its start, (D + dH^T a~ + dY^T r~) E.
    """
    chunk = _Chunk(matmul, inputs)
    over_keys = _products_over_keys(matmul, chunk, state, dstate)
    removed, dwanted = _gradients_of_values(matmul, chunk, over_keys, dy, inverse, gradients.v)
    of_y = functools.partial(_load, dy)
    over_values = _products_over_values(matmul, chunk, chunk.v, of_y, lambda: removed, lambda: dwanted, state, dstate)
    _gradients_of_keys(matmul, chunk, over_values, gradients)
    if dinitial is not None:
        read = matmul.tn(chunk.reading(dwanted), chunk.a()) + matmul.tn(chunk.reading(of_y()), chunk.r())
        dinitial[...] = (chunk.keeping(chunk.dstate_out(dstate)) + read) * chunk.enter


def gradients_of_values(
    matmul: Matmul, inputs: Inputs, dy: Ref, inverse: Ref, state: Ref, dstate: Ref, of_values: OfValues
) -> None:
    """The first half of B3, for some columns of V and dY [C, columns] and their rows of S and dS [rows, N]."""
    (size, key_dim), value_dim = inputs.r.shape, dy.shape[1]

    def over_block(keys: Any) -> Iterator[Array]:
        r, log_w, k, a, b = (x.at[:, keys] for x in (inputs.r, inputs.log_w, inputs.k, inputs.a, inputs.b))
        chunk = _Chunk(matmul, Inputs(r, log_w, k, inputs.v, a, b, inputs.local_segments))
        return map(operator.call, _products_over_keys(matmul, chunk, state.at[:, keys], dstate.at[:, keys]))

    shapes = [(size, size)] * 3 + [(size, value_dim)] * 3
    over_keys = OverKeys(*_as_products(sums_over_blocks(key_dim, over_block, shapes)))
    removed, dwanted = _gradients_of_values(matmul, _Rows(inputs), over_keys, dy, inverse, of_values.dv)
    of_values.removed[...] = removed
    of_values.dwanted[...] = dwanted


def gradients_of_keys(
    matmul: Matmul,
    inputs: Inputs,
    dy: Ref,
    removed: Ref,
    dwanted: Ref,
    state: Ref,
    dstate: Ref,
    gradients: Gradients,
) -> None:
    """The second half of B3, for some columns of r, log w, k, a, b [C, columns] and of S and dS [M, columns]."""
    chunk = _Chunk(matmul, inputs)
    (size, key_dim), value_dim = inputs.r.shape, dy.shape[1]

    def over_block(values: Any) -> Iterator[Array]:
        v, of_y, sa, dh = (functools.partial(_load, x.at[:, values]) for x in (inputs.v, dy, removed, dwanted))
        products = _products_over_values(matmul, chunk, v, of_y, sa, dh, state.at[values, :], dstate.at[values, :])
        return map(operator.call, products)

    shapes = [(size, size)] * 4 + [(size, key_dim)] * 4 + [(1, key_dim)]
    over_values = OverValues(*_as_products(sums_over_blocks(value_dim, over_block, shapes)))
    _gradients_of_keys(matmul, chunk, over_values, gradients)


def _as_products(sums: Iterable[Array]) -> list[Product]:
    return [lambda x=x: x for x in sums]


def _products_over_keys(matmul: Matmul, chunk: _Chunk, state: Ref, dstate: Ref) -> OverKeys:
    nt = matmul.nt
    return OverKeys(
        ak=lambda: nt(chunk.a(), chunk.k()),
        rb=lambda: nt(chunk.r(), chunk.b()),
        rk=lambda: nt(chunk.r(), chunk.k()),
        a_state=lambda: nt(chunk.a(), chunk.state_in(state)),
        b_dstate=lambda: nt(chunk.b(), chunk.dstate_out(dstate)),
        k_dstate=lambda: nt(chunk.k(), chunk.dstate_out(dstate)),
    )


def _products_over_values(
    matmul: Matmul, chunk: _Chunk, v: Product, dy: Product, removed: Product, dwanted: Product, state: Ref, dstate: Ref
) -> OverValues:
    nn, nt = matmul.nn, matmul.nt
    return OverValues(
        ab=lambda: nt(dwanted(), removed()),
        ak=lambda: nt(dwanted(), v()),
        rb=lambda: nt(dy(), removed()),
        rk=lambda: nt(dy(), v()),
        a=lambda: nn(dwanted(), chunk.state_in(state)),
        r=lambda: nn(dy(), chunk.state_in(state)),
        b=lambda: nn(removed(), chunk.dstate_out(dstate)),
        k=lambda: nn(v(), chunk.dstate_out(dstate)),
        end=lambda: jnp.sum(chunk.dstate_out(dstate) * chunk.state_in(state), axis=0, keepdims=True),
    )


def _gradients_of_values(
    matmul: Matmul, rows: _Rows, over_keys: OverKeys, dy: Ref, inverse: Ref, dv: Ref
) -> tuple[Array, Array]:
    """Writes dV; returns SA and dH, all [C, M]."""
    nn, tn = matmul.nn, matmul.tn
    scores = rows.earlier(over_keys.ak())  # A_k [C, C]
    wanted = rows.reading(over_keys.a_state())
    removed = nn(inverse[...], wanted + nn(scores, rows.v()))
    dremoved = rows.writing(over_keys.b_dstate())
    dremoved = dremoved + tn(rows.own(over_keys.rb()), _load(dy))
    dwanted = tn(inverse[...], dremoved)
    of_v = rows.writing(over_keys.k_dstate()) + tn(scores, dwanted)
    of_v = of_v + tn(rows.own(over_keys.rk()), _load(dy))
    dv[...] = of_v.astype(dv.dtype)
    return removed, dwanted


def _gradients_of_keys(matmul: Matmul, chunk: _Chunk, over_values: OverValues, gradients: Gradients) -> None:
    """Writes all gradients but dV."""
    nn, tn = matmul.nn, matmul.tn
    dscores_ab = chunk.earlier(over_values.ab())
    dscores_ak = chunk.earlier(over_values.ak())
    da = chunk.reading(over_values.a()) + nn(dscores_ab, chunk.b())
    da = da + nn(dscores_ak, chunk.k())
    gradients.a[...] = (da * chunk.scale_a()).astype(gradients.a.dtype)
    from_a = da * chunk.a()

    dscores_rb = chunk.own(over_values.rb())
    dscores_rk = chunk.own(over_values.rk())
    dr = chunk.reading(over_values.r()) + nn(dscores_rb, chunk.b())
    dr = dr + nn(dscores_rk, chunk.k())
    gradients.r[...] = (dr * chunk.scale_r()).astype(gradients.r.dtype)
    from_rows = from_a + dr * chunk.r()

    end = chunk.keeping(over_values.end())  # [1, N]
    db = chunk.writing(over_values.b())
    end = end + jnp.sum(db * chunk.b(), axis=0, keepdims=True)
    db = db + tn(dscores_ab, chunk.a())
    db = db + tn(dscores_rb, chunk.r())
    gradients.b[...] = (db * chunk.scale_keys()).astype(gradients.b.dtype)
    from_rows = from_rows - db * chunk.b()

    dk = chunk.writing(over_values.k())
    end = end + jnp.sum(dk * chunk.k(), axis=0, keepdims=True)
    dk = dk + tn(dscores_ak, chunk.a())
    dk = dk + tn(dscores_rk, chunk.r())
    gradients.k[...] = (dk * chunk.scale_keys()).astype(gradients.k.dtype)
    from_rows = from_rows - dk * chunk.k()

    mask = jnp.where(chunk.mask(strict=False), 1.0, 0.0)
    later = matmul.exact(mask, from_rows, "tn")  # row t: the sum over s >= t
    gradients.log_w[...] = (later + chunk.writing(end) - from_a).astype(gradients.log_w.dtype)
