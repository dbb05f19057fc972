"""WKV-4 as Pallas kernels for NVIDIA GPUs, through Triton: a program runs one row with a block of channels.

Channels are independent, so each thread keeps a channel's state in registers from the first token to the last. k and v
(and dy) of the next block of tokens are loaded while the current block is computed. y is rounded to v's dtype when it
is written.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from rwkv_kernels.arguments import varying_like
from rwkv_kernels.ops.wkv4 import pallas_driver
from rwkv_kernels.ops.wkv4.chunk import Token, run_tokens, run_tokens_backward
from rwkv_kernels.ops.wkv4.pallas_driver import BLOCK, decode_flags
from rwkv_kernels.ops.wkv4.scan import State

Rows = list[Array]
"""One [channels] vector per token of a block."""


def _load_rows(ref: Any, block: Array | int) -> Rows:
    """Loads a block of tokens from [T, channels] or [T]."""
    return [ref[block * BLOCK + step] for step in range(BLOCK)]


def _store_rows(ref: Any, block: Array | int, rows: Rows) -> None:
    for step, row in enumerate(rows):
        ref[block * BLOCK + step] = row.astype(ref.dtype)


def _tokens(flags_ref: Any | None, block: Array | int, k: Rows, v: Rows) -> list[Token]:
    flags = [None] * BLOCK if flags_ref is None else _load_rows(flags_ref, block)
    return [
        Token(decode_flags(flag), k_.astype(jnp.float32), v_.astype(jnp.float32))
        for flag, k_, v_ in zip(flags, k, v, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class TritonKernels:
    """The two kernels and their launch parameters."""

    channels: int
    """Channels per program, a power of two."""
    num_warps: int
    interpret: bool

    def _call(self, kernel: Any, name: str, batch: int, channels: int, **specs: Any) -> Any:
        return pl.pallas_call(
            kernel,
            grid=(batch, channels // self.channels),
            compiler_params=plt.CompilerParams(num_warps=self.num_warps, num_stages=1),
            interpret=self.interpret,
            name=name,
            **specs,
        )

    def _specs(self, time: int) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
        """Of [C], [B, C], [B, T, C], chunk_states and flags."""
        return (
            pl.BlockSpec((self.channels,), lambda row, block: (block,)),
            pl.BlockSpec((None, self.channels), lambda row, block: (row, block)),
            pl.BlockSpec((None, time, self.channels), lambda row, block: (row, 0, block)),
            pl.BlockSpec((None, time // BLOCK, self.channels), lambda row, block: (row, 0, block)),
            pl.BlockSpec((None, time), lambda row, block: (row, 0)),
        )

    def forward(
        self, log_w: Array, u: Array, k: Array, v: Array, state: State, flags: Array | None, *, with_residuals: bool
    ) -> tuple[Array, State, State | None]:
        """Runs the forward kernel: y, the final state and, if requested, chunk_states."""
        batch, time, channels = k.shape
        of_channels, of_row, of_tokens, of_chunk_states, of_flags = self._specs(time)

        def kernel(log_w_ref: Any, u_ref: Any, k_ref: Any, v_ref: Any, state_refs: Any, flags_ref: Any, *outs: Any):
            y_ref, final_refs, chunk_state_refs = outs
            log_w, u = log_w_ref[:], u_ref[:]

            def body(block: Array, carry: tuple[State, Rows, Rows]) -> tuple[State, Rows, Rows]:
                state, k, v = carry
                following = jnp.minimum(block + 1, time // BLOCK - 1)
                next_k, next_v = _load_rows(k_ref, following), _load_rows(v_ref, following)
                if chunk_state_refs is not None:
                    for ref, part in zip(chunk_state_refs, state, strict=True):
                        ref[block] = part
                state, ys = run_tokens(state, log_w, u, _tokens(flags_ref, block, k, v))
                _store_rows(y_ref, block, ys)
                return state, next_k, next_v

            numerator_ref, denominator_ref, exponent_ref = state_refs
            state = numerator_ref[:], denominator_ref[:], exponent_ref[:]
            carry = state, _load_rows(k_ref, 0), _load_rows(v_ref, 0)
            state, _, _ = lax.fori_loop(0, time // BLOCK, body, carry)
            for ref, part in zip(final_refs, state, strict=True):
                ref[:] = part

        row = varying_like(k, (batch, channels), jnp.float32)
        stored = varying_like(k, (batch, time // BLOCK, channels), jnp.float32)
        return self._call(
            kernel,
            "wkv4_forward",
            batch,
            channels,
            in_specs=[
                of_channels,
                of_channels,
                of_tokens,
                of_tokens,
                (of_row,) * 3,
                None if flags is None else of_flags,
            ],
            out_specs=(of_tokens, (of_row,) * 3, (of_chunk_states,) * 3 if with_residuals else None),
            out_shape=(varying_like(k, v.shape, v.dtype), (row,) * 3, (stored,) * 3 if with_residuals else None),
        )(log_w, u, k, v, state, flags)

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
        """Runs the backward kernel: gradients of the inputs and of the initial state."""
        batch, time, channels = k.shape
        of_channels, of_row, of_tokens, of_chunk_states, of_flags = self._specs(time)

        def kernel(*refs: Any) -> None:
            log_w_ref, u_ref, k_ref, v_ref, flags_ref, chunk_state_refs, dy_ref, dstate_refs, *out_refs = refs
            gradient_refs, earlier_refs = out_refs
            log_w, u = log_w_ref[:], u_ref[:]
            dlog_w_ref, du_ref, dk_ref, dv_ref = gradient_refs

            def load(block: Array | int) -> tuple[list[Array], Rows, Rows, Rows]:
                start = [ref[block] for ref in chunk_state_refs]
                return start, _load_rows(k_ref, block), _load_rows(v_ref, block), _load_rows(dy_ref, block)

            def body(backwards: Array, carry: Any) -> Any:
                later, dlog_w, du, (start, k, v, dy) = carry
                block = time // BLOCK - 1 - backwards
                following = load(jnp.maximum(block - 1, 0))
                numerator, denominator, exponent = start
                cotangents, later = run_tokens_backward(
                    (numerator, denominator, exponent),
                    log_w,
                    u,
                    _tokens(flags_ref, block, k, v),
                    [row.astype(jnp.float32) for row in dy],
                    later,
                )
                _store_rows(dk_ref, block, [x.k for x in cotangents])
                _store_rows(dv_ref, block, [x.v for x in cotangents])
                return (
                    later,
                    sum((x.log_w for x in cotangents), dlog_w),
                    sum((x.u for x in cotangents), du),
                    following,
                )

            zero = jnp.zeros((self.channels,), jnp.float32)
            later = dstate_refs[0][:], dstate_refs[1][:]
            carry = later, zero, zero, load(time // BLOCK - 1)
            later, dlog_w_ref[:], du_ref[:], _ = lax.fori_loop(0, time // BLOCK, body, carry)
            for ref, part in zip(earlier_refs, later, strict=True):
                ref[:] = part

        row = varying_like(k, (batch, channels), jnp.float32)
        return self._call(
            kernel,
            "wkv4_backward",
            batch,
            channels,
            in_specs=[
                of_channels,
                of_channels,
                of_tokens,
                of_tokens,
                None if flags is None else of_flags,
                (of_chunk_states,) * 3,
                of_tokens,
                (of_row,) * 2,
            ],
            out_specs=((of_row, of_row, of_tokens, of_tokens), (of_row,) * 2),
            out_shape=(
                (row, row, varying_like(k, k.shape, k.dtype), varying_like(k, v.shape, v.dtype)),
                (row, row),
            ),
        )(log_w, u, k, v, flags, chunk_states, dy, dstate)


def wkv4_pallas_triton(
    log_w: Array,
    u: Array,
    k: Array,
    v: Array,
    state: State,
    *,
    segments: Array | None = None,
    lengths: Array | None = None,
    channels: int = 64,
    num_warps: int = 2,
    interpret: bool = False,
) -> tuple[Array, State]:
    """WKV-4 over a sequence on an NVIDIA GPU, with a hand-written backward pass; reverse mode only.

    Arguments and results are those of `wkv4_scan`, except that the state is float32 and y has v's dtype.

    Args:
      channels: per program, a power of two.
      num_warps: per program.
      interpret: Pallas' interpret mode, on any platform.
    """
    kernels = TritonKernels(channels, num_warps, interpret)
    return pallas_driver.run(
        kernels, log_w, u, k, v, state, segments, lengths, time_multiple=BLOCK, channel_multiple=channels
    )
