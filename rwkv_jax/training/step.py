"""The training step: an objective, a partition of the parameters, and one function that reads from top to bottom."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import PartitionSpec

from rwkv_jax.parallel.sharded_model import ShardedModel
from rwkv_jax.training.ema import averaged
from rwkv_jax.training.micro_batches import sum_over_micro_batches, where_rows
from rwkv_jax.training.partition import merge_params, split_params
from rwkv_jax.training.rates import without_frozen_layers
from rwkv_jax.training.spikes import is_spike, remember
from rwkv_jax.training.state import StepMetrics, TrainState
from rwkv_kernels.arguments import broadcast_varying_axes

Partition = Callable[[tuple[str, ...]], bool]
"""Whether a parameter is trained, by its official path, such as ("blocks", "att", "key", "weight")."""


class LossSums(NamedTuple):
    """Sums over rows of a batch."""

    minimized: Array
    """The sum to minimize."""
    loss: Array
    """The sum to report."""
    metrics: dict[str, Array] | None = None
    """Further sums to report, by name."""


class Objective(Protocol):
    """What a step minimizes: sums over a batch divided by its count, over all devices and micro-batches.

    Both methods get one device's rows of one micro-batch; on a mesh they run within `jax.shard_map`. `params` is the
    run's whole nested dict, of one model or several. `batch` is a NamedTuple of arrays [B, ...].
    """

    def count(self, batch: Any, /) -> Array:
        """Denominator of the mean: the number of tokens or pairs counted."""
        ...

    def loss_sums(self, params: Any, batch: Any, recurrent_state: Any, /) -> tuple[LossSums, Any]:
        """Sums over these rows, and their next recurrent state, which is unused by runs that carry none."""
        ...


def train_step(
    state: TrainState,
    batch: Any,
    *,
    objective: Objective,
    partition: Partition,
    optimizer: optax.GradientTransformation,
    sharded: ShardedModel,
    accumulation_steps: int = 1,
    empty_state: Any = None,
    spike_factor: float | None = None,
    learning_layers: Any = None,
    ema_decay: float = 0.0,
    first_step: int = 0,
) -> tuple[TrainState, StepMetrics]:
    """One optimizer step; skipped, but counted, if loss or gradient is not finite, or a spike.

    Args:
      accumulation_steps: micro-batches into which the batch's rows are split; divides B.
      empty_state: the recurrent state of rows that begin a text, arrays [L, B, ...]; used if `state` carries one.
      spike_factor: see `spikes.is_spike`; None without the guard.
      learning_layers: see `rates.learning_layers`, of the trained parameters; None if no layer is frozen.
      ema_decay: see `ema.averaged`; used if `state` has averages, which are from `first_step` on.
    """
    recurrent_state = state.recurrent_state
    if recurrent_state is not None:
        recurrent_state = where_rows(batch.continues_previous, recurrent_state, empty_state)
    trained, frozen = split_params(state.params, partition)
    (loss, metrics), gradients, recurrent_state = loss_and_gradients(
        trained, frozen, batch, recurrent_state, objective, sharded, accumulation_steps
    )
    if learning_layers is not None:
        gradients = without_frozen_layers(gradients, learning_layers)
    norm = optax.tree.norm(gradients)
    taken, recent = jnp.isfinite(loss) & jnp.isfinite(norm), state.recent
    if spike_factor is not None:
        taken &= ~is_spike(recent, loss, norm, spike_factor)
        recent = jnp.where(taken, remember(recent, loss, norm), recent)
    updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
    updated = optax.apply_updates(trained, updates)

    def if_taken(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda new, old: jnp.where(taken, new, old), new, old)

    if recurrent_state is not None:  # the state of a failed step is no valid context for the next one
        recurrent_state = if_taken(recurrent_state, empty_state)
    ema = state.ema
    if ema is not None:
        ema = if_taken(averaged(ema, updated, state.step - first_step, ema_decay), ema)
    state = TrainState(
        params=merge_params(if_taken(updated, trained), frozen),
        opt_state=if_taken(opt_state, state.opt_state),
        step=state.step + 1,
        key=state.key,
        bad_steps=jnp.where(taken, 0, state.bad_steps + 1),
        skipped_steps=state.skipped_steps + (~taken).astype(jnp.int32),
        recurrent_state=recurrent_state,
        recent=recent,
        ema=ema,
    )
    return state, StepMetrics(loss, norm, taken, metrics)


def loss_and_gradients(
    trained: Any,
    frozen: Any,
    batch: Any,
    recurrent_state: Any,
    objective: Objective,
    sharded: ShardedModel,
    accumulation_steps: int = 1,
) -> tuple[Any, Any, Any]:
    """Reported means, the mean loss's gradient by the trained parameters, and the next recurrent state."""

    def local_loss_and_grads(trained: Any, frozen: Any, batch: Any, recurrent_state: Any) -> tuple[Any, Any, Any]:
        """The same means, with this device's share of the gradients and its rows' next state."""
        trained, frozen = sharded.as_varying(trained), sharded.as_varying(frozen)
        count = jnp.maximum(sharded.psum(broadcast_varying_axes(objective.count(batch), batch)[0]), 1)

        def mean_loss(trained: Any, batch: Any, recurrent_state: Any) -> tuple[Array, tuple[Any, Any]]:
            sums, next_state = objective.loss_sums(merge_params(trained, frozen), batch, recurrent_state)
            reported = jax.tree.map(lambda x: x / count, (sums.loss, sums.metrics))
            return sums.minimized / count, (reported, None if recurrent_state is None else next_state)

        def micro_step(batch: Any, recurrent_state: Any) -> tuple[Any, Any]:
            value_and_grads = jax.value_and_grad(mean_loss, has_aux=True)
            (_, (reported, next_state)), gradients = value_and_grads(trained, batch, recurrent_state)
            return (reported, gradients), next_state

        (reported, gradients), next_state = sum_over_micro_batches(
            micro_step, trained, batch, recurrent_state, accumulation_steps
        )
        return sharded.psum(reported), sharded.psum_gradients(gradients), next_state

    specs = sharded.select_param_specs(trained)
    state_specs = None if recurrent_state is None else sharded.carried_specs or sharded.state_specs
    run = sharded.shard_map(
        local_loss_and_grads,
        (specs, sharded.select_param_specs(frozen), sharded.batch_specs(batch), state_specs),
        (PartitionSpec(), specs, state_specs),
    )
    return run(trained, frozen, batch, recurrent_state)
