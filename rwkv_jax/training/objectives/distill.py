"""Distillation (arXiv 1503.02531): the student's next-token probabilities approach those of a frozen teacher.

With p = softmax(teacher's logits / t) and q = softmax(student's logits / t) at the temperature t, a token loses

    kl_weight t^2 sum_j p_j (log p_j - log q_j) + ce_weight (-log q_target at temperature 1)

The gradient by the student's logits is kl_weight t (q - p), plus that of the cross-entropy. With `top_k` the sum is
over the teacher's most likely tokens and all others as one (`training/distillation_loss.py`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax import Array, lax

from rwkv_jax.config import DistillationConfig, StepConfig
from rwkv_jax.parallel.sharded_model import ShardedModel
from rwkv_jax.training.batch import Batch
from rwkv_jax.training.distillation_loss import Taught, sum_distillation, taught_by_logits
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
    teacher: TeacherModel

    def count(self, batch: Batch) -> Array:
        """Number of tokens that count."""
        return count_tokens(batch)

    def loss_sums(self, params: Any, batch: Batch, recurrent_state: Any) -> tuple[LossSums, Any]:
        """Sums over a device's rows, and the next recurrent states of both models."""
        sharded, settings, teacher = self.sharded, self.distillation, self.teacher
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
        with jax.named_scope("teacher"):
            teaching = teacher.run_model.model(params[TEACHER])
            taught, next_taught = teaching.hidden(
                batch.tokens,
                states[TEACHER],
                segment_ids=batch.segment_ids,
                axes=sharded.axes,
                gather_params=teacher.sharded.gather_params,
            )
            teaching.gather_head(teacher.sharded.gather_params)
        with jax.named_scope("loss"):
            model.gather_head(sharded.gather_params)

            def taught_of(logits: Array, taught: Array) -> Taught:
                return taught_by_logits(
                    teaching.logits(taught),
                    logits,
                    temperature=settings.temperature,
                    top_k=settings.top_k,
                    axis_name=sharded.axes.tensor,
                )

            sums = sum_distillation(
                model.logits,
                hidden,
                taught_of,
                (lax.stop_gradient(taught),),
                batch.targets,
                batch.mask,
                temperature=settings.temperature,
                chunk=self.config.loss_chunk,
                axis_name=sharded.axes.tensor,
            )
        minimized = settings.kl_weight * settings.temperature**2 * sums.kl + settings.ce_weight * sums.nll
        metrics = {"kl": sums.kl, "agreement": sums.agreement, "minimized": minimized}
        return LossSums(minimized, sums.nll, metrics), {"model": next_state, TEACHER: next_taught}
