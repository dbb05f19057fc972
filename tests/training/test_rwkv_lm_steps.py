"""Ten of our training steps against ten of RWKV-LM's equations, written in PyTorch: `make test-peers`."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax.config import DataConfig, OptimizerConfig, StepConfig, TrainConfig
from rwkv_jax.training.batch import make_batch
from rwkv_jax.training.functions import make_train_functions
from rwkv_jax.training.state import StepMetrics, TrainState
from tests.golden import QUICK, assert_close, relative_error
from tests.models.parameters import SMALL, random_params, to_official

pytestmark = pytest.mark.peers

ROOT = Path(__file__).parents[2]
PEER = ROOT / ".venv-peers" / "bin" / "python"
PROGRAM = ROOT / "tests" / "training" / "rwkv_lm_oracle.py"

STEPS, BATCH, TIME = 10, 2, 16

COSINE = OptimizerConfig(
    learning_rate=2e-3,
    final_learning_rate=1e-4,
    schedule_origin="official",
    warmup_steps=3,
    weight_decay=0.1,
    clip_norm=3.0,  # amid the gradients' norms, so that some are clipped
    clip_epsilon=1e-6,
)
V4NEO = dataclasses.replace(COSINE, schedule="exponential", warmup_start=0.2, decay_fraction=0.6, clip_norm=2.2)
FALLING_DECAY = dataclasses.replace(COSINE, weight_decay_final=0.01, clip_norm=5.0)


def their_flags(config: TrainConfig) -> dict[str, Any]:
    """A config in the names of the official trainer, a step being an epoch."""
    optimizer, training = config.optimizer, config.training
    return {
        "generation": config.model.generation,
        "head_size": config.model.head_dim,
        "num_steps": training.num_steps,
        "epoch_begin": training.first_step,
        "lr_init": optimizer.learning_rate,
        "lr_final": optimizer.final_learning_rate,
        "warmup_steps": optimizer.warmup_steps,
        "warmup_start": optimizer.warmup_start,
        "my_exit_tokens": optimizer.schedule == "cosine",
        "my_pile_edecay": training.num_steps - round(optimizer.decay_fraction * training.num_steps),
        "beta1": optimizer.beta1,
        "beta2": optimizer.beta2,
        "adam_eps": optimizer.epsilon,
        "weight_decay": optimizer.weight_decay,
        "weight_decay_final": optimizer.weight_decay_final or 0,
        "grad_clip": optimizer.clip_norm,
    }


def our_steps(config: TrainConfig, params: Any, rows: np.ndarray) -> tuple[Any, list[StepMetrics]]:
    """The parameters after a step for each of rows [steps, B, T + 1], and what each step reports."""
    trainer = make_train_functions(config)
    shapes = jax.eval_shape(trainer.init, jax.random.key(0))
    state: TrainState = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    state = state._replace(params=jax.tree.map(jnp.asarray, params))
    step = jax.jit(trainer.train_step, compiler_options=QUICK)
    reported = []
    for batch in rows:
        state, metrics = step(state, make_batch(batch, end_of_text=None))
        reported.append(metrics)
    return state.params, reported


@pytest.mark.parametrize(
    ("generation", "optimizer", "first_step"),
    [
        pytest.param("7", COSINE, 0, id="7"),
        pytest.param("6", FALLING_DECAY, 5, id="6 from step 5 on, its weight decay falling"),
        pytest.param("5.2", dataclasses.replace(COSINE, clip_norm=4.5), 0, id="5.2"),
        pytest.param("4", V4NEO, 0, id="4 as v4neo trained it"),
    ],
)
def test_ten_steps_are_those_of_rwkv_lm(
    float64: None, tmp_path: Path, generation: str, optimizer: OptimizerConfig, first_step: int
) -> None:
    assert PEER.is_file(), "make test-peers sets up the environment that this needs"
    model = SMALL[generation]
    training = StepConfig(num_steps=first_step + STEPS, first_step=first_step, batch_size=BATCH, sequence_length=TIME)
    data = DataConfig(tokenizer="world")
    config = TrainConfig(model=model, data=data, optimizer=optimizer, training=training, initial_weights="theirs")
    params = random_params(model)
    start = to_official(model, params)
    rows = np.random.default_rng(1).integers(0, model.vocab_size, (STEPS, BATCH, TIME + 1)).astype(np.int32)

    np.savez(tmp_path / "input.npz", allow_pickle=False, rows=rows, **start)
    (tmp_path / "flags.json").write_text(json.dumps(their_flags(config)))
    files = [str(tmp_path / name) for name in ("flags.json", "input.npz", "output.npz")]
    done = subprocess.run([str(PEER), str(PROGRAM), *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = dict(np.load(tmp_path / "output.npz"))

    params, reported = our_steps(config, params, rows)
    norms = theirs.pop("norms")
    assert norms.min() < optimizer.clip_norm < norms.max()  # some steps are clipped, and some are not
    assert relative_error([step.gradient_norm for step in reported], norms) < 1e-12
    assert relative_error([step.loss for step in reported], theirs.pop("losses")) < 1e-12
    assert min(relative_error(theirs[name], start[name]) for name in start) > 1e-4  # all have learned
    assert_close(to_official(model, params), theirs, 1e-12)
