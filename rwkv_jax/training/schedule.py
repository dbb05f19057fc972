"""Learning rate and weight decay by step: linear warm-up, then decay; one cycle or several."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from rwkv_jax.config import OptimizerConfig, TrainConfig


def learning_rate_schedule(config: OptimizerConfig, num_steps: int, first_step: int = 0) -> optax.Schedule:
    """The learning rate of a step, counted from 0.

    `optimizer.schedule_origin` tells where the decay ends: `last_step` gives the last step, num_steps - 1, the final
    rate; `official` is the formula of RWKV-LM's trainer, whose cosine would end at step num_steps and whose exponential
    and linear decays begin one step earlier.

    Args:
      num_steps: steps of the run, and of the schedule unless `optimizer.schedule_steps` is given.
      first_step: the step at which the run and its warm-up begin.

    Returns:
      A function of the step, a number or an integer array; float64 where that is JAX's default.
    """

    def cycle(start: int, length: int) -> optax.Schedule:
        return _one_cycle(config, length, first_step - start if start <= first_step < start + length else 0)

    return _in_cycles(config, num_steps, cycle)


def rate_notice(before: TrainConfig, after: TrainConfig, step: int) -> str | None:
    """Message if a run resumed at `step` has another learning rate than before the config changed; else None.

    Args:
      before: the config of the run so far; after: the one to resume with.
    """

    def rate(config: TrainConfig) -> float:
        training = config.training
        schedule = learning_rate_schedule(config.optimizer, training.num_steps, training.first_step)
        return np.asarray(schedule(step)).item()

    old, new = rate(before), rate(after)
    rest = after.training.num_steps - step
    if rest == 0 or math.isclose(old, new, rel_tol=1e-3):
        return None
    horizon = " ".join(map(str, before.optimizer.schedule_steps or (before.training.num_steps,)))
    cycle = f"--optimizer.schedule-steps {step} {rest}"
    if min(step, rest) <= after.optimizer.warmup_steps:
        cycle += f" --optimizer.warmup-steps {min(step, rest) // 10}"
    return (
        f"learning rate: {new:.2e} at step {step + 1}, where the run as it was would have {old:.2e}; "
        f"to keep that, leave the optimizer's settings as they were, with --optimizer.schedule-steps {horizon}; "
        f"for a new cycle from here: {cycle}"
    )


def weight_decay_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """The weight decay of a step: changes exponentially from the first to the final value over the decay."""
    final = config.weight_decay_final
    if final is None:
        return optax.constant_schedule(config.weight_decay)

    def cycle(_: int, length: int) -> optax.Schedule:
        begin, span = _fall(config, length)
        decay = optax.exponential_decay(config.weight_decay, span, final / config.weight_decay, end_value=final)
        return lambda step: decay(_steps_after(begin, step))

    return _in_cycles(config, num_steps, cycle)


def _one_cycle(config: OptimizerConfig, num_steps: int, first_step: int) -> optax.Schedule:
    peak, final, start = config.learning_rate, config.final_learning_rate, config.warmup_start
    begin, span = _fall(config, num_steps)
    falls: dict[str, Callable[[], optax.Schedule]] = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, span, alpha=final / peak),
        "linear": lambda: optax.linear_schedule(peak, final, span),
        "wsd": lambda: optax.linear_schedule(peak, final, span),
        "exponential": lambda: optax.exponential_decay(peak, span, final / peak, end_value=final),
        "constant": lambda: optax.constant_schedule(peak),
    }
    fall = falls[config.schedule]()
    if config.warmup_steps == 0:
        return lambda step: fall(_steps_after(begin, step))

    def rate(step: Any) -> Any:
        after = fall(_steps_after(begin, step))
        share = jnp.asarray(step - first_step, float) / config.warmup_steps
        # This order avoids cancellation: each product is rounded once, in any dtype.
        return jnp.where(share < 1, (start + (1 - start) * share) * after, after)

    return rate


def _steps_after(begin: int, step: Any) -> Array:
    """At least 0, in JAX's default float dtype: an int32 divided by an integer would be float32 whatever that is."""
    return jnp.asarray(jnp.maximum(step - begin, 0), float)


def _fall(config: OptimizerConfig, num_steps: int) -> tuple[int, int]:
    """The step after which the rate decays, and the number of steps over which it does."""
    warmup = config.warmup_steps
    rest = max(num_steps - 1 - warmup, 1)
    decay = min(max(round(config.decay_fraction * num_steps), 1), rest)
    whole = config.schedule in ("cosine", "linear", "constant")
    if config.schedule_origin == "last_step":
        span = rest if whole else decay
        return warmup + rest - span, span
    if config.schedule == "cosine":
        return warmup, num_steps - warmup
    constant = 0 if whole else num_steps - round(config.decay_fraction * num_steps)
    return constant + warmup - 1, max(num_steps - constant - warmup, 1)


def _in_cycles(config: OptimizerConfig, num_steps: int, cycle: Callable[[int, int], optax.Schedule]) -> optax.Schedule:
    """Consecutive cycles, each made from (start, length); constant after the last one's end."""
    lengths = config.schedule_steps or (num_steps,)
    starts = [0, *itertools.accumulate(lengths)][:-1]
    return optax.join_schedules([cycle(*each) for each in zip(starts, lengths, strict=True)], starts[1:])
