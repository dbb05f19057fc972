"""Shared by the chunked forms: slices of time, segments within a chunk, and a loop whose backward pass recomputes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from rwkv_kernels.arguments import broadcast_varying_axes, pad_time


def take(x: Array, index: Array | int, size: int, dtype: jnp.dtype) -> Array:
    """Steps [index * size, (index + 1) * size) of [B, T, H, N], as [B, H, C, N]."""
    return lax.dynamic_slice_in_dim(x, index * size, size, axis=1).swapaxes(1, 2).astype(dtype)


def put(x: Array, chunk: Array, index: Array | int) -> Array:
    """Inverse of `take`: writes [B, H, C, N] into [B, T, H, N]."""
    size = chunk.shape[2]
    return lax.dynamic_update_slice_in_dim(x, chunk.swapaxes(1, 2).astype(x.dtype), index * size, axis=1)


def transpose(x: Array) -> Array:
    """Swaps the last two axes."""
    return x.swapaxes(-1, -2)


def with_ndim(x: Array, ndim: int) -> Array:
    """x with leading axes of size 1, so that it has ndim axes."""
    return jnp.expand_dims(x, tuple(range(ndim - x.ndim)))


def masked(mask: Array, x: Array) -> Array:
    """x where the mask is True, else zero; the mask may lack leading axes."""
    return jnp.where(with_ndim(mask, x.ndim), x, 0)


def fitting_size(chunk_size: int, time: int) -> int:
    """Chunk size for a sequence: chunk_size, or the smallest power of two that is at least T if that is less.

    Raises:
      ValueError: chunk_size is not a power of two.
    """
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size = {chunk_size}: must be a power of two")
    return min(chunk_size, 1 << (time - 1).bit_length())


def padded_size(size: int, smallest: int) -> int:
    """The size of an axis whose tiles are powers of two of at least `smallest`; any size where that is 1."""
    return size if smallest == 1 else max(smallest, 1 << (size - 1).bit_length())


def number_within_chunks(segments: Array | None, padding: int, size: int) -> Array | None:
    """Segment numbers relative to the segment of each chunk's incoming state, which is 0.

    Args:
      segments: int32 [B, T] from `arguments.number_segments`, or None.
      padding: steps to append to make T a multiple of size; they continue the last segment.
    """
    if segments is None:
        return None
    segments = pad_time(segments, padding, edge=True)
    before = jnp.pad(segments[:, size - 1 : -1 : size], ((0, 0), (1, 0)))
    return segments - jnp.repeat(before, size, axis=1)


class Packing(NamedTuple):
    """Masks for a chunk with parts of several segments."""

    same: Array
    """[..., C, C]: two steps are in the same segment."""
    reads: Array
    """[..., C, 1]: a step is in the segment of the incoming state."""
    writes: Array
    """[..., C, 1]: a step is in the segment of the outgoing state."""
    keeps: Array
    """[..., 1, 1]: both states are in the same segment."""


def packing(within: Array) -> Packing:
    """Masks of a chunk from its segment numbers [..., C, 1] (`number_within_chunks`)."""
    last = jnp.max(within, axis=-2, keepdims=True)
    return Packing(within == transpose(within), within == 0, within == last, last == 0)


ChunkFunction = Callable[[Array, tuple[Array, ...], tuple[Array, ...], Array | None, Array | None], tuple[Array, Array]]
"""(state [B, H, M, N], over time [B, H, C, ...], per head [1, H, 1, N], segment numbers within the chunk [B, 1, C, 1]
or None, whether a step counts [B or 1, 1, C, 1] or None) -> (next state, y [B, H, C, M])."""


class Recomputing:
    """An operator over whole chunks that stores only each chunk's initial state; the backward pass recomputes the rest.

    Arrays over time are [B, T, H, ...], those per head [H, N]. Constants, without gradients, are segment numbers from
    `number_within_chunks` [B, T] or None, and whether a step counts [B or 1, T] or None.
    """

    def __init__(
        self,
        size: int,
        chunk: ChunkFunction,
        chunk_if_weak: ChunkFunction,
        is_weak: Callable[[tuple[Array, ...], tuple[Array, ...]], Array],
    ) -> None:
        """An operator with two chunk functions.

        Args:
          size: steps in a chunk.
          chunk: valid for any inputs.
          chunk_if_weak: faster, valid for weak decays.
          is_weak: (over time, per head) -> whether all decays are weak, a scalar; called once per sequence.
        """
        self._size = size
        self._chunk = chunk
        self._chunk_if_weak = chunk_if_weak
        self._is_weak = is_weak

    def _constants(self, constants: tuple[Array | None, Array | None], index: Array) -> list[Array | None]:
        return [
            None if x is None else lax.dynamic_slice_in_dim(x, index * self._size, self._size, axis=1)[:, None, :, None]
            for x in constants
        ]

    def _loop(self, inputs: tuple[Any, Any], body: Callable[[ChunkFunction], Any], carry: Any) -> Any:
        """Loops over all chunks with one of the two chunk functions; the loop of the other runs zero times."""
        count = inputs[0][0].shape[1] // self._size
        if_weak = jnp.where(self._is_weak(*inputs), count, 0)
        carry = lax.fori_loop(0, if_weak, body(self._chunk_if_weak), carry)
        return lax.fori_loop(if_weak, count, body(self._chunk), carry)

    def _forward(
        self, with_trace: bool, constants: Any, over_time: Any, per_head: Any, state: Array
    ) -> tuple[tuple[Array, Array], Array | None]:
        batch, time, heads = over_time[0].shape[:3]
        value_dim, dtype = state.shape[-2], state.dtype
        heads_only = tuple(x[None, :, None].astype(dtype) for x in per_head)

        def body(chunk: ChunkFunction) -> Any:
            def one(index: Array, carry: tuple[Array, Array, Array | None]) -> tuple[Array, Array, Array | None]:
                state, y, trace = carry
                parts = tuple(take(x, index, self._size, dtype) for x in over_time)
                following, part = chunk(state, parts, heads_only, *self._constants(constants, index))
                if trace is not None:
                    trace = lax.dynamic_update_index_in_dim(trace, state, index, 0)
                return following, put(y, part, index), trace

            return one

        trace = jnp.zeros((time // self._size, *state.shape), dtype) if with_trace else None
        y = jnp.zeros((batch, time, heads, value_dim), dtype)
        _, y, trace = broadcast_varying_axes(state, y, trace)
        state, y, trace = self._loop((over_time, per_head), body, (state, y, trace))
        return (y, state), trace

    def forward(self, constants: Any, over_time: Any, per_head: Any, state: Array) -> tuple[Array, Array]:
        """y [B, T, H, M] and the final state."""
        return self._forward(False, constants, over_time, per_head, state)[0]

    def forward_with_residuals(
        self, constants: Any, over_time: Any, per_head: Any, state: Array
    ) -> tuple[tuple[Array, Array], Array]:
        """Also the initial state of each chunk, [T / C, B, H, M, N]."""
        return checkpoint_name(self._forward(True, constants, over_time, per_head, state), "wkv")

    def backward(
        self,
        constants: Any,
        inputs: tuple[tuple[Array, ...], tuple[Array, ...], Array],
        trace: Array,
        cotangents: tuple[Array, Array],
    ) -> tuple[tuple[Array, ...], tuple[Array, ...], Array]:
        """JAX's vector-Jacobian product of each chunk, last chunk first."""
        over_time, per_head, state = inputs
        dy, dstate = cotangents
        dtype, last = state.dtype, over_time[0].shape[1] // self._size - 1
        heads_only = tuple(x[None, :, None].astype(dtype) for x in per_head)

        def body(chunk: ChunkFunction) -> Any:
            def one(backwards: Array, carry: tuple[Array, Any, Any]) -> tuple[Array, Any, Any]:
                dstate, dover_time, dper_head = carry
                index = last - backwards
                parts = tuple(take(x, index, self._size, dtype) for x in over_time)
                selected = self._constants(constants, index)
                _, pull_back = jax.vjp(lambda *x: chunk(*x, *selected), trace[index], parts, heads_only)
                dstate, dparts, dheads = pull_back((dstate, take(dy, index, self._size, dtype)))
                dover_time = tuple(put(whole, part, index) for whole, part in zip(dover_time, dparts, strict=True))
                return dstate, dover_time, jax.tree.map(jnp.add, dper_head, dheads)

            return one

        zeros = jax.tree.map(jnp.zeros_like, (over_time, heads_only))
        dstate, dover_time, dper_head = self._loop((over_time, per_head), body, (dstate, *zeros))
        return dover_time, tuple(d[0, :, 0].astype(x.dtype) for d, x in zip(dper_head, per_head, strict=True)), dstate
