"""Meshes, sharding rules, the sharded model, and runs of several processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rwkv_jax.lazy import lazy_names

if TYPE_CHECKING:
    from rwkv_jax.parallel.mesh import MeshShape, make_mesh, mesh_shape
    from rwkv_jax.parallel.processes import DisagreementError, LostProcessError, Processes, join
    from rwkv_jax.parallel.sharded_model import ShardedModel, shard_model

__all__ = [
    "DisagreementError",
    "LostProcessError",
    "MeshShape",
    "Processes",
    "ShardedModel",
    "join",
    "make_mesh",
    "mesh_shape",
    "shard_model",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "mesh": ("MeshShape", "make_mesh", "mesh_shape"),
        "processes": ("DisagreementError", "LostProcessError", "Processes", "join"),
        "sharded_model": ("ShardedModel", "shard_model"),
    },
)
