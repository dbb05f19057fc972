"""Odds ratio preference optimization (arXiv 2403.07691): fine-tuning on the chosen reply, and away from the other one.

With p(y) = exp(mean log p of the reply's tokens) and odds(y) = p(y) / (1 - p(y)), equations 6 and 7:

    -mean log p(chosen) - b log sigmoid(log odds(chosen) - log odds(rejected))

There is no reference model. (RWKV-LM-RLHF weighs the terms with 1 - a and a; that is b = a / (1 - a).)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from rwkv_jax.training.objectives.reply import ReplyLogP


def log_odds(mean_log_p: Array) -> Array:
    """log(p / (1 - p)); p that rounds to 1 is taken to be the number next to it, whose odds are finite."""
    mean_log_p = jnp.minimum(mean_log_p, -jnp.finfo(mean_log_p.dtype).eps)
    return mean_log_p - jnp.log(-jnp.expm1(mean_log_p))


def orpo_losses(chosen: ReplyLogP, rejected: ReplyLogP, *, beta: float) -> Array:
    """The loss of each pair, [B]."""
    log_odds_ratio = log_odds(chosen.mean) - log_odds(rejected.mean)
    return -chosen.mean - beta * jax.nn.log_sigmoid(log_odds_ratio)
