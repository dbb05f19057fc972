"""WKV-4 as Pallas kernels for TPUs, through Mosaic: tiles of channels, the chunks of a row in sequence.

C is folded to [R, 128], so that a token's channels fill registers of 8 x 128 numbers. The state is kept in the outputs
for the final state: their block is the same for all chunks of a row, so it leaves the chip only at the row's end. y is
rounded to v's dtype when it is written.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rwkv_kernels.arguments import varying_like
from rwkv_kernels.ops.wkv4 import pallas_driver
from rwkv_kernels.ops.wkv4.chunk import Token, run_tokens, run_tokens_backward
from rwkv_kernels.ops.wkv4.pallas_driver import BLOCK, decode_flags
from rwkv_kernels.ops.wkv4.scan import State

LANES = 128
"""Lanes of a TPU's registers."""


def _fold(x: Array) -> Array:
    """[..., C] as [..., C / 128, 128]."""
    return x.reshape(*x.shape[:-1], -1, LANES)


def _unfold(x: Array) -> Array:
    return x.reshape(*x.shape[:-2], -1)


def _load(ref: Any, block: Array) -> list[Array]:
    """Loads a block of tokens [tokens, rows, 128] as float32."""
    return [ref[block * BLOCK + step].astype(jnp.float32) for step in range(BLOCK)]


def _store(ref: Any, block: Array, tiles: list[Array]) -> None:
    for step, tile in enumerate(tiles):
        ref[block * BLOCK + step] = tile.astype(ref.dtype)


def _tokens(flags_ref: Any | None, block: Array, k_ref: Any, v_ref: Any) -> list[Token]:
    flags = [None if flags_ref is None else flags_ref[0, block * BLOCK + step] for step in range(BLOCK)]
    tiles = zip(flags, _load(k_ref, block), _load(v_ref, block), strict=True)
    return [Token(decode_flags(flag), k, v) for flag, k, v in tiles]


def _set_all(refs: Any, parts: Any) -> None:
    for ref, part in zip(refs, parts, strict=True):
        ref[...] = part


