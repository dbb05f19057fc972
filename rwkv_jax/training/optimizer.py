"""Adam with the official parameter groups, and the learning-rate schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from rwkv_jax.config import OptimizerConfig

ParameterGroup = Callable[[tuple[str, ...], int], tuple[float, bool]]


def learning_rate_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """The learning rate of a step, counted from 0: a linear warm-up from 1% of the peak, then the chosen fall.

    The last step, num_steps - 1, has the final learning rate (the peak, for a constant schedule).
    """
    peak, final = config.learning_rate, config.final_learning_rate
    rest = max(num_steps - 1 - config.warmup_steps, 1)
    decay = min(max(round(config.decay_fraction * num_steps), 1), rest)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=final / peak)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, final, rest)
    elif config.schedule == "wsd":
        after = optax.linear_schedule(peak, final, decay, transition_begin=rest - decay)
    elif config.schedule == "exponential":
        after = optax.exponential_decay(peak, decay, final / peak, transition_begin=rest - decay, end_value=final)
    else:
        after = optax.constant_schedule(peak)
    if config.warmup_steps == 0:
        return after
    warmup = optax.linear_schedule(0.01 * peak, peak, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def parameter_groups(params: Any, group: ParameterGroup) -> tuple[Any, Any]:
    """For each parameter, the factor on its learning rate and whether its weight decays.

    Args:
      params: nested dict of arrays or shapes; those under "blocks" have a leading axis of layers.
      group: a generation's rule, from (official path, axes in one layer) to (factor, decays).
    """

    def of(path: tuple[Any, ...], parameter: Any) -> tuple[float, bool]:
        names = tuple(str(entry.key) for entry in path)
        return group(names, parameter.ndim - (names[0] == "blocks"))

    groups = jax.tree_util.tree_map_with_path(of, params)
    is_pair = lambda x: isinstance(x, tuple)  # noqa: E731
    return (
        jax.tree.map(lambda pair: pair[0], groups, is_leaf=is_pair),
        jax.tree.map(lambda pair: pair[1], groups, is_leaf=is_pair),
    )


def _scale_each(factors: Any) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, factor: u * factor, updates, factors))


def make_optimizer(
    config: OptimizerConfig, num_steps: int, params: Any, group: ParameterGroup
) -> optax.GradientTransformation:
    """Clipping, Adam, decoupled weight decay of the large matrices, each group's learning rate.

    Args:
      params: the parameters or their shapes; only names and axes are read.
      group: the generation's `parameter_group`.
    """
    factors, decays = parameter_groups(params, group)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        _scale_each(factors),
        optax.scale_by_learning_rate(learning_rate_schedule(config, num_steps)),
    )
