"""Digests of arrays: 64 bits that depend on shape, dtype and every bit, but not on how an array is sharded.

An array is read where it is, on its devices, so that a checkpoint of any size is digested without a copy to a host, by
all processes of a run together. Each word of an array, mixed with its position, adds a term to two sums modulo 2^32.
For a given position mixing is a bijection: a single changed word always changes both sums, more than one all but with a
chance of 2^-64. (The mixing is the finalizer of MurmurHash3, by Austin Appleby, which is in the public domain.)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

_MULTIPLIERS = ((0x9E3779B1, 0x85EBCA77), (0xC2B2AE3D, 0x27D4EB2F))
"""Of words and positions, for each sum; odd, so that multiplying modulo 2^32 is a bijection."""


def digest_tree(tree: Any) -> dict[str, str]:
    """The digest of each array, by path: "params.head.weight" -> "bfloat16[512,64] 0123456789abcdef".

    Args:
      tree: arrays; on a mesh, all processes call this together.
    """
    digests = {}
    for path, x in paths_of(tree).items():
        # One after the other: programs with collectives that run at the same time may wait for each other for ever.
        first, second = jax.device_get(_sums(_on_device(x)))
        digests[path] = f"{x.dtype}{list(x.shape)} {int(first):08x}{int(second):08x}".replace(", ", ",")
    return digests


def paths_of(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path, such as "opt_state.0.mu.head.weight"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _on_device(x: Array) -> Array:
    """The array itself, or a copy of one that waits in host memory."""
    if x.sharding.memory_kind == "pinned_host":
        return jax.device_put(x, x.sharding.with_memory_kind("device"))
    return x


@jax.jit
def _sums(x: Array) -> tuple[Array, Array]:
    """Two sums over the words of an array, uint32 scalars."""
    words = _words(x)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        position = position * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    first, second = (
        jnp.sum(_mix(words * jnp.uint32(of_words) + position * jnp.uint32(of_positions)), dtype=jnp.uint32)
        for of_words, of_positions in _MULTIPLIERS
    )
    return first, second


def _words(x: Array) -> Array:
    """The bits of an array as uint32; numbers of 8 bytes are two words."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    width = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return lax.bitcast_convert_type(x, width).astype(jnp.uint32)


def _mix(h: Array) -> Array:
    for shift, multiplier in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> shift)) * jnp.uint32(multiplier)
    return h ^ (h >> 16)
