"""Gradient accumulation over micro-batches, and recurrent states by rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array

from rwkv_kernels.arguments import broadcast_varying_axes


def sum_over_micro_batches(
    step: Callable[[Any, Any], tuple[Any, Any]], params: Any, batch: Any, recurrent_state: Any, steps: int
) -> tuple[Any, Any]:
    """Sums a step's results over micro-batches.

    Args:
      step: (micro-batch, its recurrent state) -> ((scalars, gradients by `params`), the next recurrent state).
      params: nested dict; the gradients have its structure.
      batch: arrays [B, ...]; recurrent_state: arrays [L, B, ...], or None.
      steps: number of micro-batches; divides B.

    Returns:
      Both sums, and the next recurrent state of all rows.
    """
    if steps == 1:
        return step(batch, recurrent_state)
    micro = jax.tree.map(lambda x: rearrange(x, "(steps B) ... -> steps B ...", steps=steps), batch)
    states = jax.tree.map(lambda x: rearrange(x, "L (steps B) ... -> steps L B ...", steps=steps), recurrent_state)

    def add(total: Any, micro: tuple[Any, Any]) -> tuple[Any, Any]:
        terms, next_state = step(*micro)
        return jax.tree.map(jnp.add, total, terms), next_state

    (scalars, _), _ = jax.eval_shape(step, *jax.tree.map(lambda x: x[0], (micro, states)))
    scalars = jax.tree.map(lambda x: broadcast_varying_axes(jnp.zeros(x.shape, x.dtype), batch)[0], scalars)
    gradients = jax.tree.map(lambda x: broadcast_varying_axes(jnp.zeros_like(x), x)[0], params)
    total, states = jax.lax.scan(add, (scalars, gradients), (micro, states))
    return total, jax.tree.map(lambda x: rearrange(x, "steps L B ... -> L (steps B) ..."), states)


def where_rows(condition: Array, x: Any, y: Any) -> Any:
    """x in rows where the condition [B] holds, else y; trees of arrays [L, B, ...]."""
    return jax.tree.map(lambda x, y: jnp.where(condition.reshape(1, -1, *(1,) * (x.ndim - 2)), x, y), x, y)
