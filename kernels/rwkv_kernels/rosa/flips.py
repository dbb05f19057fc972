"""What a loss would be if one bit of a query, a key or a value were another: the surrogate gradient of ROSA.

A lookup has no derivative by the numbers whose signs are its bits. The gradient published with ROSA (RWKV-LM,
251014_rosa_1bit_layer.py) is a difference: with phi(bit) the sum of output times incoming gradient over the sequence,
g = (phi(1) - phi(0)) / (2 max(|x|, tau)). Published for a sequence that is queries, keys and values at once, it looks
every sequence up again for each of its bits (`of_sequence`). For queries, keys and values apart, of which only the
forward is published, the same differences are found without looking up again (`of_lookup`):

Of a lane of `scan.py`, which compares queries with keys of a fixed distance, three numbers are kept: L, its matches up
to now; the one mismatch before them; and P, the matches before that. To flip a bit of a query or a key cuts the match
where it was part of it, and joins L + 1 + P where it mends the mismatch. The longest match after a flip is then the
largest of S numbers again, for all tokens of the call at once by maxima over what comes before and after. That is a
number of operations that grows with S a token, as the lookup's does.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from rwkv_kernels.arguments import broadcast_varying_axes
from rwkv_kernels.rosa.scan import RosaState, empty_state, keys_in_reach, match, with_keys


class Scores(NamedTuple):
    """What outputs add to phi, in any floating dtype, [B, G, T, bits]; phi of an output is the sum over its bits."""

    one: Array
    """Where a bit of the answer is 1."""
    zero: Array
    """Where it is 0."""
    none: Array
    """Where there is no match."""


class Flips(NamedTuple):
    """phi with one bit flipped, less phi: [B, G, T, bits]."""

    queries: Array
    keys: Array
    values: Array


class _Lanes(NamedTuple):
    """Of each lane, [N, S]: matches up to now, those before the mismatch before them, and the mismatch's bits."""

    length: Array
    earlier: Array
    differs: Array


def _phi(symbols: Array, found: Array, scores: Scores) -> Array:
    """phi of answers [N, ...] at one token, whose scores are [N, bits]."""
    total = jnp.zeros((), scores.one.dtype)
    for bit in range(scores.one.shape[1]):
        one, zero, none = (x[:, bit].reshape(-1, *(1,) * (symbols.ndim - 1)) for x in scores)
        is_one = (symbols >> bit) & 1 == 1
        total = total + jnp.where(found, jnp.where(is_one, one, zero), none)
    return total


def _like(fill: int, shape: tuple[int, ...], x: Array) -> Array:
    """A new array that varies over the mesh axes over which x varies."""
    return broadcast_varying_axes(jnp.full(shape, fill, jnp.int32), x)[0]


def _bit_of(differs: Array, bits: int) -> tuple[Array, Array]:
    """The bit in which symbols differ, and whether it is just one."""
    bit = sum((differs >> i > 0).astype(jnp.int32) for i in range(1, bits))
    return jnp.asarray(bit, jnp.int32), (differs > 0) & (differs & (differs - 1) == 0)


def _of_queries(lanes: _Lanes, answers: Array, base: Array, index: Array, time: int, scores: Scores) -> Array:
    """phi less `base` for a flip of each bit of the query `d` tokens back, [N, T, bits].

    Args:
      answers: [N, S], the value behind each lane's key; base: [N], phi at this token, the call's `index`th of T.
    """
    bits = scores.one.shape[1]
    rows, size = lanes.length.shape
    lane, row = jnp.arange(size, dtype=jnp.int32), jnp.arange(rows)[:, None]
    back = jnp.minimum(lanes.length, time - 1)
    # What is left of a match that is cut: the latest lane with as many.
    latest = _like(-1, (rows, time), lanes.length)
    latest = latest.at[row, back].max(jnp.where(lanes.length > 0, lane, -1))
    latest = lax.cummax(latest, axis=1, reverse=True)
    # What is mended.
    bit, is_one_bit = _bit_of(lanes.differs, bits)
    mended = jnp.where(is_one_bit, _key(lanes.length + 1 + lanes.earlier, size), -1)
    best = _like(-1, (rows, time, bits), lanes.length).at[row, back, bit].max(mended)
    distance = jnp.arange(time, dtype=jnp.int32)
    cut = jnp.where((distance > 0) & (latest >= 0), latest, -1)
    winner = jnp.where(best >= 0, best % size, cut[:, :, None])
    symbols = jnp.take_along_axis(answers, jnp.maximum(winner, 0).reshape(rows, -1), axis=1).reshape(winner.shape)
    changed = _phi(symbols, winner >= 0, scores) - base[:, None, None]
    longest = jnp.max(lanes.length, axis=1)
    reaches = (distance <= longest[:, None]) & (distance <= index)
    return jnp.where(reaches[:, :, None], changed, 0)