@dataclasses.dataclass(frozen=True)
class TpuKernels:
    """The two kernels and their block sizes."""

    rows: int
    """Rows of 128 channels per program."""
    tokens: int
    """Tokens per program: a chunk."""
    interpret: bool

    def _call(self, kernel: Any, name: str, k: Array, **specs: Any) -> Any:
        batch, time, rows, _ = k.shape
        return pl.pallas_call(
            kernel,
            grid=(batch, rows // self.rows, time // self.tokens),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            interpret=self.interpret,
            name=name,
            **specs,
        )

    def _specs(self, last: int | None = None) -> tuple[pl.BlockSpec, ...]:
        """Of [R, 128], [B, R, 128], [B, T, R, 128], chunk_states and flags; backwards in time from chunk `last`."""

        def chunk(time: Any) -> Any:
            return time if last is None else last - time

        return (
            pl.BlockSpec((self.rows, LANES), lambda row, block, time: (block, 0)),
            pl.BlockSpec((None, self.rows, LANES), lambda row, block, time: (row, block, 0)),
            pl.BlockSpec((None, self.tokens, self.rows, LANES), lambda row, block, time: (row, chunk(time), block, 0)),
            pl.BlockSpec(
                (None, self.tokens // BLOCK, self.rows, LANES), lambda row, block, time: (row, chunk(time), block, 0)
            ),
            pl.BlockSpec(
                (None, None, 1, self.tokens),
                lambda row, block, time: (row, chunk(time), 0, 0),
                memory_space=pltpu.SMEM,
            ),
        )

    def _fold_flags(self, flags: Array | None) -> Array | None:
        return None if flags is None else flags.reshape(flags.shape[0], -1, 1, self.tokens)

    def forward(
        self, log_w: Array, u: Array, k: Array, v: Array, state: State, flags: Array | None, *, with_residuals: bool
    ) -> tuple[Array, State, State | None]:
        """Runs the forward kernel: y, the final state and, if requested, chunk_states."""
        log_w, u, k, v, *folded = map(_fold, (log_w, u, k, v, *state))
        batch, time, rows, _ = k.shape
        of_channels, of_row, of_tokens, of_chunk_states, of_flags = self._specs()

        def kernel(log_w_ref: Any, u_ref: Any, k_ref: Any, v_ref: Any, state_refs: Any, flags_ref: Any, *outs: Any):
            y_ref, final_refs, chunk_state_refs = outs
            log_w, u = log_w_ref[...], u_ref[...]

            @pl.when(pl.program_id(2) == 0)
            def _() -> None:
                _set_all(final_refs, [ref[...] for ref in state_refs])

            def body(block: Array, state: State) -> State:
                if chunk_state_refs is not None:
                    for ref, part in zip(chunk_state_refs, state, strict=True):
                        ref[block] = part
                state, ys = run_tokens(state, log_w, u, _tokens(flags_ref, block, k_ref, v_ref))
                _store(y_ref, block, ys)
                return state

            state = final_refs[0][...], final_refs[1][...], final_refs[2][...]
            _set_all(final_refs, lax.fori_loop(0, self.tokens // BLOCK, body, state))

        row = varying_like(k, (batch, rows, LANES), jnp.float32)
        stored = varying_like(k, (batch, time // BLOCK, rows, LANES), jnp.float32)
        y, (numerator, denominator, exponent), chunk_states = self._call(
            kernel,
            "wkv4_forward",
            k,
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
        )(log_w, u, k, v, tuple(folded), self._fold_flags(flags))
        return _unfold(y), (_unfold(numerator), _unfold(denominator), _unfold(exponent)), chunk_states

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
        """Runs the backward kernel on folded chunk_states: gradients of the inputs and of the initial state."""
        log_w, u, k, v, dy, *folded = map(_fold, (log_w, u, k, v, dy, *dstate))
        batch, time, rows, _ = k.shape
        of_channels, of_row, of_tokens, of_chunk_states, of_flags = self._specs(time // self.tokens - 1)

        def kernel(
            log_w_ref: Any,
            u_ref: Any,
            k_ref: Any,
            v_ref: Any,
            flags_ref: Any,
            chunk_state_refs: Any,
            dy_ref: Any,
            dstate_refs: Any,
            gradient_refs: Any,
            earlier_refs: Any,
        ):
            log_w, u = log_w_ref[...], u_ref[...]
            dlog_w_ref, du_ref, dk_ref, dv_ref = gradient_refs
            running = (*earlier_refs, dlog_w_ref, du_ref)

            @pl.when(pl.program_id(2) == 0)
            def _() -> None:
                zero = jnp.zeros(log_w.shape, jnp.float32)
                _set_all(running, [*(ref[...] for ref in dstate_refs), zero, zero])

            def body(backwards: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
                dnumerator, ddenominator, dlog_w, du = carry
                block = self.tokens // BLOCK - 1 - backwards
                cotangents, later = run_tokens_backward(
                    (chunk_state_refs[0][block], chunk_state_refs[1][block], chunk_state_refs[2][block]),
                    log_w,
                    u,
                    _tokens(flags_ref, block, k_ref, v_ref),
                    _load(dy_ref, block),
                    (dnumerator, ddenominator),
                )
                _store(dk_ref, block, [x.k for x in cotangents])
                _store(dv_ref, block, [x.v for x in cotangents])
                return *later, sum((x.log_w for x in cotangents), dlog_w), sum((x.u for x in cotangents), du)

            carry = tuple(ref[...] for ref in running)
            _set_all(running, lax.fori_loop(0, self.tokens // BLOCK, body, carry))

        row = varying_like(k, (batch, rows, LANES), jnp.float32)
        gradients, earlier = self._call(
            kernel,
            "wkv4_backward",
            k,
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
        )(log_w, u, k, v, self._fold_flags(flags), chunk_states, dy, tuple(folded))
        dlog_w, du, dk, dv = map(_unfold, gradients)
        return (dlog_w, du, dk, dv), (_unfold(earlier[0]), _unfold(earlier[1]))


def wkv4_pallas_mosaic_tpu(
    log_w: Array,
    u: Array,
    k: Array,
    v: Array,
    state: State,
    *,
    segments: Array | None = None,
    lengths: Array | None = None,
    chunk_size: int = 64,
    interpret: bool = False,
) -> tuple[Array, State]:
    """WKV-4 over a sequence on a TPU, with a hand-written backward pass; reverse mode only.

    Arguments and results are those of `wkv4_scan`, except that the state is float32 and y has v's dtype.

    Args:
      chunk_size: tokens per program, at most; a multiple of 8.
      interpret: Pallas' interpret mode, on any platform.
    """
    k, v = (x.astype(jnp.float32) if x.dtype == jnp.float16 else x for x in (k, v))  # Mosaic loads no float16
    time, channels = k.shape[1:]
    all_rows = -(-channels // LANES)
    rows = all_rows if all_rows <= 16 else 8 if all_rows % 16 else 16
    tokens = min(chunk_size, time + -time % BLOCK)
    kernels = TpuKernels(rows, tokens, interpret)
    return pallas_driver.run(
        kernels, log_w, u, k, v, state, segments, lengths, time_multiple=tokens, channel_multiple=rows * LANES
    )
