"""What chunked forms and kernels share: chunk sizes, a chunk's type, its masks where several segments meet in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from rwkv_kernels.arguments import pad_time

ChunkFunction = Callable[[Array, tuple[Array, ...], tuple[Array, ...], Array | None, Array | None], tuple[Array, Array]]
"""(state [B, H, M, N], over time [B, H, C, ...], per head [1, H, 1, N], local segments [B, 1, C, 1] or None, whether a
step counts [B or 1, 1, C, 1] or None) -> (next state, y [B, H, C, M]); in kernels, the same without B and H."""


def transpose(x: Array) -> Array:
    """Swaps the last two axes."""
    return x.swapaxes(-1, -2)


def with_ndim(x: Array, ndim: int) -> Array:
    """x with leading axes of size 1, so that it has ndim axes."""
    return jnp.expand_dims(x, tuple(range(ndim - x.ndim)))


def masked(mask: Array, x: Array) -> Array:
    """x where the mask is True, else zero; the mask may lack leading axes."""
    return jnp.where(with_ndim(mask, x.ndim), x, 0)


def is_power_of_two(size: int) -> bool:
    """Whether a chunk may have this many steps."""
    return size >= 1 and not size & (size - 1)


def fitting_size(chunk_size: int, time: int) -> int:
    """Chunk size for a sequence: chunk_size, or the smallest power of two that is at least T if that is less.

    Raises:
      ValueError: chunk_size is not a power of two.
    """
    if not is_power_of_two(chunk_size):
        raise ValueError(f"chunk_size = {chunk_size}: must be a power of two")
    return min(chunk_size, 1 << (time - 1).bit_length())


def local_segment_index(segments: Array | None, padding: int, size: int) -> Array | None:
    """Segment indices relative to the segment of each chunk's initial state, which is 0.

    Args:
      segments: int32 [B, T] from `arguments.segment_index`, or None.
      padding: steps to append to make T a multiple of size; they continue the last segment.
    """
    if segments is None:
        return None
    segments = pad_time(segments, padding, edge=True)
    before = jnp.pad(segments[:, size - 1 : -1 : size], ((0, 0), (1, 0)))
    return segments - jnp.repeat(before, size, axis=1)


class Packing(NamedTuple):
    """Masks for a chunk with steps of several segments."""

    same: Array
    """[..., C, C]: two steps are in the same segment."""
    reads: Array
    """[..., C, 1]: a step is in the segment of the initial state."""
    writes: Array
    """[..., C, 1]: a step is in the segment of the final state."""
    keeps: Array
    """[..., 1, 1]: both states are in the same segment."""


def packing(local_segments: Array) -> Packing:
    """Masks of a chunk from its segment indices [..., C, 1] (`local_segment_index`)."""
    last = jnp.max(local_segments, axis=-2, keepdims=True)
    same = local_segments == transpose(local_segments)
    return Packing(same, local_segments == 0, local_segments == last, last == 0)


class SegmentedChunk:
    """Applies a chunk's masks where it may have steps of several segments, and changes nothing where it has one."""

    def __init__(self, local_segments: Array | None) -> None:
        """Takes segment indices [C, 1], or None."""
        self.packing = None if local_segments is None else packing(local_segments)

    def reading(self, x: Array) -> Array:
        """Rows [C, ...] that read the state which enters."""
        return x if self.packing is None else masked(self.packing.reads, x)

    def writing(self, x: Array) -> Array:
        """Rows [C or 1, ...] that write the state which leaves."""
        return x if self.packing is None else masked(self.packing.writes, x)

    def keeping(self, x: Array) -> Array:
        """x if the state which leaves has the one that enters in it."""
        return x if self.packing is None else masked(self.packing.keeps, x)

    def within(self, mask: Array) -> Array:
        """Pairs of steps [C, C] of a mask that are in one segment."""
        return mask if self.packing is None else mask & self.packing.same