def _key(length: Array, size: int) -> Array:
    """Length and lane as one number, of which the largest is the longest and latest match."""
    limit = (2**31 - 1) // size - 2
    return jnp.minimum(length, limit) * size + jnp.arange(size, dtype=jnp.int32)


def _of_keys(lanes: _Lanes, answers: Array, base: Array, scores: Scores) -> Array:
    """phi less `base` for a flip of each bit of the key in each lane, [N, S, bits]."""
    bits = scores.one.shape[1]
    rows, size = lanes.length.shape
    lane, row = jnp.arange(size, dtype=jnp.int32), jnp.arange(rows)[:, None]
    matches = lanes.length > 0
    key = jnp.where(matches, _key(lanes.length, size), -1)
    begin = jnp.clip(lane - lanes.length + 1, 0, size - 1)  # the lane that has a match's first key
    outside = _like(-1, (rows, 1), lanes.length)
    before = jnp.concatenate([outside, lax.cummax(key, axis=1)[:, :-1]], axis=1)
    behind = _like(-1, (rows, size), lanes.length).at[row, begin].max(key)
    behind = jnp.concatenate([lax.cummax(behind, axis=1, reverse=True)[:, 1:], outside], axis=1)
    # Of matches with the key in them what comes behind it is left, most of it in the latest of them.
    last = _like(-1, (rows, size), lanes.length).at[row, begin].max(jnp.where(matches, lane, -1))
    last = lax.cummax(last, axis=1)
    cut = jnp.where(last > lane, (last - lane) * size + last, -1)
    kept = jnp.maximum(jnp.maximum(before, behind), cut)
    bit, is_one_bit = _bit_of(lanes.differs, bits)
    place = lane - lanes.length  # of the mismatch
    mended = jnp.where(is_one_bit & (place >= 0), _key(lanes.length + 1 + lanes.earlier, size), -1)
    best = _like(-1, (rows, size, bits), lanes.length).at[row, jnp.maximum(place, 0), bit].max(mended)
    best = jnp.maximum(best, kept[:, :, None])
    symbols = jnp.take_along_axis(answers, (jnp.maximum(best, 0) % size).reshape(rows, -1), axis=1).reshape(best.shape)
    return _phi(symbols, best >= 0, scores) - base[:, None, None]


def of_lookup(
    queries: Array,
    keys: Array,
    values: Array,
    state: RosaState,
    scores: Scores,
    segment_ids: Array | None = None,
    lengths: Array | None = None,
) -> Flips:
    """What each bit of a call's queries, keys and values is worth.

    Args:
      queries, keys, values: symbols [B, G, T] of `bits` bits.
      state: before the call; what it holds is not flipped. A key counts for the S tokens after it, in whose window it
        is, and matches up to 2^31 / S tokens.
      segment_ids, lengths: as in `scan.keys_in_reach`.

    Returns:
      Differences in the scores' dtype; 0 beyond a row's length.
    """
    batch, groups, time = queries.shape
    size, bits = state.keys.shape[2], scores.one.shape[3]
    before, is_read, _ = keys_in_reach(state.count, time, segment_ids, lengths)
    held = (with_keys(state.keys, keys), with_keys(state.values, values))
    found, _ = match(queries, held[0], state, before, is_read)
    scores = Scores(*(jnp.where(is_read[:, None, :, None], x, 0) for x in scores))

    def flat(x: Array) -> Array:
        return x.reshape(batch * groups, *x.shape[2:])

    keys, values, lengths_of = (flat(x).astype(jnp.int32) for x in (*held, state.lengths))
    place, length = flat(found.place), flat(found.length)
    before, is_read = (jnp.repeat(x, groups, axis=0) for x in (before, is_read))
    lane = jnp.arange(size, dtype=jnp.int32)
    symbols = jnp.take_along_axis(values, jnp.minimum(place, values.shape[1] - 1), axis=1)
    scores = Scores(*map(flat, scores))

    def step(carry: tuple[_Lanes, Array, Array], token: tuple[Array, ...]) -> tuple[tuple[_Lanes, Array, Array], None]:
        lanes, of_queries, of_keys = carry
        index, query, before, symbol, length, *scored = token
        own = Scores(*scored)
        own_keys = lax.dynamic_slice_in_dim(keys, index, size, axis=1)
        answers = lax.dynamic_slice_in_dim(values, index + 1, size, axis=1)
        has_key = lane >= size - before[:, None]
        differs = own_keys ^ query[:, None]
        equal = has_key & (differs == 0)
        unequal = has_key & (differs != 0)
        lanes = _Lanes(
            jnp.where(equal, lanes.length + 1, 0),
            jnp.where(unequal, lanes.length, jnp.where(equal, lanes.earlier, 0)),
            jnp.where(unequal, differs, jnp.where(equal, lanes.differs, 0)),
        )
        base = _phi(symbol, length > 0, own)
        back = _of_queries(lanes, answers, base, index, time, own)
        # Of d tokens back, at place T - 1 + index - d of 2 T - 1.
        at = lax.dynamic_slice_in_dim(of_queries, index, time, axis=1)
        of_queries = lax.dynamic_update_slice_in_dim(of_queries, at + back[:, ::-1], index, axis=1)
        at = lax.dynamic_slice_in_dim(of_keys, index, size, axis=1)
        of_keys = lax.dynamic_update_slice_in_dim(of_keys, at + _of_keys(lanes, answers, base, own), index, axis=1)
        return (lanes, of_queries, of_keys), None

    rows = batch * groups
    none = jnp.zeros_like(lengths_of)
    sums = [jnp.zeros((rows, length_of, bits), scores.one.dtype) for length_of in (2 * time - 1, size + time)]
    carry, tokens = broadcast_varying_axes(
        (_Lanes(lengths_of, none, none), *sums),
        (flat(queries).astype(jnp.int32), before, symbols, length, *scores),
    )
    tokens = (jnp.arange(time, dtype=jnp.int32), *(jnp.moveaxis(x, 1, 0) for x in tokens))
    (_, of_queries, of_keys), _ = lax.scan(step, carry, tokens)
    own = (of_queries[:, time - 1 :], of_keys[:, size:], _of_values(symbols, place - size, length > 0, scores))
    return Flips(*(x.reshape(batch, groups, time, bits) for x in own))


