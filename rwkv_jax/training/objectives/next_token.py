"""Next-token cross-entropy with L2Wrap, for pretraining."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rwkv_jax.config import StepConfig
from rwkv_jax.parallel.sharded_model import ShardedModel
from rwkv_jax.training.batch import Batch
from rwkv_jax.training.fused_loss import fused_losses
from rwkv_jax.training.loss import sum_losses
from rwkv_jax.training.run_model import RunModel
from rwkv_jax.training.step import LossSums


def count_tokens(batch: Batch) -> Array:
    """Number of tokens that the batch's mask counts; all without one."""
    return jnp.sum(jnp.ones(batch.tokens.shape, jnp.float32) if batch.mask is None else batch.mask)


@dataclasses.dataclass(frozen=True, eq=False)
class NextToken:
    """Mean -log p(token) in nats over the tokens in the batch's mask, or all without one."""

    run_model: RunModel
    sharded: ShardedModel
    config: StepConfig
    """Provides `remat`, `loss_chunk`, `fused_loss` and the strength of L2Wrap."""

    def count(self, batch: Batch) -> Array:
        """Number of tokens that count."""
        return count_tokens(batch)

    def loss_sums(self, params: Any, batch: Batch, recurrent_state: Any) -> tuple[LossSums, Any]:
        """Sums over a device's rows, and their next recurrent state."""
        sharded, config = self.sharded, self.config
        model = self.run_model.model(params, batch.dropout_keys)
        if recurrent_state is None:
            recurrent_state = self.run_model.first_state(params, batch.tokens.shape[0], sharded.axes)
        hidden, next_state = model.hidden(
            batch.tokens,
            recurrent_state,
            segment_ids=batch.segment_ids,
            remat=config.remat,
            axes=sharded.axes,
            gather_params=sharded.gather_params,
        )
        with jax.named_scope("loss"):
            model.gather_head(sharded.gather_params)
            tensor = sharded.axes.tensor
            if config.fused_loss:
                fused = fused_losses(
                    hidden,
                    model.head_weight,
                    batch.targets,
                    batch.mask,
                    l2wrap=config.l2wrap,
                    chunk=config.loss_chunk,
                    axis_name=tensor,
                )
                return LossSums(minimized=fused.minimized, loss=fused.nll), next_state
            sums = sum_losses(model.logits, hidden, batch.targets, batch.mask, config.loss_chunk, tensor)
        return LossSums(minimized=sums.nll + config.l2wrap * sums.peak, loss=sums.nll), next_state
