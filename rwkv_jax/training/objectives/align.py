"""Alignment of a student's time mixing with its teacher's attention (stage 1 of RADLADS, arXiv 2505.03005).

With x_l the teacher's residual stream before block l, a layer and token lose the Euclidean norm over the width of

    student's mixer_l(norm_l(x_l)) - teacher's mixer_l(norm_l(x_l))

(the norm itself, not its square), and the loss is the mean over the tokens that count and the layers whose mixer is
another one than the teacher's. All layers learn at once, each from the teacher's own hidden states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from rwkv_jax.config import ConfigError, ModelConfig, StepConfig
from rwkv_jax.models.alignment import mixer_outputs
from rwkv_jax.models.layers import wide_dtype
from rwkv_jax.models.stacks import FIRST, is_stack, layer_runs, stacked_layers
from rwkv_jax.parallel.sharded_model import ShardedModel
from rwkv_jax.training.batch import Batch
from rwkv_jax.training.objectives.next_token import count_tokens
from rwkv_jax.training.run_model import TEACHER, RunModel
from rwkv_jax.training.step import LossSums
from rwkv_jax.training.teacher import TeacherModel

_SMALLEST = 1e-24
"""Squared norms below it have no gradient, which would be infinite at zero."""


def aligned_layers(student: ModelConfig, teacher: ModelConfig) -> tuple[int, ...]:
    """The layers in which time mixing takes the place of the teacher's attention.

    Raises:
      ConfigError: there are none, or the residual streams of both models are not of one shape.
    """
    for name in ("num_layers", "width"):
        own, found = getattr(student, name), getattr(teacher, name)
        if own != found:
            raise ConfigError(
                f"model.{name} = {own}: the layers of the teacher are aligned with those of the student, and it has "
                f"{found}; to fit it: --model.{name.replace('_', '-')} {found}"
            )
    layers = tuple(sorted(set(student.rwkv_layers) - set(teacher.rwkv_layers)))
    if not layers:
        raise ConfigError(
            "model.rwkv_layers: no layer of the student has time mixing where the teacher has attention, so that there "
            "is nothing to align; name some, such as --model.rwkv-layers "
            + " ".join(map(str, range(student.num_layers)))
        )
    return layers


def mixers_of(layers: tuple[int, ...], num_layers: int) -> Callable[[tuple[str, ...]], bool]:
    """The partition that trains the mixers of these layers."""

    def is_trained(path: tuple[str, ...]) -> bool:
        part, *within = path
        held = (0,) if part == FIRST else stacked_layers(part, num_layers) if is_stack(part) else ()
        return within[:1] == ["att"] and not set(layers).isdisjoint(held)

    return is_trained


def kept_mixers(layers: tuple[int, ...], student: ModelConfig) -> tuple[tuple[str, float], ...]:
    """Rates (`OptimizerConfig.rates`) that freeze the other layers of the arrays that `mixers_of` trains.

    These are mixers that the teacher has already: they have no loss, but would lose to weight decay.
    """
    runs = layer_runs(student.spec.layer_kinds(student))
    beside = [layer for run in runs if not set(layers).isdisjoint(run.layers) for layer in run.layers]
    return tuple((f"blocks.{layer}.att.*", 0.0) for layer in beside if layer not in layers)


@dataclasses.dataclass(frozen=True, eq=False)
class Align:
    """Mean distance of mixers' outputs over tokens and aligned layers; each layer's is a metric of its own."""

    run_model: RunModel
    sharded: ShardedModel
    config: StepConfig
    """Provides `remat`."""
    teacher: TeacherModel

    def count(self, batch: Batch) -> Array:
        """Number of tokens that count."""
        return count_tokens(batch)

    def loss_sums(self, params: Any, batch: Batch, recurrent_state: Any) -> tuple[LossSums, Any]:
        """Sums over a device's rows; states are not carried."""
        sharded, teacher = self.sharded, self.teacher
        segments, axes = batch.segment_ids, sharded.axes
        gather = teacher.sharded.gather_params
        with jax.named_scope("teacher"):
            teaching = teacher.run_model.model(params[TEACHER])
            embedded = gather("emb", teaching.emb)(batch.tokens, teacher.config.dtype, axes)
            streams = teaching.residual_stream(batch.tokens, segment_ids=segments, axes=axes, gather_params=gather)
            inputs = lax.stop_gradient(jnp.concatenate([embedded[None], streams.hidden[:-1]]))
            given = mixer_outputs(teaching, inputs, segment_ids=segments, axes=axes, gather_params=gather)
            expected = lax.stop_gradient(given)
        found = mixer_outputs(
            self.run_model.model(params, batch.dropout_keys),
            inputs,
            segment_ids=segments,
            remat=self.config.remat,
            axes=axes,
            gather_params=sharded.gather_params,
        )
        layers = aligned_layers(self.run_model.config, teacher.config)
        own = jnp.array(layers)
        wide = wide_dtype(found.dtype)
        squares = jnp.sum(jnp.square(found[own].astype(wide) - expected[own].astype(wide)), axis=-1)
        distances = jnp.sqrt(jnp.maximum(squares, _SMALLEST))
        mask = 1.0 if batch.mask is None else batch.mask.astype(wide)
        of_layers = jnp.sum(distances * mask, axis=(1, 2)).astype(jnp.float32)
        loss = jnp.mean(of_layers)
        metrics = {f"layer_{layer}": of_layers[i] for i, layer in enumerate(layers)}
        return LossSums(loss, loss, metrics), recurrent_state
