"""Distillation (arXiv 1503.02531): the student's next-token probabilities approach those of a frozen teacher.

With p = softmax(teacher's logits / t) and q = softmax(student's logits / t) at the temperature t, a token loses

    kl_weight t^2 sum_j p_j (log p_j - log q_j) + ce_weight (-log q_target at temperature 1)

The gradient by the student's logits is kl_weight t (q - p), plus that of the cross-entropy. With `top_k` the sum is
over the teacher's most likely tokens and all others as one (`training/distillation_loss.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import Array, lax

from rwkv_jax.config import DistillationConfig, StepConfig
from rwkv_jax.parallel.sharded_model import ShardedModel
from rwkv_jax.training.batch import Batch
from rwkv_jax.training.distillation_loss import (
    Taught,
    TopK,
    sum_distillation,
    taught_by_logits,
    taught_by_top_k,
)
from rwkv_jax.training.objectives.next_token import count_tokens
from rwkv_jax.training.run_model import TEACHER, RunModel
from rwkv_jax.training.step import LossSums
from rwkv_jax.training.teacher import TeacherModel


@dataclasses.dataclass(frozen=True, eq=False)
class Distill:
    """Mean over the tokens in the batch's mask, or all without one; the reported loss is the cross-entropy."""

    run_model: RunModel
    sharded: ShardedModel
    config: StepConfig
    """Provides `remat` and `loss_chunk`."""
    distillation: DistillationConfig
    teacher: TeacherModel | None
    """None if the batch has what it says."""

    def count(self, batch: Batch) -> Array:
        """Number of tokens that count."""
        return count_tokens(batch)

    def loss_sums(self, params: Any, batch: Batch, recurrent_state: Any) -> tuple[LossSums, Any]:
        """Sums over a device's rows, and the next recurrent states of both models."""
        sharded, settings = self.sharded, self.distillation
        model = self.run_model.model(params, batch.dropout_keys)
        states = {"model": None, TEACHER: None} if recurrent_state is None else recurrent_state
        first = states["model"]
        if first is None:
            first = self.run_model.first_state(params, batch.tokens.shape[0], sharded.axes)
        hidden, next_state = model.hidden(
            batch.tokens,
            first,
            segment_ids=batch.segment_ids,
            remat=self.config.remat,
            axes=sharded.axes,
            gather_params=sharded.gather_params,
        )
        taught_of, given, next_taught = self._taught(params, batch, states[TEACHER])
        with jax.named_scope("loss"):
            model.gather_head(sharded.gather_params)
            sums = sum_distillation(
                model.logits,
                hidden,
                taught_of,
                given,
                batch.targets,
                batch.mask,
                temperature=settings.temperature,
                chunk=self.config.loss_chunk,
                axis_name=sharded.axes.tensor,
            )
        minimized = settings.kl_weight * settings.temperature**2 * sums.kl + settings.ce_weight * sums.nll
        metrics = {"kl": sums.kl, "agreement": sums.agreement, "minimized": minimized}
        return LossSums(minimized, sums.nll, metrics), {"model": next_state, TEACHER: next_taught}

    def _taught(self, params: Any, batch: Batch, state: Any) -> tuple[Callable[..., Taught], tuple[Array, ...], Any]:
        """What makes a `Taught` of the student's logits and given arrays [B, T, ...]; these, and the next state."""
        teacher, top_k = self.teacher, self.distillation.top_k
        options = {"temperature": self.distillation.temperature, "axis_name": self.sharded.axes.tensor}
        if teacher is None:

            def stored(logits: Array, ids: Array, log_p: Array) -> Taught:
                return taught_by_top_k(TopK(ids, log_p), logits, **options)

            return stored, (batch.teacher_ids, batch.teacher_log_p), None
        with jax.named_scope("teacher"):
            model = teacher.run_model.model(params[TEACHER])
            hidden, state = model.hidden(
                batch.tokens,
                state,
                segment_ids=batch.segment_ids,
                axes=self.sharded.axes,
                gather_params=teacher.sharded.gather_params,
            )
            model.gather_head(teacher.sharded.gather_params)

        def computed(logits: Array, hidden: Array) -> Taught:
            return taught_by_logits(model.logits(hidden), logits, top_k=top_k, **options)

        return computed, (lax.stop_gradient(hidden),), state
