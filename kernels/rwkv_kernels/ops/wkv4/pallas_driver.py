"""Shared by the WKV-4 kernels: flags of tokens as integers, padding to whole blocks, and the custom backward pass.

A kernel loops over blocks of tokens with the state in registers or scratch memory. The forward kernel stores the
initial state of each block; the backward kernel recomputes the states within a block (chunk.run_tokens_backward).
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from rwkv_kernels.arguments import is_active, pad_time, segment_starts
from rwkv_kernels.ops.wkv4.chunk import TokenFlags
from rwkv_kernels.ops.wkv4.scan import State, freeze_exponent

BLOCK = 8
"""Tokens between stored states; kernels unroll over them."""

RESTART, INACTIVE = 1, 2
"""Flags of tokens as integers; 0 is a token without any."""


def encode_flags(segments: Array | None, lengths: Array | None, batch: int, time: int, padding: int) -> Array | None:
    """Flags int32 [B, T + padding], or None if no token has any."""
    if segments is None and lengths is None and not padding:
        return None
    flags = jnp.zeros((batch, time), jnp.int32) if segments is None else segment_starts(segments).astype(jnp.int32)
    counted = jnp.full((batch,), time) if lengths is None else lengths
    return jnp.where(is_active(counted, time + padding), pad_time(flags, padding), INACTIVE)


def decode_flags(flag: Array | None) -> TokenFlags:
    """A token's flags from their integer."""
    return TokenFlags(None, None) if flag is None else TokenFlags(flag == RESTART, flag != INACTIVE)


class Kernels(Protocol):
    """A backend's two kernels, over whole blocks of tokens and of channels; all float32 but k, v, y, dy, dk and dv.

    log_w, u: [C]; k, v, y, dy: [B, T, C]; flags: int32 [B, T] or None; states: each part [B, C];
    chunk_states, the initial states of all blocks of tokens, are in a layout of the backend's choice.
    """

    def forward(
        self, log_w: Array, u: Array, k: Array, v: Array, state: State, flags: Array | None, *, with_residuals: bool
    ) -> tuple[Array, State, State | None]:
        """y in v's dtype, the final state, and chunk_states if asked for."""
        ...

    def backward(
        self,
        log_w: Array,
        u: Array,
        k: Array,
        v: Array,
        flags: Array | None,
        chunk_states: State,
        dy: Array,
        dstate: tuple[Array, Array],
    ) -> tuple[tuple[Array, Array, Array, Array], tuple[Array, Array]]:
        """(dlog_w [B, C], du [B, C], dk, dv) and the cotangents of the initial numerator and denominator."""
        ...


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(
    kernels: Kernels, log_w: Array, u: Array, k: Array, v: Array, state: State, flags: Array | None
) -> tuple[Array, State]:
    y, state, _ = kernels.forward(log_w, u, k, v, state, flags, with_residuals=False)
    return y, state


def _run_forward(kernels: Kernels, *inputs: Any) -> tuple[tuple[Array, State], Any]:
    log_w, u, k, v, state, flags = inputs
    y, final, chunk_states = kernels.forward(log_w, u, k, v, state, flags, with_residuals=True)
    y = checkpoint_name(y, "wkv")
    final, chunk_states = jax.tree.map(lambda x: checkpoint_name(x, "wkv"), (final, chunk_states))
    return (y, final), (log_w, u, k, v, flags, chunk_states)


def _run_backward(kernels: Kernels, saved: Any, cotangents: tuple[Array, State]) -> tuple:
    log_w, u, k, v, flags, chunk_states = saved
    dy, (dnumerator, ddenominator, _) = cotangents
    (dlog_w, du, dk, dv), (dnumerator, ddenominator) = kernels.backward(
        log_w, u, k, v, flags, chunk_states, dy, (dnumerator, ddenominator)
    )
    dstate = dnumerator, ddenominator, jnp.zeros_like(dnumerator)  # the exponent is a constant
    return jnp.sum(dlog_w, axis=0), jnp.sum(du, axis=0), dk, dv, dstate, None


_run.defvjp(_run_forward, _run_backward)


def run(
    kernels: Kernels,
    log_w: Array,
    u: Array,
    k: Array,
    v: Array,
    state: State,
    segments: Array | None,
    lengths: Array | None,
    *,
    time_multiple: int,
    channel_multiple: int,
) -> tuple[Array, State]:
    """Runs the operator by kernels, padding T and C to multiples of their blocks; `kernels` must compare by value."""
    batch, time, channels = k.shape
    later, wider = -time % time_multiple, -channels % channel_multiple

    def widen(x: Array) -> Array:
        return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, wider),)) if wider else x

    flags = encode_flags(segments, lengths, batch, time, later)
    numerator, denominator, exponent = freeze_exponent(state)
    # Padded channels have an empty state and v = 0, with weight e^0.
    outputs: Any = _run(
        kernels,
        widen(log_w.astype(jnp.float32)),
        widen(u.astype(jnp.float32)),
        widen(pad_time(k, later)),
        widen(pad_time(v, later)),
        (widen(numerator), widen(denominator), widen(exponent)),
        flags,
    )
    y, (numerator, denominator, exponent) = outputs
    return y[:, :time, :channels], (numerator[:, :channels], denominator[:, :channels], exponent[:, :channels])
