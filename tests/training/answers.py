"""Sums over the answers of a batch on a mesh and on one device, as JSON: run in a process of its own."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from rwkv_jax.config import ModelConfig, StepConfig, TrainConfig
from rwkv_jax.config.parallel import ParallelConfig
from rwkv_jax.parallel.mesh import make_mesh
from rwkv_jax.training.answers import answer_sums
from rwkv_jax.training.batch import Batch
from rwkv_jax.training.functions import initial_state, make_train_functions
from tests.golden import QUICK

ROWS, TIME, VOCAB = 4, 6, 10
CONFIG = TrainConfig(
    model=ModelConfig("4", vocab_size=VOCAB, num_layers=2, width=16, wkv_implementation="scan"),
    training=StepConfig(batch_size=ROWS, sequence_length=TIME),
    parallel=ParallelConfig(data=1),
)
WRONG = ((1, 2), (1, 4), (2, 5))
"""Row and position of the targets that are not what the model finds likeliest."""
SCORED = np.array([[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0] * 6], np.float32)
"""Row 0 is whole, row 1 is not; row 2 is whole, since what is wrong there does not count, and row 3 has no answers."""


def answers_of(config: TrainConfig) -> dict[str, float]:
    """The sums over a batch of random tokens, with the initial parameters."""
    functions = make_train_functions(config, make_mesh(config, jax.devices(), None))
    params = initial_state(functions, 0).params
    alone = make_train_functions(CONFIG)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (ROWS, TIME)).astype(np.int32)
    logits, _ = jax.jit(lambda params: alone.run_model.model(params)(jnp.asarray(tokens)), compiler_options=QUICK)(
        initial_state(alone, 0).params
    )
    targets = np.array(np.argmax(logits, axis=-1), np.int32)
    for row, position in WRONG:
        targets[row, position] = (targets[row, position] + 1) % VOCAB
    placed = [jax.device_put(x, functions.tokens_sharding) for x in (tokens, targets, SCORED)]
    batch = Batch(placed[0], placed[1], mask=placed[2])
    sums = jax.jit(functools.partial(answer_sums, functions), compiler_options=QUICK)(params, batch)
    losses = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), targets[..., None], axis=-1)[..., 0]
    return {name: float(value) for name, value in sums._asdict().items()} | {"expected": float((losses * SCORED).sum())}


if __name__ == "__main__":
    split = ParallelConfig(data=2, sequence=2, tensor=2)
    print(json.dumps(answers_of(dataclasses.replace(CONFIG, parallel=split))))
