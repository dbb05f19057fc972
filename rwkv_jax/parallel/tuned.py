"""A tuning run's parameters on a mesh: adapters and packed matrices are split as the matrices they belong to."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from rwkv_jax.config import ConfigError, ModelConfig, TuningConfig
from rwkv_jax.models.initial_state import AXES
from rwkv_jax.models.packed import PackedMatrix
from rwkv_jax.models.tuned import ADAPTER, INITIAL_STATE, adapted_matrices, at, is_matrix, set_at
from rwkv_jax.parallel.rules import RULES, check_divisible, entry_axes, packed_specs, part_spec
from rwkv_jax.parallel.sharded_model import ShardedModel


def shard_tuned(sharded: ShardedModel, tuning: TuningConfig, model: ModelConfig, params: Any) -> ShardedModel:
    """The sharded model of a tuning run.

    Args:
      params: shapes of the run's parameters, with packed matrices in place of some.

    Raises:
      ConfigError: an array that the mesh does not divide.
    """
    mesh = sharded.mesh
    if mesh is None:
        return sharded
    specs = sharded.param_specs
    adapter: dict[str, Any] = {}
    for path, matrix in adapted_matrices(tuning, model).items():
        spec = at(specs, (*path, "weight"))
        parts = at(params[ADAPTER], path)
        own = {name: part_spec(str(tuning.adapter), name, spec) for name in parts}
        for name, part in parts.items():
            check_divisible(part.shape, own[name], mesh, ".".join([ADAPTER, *path, name]))
        if tuning.adapter == "bat":
            _check_blocks(tuning, ".".join(path), matrix.num_inputs, spec, mesh)
        set_at(adapter, path, own)
    added = {ADAPTER: adapter} if adapter else {}
    if INITIAL_STATE in params:
        added[INITIAL_STATE] = _state_specs(params[INITIAL_STATE], mesh)
    whole = {name: part for name, part in params.items() if name in specs}

    def base(path: tuple[Any, ...], x: Any, spec: Any) -> Any:
        if not isinstance(x, PackedMatrix):
            return spec
        found = packed_specs(x, spec)
        for part in dataclasses.fields(x):
            if not part.metadata.get("static"):
                name = ".".join([*(str(entry.key) for entry in path), part.name])
                check_divisible(getattr(x, part.name).shape, getattr(found, part.name), mesh, name)
        return found

    split = jax.tree.map_with_path(base, whole, specs, is_leaf=is_matrix)
    return dataclasses.replace(sharded, param_specs=split | added)


def _state_specs(state: Any, mesh: Mesh) -> Any:
    """Specs of a tuned state, whose heads are split; all rows read the same."""
    rules = RULES.on(mesh)
    return {
        part: {name: rules.spec((*[None] * (part == "blocks"), *AXES[name]), name) for name in arrays}
        for part, arrays in state.items()
    }


def _check_blocks(tuning: TuningConfig, name: str, num_inputs: int, spec: PartitionSpec, mesh: Mesh) -> None:
    """Refuses shards of inputs that would cut a block of bat."""
    ways = mesh.shape["tensor"] if "tensor" in entry_axes(spec[-1]) else 1
    if num_inputs // ways % tuning.rank:
        raise ConfigError(
            f"tuning.rank = {tuning.rank}: parallel.tensor = {ways} gives a device {num_inputs // ways} inputs of "
            f"{name}, which bat cannot cut into blocks; take a rank that divides them"
        )
