"""Direct preference optimization and its relatives: the reply that is preferred, against a frozen reference model.

With the log-ratio h(y) = log p(y | x) - log p_reference(y | x), d = h(chosen) - h(rejected), and n(y) tokens in y:

    sigmoid       -(1 - e) log sigmoid(b d) - e log sigmoid(-b d)
    robust        (-(1 - e) log sigmoid(b d) + e log sigmoid(-b d)) / (1 - 2 e)
    ipo           (h(chosen) / n(chosen) - h(rejected) / n(rejected) - 1 / (2 b))^2
    hinge         max(0, 1 - b d)
    sigmoid_norm  sigmoid with h(y) / n(y) in the place of h(y)

Sigmoid is equation 7 of arXiv 2305.18290 and, with e > 0, conservative DPO (E. Mitchell, 2023), where e is how often
labels are wrong; robust is from arXiv 2403.00409, IPO from arXiv 2310.12036 (by tokens, as trl has it), hinge from
arXiv 2309.06657, and the mean form is that of RWKV-LM-RLHF.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from rwkv_jax.config.objective import PairLoss
from rwkv_jax.training.objectives.reply import ReplyLogP


def dpo_losses(
    chosen: ReplyLogP, rejected: ReplyLogP, *, loss: PairLoss = "sigmoid", beta: float, label_smoothing: float = 0.0
) -> Array:
    """The loss of each pair, [B].

    Args:
      beta: b; strength of the pull to the reference, for `ipo` the inverse of twice the margin asked for.
      label_smoothing: e, for sigmoid, sigmoid_norm and robust.
    """
    difference = chosen.log_ratio - rejected.log_ratio
    if loss in ("ipo", "sigmoid_norm"):
        difference = chosen.log_ratio / chosen.tokens - rejected.log_ratio / rejected.tokens
    if loss == "ipo":
        return jnp.square(difference - 1 / (2 * beta))
    if loss == "hinge":
        return jax.nn.relu(1 - beta * difference)
    right, wrong = jax.nn.log_sigmoid(beta * difference), jax.nn.log_sigmoid(-beta * difference)
    if loss == "robust":
        return (-(1 - label_smoothing) * right + label_smoothing * wrong) / (1 - 2 * label_smoothing)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def dpo_metrics(chosen: ReplyLogP, rejected: ReplyLogP, beta: float) -> dict[str, Array]:
    """Implicit rewards b h(y), their margin, and whether the chosen reply has the larger one; arrays [B]."""
    reward_chosen, reward_rejected = beta * chosen.log_ratio, beta * rejected.log_ratio
    return {
        "reward_chosen": reward_chosen,
        "reward_rejected": reward_rejected,
        "margin": reward_chosen - reward_rejected,
        "accuracy": (reward_chosen > reward_rejected).astype(reward_chosen.dtype),
    }
