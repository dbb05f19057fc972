"""Group relative policy optimization: replies to one prompt, drawn from the model, are rewarded relative to each other.

The advantage of a reply is its reward less the mean of its group (arXiv 2402.03300, section 4.1.2), divided by the
group's standard deviation or not (arXiv 2503.20783). With the ratio r_t = exp(log p_t - log p_old,t), each token loses

    -min(r_t A, clip(r_t, 1 - low, 1 + high) A) + b (exp(d_t) - d_t - 1),    d_t = log p_reference,t - log p_t

with separate bounds as in DAPO (arXiv 2503.14476), and the KL estimate of arXiv 2402.03300, eq. 4. The ratio of
a sequence, exp(mean log ratio), stands for those of all its tokens in GSPO (arXiv 2507.18071).

How tokens are averaged: `grpo` over each reply, then over replies; `dapo` over all tokens of the batch; `dr_grpo` sums,
divided by the number of replies and the most tokens that one may have (arXiv 2503.20783). `bnpo` is `dapo` here: it
differs only in frameworks that average each micro-batch by itself.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from rwkv_jax.config import GRPOConfig, StepConfig
from rwkv_jax.config.objective import RatioLevel, RewardScale, TokenMean
from rwkv_jax.parallel.sharded_model import ShardedModel
from rwkv_jax.training.log_probabilities import row_sums, token_log_p
from rwkv_jax.training.run_model import RunModel
from rwkv_jax.training.step import LossSums
from rwkv_kernels.arguments import broadcast_varying_axes

_EPSILON = 1e-4  # added to standard deviations, as in trl


def advantages(rewards: Array, group_size: int, scale: RewardScale = "group") -> Array:
    """The advantage of each reply, [R].

    Args:
      rewards: [R]; consecutive ones are of one prompt.
      group_size: replies to each prompt.
      scale: divide by the standard deviation (of n - 1 degrees of freedom) of the group or of all rewards, or not.
    """
    groups = rewards.reshape(-1, group_size)
    centered = groups - jnp.mean(groups, axis=1, keepdims=True)
    if scale == "group":
        centered /= jnp.std(groups, axis=1, ddof=1, keepdims=True) + _EPSILON
    elif scale == "batch":
        centered /= jnp.std(rewards, ddof=1) + _EPSILON
    return centered.reshape(-1)


def _row_sums(x: Array) -> Array:
    return jnp.sum(x, axis=-1, keepdims=True)


def grpo_token_losses(
    log_p: Array,
    old_log_p: Array,
    reference_log_p: Array | None,
    advantage: Array,
    mask: Array,
    *,
    clip_low: float,
    clip_high: float,
    kl_weight: float = 0.0,
    level: RatioLevel = "token",
    max_ratio: float | None = None,
    row_sums: Callable[[Array], Array] = _row_sums,
) -> Array:
    """The loss of each token, [R, T], zero where the mask is.

    Args:
      log_p: [R, T] of the tokens under the model; old_log_p: when they were drawn.
      reference_log_p: under the reference model; None if kl_weight is 0.
      advantage: [R]; mask: [R, T], 1 at tokens of the reply.
      kl_weight: b.
      level: whether ratios are those of tokens or of sequences.
      max_ratio: the ratio in the term that is not clipped is at most this (two-sided clipping, arXiv 2505.07291).
      row_sums: sums [R, T] to [R, 1], over devices too where a mesh splits time.
    """
    log_ratio = (log_p - old_log_p) * mask
    if level == "sequence":
        log_ratio = row_sums(log_ratio) / jnp.maximum(row_sums(mask), 1)
    ratio = jnp.exp(log_ratio)
    free = ratio if max_ratio is None else jnp.minimum(ratio, max_ratio)
    gain = jnp.minimum(free * advantage[:, None], jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantage[:, None])
    loss = -gain
    if reference_log_p is not None:
        loss += kl_weight * kl_estimate(log_p, reference_log_p)
    return loss * mask


def kl_estimate(log_p: Array, reference_log_p: Array) -> Array:
    """exp(d) - d - 1 with d = log p_reference - log p: unbiased and never negative."""
    difference = reference_log_p - log_p
    return jnp.expm1(difference) - difference


def token_weights(
    mask: Array,
    mean: TokenMean,
    max_tokens: int,
    counts: Array | None = None,
    row_sums: Callable[[Array], Array] = _row_sums,
) -> tuple[Array, Array]:
    """What each token's loss is multiplied by, [R, T], and what their sum is divided by.

    Where a mesh splits time, each of its devices has its share of the divisor.

    Args:
      counts: [R], 0 for replies that are no part of the mean; None for none.
    """
    if mean in ("dapo", "bnpo"):
        return mask, jnp.sum(mask)
    share = mask.shape[1] / row_sums(0 * mask + 1)  # [R, 1], of each row's positions that are here
    share = share if counts is None else share * counts[:, None]
    if mean == "dr_grpo":
        return mask, jnp.sum(share) * max_tokens
    return mask / jnp.maximum(row_sums(mask), 1), jnp.sum(share)


class GroupBatch(NamedTuple):
    """Prompts with replies that the model has drawn, G rows in a row for each prompt."""

    tokens: Any
    """int32 [B, T]: prompt and reply."""
    targets: Any
    """int32 [B, T], the next tokens."""
    mask: Any
    """float32 [B, T], 1 where the target is of a reply that counts."""
    advantage: Any
    """float32 [B]."""
    counts: Any
    """float32 [B], 0 for the replies of groups that were skipped."""
    old_log_p: Any = None
    """float32 [B, T] under the model that drew them; None if that is the model of this step."""
    reference_log_p: Any = None
    """float32 [B, T] under the reference model; None without a KL divergence."""


@dataclasses.dataclass(frozen=True, eq=False)
class GRPO:
    """Mean of `grpo_token_losses` over the replies of a batch."""

    run_model: RunModel
    sharded: ShardedModel
    config: StepConfig
    """Provides `remat` and `loss_chunk`."""
    grpo: GRPOConfig

    @property
    def _row_sums(self) -> Callable[[Array], Array]:
        return functools.partial(row_sums, sharded=self.sharded)

    def _weights(self, batch: GroupBatch) -> tuple[Array, Array]:
        mask, counts = broadcast_varying_axes(batch.mask, batch.counts)
        return token_weights(mask, self.grpo.mean, self.grpo.max_tokens, counts, self._row_sums)

    def count(self, batch: GroupBatch) -> Array:
        """The divisor of the mean that `grpo.mean` names."""
        return self._weights(batch)[1]

    def loss_sums(self, params: Any, batch: GroupBatch, recurrent_state: Any) -> tuple[LossSums, Any]:
        """Sums over a device's rows."""
        settings = self.grpo
        log_p = token_log_p(self.run_model, self.sharded, self.config, params, batch.tokens, batch.targets, batch.mask)
        old = lax.stop_gradient(log_p) if batch.old_log_p is None else batch.old_log_p
        advantage = broadcast_varying_axes(batch.advantage, batch.mask)[0]
        losses = grpo_token_losses(
            log_p,
            old,
            batch.reference_log_p,
            advantage,
            batch.mask,
            clip_low=settings.clip_low,
            clip_high=settings.clip_low if settings.clip_high is None else settings.clip_high,
            kl_weight=settings.kl_weight,
            level=settings.ratio,
            max_ratio=settings.max_ratio,
            row_sums=self._row_sums,
        )
        weights, _ = self._weights(batch)
        ratio = jnp.exp((log_p - old) * batch.mask)
        high = settings.clip_low if settings.clip_high is None else settings.clip_high
        is_clipped = jnp.where(advantage[:, None] > 0, ratio > 1 + high, ratio < 1 - settings.clip_low)
        metrics = {"log_p": jnp.sum(log_p * weights), "clipped": jnp.sum(is_clipped * weights)}
        if batch.reference_log_p is not None:
            metrics["kl"] = jnp.sum(kl_estimate(log_p, batch.reference_log_p) * weights)
        loss = jnp.sum(losses * weights)
        return LossSums(minimized=loss, loss=loss, metrics=metrics), None
