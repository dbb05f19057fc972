"""The spike guard: steps whose loss or gradient norm is far above its recent median are skipped."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def empty_window(size: int) -> Array:
    """What is remembered before the first step: float32 [2, W], all NaN."""
    return jnp.full((2, size), jnp.nan, jnp.float32)


def is_spike(recent: Array, loss: Array, norm: Array, factor: float) -> Array:
    """Whether loss or gradient norm exceeds `factor` times its median; False until the window is full.

    Args:
      recent: [2, W], losses and norms of the last steps taken.
    """
    # A median with a NaN in it is NaN, which is not above 0.
    medians = jnp.median(recent, axis=1)
    limits = jnp.where(medians > 0, factor * medians, jnp.inf)  # an objective's loss may be negative
    return jnp.any(jnp.stack([loss, norm]).astype(jnp.float32) > limits)


def remember(recent: Array, loss: Array, norm: Array) -> Array:
    """The window without its oldest step, and with this one."""
    newest = jnp.stack([loss, norm]).astype(jnp.float32)[:, None]
    return jnp.concatenate([recent[:, 1:], newest], axis=1)
