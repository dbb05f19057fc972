"""Meshes, sharding rules, the sharded model, and runs of several processes."""

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
