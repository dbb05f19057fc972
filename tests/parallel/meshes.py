"""Run with eight fake devices and a list of cases: prints, as JSON, how far a step on a mesh is from one device's.

A case is GENERATION:DTYPE:MESH, the mesh as data2.fsdp2.tensor2.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import jax
import numpy as np

from rwkv_jax.config import ModelConfig, OptimizerConfig, TrainConfig, TrainingConfig
from rwkv_jax.parallel.mesh import MeshShape, make_mesh
from rwkv_jax.training.batch import make_batch
from rwkv_jax.training.step import make_trainer
from tests.golden import QUICK, relative_error
from tests.models.parameters import random_params

SIZES = {"vocab_size": 48, "num_layers": 3, "width": 32, "head_dim": 4, "ffn_width": 64}
RANKS = {
    "4": {},
    "5.0": {},
    "5.2": {},
    "6": {"mix_rank": 6, "decay_rank": 5},
    "7": {"decay_rank": 9, "iclr_rank": 5, "value_rank": 6, "gate_rank": 7},
}
BATCH, TIME = 16, 32


def config_of(generation: Any, dtype: Any, accumulation_steps: int = 1) -> TrainConfig:
    """Rows that carry states and hold several documents, logits a few at a time."""
    return TrainConfig(
        model=ModelConfig(generation, dtype=dtype, **SIZES, **RANKS[generation]),
        optimizer=OptimizerConfig(warmup_steps=0),
        training=TrainingConfig(
            batch_size=BATCH,
            sequence_length=TIME,
            accumulation_steps=accumulation_steps,
            carry_state=True,
            loss_chunk=7,
            l2wrap=1e-2,
        ),
    )


def mesh_of(name: str) -> jax.sharding.Mesh | None:
    """The mesh of a case's name; None for `one`."""
    if name == "one":
        return None
    shape = MeshShape(**{axis: int(size) for axis, size in re.findall(r"([a-z]+)(\d+)", name)})
    return make_mesh(shape, jax.devices()[: shape.size])


def rows_of_text() -> np.ndarray:
    """Rows of random tokens with documents that end anywhere, at the borders of shards too."""
    draws = np.random.default_rng(5)
    rows = draws.integers(1, 48, (BATCH, TIME + 1)).astype(np.int32)
    rows[draws.random(rows.shape) < 0.05] = 0
    rows[::3, 0] = rows[1::3, TIME // 2] = rows[2::3, TIME // 4] = 0
    return rows


def gradients_on(config: TrainConfig, mesh: jax.sharding.Mesh | None) -> Any:
    """Loss, gradients and next state of a batch whose rows go on with random states."""
    trainer = make_trainer(config, mesh)
    params: Any = jax.tree.map(lambda x: x.astype(config.model.dtype), random_params(config.model))
    batch = make_batch(rows_of_text(), end_of_text=0, carries_state=True)
    shapes = jax.eval_shape(trainer.init, jax.random.key(0)).carried
    draws = np.random.default_rng(6)
    carried = jax.tree.map(lambda x: np.abs(draws.standard_normal(x.shape)).astype(x.dtype), shapes)
    where = trainer.state_shardings
    inputs = jax.device_put((params, batch, carried), (where.params, trainer.batch_shardings(batch), where.carried))
    return jax.jit(trainer.loss_and_gradients, compiler_options=QUICK)(*inputs)


def distance(ours: Any, theirs: Any) -> float:
    """Relative error of all arrays as one vector."""
    both = [
        np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]) for tree in (ours, theirs)
    ]
    return relative_error(*both)


def main() -> None:
    found: dict[str, dict[str, float]] = {}
    references: dict[tuple[str, str], Any] = {}
    for case in sys.argv[1:]:
        generation, dtype, name = case.split(":")
        with jax.enable_x64(dtype == "float64"):
            config = config_of(generation, dtype, accumulation_steps=1 if name.endswith("8") else 2)
            key = (generation, dtype)
            if key not in references:
                references[key] = gradients_on(config_of(generation, dtype, accumulation_steps=2), None)
            loss, gradients, carried = gradients_on(config, mesh_of(name))
            expected_loss, expected_gradients, expected_carried = references[key]
            found[case] = {
                "loss": distance(loss, expected_loss),
                "carried": distance(carried, expected_carried),
                "gradients": distance(gradients, expected_gradients),
            }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
