"""A loop over the chunks of a sequence, whose backward pass recomputes each chunk from its initial state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from rwkv_kernels.arguments import broadcast_varying_axes
from rwkv_kernels.chunking import ChunkFunction


def take(x: Array, index: Array | int, size: int, dtype: jnp.dtype) -> Array:
    """Steps [index * size, (index + 1) * size) of [B, T, H, N], as [B, H, C, N]."""
    return lax.dynamic_slice_in_dim(x, index * size, size, axis=1).swapaxes(1, 2).astype(dtype)


def put(x: Array, chunk: Array, index: Array | int) -> Array:
    """Inverse of `take`: writes [B, H, C, N] into [B, T, H, N]."""
    size = chunk.shape[2]
    return lax.dynamic_update_slice_in_dim(x, chunk.swapaxes(1, 2).astype(x.dtype), index * size, axis=1)


class ChunkedRecurrence:
    """An operator over whole chunks that stores only each chunk's initial state; the backward pass recomputes the rest.

    Arrays over time are [B, T, H, ...], those per head [H, N]. Constants, without gradients, are local segments
    [B, T] or None (`local_segment_index`), and whether a step counts, [B or 1, T] or None.
    """

    def __init__(
        self,
        size: int,
        chunk: ChunkFunction,
        chunk_fast: ChunkFunction,
        decay_is_mild: Callable[[tuple[Array, ...], tuple[Array, ...]], Array],
    ) -> None:
        """An operator with two chunk functions.

        Args:
          size: steps in a chunk.
          chunk: valid for any inputs.
          chunk_fast: faster, valid for mild decays only.
          decay_is_mild: (over time, per head) -> whether all decays are mild, a scalar; called once per sequence.
        """
        self._size = size
        self._chunk = chunk
        self._chunk_fast = chunk_fast
        self._decay_is_mild = decay_is_mild

    def _constants(self, constants: tuple[Array | None, Array | None], index: Array) -> list[Array | None]:
        return [
            None if x is None else lax.dynamic_slice_in_dim(x, index * self._size, self._size, axis=1)[:, None, :, None]
            for x in constants
        ]

    def _loop(self, inputs: tuple[Any, Any], body: Callable[[ChunkFunction], Any], carry: Any) -> Any:
        """Loops over all chunks with one of the two chunk functions; the loop of the other runs zero times."""
        count = inputs[0][0].shape[1] // self._size
        fast_chunks = jnp.where(self._decay_is_mild(*inputs), count, 0)
        carry = lax.fori_loop(0, fast_chunks, body(self._chunk_fast), carry)
        return lax.fori_loop(fast_chunks, count, body(self._chunk), carry)

    def _forward(
        self, with_residuals: bool, constants: Any, over_time: Any, per_head: Any, state: Array
    ) -> tuple[tuple[Array, Array], Array | None]:
        batch, time, heads = over_time[0].shape[:3]
        value_dim, dtype = state.shape[-2], state.dtype
        heads_only = tuple(x[None, :, None].astype(dtype) for x in per_head)

        def body(chunk: ChunkFunction) -> Any:
            def one(index: Array, carry: tuple[Array, Array, Array | None]) -> tuple[Array, Array, Array | None]:
                state, y, chunk_states = carry
                parts = tuple(take(x, index, self._size, dtype) for x in over_time)
                following, part = chunk(state, parts, heads_only, *self._constants(constants, index))
                if chunk_states is not None:
                    chunk_states = lax.dynamic_update_index_in_dim(chunk_states, state, index, 0)
                return following, put(y, part, index), chunk_states

            return one

        chunk_states = jnp.zeros((time // self._size, *state.shape), dtype) if with_residuals else None
        y = jnp.zeros((batch, time, heads, value_dim), dtype)
        _, y, chunk_states = broadcast_varying_axes(state, y, chunk_states)
        state, y, chunk_states = self._loop((over_time, per_head), body, (state, y, chunk_states))
        return (y, state), chunk_states

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
        chunk_states: Array,
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
                _, pull_back = jax.vjp(lambda *x: chunk(*x, *selected), chunk_states[index], parts, heads_only)
                dstate, dparts, dheads = pull_back((dstate, take(dy, index, self._size, dtype)))
                dover_time = tuple(put(whole, part, index) for whole, part in zip(dover_time, dparts, strict=True))
                return dstate, dover_time, jax.tree.map(jnp.add, dper_head, dheads)

            return one

        zeros = jax.tree.map(jnp.zeros_like, (over_time, heads_only))
        dstate, dover_time, dper_head = self._loop((over_time, per_head), body, (dstate, *zeros))
        return dover_time, tuple(d[0, :, 0].astype(x.dtype) for d, x in zip(dper_head, per_head, strict=True)), dstate
