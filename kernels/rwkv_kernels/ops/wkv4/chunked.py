"""WKV-4 token by token like the definition, with a hand-written backward pass that stores one state per chunk.

The backward pass recomputes the states of a chunk from its initial one and then runs chunk.py's equations over its
tokens in reverse.

A loop step does all the work of a token. Work that does not depend on the token before could be done for a whole chunk
at once, but on a CPU that is slower: a token's data fit into the L1 cache, a chunk's do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from rwkv_kernels.arguments import broadcast_varying_axes, is_active, pad_time, segment_starts
from rwkv_kernels.ops.wkv4 import chunk
from rwkv_kernels.ops.wkv4.chunk import Token, TokenFlags
from rwkv_kernels.ops.wkv4.scan import State, freeze_exponent
from rwkv_kernels.xla.linear_rule import with_backward

CHUNK_SIZE = 32
"""Default steps between stored states; chosen by benchmarks/wkv_cpu.py --chunk-sizes."""

UNROLL = 2
"""Tokens per step of XLA's loop: with one, XLA copies the state at each step."""

Inputs = tuple[Array, Array, Array, Array, State]
"""log_w, u, k, v and the initial state, whose exponent is a constant."""


def _at(tree: Any, index: Array, axis: int) -> Any:
    """Arrays at an index of an axis, without that axis."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, axis, keepdims=False), tree)


def _set(tree: Any, parts: Any, index: Array, axis: int) -> Any:
    """Arrays with parts written at an index of an axis."""
    return jax.tree.map(lambda x, part: lax.dynamic_update_index_in_dim(x, part, index, axis), tree, parts)


class _Chunked:
    """Forward and hand-written backward pass over whole chunks."""

    def __init__(self, size: int) -> None:
        self._size = size

    def _loop(self, body: Callable[[Array, Any], Any], carry: Any) -> Any:
        """Runs body(step, carry) for each step of a chunk."""
        return lax.fori_loop(0, self._size, body, carry, unroll=min(UNROLL, self._size))

    def _forward(
        self, flags: TokenFlags, inputs: Inputs, with_residuals: bool
    ) -> tuple[tuple[Array, State], State | None]:
        log_w, u, k, v, state = inputs
        batch, time, channels = k.shape
        dtype = state[0].dtype
        log_w, u = log_w.astype(dtype)[None], u.astype(dtype)[None]  # [1, C]

        def token(index: Array, carry: tuple[State, Array]) -> tuple[State, Array]:
            state, y = carry
            here, k_, v_ = _at((flags, k, v), index, axis=1)
            k_, v_ = k_.astype(dtype), v_.astype(dtype)
            before = chunk.restart(here, state)
            y = _set(y, chunk.read(here, before, u, k_, v_), index, axis=1)
            return chunk.advance(before, log_w, Token(here, k_, v_)), y

        def one_chunk(index: Array, carry: tuple[State, Array, State | None]) -> tuple[State, Array, State | None]:
            state, y, chunk_states = carry
            if chunk_states is not None:
                chunk_states = _set(chunk_states, state, index, axis=1)
            first = index * self._size
            return *self._loop(lambda step, carry: token(first + step, carry), (state, y)), chunk_states

        chunks = time // self._size
        chunk_states = None
        if with_residuals:
            chunk_states = jax.tree.map(lambda x: jnp.zeros((batch, chunks, channels), dtype), state)
        y = jnp.zeros((batch, time, channels), dtype)
        _, y, chunk_states = broadcast_varying_axes(state, y, chunk_states)
        state, y, chunk_states = lax.fori_loop(0, chunks, one_chunk, (state, y, chunk_states))
        return (y, state), chunk_states

    def forward(self, flags: TokenFlags, *inputs: Any) -> tuple[Array, State]:
        """y and the final state."""
        return self._forward(flags, inputs, with_residuals=False)[0]

    def forward_with_residuals(self, flags: TokenFlags, *inputs: Any) -> tuple[tuple[Array, State], State | None]:
        """Also the initial state of each chunk, each part [B, T / size, C]."""
        outputs, chunk_states = self._forward(flags, inputs, with_residuals=True)
        return checkpoint_name((outputs, chunk_states), "wkv")

    def backward(
        self, flags: TokenFlags, inputs: Inputs, chunk_states: State, cotangents: tuple[Array, State]
    ) -> Inputs:
        """Gradients, the last chunk first."""
        log_w_, u_, k, v, (numerator, _, _) = inputs
        dy, (dnumerator, ddenominator, _) = cotangents
        dtype, last = numerator.dtype, k.shape[1] // self._size - 1
        log_w, u = log_w_.astype(dtype)[None], u_.astype(dtype)[None]  # [1, C]

        def token_at(time: Array) -> Token:
            here, k_, v_ = _at((flags, k, v), time, axis=1)
            return Token(here, k_.astype(dtype), v_.astype(dtype))

        def one_chunk(backwards: Array, carry: Any) -> Any:
            befores, *rest = carry
            index = last - backwards
            first = index * self._size

            def forward(step: Array, carry: tuple[State, State]) -> tuple[State, State]:
                state, befores = carry
                token = token_at(first + step)
                before = chunk.restart(token.flags, state)
                return chunk.advance(before, log_w, token), _set(befores, before, step, axis=0)

            def backward(backwards: Array, carry: Any) -> Any:
                later, dlog_w, du, dk, dv = carry
                step = self._size - 1 - backwards
                time = first + step
                before, dy_ = _at(befores, step, axis=0), _at(dy, time, axis=1).astype(dtype)
                cotangents, later = chunk.backward(before, log_w, u, token_at(time), dy_, later)
                dk, dv = _set((dk, dv), (cotangents.k.astype(k.dtype), cotangents.v.astype(v.dtype)), time, axis=1)
                return later, dlog_w + cotangents.log_w, du + cotangents.u, dk, dv

            _, befores = self._loop(forward, (_at(chunk_states, index, axis=1), befores))
            return befores, *self._loop(backward, tuple(rest))

        sums = jnp.zeros_like(numerator)
        befores = (jnp.zeros((self._size, *numerator.shape), dtype),) * 3
        _, befores, *zeros = broadcast_varying_axes(
            numerator, befores, sums, sums, jnp.zeros_like(k), jnp.zeros_like(v)
        )
        carry = befores, (dnumerator, ddenominator), *zeros
        _, (dnumerator, ddenominator), dlog_w, du, dk, dv = lax.fori_loop(0, last + 1, one_chunk, carry)
        return (
            jnp.sum(dlog_w, axis=0).astype(log_w_.dtype),
            jnp.sum(du, axis=0).astype(u_.dtype),
            dk,
            dv,
            (dnumerator, ddenominator, jnp.zeros_like(numerator)),  # the exponent is a constant
        )


def wkv4_chunked(
    log_w: Array,
    u: Array,
    k: Array,
    v: Array,
    state: State,
    *,
    segments: Array | None = None,
    lengths: Array | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Array, State]:
    """WKV-4 over a sequence, with a hand-written backward pass; arguments and results are those of `wkv4_scan`.

    Args:
      chunk_size: steps between stored states, at most.
    """
    batch, time, _ = k.shape
    size = -(-time // -(-time // chunk_size))  # nearly equal chunks need little padding
    padding = -time % size
    restart = active = None
    if segments is not None:
        restart = pad_time(segment_starts(segments), padding)[..., None]
    if lengths is not None or padding:
        counted = jnp.full((batch,), time) if lengths is None else lengths
        active = is_active(counted, time + padding)[..., None]
    form = _Chunked(size)
    padded = (log_w, u, pad_time(k, padding), pad_time(v, padding), freeze_exponent(state))
    run = with_backward(form.forward, form.forward_with_residuals, form.backward)
    y, state = run(TokenFlags(restart, active), *padded)
    return y[:, :time], state
