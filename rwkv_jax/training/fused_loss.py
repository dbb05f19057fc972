"""Cross-entropy and L2Wrap with the head inside, whose forward pass makes the gradients of hidden vectors and head.

The loss is a sum over tokens, so its gradient by their logits is known together with them, but for one factor: the
cotangent of the sum. A chunk's logits are therefore computed once, and give the loss, its gradient by the logits, and
the two products of that gradient; what waits for the backward pass has the sizes of the hidden vectors and the head.
`loss.sum_losses` computes the logits again in its backward pass, which takes a fourth product with the head and another
pass over the logits (docs/plan.md has the bytes and FLOPs of both).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array, lax

from rwkv_jax.models.layers import wide_dtype
from rwkv_jax.training.loss import flatten_tokens, split_chunks, token_losses
from rwkv_kernels.arguments import broadcast_varying_axes


class FusedLosses(NamedTuple):
    """Sums over the tokens of a batch."""

    minimized: Array
    """Sum of -log p(target) in nats, and of L2Wrap's penalty."""
    nll: Array
    """Sum of -log p(target), to report: it has no gradient."""


class _Setting(NamedTuple):
    l2wrap: float
    chunk: int
    axis_name: str | None


def fused_losses(
    hidden: Array,
    head: Array,
    targets: Array,
    mask: Array | None = None,
    *,
    l2wrap: float,
    chunk: int | None = None,
    axis_name: str | None = None,
) -> FusedLosses:
    """The losses of a batch, summed, with gradients by hidden vectors and head.

    Products have operands of hidden's dtype and sums in at least float32. With bfloat16 that rounds each gradient by a
    logit to 8 bits, without a bias; the head's gradient is summed over all tokens before it takes the head's dtype.

    Args:
      hidden: [B, T, C]; targets: [B, T] integers; mask: [B, T], 1 where a token counts (None: everywhere).
      head: [V, C]; the shard's part of V if a mesh axis splits it.
      l2wrap: strength of the penalty on each token's largest logit.
      chunk: tokens whose logits are in memory at a time; None computes all B * T at once.
      axis_name: the mesh axis over which V is split, within `jax.shard_map`.
    """
    flat, wanted, counted = flatten_tokens(hidden, targets, mask)
    counted = lax.stop_gradient(counted)
    flat, wanted, counted = broadcast_varying_axes(flat, wanted, counted)
    flat, head = broadcast_varying_axes(flat, head)  # over axis_name, too: there the gradient of hidden is summed
    tokens = wanted.shape[0]
    setting = _Setting(l2wrap, tokens if chunk is None else min(chunk, tokens), axis_name)
    losses: Any = _fused(flat, head, wanted, counted, setting)
    return FusedLosses(losses.minimized, lax.stop_gradient(losses.nll))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _fused(hidden: Array, head: Array, targets: Array, counted: Array, setting: _Setting) -> Any:
    """hidden [n, C], head [V, C], targets and counted [n] -> the losses."""
    operand = head.astype(hidden.dtype)

    def add_chunk(total: FusedLosses, part: tuple[Array, ...]) -> tuple[FusedLosses, None]:
        hidden, targets, counted = part
        losses = _losses(_product(hidden, operand, 1, 1), targets, counted, setting)
        return jax.tree.map(jnp.add, total, FusedLosses(*losses)), None

    parts = split_chunks((hidden, targets, counted), setting.chunk)
    return lax.scan(add_chunk, _no_losses(hidden, targets), parts)[0]


def _losses(logits: Array, targets: Array, counted: Array, setting: _Setting) -> tuple[Array, Array]:
    """What is minimized, and the sum of -log p(target)."""
    nll, peak = token_losses(logits, targets, setting.axis_name)
    total = jnp.sum(nll * counted)
    return total + setting.l2wrap * jnp.sum(peak * counted), total


def _product(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    """The product of two matrices over one axis of each, summed and returned in at least float32."""
    return lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=wide_dtype(x.dtype))


def _no_losses(hidden: Array, targets: Array) -> FusedLosses:
    zero, _ = broadcast_varying_axes(jnp.zeros((), wide_dtype(hidden.dtype)), targets)
    return FusedLosses(zero, zero)


def _fused_forward(
    hidden: Array, head: Array, targets: Array, counted: Array, setting: _Setting
) -> tuple[FusedLosses, tuple[Array, ...]]:
    operand = head.astype(hidden.dtype)

    def add_chunk(total: tuple[FusedLosses, Array], part: tuple[Array, ...]) -> tuple[tuple[FusedLosses, Array], Array]:
        losses, dhead = total
        hidden, targets, counted = part
        differentiate = jax.value_and_grad(_losses, has_aux=True)
        (minimized, nll), dlogits = differentiate(_product(hidden, operand, 1, 1), targets, counted, setting)
        dlogits = dlogits.astype(hidden.dtype)
        losses = FusedLosses(losses.minimized + minimized, losses.nll + nll)
        return (losses, dhead + _product(dlogits, hidden, 0, 0)), _product(dlogits, operand, 1, 0)

    dhead, _ = broadcast_varying_axes(jnp.zeros(head.shape, wide_dtype(hidden.dtype)), head)
    parts = split_chunks((hidden, targets, counted), setting.chunk)
    (losses, dhead), dhidden = lax.scan(add_chunk, (_no_losses(hidden, targets), dhead), parts)
    dhidden = rearrange(dhidden, "chunks n C -> (chunks n) C")[: hidden.shape[0]]
    return losses, (hidden, head, dhidden, dhead)


def _fused_backward(
    setting: _Setting, saved: tuple[Array, ...], cotangents: FusedLosses
) -> tuple[Array, Array, None, None]:
    del setting
    hidden, head, dhidden, dhead = saved  # of the first two only the dtypes
    factor, _ = broadcast_varying_axes(cotangents.minimized, dhidden)
    return (factor * dhidden).astype(hidden.dtype), (factor * dhead).astype(head.dtype), None, None


_fused.defvjp(_fused_forward, _fused_backward)