def _of_values(symbols: Array, place: Array, found: Array, scores: Scores) -> Array:
    """phi less phi for a flip of each bit of the values, [N, T, bits]; the values of a state have places below 0."""
    rows, time = symbols.shape
    is_one = (symbols[:, :, None] >> jnp.arange(scores.one.shape[2])) & 1 == 1
    change = jnp.where(is_one, scores.zero - scores.one, scores.one - scores.zero)
    change = jnp.where((found & (place >= 0))[:, :, None], change, 0)
    sums, _ = broadcast_varying_axes(jnp.zeros_like(change), change)
    return sums.at[jnp.arange(rows)[:, None], jnp.clip(place, 0, time - 1)].add(change)


def of_sequence(symbols: Array, scores: Scores) -> Array:
    """What each bit of a sequence is worth that is queries, keys and values at once, from its beginning.

    Looks it up again for every bit, which takes T^3 operations a sequence: for short ones.

    Args:
      symbols: [B, G, T].

    Returns:
      phi with one bit flipped, less phi: [B, G, T, bits].
    """
    batch, groups, time = symbols.shape
    bits = scores.one.shape[3]

    def phi(flipped: Array) -> Array:
        symbol, found = look_up_sequence(flipped)
        is_one = (symbol[..., None] >> jnp.arange(bits)) & 1 == 1
        per_bit = jnp.where(found[..., None], jnp.where(is_one, scores.one, scores.zero), scores.none)
        return jnp.sum(per_bit, axis=(2, 3))

    whole = phi(symbols)

    def of_bit(place: Array) -> Array:
        token, bit = place // bits, place % bits
        mask = jnp.where(jnp.arange(time) == token, 1 << bit, 0).astype(symbols.dtype)
        return phi(symbols ^ mask) - whole

    changes = lax.map(of_bit, jnp.arange(time * bits, dtype=jnp.int32))
    return jnp.moveaxis(changes.reshape(time, bits, batch, groups), (0, 1), (2, 3))


def look_up_sequence(symbols: Array) -> tuple[Array, Array]:
    """Answers of a sequence's own symbols [B, G, T], and whether there are any."""
    batch, groups, time = symbols.shape
    state = empty_state(batch, groups, time, str(symbols.dtype))
    keys = with_keys(state.keys, symbols)
    before, is_read, _ = keys_in_reach(state.count, time, None, None)
    found, _ = match(symbols, keys, state, before, is_read)
    place = jnp.minimum(found.place, keys.shape[2] - 1)
    return jnp.take_along_axis(keys, place, axis=2), found.length > 0


def surrogate(x: Array, flipped: Array, tau: float) -> Array:
    """(phi(1) - phi(0)) / (2 max(|x|, tau)) from phi with the other bit, less phi; any shape, rounded once."""
    change = jnp.where(x > 0, -flipped, flipped)
    return (change / (2 * jnp.maximum(jnp.abs(x.astype(flipped.dtype)), tau))).astype(x.dtype)
