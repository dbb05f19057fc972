"""What follows WKV-7 within a head of a model: norm, bonus and gate."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax


def gated_output(
    y: Array, r: Array, k: Array, v: Array, g: Array, r_k: Array, weight: Array, bias: Array, epsilon: float
) -> Array:
    """(norm(y) weight + bias + (r . r_k k) v) g, where the last axis is one head's channels.

    RWKV-7 (arXiv 2503.14456), equations 20 to 22. Shared by all implementations; all arrays have one dtype, float32 or
    float64, and shapes that broadcast.
    """
    centered = y - jnp.mean(y, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
    bonus = jnp.sum(r * r_k * k, axis=-1, keepdims=True) * v
    return (centered * lax.rsqrt(variance + epsilon) * weight + bias + bonus) * g
