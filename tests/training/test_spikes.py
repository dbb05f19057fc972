"""The spike guard skips a step that is far above the median, and no other."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax.config import ConfigError, StepConfig
from rwkv_jax.training.functions import initial_state, make_train_functions
from rwkv_jax.training.spikes import empty_window, is_spike, remember
from tests.golden import QUICK
from tests.models import small_transformers
from tests.small_runs import assert_same_bits
from tests.training import test_step
from tests.training.test_step import BATCH

CONFIG = dataclasses.replace(test_step.CONFIG, model=small_transformers.SMALL)
"""The guard knows nothing of the model, and a Transformer's step compiles in a third of the time of RWKV-7's."""


def test_nothing_is_a_spike_before_the_window_is_full() -> None:
    recent = empty_window(3)
    for norm in (1.0, 1.0):
        recent = remember(recent, jnp.float32(2), jnp.float32(norm))
        assert not is_spike(recent, jnp.float32(1e9), jnp.float32(1e9), 2.0)
    recent = remember(recent, jnp.float32(2), jnp.float32(1))
    assert is_spike(recent, jnp.float32(2), jnp.float32(2.1), 2.0)
    assert is_spike(recent, jnp.float32(4.1), jnp.float32(1), 2.0)
    assert not is_spike(recent, jnp.float32(4), jnp.float32(2), 2.0)


def test_the_window_holds_the_last_steps() -> None:
    recent = empty_window(3)
    for number in range(5):
        recent = remember(recent, jnp.float32(number), jnp.float32(10 * number))
    np.testing.assert_array_equal(recent, [[2, 3, 4], [20, 30, 40]])


def test_a_spike_is_skipped_and_counted_and_what_follows_is_not(float64: None) -> None:
    guarded = dataclasses.replace(CONFIG.training, spike_factor=1.5, spike_window=2)
    functions = make_train_functions(dataclasses.replace(CONFIG, training=guarded))
    step = jax.jit(functions.train_step, compiler_options=QUICK)
    state = initial_state(functions, 0)
    for _ in range(3):
        state, metrics = step(state, BATCH)
        assert bool(metrics.taken)
    # With a head a hundred times as large, loss and gradient are far from what they were.
    params = state.params | {"head": jax.tree.map(lambda x: 100 * x, state.params["head"])}
    high = state._replace(params=params)
    after, metrics = step(high, BATCH)
    assert not bool(metrics.taken)
    assert np.isfinite(metrics.loss)
    assert (int(after.bad_steps), int(after.skipped_steps), int(after.step)) == (1, 1, 4)
    assert_same_bits((after.params, after.opt_state, after.recent), (high.params, high.opt_state, high.recent))
    following, metrics = step(after._replace(params=state.params), BATCH)
    assert bool(metrics.taken)
    assert int(following.bad_steps) == 0


def test_without_the_guard_the_state_has_no_window(float64: None) -> None:
    assert initial_state(make_train_functions(CONFIG), 0).recent is None


@pytest.mark.parametrize(("field", "value"), [("spike_factor", 1.0), ("spike_window", 0)])
def test_settings_that_make_no_sense_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"training\.{field} = {value}"):
        StepConfig(**{field: value})
