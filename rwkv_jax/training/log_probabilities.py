"""Log-probabilities of rows' tokens under a run's model, token by token, for objectives that are functions of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from rwkv_jax.config import StepConfig
from rwkv_jax.parallel.sharded_model import ShardedModel
from rwkv_jax.training.loss import flatten_tokens, split_chunks, token_losses
from rwkv_jax.training.run_model import RunModel


def token_log_p(
    run_model: RunModel,
    sharded: ShardedModel,
    config: StepConfig,
    params: Any,
    tokens: Array,
    targets: Array,
    mask: Array,
) -> Array:
    """log p of each target, [B, T], zero where the mask is; each row is a text of its own.

    Args:
      config: provides `remat` and `loss_chunk`.
      tokens: int32 [B, T]; targets: int32 [B, T]; mask: float32 [B, T].
    """
    model = run_model.model(params)
    hidden, _ = model.hidden(
        tokens,
        run_model.first_state(params, tokens.shape[0], sharded.axes),
        remat=config.remat,
        axes=sharded.axes,
        gather_params=sharded.gather_params,
    )
    with jax.named_scope("loss"):
        model.gather_head(sharded.gather_params)
        flat, wanted, _ = flatten_tokens(hidden, targets, None)

        def losses(hidden: Array, targets: Array) -> Array:
            return token_losses(model.logits(hidden), targets, sharded.axes.tensor)[0]

        chunk = config.loss_chunk
        if chunk is None or chunk >= len(wanted):
            nll = losses(flat, wanted)
        else:
            pieces = lax.map(lambda piece: jax.checkpoint(losses)(*piece), split_chunks((flat, wanted), chunk))
            nll = pieces.reshape(-1)[: len(wanted)]
    return jnp.where(mask > 0, -nll.reshape(mask.shape), 0)


def row_sums(x: Array, sharded: ShardedModel) -> Array:
    """Sums [B, T] to [B, 1], over all devices that share a row's time."""
    total = jnp.sum(x, axis=1, keepdims=True)
    if sharded.axes.sequence is None:
        return total
    return lax.pcast(lax.psum(total, sharded.axes.sequence), sharded.axes.sequence, to="varying")
