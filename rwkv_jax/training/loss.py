"""Cross-entropy and L2Wrap, over all logits at once or in chunks of tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array, lax

from rwkv_jax.models.layers import reduce_from_tensor_parallel, shard_offset
from rwkv_kernels.arguments import broadcast_varying_axes


class TokenLosses(NamedTuple):
    """Sums over the tokens of a batch, which can be added over batches with different masks."""

    nll: Array
    """Sum of -log p(target), in nats."""
    peak: Array
    """Sum of half the square of each token's largest logit, which L2Wrap penalizes."""
    count: Array
    """Number of tokens counted."""


def token_losses(logits: Array, targets: Array, axis_name: str | None = None) -> tuple[Array, Array]:
    """Each token's -log p(target) in nats, and half its largest logit's square.

    Only the first of the largest logits gets the gradient of the second, as in the official L2Wrap.

    Args:
      logits: [n, V], float32 or float64; the shard's part of V if a mesh axis splits it.
      targets: [n] integers in [0, V).
      axis_name: the mesh axis over which V is split; only sums [n] are communicated.

    Returns:
      Two arrays [n], the same on all shards.
    """
    return _token_losses(logits, targets, axis_name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _token_losses(logits: Array, targets: Array, axis_name: str | None) -> Any:
    return _token_losses_forward(logits, targets, axis_name)[0]


def _token_losses_forward(
    logits: Array, targets: Array, axis_name: str | None
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    largest = jnp.max(logits, axis=-1)
    if axis_name is not None:
        largest = lax.pmax(largest, axis_name)
    normalizer = reduce_from_tensor_parallel(jnp.sum(jnp.exp(logits - largest[:, None]), axis=-1), axis_name)
    log_normalizer = largest + jnp.log(normalizer)
    target_logit = logit_of(logits, targets, axis_name)
    return (log_normalizer - target_logit, 0.5 * jnp.square(largest)), (logits, targets, log_normalizer, largest)


def logit_of(logits: Array, targets: Array, axis_name: str | None) -> Array:
    """The logits [n] of the targets [n]; NaN for a target outside the vocabulary."""
    if axis_name is None:
        return jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    vocab_size = logits.shape[-1] * lax.axis_size(axis_name)
    own = targets - shard_offset(logits.shape[-1], axis_name)
    is_here = (own >= 0) & (own < logits.shape[-1])
    found = jnp.take_along_axis(logits, jnp.where(is_here, own, 0)[:, None], axis=-1)[:, 0]
    found = reduce_from_tensor_parallel(jnp.where(is_here, found, 0), axis_name)
    return jnp.where((targets >= 0) & (targets < vocab_size), found, jnp.nan)


def _token_losses_backward(
    axis_name: str | None, saved: tuple[Array, ...], cotangents: tuple[Array, Array]
) -> tuple[Array, None]:
    logits, targets, log_normalizer, largest = saved
    dnll, dpeak = cotangents
    size = logits.shape[-1]
    vocabulary = (jnp.arange(size) + shard_offset(size, axis_name))[None]  # [1, V]
    # Masks rather than scatters: one pass over [n, V], and no serial scatter on a CPU.
    is_target = vocabulary == targets[:, None]
    peak = _first_largest(logits, largest, vocabulary, axis_name)
    is_peak = vocabulary == peak[:, None]
    probability = jnp.exp(logits - log_normalizer[:, None])
    dlogits = dnll[:, None] * (probability - is_target.astype(logits.dtype)) + jnp.where(
        is_peak, (dpeak * largest)[:, None], 0
    )
    return dlogits.astype(logits.dtype), None


def _first_largest(logits: Array, largest: Array, vocabulary: Array, axis_name: str | None) -> Array:
    """Ids [n] of the first of the largest logits; `vocabulary` [1, V] are the ids of this shard's part."""
    # jnp.argmax is a reduction over pairs, which XLA's CPU backend does not vectorize.
    beyond = jnp.iinfo(vocabulary.dtype).max
    peak = jnp.min(jnp.where(logits == largest[:, None], vocabulary, beyond), axis=-1)
    return peak if axis_name is None else lax.pmin(peak, axis_name)


_token_losses.defvjp(_token_losses_forward, _token_losses_backward)


def likeliest(logits: Array, axis_name: str | None = None) -> Array:
    """Ids [n] of the tokens with the largest logits [n, V], the first one of equals; no gradient flows."""
    logits, size = lax.stop_gradient(logits), logits.shape[-1]
    largest = jnp.max(logits, axis=-1)
    if axis_name is not None:
        largest = lax.pmax(largest, axis_name)
    return _first_largest(logits, largest, (jnp.arange(size) + shard_offset(size, axis_name))[None], axis_name)


def sum_losses(
    logits_of: Callable[[Array], Array],
    hidden: Array,
    targets: Array,
    mask: Array | None = None,
    chunk: int | None = None,
    axis_name: str | None = None,
) -> TokenLosses:
    """The losses of a batch, summed.

    Args:
      logits_of: from hidden vectors [n, C] to logits [n, V].
      hidden: [B, T, C]; targets: [B, T] integers; mask: [B, T], 1 where a token counts (None: everywhere).
      chunk: tokens whose logits are in memory at a time, also in the backward pass; None computes all B * T at once.
      axis_name: the mesh axis over which V is split, within `jax.shard_map`.
    """
    flat, wanted, weight = flatten_tokens(hidden, targets, mask)

    def losses(hidden: Array, targets: Array, weight: Array) -> TokenLosses:
        nll, peak = token_losses(logits_of(hidden), targets, axis_name)
        return TokenLosses(jnp.sum(nll * weight), jnp.sum(peak * weight), jnp.sum(weight))

    return sum_over_chunks(losses, (flat, wanted, weight), chunk)


def sum_over_chunks(sums: Callable[..., Any], arrays: tuple[Array, ...], chunk: int | None) -> Any:
    """Sums over tokens, a chunk of them at a time, which the backward pass computes again.

    Args:
      sums: from arrays [n, ...] to a tree of scalars; of the zeros that fill up the last chunk it must be zero.
      arrays: [n, ...]; chunk: None takes all n at once.
    """
    if chunk is None or chunk >= arrays[0].shape[0]:
        return sums(*arrays)
    arrays = split_chunks(arrays, chunk)

    def add_chunk(total: Any, inputs: tuple[Array, ...]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.checkpoint(sums)(*inputs)), None

    shapes = jax.eval_shape(sums, *(x[0] for x in arrays))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    zero, _ = broadcast_varying_axes(zero, arrays)
    return jax.lax.scan(add_chunk, zero, arrays)[0]


def flatten_tokens(hidden: Array, targets: Array, mask: Array | None) -> tuple[Array, Array, Array]:
    """Hidden vectors [n, C], targets [n] and float32 weights [n], 1 where a token counts, of [B, T, ...]."""
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    weight = jnp.ones(wanted.shape, jnp.float32) if mask is None else mask.reshape(-1).astype(jnp.float32)
    return flat, wanted, weight


def split_chunks(arrays: tuple[Array, ...], chunk: int) -> tuple[Array, ...]:
    """Splits arrays [n, ...] into chunks of tokens, [chunks, chunk, ...]; zeros fill up the last one."""

    def split(x: Array) -> Array:
        padded = jnp.pad(x, ((0, -x.shape[0] % chunk), *((0, 0),) * (x.ndim - 1)))
        return rearrange(padded, "(chunks n) ... -> chunks n ...", n=chunk)

    return tuple(map(split, arrays))
