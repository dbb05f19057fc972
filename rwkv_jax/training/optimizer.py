"""Adam with the official parameter groups."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rwkv_jax.config import OptimizerConfig, TuningConfig
from rwkv_jax.models.stacks import has_layer_axis
from rwkv_jax.models.tuned import ADAPTER, INITIAL_STATE
from rwkv_jax.training.rates import keep_frozen, learning_layers, rate_factors, scaled
from rwkv_jax.training.schedule import learning_rate_schedule, weight_decay_schedule

DECAYING_PARTS = ("lora_A", "lora_B", "miss_block")
"""Of adapters, if `tuning.decay` is on."""

ParameterGroup = Callable[[tuple[str, ...], int], tuple[float, bool]]


def parameter_groups(params: Any, group: ParameterGroup) -> tuple[Any, Any]:
    """For each parameter, its learning-rate factor and whether it has weight decay.

    Args:
      params: nested dict of arrays or shapes; those of stacks have a leading axis of layers.
      group: a generation's rule, from (official path, axes in one layer) to (factor, decays).
    """

    def of(path: tuple[Any, ...], parameter: Any) -> tuple[float, bool]:
        names = tuple(str(entry.key) for entry in path)
        return group(names, parameter.ndim - has_layer_axis(names))

    leaves, structure = jax.tree.flatten_with_path(params)
    factors, decays = zip(*(of(path, parameter) for path, parameter in leaves), strict=True)
    return structure.unflatten(factors), structure.unflatten(decays)


def tuned_group(tuning: TuningConfig, group: ParameterGroup, path: tuple[str, ...], ndim: int) -> tuple[float, bool]:
    """The group of a tuning run's parameter: adapters decay only if asked to, states never."""
    if path[0] == INITIAL_STATE:
        return tuning.state_rate, False
    if path[0] == ADAPTER:
        return 1.0, tuning.decay and path[-1] in DECAYING_PARTS
    return group(path, ndim)


_FASTER_IN_STAGE_2 = ("time_mix", "time_maa", "time_decay", "time_faaaa", "time_first", "w0")
"""Prefixes of names within time and channel mixing."""


def in_stage_2(path: tuple[str, ...], factor: float) -> float:
    """The factor on a parameter's learning rate in RWKV-LM's second stage (my_pile_stage 2).

    It is 5 for token-shift blends, decay and bonus, except their low-rank maps, and `factor` for the rest.
    """
    name = path[-1]
    is_faster = name.startswith(_FASTER_IN_STAGE_2) and not name.endswith(("_w1", "_w2"))
    return 5.0 if is_faster else factor


def clip_by_global_norm(limit: float, epsilon: float) -> optax.GradientTransformation:
    """Scales gradients by limit / (norm + epsilon) if that is below 1, as PyTorch and DeepSpeed do with 1e-6."""
    if not limit:
        return optax.identity()
    if not epsilon:
        return optax.clip_by_global_norm(limit)

    def clip(updates: Any, _: Any) -> Any:
        scale = jnp.minimum(limit / (optax.tree.norm(updates) + epsilon), 1)
        return jax.tree.map(lambda update: update * scale.astype(update.dtype), updates)

    return optax.stateless(clip)


def _decay_weights(
    config: OptimizerConfig, num_steps: int, decays: Any, first_step: int
) -> optax.GradientTransformation:
    """Adds weight decay to the updates of matrices; counts steps if the decay changes."""
    if config.weight_decay_final is None:
        return optax.add_decayed_weights(config.weight_decay, mask=decays)
    schedule = weight_decay_schedule(config, num_steps)

    def init(params: Any) -> Any:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        def decayed(update: Array, param: Array, decays: bool) -> Array:
            return update + jnp.asarray(schedule(state.count + first_step), update.dtype) * param if decays else update

        return jax.tree.map(decayed, updates, params, decays), optax.ScaleByScheduleState(state.count + 1)

    return optax.GradientTransformation(init, update)


def make_optimizer(
    config: OptimizerConfig, num_steps: int, params: Any, group: ParameterGroup, first_step: int = 0
) -> optax.GradientTransformation:
    """Builds the optimizer: clipping, Adam, decoupled weight decay of large matrices, learning rate per group.

    Args:
      params: the parameters or their shapes; only names, axes and the number of layers are used.
      group: the generation's `parameter_group`.
      first_step: the step at which the run begins.
    """

    def staged(path: tuple[str, ...], ndim: int) -> tuple[float, bool]:
        factor, decays = group(path, ndim)
        return in_stage_2(path, factor) if config.stage == 2 else factor, decays

    factors, decays = parameter_groups(params, staged)
    factors = jax.tree.map(operator.mul, factors, rate_factors(params, config.rates))
    learns = learning_layers(params, config.rates)
    rate = learning_rate_schedule(config, num_steps, first_step)
    return optax.chain(
        clip_by_global_norm(config.clip_norm, config.clip_epsilon),
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        _decay_weights(config, num_steps, decays, first_step),
        optax.stateless(lambda updates, _: jax.tree.map(scaled, updates, factors)),
        optax.scale_by_learning_rate(lambda count: rate(count + first_step)),
        *([] if learns is None else [keep_frozen(learns)]),
    )
