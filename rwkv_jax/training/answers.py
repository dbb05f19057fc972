"""Evaluation of a run on a synthetic task: loss, accuracy and whole answers at every length, beside chance."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from rwkv_jax.config import TrainConfig
from rwkv_jax.data.synthetic.source import synthetic_rows
from rwkv_jax.data.synthetic.task import Task
from rwkv_jax.held_out import Answers
from rwkv_jax.training.batch import Batch, batch_loader
from rwkv_jax.training.functions import TrainFunctions
from rwkv_jax.training.loss import flatten_tokens, likeliest, token_losses


class AnswerSums(NamedTuple):
    """Sums over a batch."""

    loss: Array
    """-log p(target) at scored positions, nats."""
    right: Array
    """Scored positions whose target is the likeliest token."""
    scored: Array
    """Scored positions."""
    whole: Array
    """Rows without a wrong position; like `rows`, once for each part into which a mesh splits time."""
    rows: Array
    """Rows with scored positions."""


def answer_sums(functions: TrainFunctions, params: Any, batch: Batch) -> AnswerSums:
    """Sums over all rows of a batch, each starting from the empty state; `jax.jit` it with the functions bound."""
    sharded = functions.sharded

    def local_sums(params: Any, batch: Batch) -> AnswerSums:
        model = functions.run_model.model(params)
        hidden, _ = model.hidden(
            batch.tokens,
            functions.run_model.first_state(params, batch.tokens.shape[0], sharded.axes),
            segment_ids=batch.segment_ids,
            axes=sharded.axes,
            gather_params=sharded.gather_params,
        )
        model.gather_head(sharded.gather_params)
        flat, targets, scored = flatten_tokens(hidden, batch.targets, batch.mask)
        logits = model.logits(flat)
        losses, _ = token_losses(logits, targets, sharded.axes.tensor)
        right = scored * (likeliest(logits, sharded.axes.tensor) == targets)
        # A row may be split over devices, so its wrong positions are summed first.
        counts = jnp.sum(jnp.stack([scored - right, scored]).reshape(2, *batch.tokens.shape), axis=-1)
        if sharded.axes.sequence is not None:
            counts = lax.psum(counts, sharded.axes.sequence)
            counts = lax.pcast(counts, sharded.axes.sequence, to="varying")
        wrong_in_row, scored_in_row = counts
        has_answers = scored_in_row > 0
        sums = (losses * scored, right, scored, has_answers & (wrong_in_row == 0), has_answers)
        return sharded.psum(AnswerSums(*(jnp.sum(x, dtype=jnp.float32) for x in sums)))

    specs = (sharded.select_param_specs(params), sharded.batch_specs(batch))
    return sharded.shard_map(local_sums, specs, PartitionSpec())(params, batch)


def answers_evaluation(
    config: TrainConfig, task: Task, functions: TrainFunctions
) -> Callable[[Any, int | None], Answers | None]:
    """Makes (params, number of batches or None for those of the config) -> Answers; None without held-out rows.

    Each call draws the same rows, from another stream of the run's seed than the training rows.
    """
    if not config.data.held_out:
        return lambda params, num_batches: None
    sums_of = jax.jit(functools.partial(answer_sums, functions))

    def answers(task: Task, length: int, params: Any, num_batches: int) -> Answers:
        rows = synthetic_rows(task, config, "held-out", length)
        training = dataclasses.replace(config.training, sequence_length=length, carry_state=False)
        load = batch_loader(functions.tokens_sharding, functions.rows_sharding, training, task.tokenizer.end_of_text)
        # Sums stay on the device until the end, so that batches are dispatched without waiting.
        found = [sums_of(params, load(functools.partial(rows.read, step))) for step in range(num_batches)]
        loss, right, scored, whole, num_rows = (sum(map(float, column)) for column in zip(*found, strict=True))
        return Answers(loss / scored, right / scored, whole / num_rows, task.chance(length))

    def evaluate(params: Any, num_batches: int | None) -> Answers:
        own, batches = config.training.sequence_length, num_batches or config.evaluation.batches
        result = answers(task, own, params, batches)
        parts = {
            f"length_{length}": result if length == own else answers(task, length, params, batches)
            for length in config.evaluation.lengths
        }
        parts |= {name: answers(variant, own, params, batches) for name, variant in task.variants().items()}
        return result._replace(parts=parts)

    return evaluate
