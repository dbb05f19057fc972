"""Choosing the next token from logits."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array

from rwkv_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: temperature first, then top-k, then top-p of what is left."""

    temperature: float = 1.0
    """Divides the logits; 0 always takes the likeliest token."""
    top_p: float = 1.0
    """Keep the likeliest tokens whose probabilities add up to this."""
    top_k: int = 0
    """Keep this many of the likeliest tokens; 0 keeps all."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature = {self.temperature!r}: must be a number that is not negative")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p = {self.top_p!r}: must lie in (0, 1]")
        if self.top_k < 0:
            raise ConfigError(f"top_k = {self.top_k!r}: must not be negative; 0 keeps all tokens")


def sample(logits: Array, key: Array, temperature: Array, top_p: Array, top_k: Array) -> Array:
    """One token for each row of logits [B, V]; the settings are scalars that may be traced.

    Returns:
      int32 [B]. A token as likely as the last one that is kept is kept too.
    """
    greedy = jnp.argmax(logits, axis=-1)
    scaled = logits / jnp.where(temperature > 0, temperature, 1)
    descending = -jnp.sort(-scaled, axis=-1)
    rank = jnp.arange(logits.shape[-1])
    in_top_k = (top_k == 0) | (rank < top_k)
    probability = jax.nn.softmax(jnp.where(in_top_k, descending, -jnp.inf), axis=-1)
    # A token is kept if those before it have not reached top_p yet, so the first always is.
    kept = in_top_k & (jnp.cumsum(probability, axis=-1) - probability < top_p)
    threshold = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
    drawn = jax.random.categorical(key, jnp.where(scaled >= threshold, scaled, -jnp.inf), axis=-1)
    return jnp.where(temperature > 0, drawn, greedy).astype(jnp.int32)
