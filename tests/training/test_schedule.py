"""Schedules against the formulas of RWKV-LM's trainer, over cycles, and from a later step."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax.config import ConfigError, OptimizerConfig, StepConfig, TrainConfig
from rwkv_jax.training.schedule import learning_rate_schedule, rate_notice, weight_decay_schedule

CONFIG = OptimizerConfig(
    learning_rate=6e-4, final_learning_rate=2e-5, warmup_steps=10, decay_fraction=0.4, schedule_origin="official"
)
STEPS = 50


def rates(config: OptimizerConfig, num_steps: int = STEPS, upto: int = STEPS, first_step: int = 0) -> np.ndarray:
    schedule = learning_rate_schedule(config, num_steps, first_step)
    steps = jnp.arange(upto, dtype=jnp.int32)  # as the training step counts
    return np.array([float(np.asarray(schedule(step))) for step in steps])


def official(config: OptimizerConfig, step: int, num_steps: int = STEPS, begun: int = 0) -> float:
    """The trainer's rate: `step` counts from the very first step, `begun` is where this process took up."""
    warmup, peak, final = config.warmup_steps, config.learning_rate, config.final_learning_rate
    if config.schedule == "cosine":
        progress = min(max((step - warmup) / (num_steps - warmup), 0), 1)
        factor = final / peak
        rate = peak * ((0.5 + factor / 2) + (0.5 - factor / 2) * math.cos(math.pi * progress))
    else:
        constant = num_steps - round(config.decay_fraction * num_steps)
        progress = min(max((step - constant - warmup + 1) / (num_steps - constant - warmup), 0), 1)
        rate = peak * math.exp(math.log(final / peak) * progress)
    return rate * (config.warmup_start + (1 - config.warmup_start) * min((step - begun) / warmup, 1) if warmup else 1)


@pytest.mark.parametrize("schedule", ["cosine", "exponential"])
@pytest.mark.parametrize(("warmup_steps", "warmup_start"), [(0, 0.01), (10, 0.01), (10, 0.2)])
def test_the_official_origin_is_the_trainers_formula(
    float64: None, schedule: Any, warmup_steps: int, warmup_start: float
) -> None:
    config = dataclasses.replace(CONFIG, schedule=schedule, warmup_steps=warmup_steps, warmup_start=warmup_start)
    np.testing.assert_allclose(rates(config), [official(config, step) for step in range(STEPS)], rtol=1e-14)


def test_a_warmup_is_exact_in_float32_too() -> None:
    # As peak (0.01 + 0.99 s), which rounds three times; a difference of two rates would lose digits.
    config = dataclasses.replace(CONFIG, schedule="constant", warmup_steps=997)
    expected = [6e-4 * (0.01 + 0.99 * step / 997) for step in range(997)]
    np.testing.assert_allclose(rates(config, 2000, 997), expected, rtol=4 * 2.0**-24)


def test_the_last_step_has_the_final_rate_and_the_official_one_does_not() -> None:
    ours = dataclasses.replace(CONFIG, schedule_origin="last_step")
    assert rates(ours)[-1] == pytest.approx(2e-5, rel=1e-6)
    assert rates(CONFIG)[-1] > 2.001e-5
    assert rates(CONFIG, STEPS, STEPS + 1)[-1] == pytest.approx(2e-5, rel=1e-6)


def test_a_horizon_keeps_the_schedule_of_a_run_that_is_made_longer() -> None:
    kept = dataclasses.replace(CONFIG, schedule_steps=(STEPS,))
    longer = rates(kept, 2 * STEPS, 2 * STEPS)
    np.testing.assert_array_equal(longer[:STEPS], rates(CONFIG))
    np.testing.assert_array_equal(longer[STEPS:], longer[STEPS])


def test_cycles_begin_anew_each_with_its_warmup() -> None:
    cycles = rates(dataclasses.replace(CONFIG, schedule_steps=(STEPS, 20)), 90, 90)
    np.testing.assert_array_equal(cycles[:STEPS], rates(CONFIG))
    np.testing.assert_array_equal(cycles[STEPS : STEPS + 20], rates(CONFIG, 20, 20))
    np.testing.assert_array_equal(cycles[STEPS + 20 :], cycles[STEPS + 20])


def test_a_run_that_begins_later_goes_on_in_the_schedule_after_a_warmup_of_its_own(float64: None) -> None:
    late = rates(CONFIG, first_step=17)
    np.testing.assert_allclose(late[17:], [official(CONFIG, step, begun=17) for step in range(17, STEPS)], rtol=1e-14)
    assert late[17] == pytest.approx(0.01 * rates(CONFIG)[17])


def test_weight_decay_falls_by_the_same_factor_with_the_schedules_progress(float64: None) -> None:
    config = dataclasses.replace(CONFIG, weight_decay=0.1, weight_decay_final=0.001)
    schedule = weight_decay_schedule(config, STEPS)
    for step in range(STEPS):
        progress = max(step - 10, 0) / (STEPS - 10)
        expected = 0.1 * math.exp(math.log(0.001 / 0.1) * progress)
        assert float(np.asarray(schedule(jnp.int32(step)))) == pytest.approx(expected, rel=1e-13)
    assert float(np.asarray(weight_decay_schedule(CONFIG, STEPS)(7))) == CONFIG.weight_decay


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"schedule_steps": (50, 10)}, r"optimizer.schedule_steps = \(50, 10\): each must be greater than"),
        ({"schedule_origin": "theirs"}, r"optimizer.schedule_origin = 'theirs': must be last_step or official"),
        ({"warmup_start": 0.0}, r"optimizer.warmup_start = 0.0: must lie in \(0, 1\]"),
        ({"weight_decay_final": 0.2}, r"optimizer.weight_decay_final = 0.2: must be greater than zero and not exceed"),
        ({"clip_epsilon": -1e-6}, r"optimizer.clip_epsilon = -1e-06: must not be negative"),
        ({"stage": 3}, r"optimizer.stage = 3: must be 1 or 2"),
    ],
)
def test_values_that_cannot_work_are_refused(change: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        dataclasses.replace(CONFIG, **change)


def run(num_steps: int, **changes: Any) -> TrainConfig:
    optimizer = OptimizerConfig(warmup_steps=1, **changes)
    return TrainConfig(training=StepConfig(num_steps=num_steps), optimizer=optimizer)


def test_a_run_made_longer_is_told_that_its_learning_rate_jumps() -> None:
    notice = rate_notice(run(6), run(12), 6)
    assert notice is not None
    assert notice == (
        "learning rate: 5.50e-04 at step 7, where the run as it was would have 1.00e-04; to keep that, leave the "
        "optimizer's settings as they were, with --optimizer.schedule-steps 6; for a new cycle from here: "
        "--optimizer.schedule-steps 6 6"
    )
    # Either choice is what the notice says it is.
    assert rate_notice(run(6), run(12, schedule_steps=(6,)), 6) is None
    cycle = learning_rate_schedule(run(12, schedule_steps=(6, 6)).optimizer, 12)
    again = learning_rate_schedule(run(6).optimizer, 6)
    assert [float(np.asarray(cycle(6 + step))) for step in range(6)] == [float(np.asarray(again(s))) for s in range(6)]


def test_a_schedule_that_stays_is_no_news() -> None:
    assert rate_notice(run(6), run(6), 3) is None
    assert rate_notice(run(6, schedule="constant"), run(12, schedule="constant"), 6) is None
    assert rate_notice(run(6), run(6, schedule="linear"), 2) is not None
