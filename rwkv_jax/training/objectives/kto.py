"""Kahneman-Tversky optimization (arXiv 2402.01306): replies that are each desirable or not, without pairs.

With the log-ratio h(y) = log p(y | x) - log p_reference(y | x):

    z = max(0, mean over the batch of h of replies to other prompts)         an estimate of KL(p || p_reference)
    desirable     w_d (1 - sigmoid(b (h(y) - z)))
    undesirable   w_u (1 - sigmoid(b (z - h(y))))

No gradient flows through z.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from rwkv_jax.training.objectives.reply import ReplyLogP


def kto_losses(
    reply: ReplyLogP,
    desirable: Array,
    kl: Array,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Array:
    """The loss of each reply, [B].

    Args:
      desirable: bool [B], the labels.
      kl: z, a scalar.
    """
    gain = beta * (reply.log_ratio - lax.stop_gradient(kl))
    return jnp.where(
        desirable, desirable_weight * (1 - jax.nn.sigmoid(gain)), undesirable_weight * (1 - jax.nn.sigmoid(-gain))
    )
