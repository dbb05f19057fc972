"""States of a run that differ at each step, saved."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp

from rwkv_jax.config import ModelConfig, TrainConfig
from rwkv_jax.training import checkpoints as ckpt
from rwkv_jax.training.state import TrainState

CONFIG = TrainConfig(model=ModelConfig(vocab_size=300, num_layers=2, width=32, head_dim=16))


def make_state(step: int, size: int = 64) -> TrainState:
    """A state that differs at each step."""
    values = jax.random.normal(jax.random.key(step), (size, size))
    params = {"emb": values, "blocks": {"w0": values[:, :3] * 2, "k": jnp.bfloat16(values[0])}}
    return TrainState(
        params=params,
        opt_state=(jax.tree.map(jnp.square, params), jnp.float32(step)),
        step=jnp.int32(step),
        key=jax.random.key_data(jax.random.key(0)),
        bad_steps=jnp.int32(0),
        skipped_steps=jnp.int32(step // 2),
    )


def shapes_of(state: TrainState) -> TrainState:
    """What such a state is restored as."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


LIKE = shapes_of(make_state(0))


def save(run_dir: Path, *steps: int, keep: int = 3) -> None:
    """The states of some steps."""
    with ckpt.Checkpoints(run_dir, keep, print) as checkpoints:
        for step in steps:
            checkpoints.save(make_state(step), step)


def restore(checkpoints: ckpt.Checkpoints, like: TrainState = LIKE) -> TrainState:
    """The state of the newest intact checkpoint, of which there must be one."""
    restored = checkpoints.restore(like)
    assert restored is not None
    return restored.state


def truncate_data(folder: Path) -> None:
    """Leaves half of each file of a checkpoint's arrays."""
    for path in (folder / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
