"""ROSA as a layer: the signs of numbers are bits, bits of neighboring channels a symbol, and answers choose numbers.

    rosa_lookup      symbols of queries, keys and values -> symbols of answers, exact
    rosa_qkv         the same of the signs of q, k and v, with the surrogate gradient (flips.py)
    rosa_sequence    a sequence that is queries, keys and values at once, with the gradient published for it

At token t the lookup takes the longest suffix of the queries up to t that equals keys which end before t, where they
ended last, and answers with the value of the token behind them, which may be t itself (RWKV-LM, RWKV-v8). Shape
letters: B batch, T time, C channels, G = C / bits groups, S keys that a text looks back on.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from numpy.typing import NDArray

from rwkv_kernels.arguments import broadcast_varying_axes, check_lengths, check_segment_ids, segment_index, varying_like
from rwkv_kernels.arguments import segment_starts as starts_of
from rwkv_kernels.rosa.automaton import read_rows
from rwkv_kernels.rosa.flips import Scores, look_up_sequence, of_lookup, of_sequence, surrogate
from rwkv_kernels.rosa.scan import RosaState, empty_state, keys_in_reach, match, next_state, with_keys, without_others

IMPLEMENTATIONS = ("scan", "host")
"""`scan` compares with S keys a token on the device. `host` calls back to the host's automaton, whose cost a token
grows with the logarithm of the text, for calls that begin their texts; others are `scan`'s."""

TAU = 1e-3
"""The surrogate gradient's smallest |x|, the published one."""


class Lookup(NamedTuple):
    """What queries found."""

    symbols: Array
    """[B, G, T], the answers; 0 where there is none."""
    found: Array
    """bool [B, G, T]."""
    state: RosaState
    """The next state."""


def rosa_lookup(
    queries: Array,
    keys: Array,
    values: Array,
    state: RosaState | None = None,
    *,
    window: int,
    segment_ids: Array | None = None,
    lengths: Array | None = None,
    implementation: str | None = None,
) -> Lookup:
    """Looks up symbols.

    Args:
      queries, keys, values: integers [B, G, T] of one dtype, not negative.
      state: from an earlier call; None is the start of a text.
      window: S, the keys before a token that it looks back on. Lookups are those of ROSA up to S + 1 tokens of a text.
      segment_ids: integers [B, T]; a new text begins where the id changes along a row.
      lengths: integers [B] from 0 to T; tokens beyond a row's length are not read, and their answers are undefined.
      implementation: one of `IMPLEMENTATIONS`; None is `scan`.

    Raises:
      ValueError: incompatible shapes or dtypes, an unknown implementation, a window below 1.
    """
    _check(queries, keys, values, state, window, implementation)
    batch, groups, time = queries.shape
    segment_ids = None if segment_ids is None else check_segment_ids(segment_ids, batch, time)
    lengths = check_lengths(lengths, batch, time)
    # A new text compares with no more keys than the call has.
    held = empty_state(batch, groups, min(window, time), str(keys.dtype)) if state is None else state
    before, is_read, count = keys_in_reach(held.count, time, segment_ids, lengths)
    all_keys, all_values = with_keys(held.keys, keys), with_keys(held.values, values)
    all_keys, all_values, queries = broadcast_varying_axes(all_keys, all_values, queries)
    found, lane_lengths = match(queries, all_keys, held, before, is_read)
    after = next_state(held, all_keys, all_values, lane_lengths, count, lengths)
    if segment_ids is not None:
        after = without_others(after)
    if held.keys.shape[2] < window:
        padding = ((0, 0), (0, 0), (window - held.keys.shape[2], 0))
        padded = {name: jnp.pad(getattr(after, name), padding) for name in ("keys", "values", "lengths")}
        after = after._replace(**padded)
    if implementation == "host" and state is None and time <= window:
        symbols, length = _on_host(queries, keys, values, segment_ids, lengths)
    else:
        place = jnp.minimum(found.place, all_values.shape[2] - 1)
        symbols, length = jnp.take_along_axis(all_values, place, axis=2), found.length
    return Lookup(jnp.where(length > 0, symbols, 0), length > 0, after)


