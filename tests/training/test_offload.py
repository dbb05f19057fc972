"""Optimizer moments in the host's memory: the same step, and they come back from a checkpoint to where they were."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from rwkv_jax.config import ConfigError, OptimizerConfig, ParallelConfig, StepConfig, TrainConfig
from rwkv_jax.training import functions as functions_module
from rwkv_jax.training.batch import make_batch
from rwkv_jax.training.checkpoints import Checkpoints
from rwkv_jax.training.functions import abstract_state, initial_state, make_train_functions
from tests.golden import QUICK
from tests.models.parameters import SMALL
from tests.training.saved import restore

CONFIG = TrainConfig(
    model=dataclasses.replace(SMALL["4"], dtype="float32", num_layers=2),
    optimizer=OptimizerConfig(warmup_steps=0),
    training=StepConfig(num_steps=5, batch_size=2, sequence_length=8),
)
OFFLOADED = dataclasses.replace(CONFIG, parallel=ParallelConfig(offload_optimizer=True))


def memories(state: Any) -> tuple[set[str], set[str]]:
    kinds = [{x.sharding.memory_kind for x in jax.tree.leaves(part)} for part in (state.params, state.opt_state)]
    return kinds[0], kinds[1]


@pytest.mark.long
def test_moments_wait_in_host_memory(tmp_path: Path) -> None:
    batch = make_batch(np.arange(18, dtype=np.int32).reshape(2, 9), end_of_text=0)
    states = []
    for config in (CONFIG, OFFLOADED):
        trainer = make_train_functions(config)
        state, _ = jax.jit(trainer.train_step, compiler_options=QUICK)(initial_state(trainer, 0), batch)
        states.append(state)
    for ours, theirs in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert memories(states[1]) == ({"device"}, {"pinned_host"})
    with Checkpoints(tmp_path, 1, pytest.fail) as checkpoints:
        checkpoints.save(states[1], 1)
        checkpoints.wait()
        restored = restore(checkpoints, abstract_state(make_train_functions(OFFLOADED)))
    assert memories(restored) == ({"device"}, {"pinned_host"})
    for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(states[1]), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_devices_without_host_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoHostMemory:
        def with_memory_kind(self, kind: str) -> Any:
            raise ValueError(f"Could not find memory addressable by device cpu. Got memory kind: {kind}")

    monkeypatch.setattr(functions_module, "_sharding", lambda mesh, spec: NoHostMemory())
    with pytest.raises(ConfigError, match=r"^parallel.offload_optimizer = True: these devices cannot reach"):
        make_train_functions(OFFLOADED)
