"""A model on a mesh: partition specs, and the collectives of loss and gradient within one `jax.shard_map`.

Every collective of loss and gradient is written here, in models/layers.py, rwkv_kernels/sharded.py or
training/loss.py; none is left to the compiler to find. (The optimizer stays outside, and with it the gradient's norm.)
Rows are split over `data` and `fsdp`, weights are scattered over `fsdp` and gathered where a block uses them (ZeRO
stage 3, arXiv 1910.02054), heads and vocabulary are split over `tensor`, time over `sequence`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from rwkv_jax.config import ModelConfig
from rwkv_jax.models import model_type
from rwkv_jax.models.context import UNSHARDED, MeshAxes
from rwkv_jax.models.language_model import Part, PartTransform, identity
from rwkv_jax.parallel.rules import RULES, check_model, is_spec, parameter_specs, state_specs


@dataclasses.dataclass(frozen=True)
class ShardedModel:
    """Partition specs of a model on a mesh and the collectives of its training step; `ONE_DEVICE` has no mesh."""

    mesh: Mesh | None
    param_specs: Any
    """Of each parameter, a nested dict under official names."""
    state_specs: Any
    """Of a model's recurrent state."""
    tokens_spec: PartitionSpec
    """Of arrays [B, T]."""
    rows_spec: PartitionSpec
    """Of arrays [B]."""
    token_axes: tuple[str, ...]
    """The mesh axes along which devices have different tokens."""
    axes: MeshAxes
    gather_params: PartTransform
    """All-gathers a part's weights over `fsdp`."""
    shard_params: PartTransform
    """Cuts this device's shard out of a part's matrices."""
    initial_param_specs: Any
    """Of each parameter after `shard_params`, which leaves vectors whole."""

    def shard_map(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`jax.shard_map` over the mesh; without one the function itself."""
        if self.mesh is None:
            return function
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs)

    def psum(self, values: Any) -> Any:
        """The sum over devices that have different tokens."""
        return lax.psum(values, self.token_axes) if self.token_axes else values

    def as_varying(self, params: Any) -> Any:
        """Parameters marked as varying over `token_axes`, so that their gradients stay local until `psum_gradients`."""
        return self._map(lambda x, axes: lax.pcast(x, axes, to="varying"), params)

    def psum_gradients(self, gradients: Any) -> Any:
        """The sum of the local gradients of `as_varying` parameters.

        Of a weight scattered over `fsdp` it is this device's shard, which `gather_params` has reduced in its backward
        pass already.
        """
        return self._map(lax.psum, gradients)

    def specs_of(self, params: Any) -> Any:
        """The partition specs of a nested dict of some of the parameters; None without a mesh."""
        return None if self.mesh is None else jax.tree.map_with_path(lambda path, _: self._spec(path), params)

    def batch_specs(self, batch: Any) -> Any:
        """The partition specs of a batch's arrays [B, ...].

        Those that share the axes [B, T] of the first one are split over rows and time, all others over rows.
        """
        first = jax.tree.leaves(batch)[0].shape[:2]
        return jax.tree.map(
            lambda x: self.tokens_spec if x.ndim > 1 and x.shape[:2] == first else self.rows_spec, batch
        )

    def _map(self, change: Callable[[Array, tuple[str, ...]], Array], params: Any) -> Any:
        """Applies change(parameter, axes) with the axes of `token_axes` over which a parameter is replicated."""
        if self.mesh is None:
            return params

        def changed(path: tuple[Any, ...], x: Array) -> Array:
            axes = tuple(name for name in self.token_axes if name not in _names_in(self._spec(path)))
            return change(x, axes) if axes else x

        return jax.tree.map_with_path(changed, params)

    def _spec(self, path: tuple[Any, ...]) -> PartitionSpec:
        """The partition spec of the parameter at a path of the nested dict."""
        return functools.reduce(lambda specs, entry: specs[entry.key], path, self.param_specs)


def _names_in(spec: PartitionSpec) -> set[str]:
    return {name for entry in spec for name in ((entry,) if isinstance(entry, str) else entry or ())}


ONE_DEVICE = ShardedModel(None, None, None, PartitionSpec(), PartitionSpec(), (), UNSHARDED, identity, identity, None)


def shard_model(config: ModelConfig, params: Any, mesh: Mesh | None) -> ShardedModel:
    """How a model is split over a mesh.

    Args:
      params: nested dict of the parameters' shapes.
      mesh: as `mesh_from_shape` has it; None, like a mesh of one device, splits nothing.

    Raises:
      ConfigError: a size that the mesh does not divide, with the parameter's name and the nearest that it does.
    """
    if mesh is None:
        return ONE_DEVICE
    kind = model_type(config)
    check_model(kind, params, config.num_heads if config.spec.has_heads else None, mesh)
    rules = RULES.on(mesh)
    full_specs, specs = parameter_specs(kind, params), parameter_specs(kind, params, rules)
    # A vector's shard would be computed with another rounding than the same numbers of the whole vector; a matrix is
    # drawn in a loop, whose result is cut.
    initial_specs = jax.tree.map(
        lambda full, spec: spec if "fsdp" in _names_in(full) else PartitionSpec(), full_specs, specs, is_leaf=is_spec
    )
    return ShardedModel(
        mesh=mesh,
        param_specs=specs,
        state_specs=state_specs(config, rules),
        tokens_spec=rules.spec(("rows", "time"), "tokens"),
        rows_spec=rules.spec(("rows",), "rows"),
        token_axes=rules.rows + rules.time,
        axes=MeshAxes(tensor=_only(rules.heads), sequence=_only(rules.time)),
        gather_params=_part_transform(specs, functools.partial(_gather, dtype=jnp.dtype(config.dtype))),
        shard_params=_part_transform(initial_specs, _local_shard),
        initial_param_specs=initial_specs,
    )


def _only(mesh_axes: tuple[str, ...]) -> str | None:
    return mesh_axes[0] if mesh_axes else None


def _part_transform(specs: Any, change: Callable[[Array, PartitionSpec], Array]) -> PartTransform:
    """Applies change(parameter, spec) to each parameter of a part."""

    def transform(name: str, part: Part) -> Part:
        graphdef, params = nnx.split(part)
        own = specs[name]
        if name == "blocks":  # of which this is one layer
            own = jax.tree.map(lambda spec: PartitionSpec(*spec[1:]), own, is_leaf=is_spec)
        return nnx.merge(graphdef, jax.tree.map(change, nnx.to_pure_dict(params), own))

    return transform


def _gather(x: Array, spec: PartitionSpec, *, dtype: jnp.dtype) -> Array:
    for axis, entry in enumerate(spec):
        if entry == "fsdp" or (isinstance(entry, tuple) and "fsdp" in entry):
            return _all_gather(x, axis, dtype, x.dtype)
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _all_gather(x: Array, axis: int, dtype: jnp.dtype, own_dtype: jnp.dtype) -> Array:
    """All-gathers a weight over `fsdp` in the compute dtype and casts it back to the dtype in which it is stored.

    The cast back keeps its gradient, which may be a sum over tokens or loss chunks, from being rounded at each term.
    """
    return lax.all_gather(x.astype(dtype), "fsdp", axis=axis, tiled=True).astype(own_dtype)


def _all_gather_forward(x: Array, axis: int, dtype: jnp.dtype, own_dtype: jnp.dtype) -> tuple[Array, None]:
    return _all_gather(x, axis, dtype, own_dtype), None


def _all_gather_backward(
    axis: int, dtype: jnp.dtype, own_dtype: jnp.dtype, saved: None, cotangent: Array
) -> tuple[Array]:
    del dtype, own_dtype, saved
    return (lax.psum_scatter(cotangent, "fsdp", scatter_dimension=axis, tiled=True),)


_all_gather.defvjp(_all_gather_forward, _all_gather_backward)


def _local_shard(x: Array, spec: PartitionSpec) -> Array:
    for axis, entry in enumerate(spec):
        names = (entry,) if isinstance(entry, str) else entry or ()
        if names:
            size = x.shape[axis] // lax.axis_size(names)
            x = lax.dynamic_slice_in_dim(x, lax.axis_index(names) * size, size, axis)
    return x