def _check(
    queries: Array, keys: Array, values: Array, state: RosaState | None, window: int, implementation: str | None
) -> None:
    for name, x in (("queries", queries), ("keys", keys), ("values", values)):
        if x.ndim != 3 or 0 in x.shape or x.shape != queries.shape or x.dtype != queries.dtype:
            raise ValueError(f"{name}: {x.dtype} of shape {x.shape} must be {queries.dtype} [B, G, T], as the others")
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{name}: dtype {x.dtype} must be an integer one")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation = {implementation!r}: must be one of {', '.join(IMPLEMENTATIONS)}")
    if window < 1:
        raise ValueError(f"window = {window}: must be at least 1")
    if state is not None and state.keys.shape != (*queries.shape[:2], window):
        raise ValueError(f"state: keys of shape {state.keys.shape} must be {(*queries.shape[:2], window)}, [B, G, S]")
    if state is not None and not state.keys.dtype == state.values.dtype == keys.dtype:
        raise ValueError(
            f"state: keys are {state.keys.dtype} and values {state.values.dtype}, and must be {keys.dtype} as the "
            f"call's; give symbols of the state's dtype, or empty_state a dtype"
        )


def _on_host(
    queries: Array, keys: Array, values: Array, segment_ids: Array | None, lengths: Array | None
) -> tuple[Array, Array]:
    """Answers and lengths of matches [B, G, T] by the host's automaton."""
    batch, groups, time = queries.shape
    segments = segment_index(segment_ids, lengths, batch, time)
    starts = None if segments is None else starts_of(segments)

    def read(queries: Any, keys: Any, values: Any, starts: Any) -> tuple[NDArray, NDArray]:
        rows, of_keys, of_values = (np.asarray(x).reshape(-1, time) for x in (queries, keys, values))
        own = None if starts is None else np.repeat(np.asarray(starts), len(rows) // len(np.asarray(starts)), axis=0)
        found = read_rows(rows, of_keys, of_values, own)
        symbols, lengths = (x.reshape(np.shape(queries)) for x in found)
        return symbols.astype(of_values.dtype), lengths

    shape = (batch, groups, time)
    results = (varying_like(queries, shape, values.dtype), varying_like(queries, shape, jnp.int32))
    return jax.pure_callback(read, results, queries, keys, values, starts, vmap_method="sequential")


def _by_group(x: Array, bits: int) -> Array:
    """[B, T, C] -> [B, G, T, bits]."""
    batch, time, width = x.shape
    return jnp.swapaxes(x.reshape(batch, time, width // bits, bits), 1, 2)


def _channels(x: Array) -> Array:
    """[B, G, T, bits] -> [B, T, C]."""
    batch, groups, time, bits = x.shape
    return jnp.swapaxes(x, 1, 2).reshape(batch, time, groups * bits)


def symbols_of(x: Array, bits: int) -> Array:
    """The symbols [B, G, T] of the signs of x [B, T, C]: channel bits g + i is bit i of group g, 1 where x > 0."""
    return jnp.sum(
        _by_group(x > 0, bits).astype(jnp.uint8) << jnp.arange(bits, dtype=jnp.uint8), axis=-1, dtype=jnp.uint8
    )


class Outputs(NamedTuple):
    """What answers choose from, [B, T, C] or what broadcasts to it."""

    one: Array
    """For a bit that is 1."""
    zero: Array
    """For a bit that is 0."""
    none: Array
    """Where there is no answer."""


def _choose(symbols: Array, found: Array, outputs: Outputs, bits: int) -> Array:
    """[B, T, C] of answers [B, G, T]."""
    is_one = (symbols[..., None] >> jnp.arange(bits, dtype=symbols.dtype)) & 1 == 1
    is_one = _channels(is_one)
    is_found = jnp.repeat(jnp.moveaxis(found, 1, 2), bits, axis=2)
    return jnp.where(is_found, jnp.where(is_one, outputs.one, outputs.zero), outputs.none)


def _scores(outputs: Outputs, cotangent: Array, bits: int) -> Scores:
    wide = jnp.promote_types(cotangent.dtype, jnp.float32)
    terms = (cotangent.astype(wide) * x.astype(wide) for x in outputs)
    return Scores(*(_by_group(x, bits) for x in terms))


class _Context(NamedTuple):
    """Integers that a call's gradient needs."""

    symbols: Array
    found: Array
    state: RosaState
    segment_ids: Array | None
    lengths: Array | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _answered(bits: int, tau: float, q: Array, k: Array, v: Array, outputs: Outputs, context: _Context) -> Array:
    del tau, q, k, v
    return _choose(context.symbols, context.found, outputs, bits)


def _answered_forward(bits: int, tau: float, *arguments: Any) -> tuple[Array, Any]:
    return _answered(bits, tau, *arguments), arguments


def _answered_backward(bits: int, tau: float, arguments: Any, cotangent: Array) -> tuple[Any, ...]:
    *inputs, outputs, context = arguments
    q, k, v = (symbols_of(x, bits) for x in inputs)
    scores = _scores(outputs, cotangent, bits)
    flipped = of_lookup(q, k, v, context.state, scores, context.segment_ids, context.lengths)
    of_inputs = (surrogate(x, _channels(own), tau) for x, own in zip(inputs, flipped, strict=True))
    return (*of_inputs, _output_gradients(context.symbols, context.found, outputs, cotangent, bits), None)


def _output_gradients(symbols: Array, found: Array, outputs: Outputs, cotangent: Array, bits: int) -> Outputs:
    return jax.vjp(lambda own: _choose(symbols, found, own, bits), outputs)[1](cotangent)[0]


_answered.defvjp(_answered_forward, _answered_backward)


def rosa_qkv(
    q: Array,
    k: Array,
    v: Array,
    outputs: Outputs,
    state: RosaState | None = None,
    *,
    bits: int,
    window: int,
    segment_ids: Array | None = None,
    lengths: Array | None = None,
    implementation: str | None = None,
    tau: float = TAU,
) -> tuple[Array, RosaState]:
    """A layer of lookups, with its surrogate gradient.

    Args:
      q, k, v: [B, T, C] of a floating dtype; a bit is 1 where its number is above 0.
      outputs: of q's dtype, [B, T, C].
      state, window, segment_ids, lengths, implementation: as in `rosa_lookup`.
      bits: of a symbol, 1 to 8; divides C.
      tau: bounds the gradient where a number is near 0.

    Returns:
      [B, T, C] in q's dtype, and the next state.

    Raises:
      ValueError: as `rosa_lookup`, and for channels that are not a multiple of bits.
    """
    _check_bits(q, bits)
    q, k, v, outputs = broadcast_varying_axes(q, k, v, outputs)
    outputs = Outputs(*(jnp.broadcast_to(x, q.shape).astype(q.dtype) for x in outputs))
    queries, keys, values = (symbols_of(jax.lax.stop_gradient(x), bits) for x in (q, k, v))
    found = rosa_lookup(
        queries,
        keys,
        values,
        state,
        window=window,
        segment_ids=segment_ids,
        lengths=lengths,
        implementation=implementation,
    )
    # Stored for the backward pass under the operators' name, so that it does not look up again.
    symbols, is_found = checkpoint_name((found.symbols, found.found), "wkv")
    batch, time, width = q.shape
    held = empty_state(batch, width // bits, min(window, time)) if state is None else state
    context = _Context(symbols, is_found, held, segment_ids, lengths)
    return _answered(bits, tau, q, k, v, outputs, context), found.state


def _check_bits(x: Array, bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits = {bits}: must lie from 1 to 8")
    if x.ndim != 3 or x.shape[2] % bits:
        raise ValueError(f"x: shape {x.shape} must be [B, T, C], C a multiple of bits = {bits}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _of_sequence(bits: int, tau: float, x: Array, outputs: Outputs) -> Array:
    del tau
    return _choose(*look_up_sequence(symbols_of(x, bits)), outputs, bits)


def _of_sequence_forward(bits: int, tau: float, x: Array, outputs: Outputs) -> tuple[Array, Any]:
    return _of_sequence(bits, tau, x, outputs), (x, outputs)


def _of_sequence_backward(bits: int, tau: float, arguments: Any, cotangent: Array) -> tuple[Any, ...]:
    x, outputs = arguments
    symbols = symbols_of(x, bits)
    flipped = of_sequence(symbols, _scores(outputs, cotangent, bits))
    found = look_up_sequence(symbols)
    return surrogate(x, _channels(flipped), tau), _output_gradients(*found, outputs, cotangent, bits)


_of_sequence.defvjp(_of_sequence_forward, _of_sequence_backward)


def rosa_sequence(x: Array, outputs: Outputs, *, bits: int, tau: float = TAU) -> Array:
    """A layer of lookups of a sequence in itself (RWKV-LM, 251014_rosa_1bit_layer.py), with its published gradient.

    Args:
      x: [B, T, C] of a floating dtype, a whole text a row; outputs: of x's dtype.
      bits, tau: as in `rosa_qkv`.

    Returns:
      [B, T, C] in x's dtype. The gradient takes T^3 operations a sequence.

    Raises:
      ValueError: channels that are not a multiple of bits.
    """
    _check_bits(x, bits)
    return _of_sequence(bits, tau, x, Outputs(*(jnp.broadcast_to(own, x.shape).astype(x.dtype) for own in outputs)))
