"""The objectives of preferences: a model's log-probabilities of replies, and a loss of them for each pair.

Each loss is a function in a file of its own: `dpo.py`, `orpo.py`, `simpo.py`, `kto.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from rwkv_jax.config import PreferenceConfig, StepConfig
from rwkv_jax.parallel.sharded_model import ShardedModel
from rwkv_jax.training.log_probabilities import row_sums, token_log_p
from rwkv_jax.training.objectives.dpo import dpo_losses, dpo_metrics
from rwkv_jax.training.objectives.kto import kto_losses
from rwkv_jax.training.objectives.orpo import orpo_losses
from rwkv_jax.training.objectives.reply import ReplyLogP
from rwkv_jax.training.objectives.simpo import simpo_losses
from rwkv_jax.training.run_model import RunModel
from rwkv_jax.training.step import LossSums
from rwkv_kernels.arguments import broadcast_varying_axes


class Replies(NamedTuple):
    """Prompts with a reply each, one a row."""

    tokens: Any
    """int32 [B, T]: prompt and reply."""
    targets: Any
    """int32 [B, T], the next tokens."""
    mask: Any
    """float32 [B, T], 1 where the target is of the reply."""
    reference: Any = None
    """float32 [B]: log p of the reply under the reference model; None if it is not stored."""


class PairBatch(NamedTuple):
    """Pairs of replies; a pair is an entry of all arrays, so that no micro-batch or device has half of one."""

    first: Replies
    """The chosen replies; for KTO, the replies."""
    second: Replies
    """The rejected replies; for KTO, replies to other prompts, of which the KL divergence is estimated."""
    weight: Any
    """float32 [B], 1 for a pair, 0 for an entry that fills up the batch."""
    desirable: Any = None
    """bool [B], the labels of KTO; None otherwise."""


@dataclasses.dataclass(frozen=True, eq=False)
class Preference:
    """Mean loss of pairs of replies, of which one is preferred, or of replies with a label (KTO)."""

    run_model: RunModel
    sharded: ShardedModel
    config: StepConfig
    """Provides `objective`, `remat` and `loss_chunk`."""
    preference: PreferenceConfig

    def count(self, batch: PairBatch) -> Array:
        """Number of pairs. Devices that split time all count the same ones, and sum their losses."""
        return jnp.sum(batch.weight)

    def loss_sums(self, params: Any, batch: PairBatch, recurrent_state: Any) -> tuple[LossSums, Any]:
        """Sums over a device's pairs."""
        batch = batch._replace(weight=broadcast_varying_axes(batch.weight, batch.first.tokens)[0])
        first, second = self.log_p_of(params, batch)
        if self.preference.reference == "adapter_off":
            base = self.log_p_of(
                lax.stop_gradient(self.run_model.base(params)), batch, RunModel(self.run_model.graphdef)
            )
            first, second = (
                reply._replace(reference=frozen.total) for reply, frozen in zip((first, second), base, strict=True)
            )
        losses, metrics = self._losses(_counted(first, batch.weight), _counted(second, batch.weight), batch)
        loss = jnp.sum(losses * batch.weight)
        sums = {name: jnp.sum(values * batch.weight) for name, values in metrics.items()}
        return LossSums(minimized=loss, loss=loss, metrics=sums), None

    def log_p_of(self, params: Any, batch: PairBatch, run_model: RunModel | None = None) -> tuple[ReplyLogP, ReplyLogP]:
        """Log-probabilities of both replies of each pair, which the model reads as rows of one batch."""
        rows = jax.tree.map(lambda *both: jnp.concatenate(both), *(each[:3] for each in (batch.first, batch.second)))
        log_p = token_log_p(run_model or self.run_model, self.sharded, self.config, params, *rows)
        totals, tokens = row_sums(log_p, self.sharded)[:, 0], row_sums(rows[2], self.sharded)[:, 0]
        halves = zip(jnp.split(totals, 2), jnp.split(jnp.maximum(tokens, 1), 2), strict=True)
        first, second = (
            ReplyLogP(total, tokens, replies.reference)
            for (total, tokens), replies in zip(halves, (batch.first, batch.second), strict=True)
        )
        return first, second

    def _losses(self, first: ReplyLogP, second: ReplyLogP, batch: PairBatch) -> tuple[Array, dict[str, Array]]:
        """The loss of each pair, [B], and metrics."""
        objective, settings = self.config.objective, self.preference
        beta = settings.beta_of(objective)
        if objective == "kto":
            return self._kto(first, second, batch, beta)
        if objective == "dpo":
            losses = dpo_losses(first, second, loss=settings.loss, beta=beta, label_smoothing=settings.label_smoothing)
            metrics = dpo_metrics(first, second, beta)
        elif objective == "orpo":
            losses, metrics = orpo_losses(first, second, beta=beta), _mean_metrics(first, second)
        else:
            losses = simpo_losses(
                first, second, beta=beta, gamma=settings.gamma, label_smoothing=settings.label_smoothing
            )
            metrics = _mean_metrics(first, second)
        if settings.chosen_weight:
            losses -= settings.chosen_weight * first.mean
        return losses, metrics | {"log_p_chosen": first.total, "log_p_rejected": second.total}

    def _kto(
        self, reply: ReplyLogP, unrelated: ReplyLogP, batch: PairBatch, beta: float
    ) -> tuple[Array, dict[str, Array]]:
        """KTO's losses; the KL divergence is estimated over all devices' rows of the micro-batch."""
        settings, weight = self.preference, self.sharded.psum(jnp.sum(batch.weight))
        ratios = lax.stop_gradient(unrelated.log_ratio) * batch.weight
        kl = jnp.maximum(self.sharded.psum(jnp.sum(ratios)) / jnp.maximum(weight, 1), 0)
        losses = kto_losses(
            reply,
            batch.desirable,
            kl,
            beta=beta,
            desirable_weight=settings.desirable_weight,
            undesirable_weight=settings.undesirable_weight,
        )
        gain = beta * (reply.log_ratio - kl)
        right = jnp.where(batch.desirable, gain > 0, gain < 0)
        return losses, {
            "reward": beta * reply.log_ratio,
            "accuracy": right.astype(losses.dtype),
            "kl": jnp.broadcast_to(kl, losses.shape),
            "log_p": reply.total,
        }


def _counted(reply: ReplyLogP, weight: Array) -> ReplyLogP:
    """Replies of which those that fill up a batch have log p = -1 for each token: losses have finite derivatives there.

    They have no tokens, so log p = 0, where those of odds are infinite; times a weight of zero that is not zero.
    """
    return reply._replace(total=jnp.where(weight > 0, reply.total, -reply.tokens))


def _mean_metrics(chosen: ReplyLogP, rejected: ReplyLogP) -> dict[str, Array]:
    """The rewards of losses without a reference are mean log-probabilities."""
    return {
        "margin": chosen.mean - rejected.mean,
        "accuracy": (chosen.mean > rejected.mean).astype(chosen.total.dtype),
    }
