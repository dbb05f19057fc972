"""Simple preference optimization (arXiv 2405.14734): mean log-probabilities as rewards, and no reference model.

With D = mean log p(chosen) - mean log p(rejected) - g / b, equation 6:

    -(1 - e) log sigmoid(b D) - e log sigmoid(-b D)

The margin that is asked for is g; e > 0 smooths the labels, as in conservative DPO.
"""

from __future__ import annotations

import jax
from jax import Array

from rwkv_jax.training.objectives.reply import ReplyLogP


def simpo_losses(
    chosen: ReplyLogP, rejected: ReplyLogP, *, beta: float, gamma: float, label_smoothing: float = 0.0
) -> Array:
    """The loss of each pair, [B]; beta is b, gamma g and label_smoothing e."""
    scaled = beta * (chosen.mean - rejected.mean) - gamma
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(scaled) - label_smoothing * jax.nn.log_sigmoid(-scaled)
