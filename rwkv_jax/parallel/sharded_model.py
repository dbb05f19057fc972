"""A model on a mesh: its partition specs, and the collectives of loss and gradient inside one `jax.shard_map`.

All collectives of loss and gradient are explicit: here, in models/layers.py, rwkv_kernels/sharded.py and
training/loss.py. XLA partitions only the optimizer and the gradient norm, which stay outside. Rows are split over
`data` and `fsdp`; weights are sharded over `fsdp` and all-gathered where a block uses them (ZeRO stage 3,
arXiv 1910.02054); heads and vocabulary are split over `tensor`, time over `sequence`.
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
from rwkv_jax.models.adapted import AdaptedMatrix
from rwkv_jax.models.context import UNSHARDED, MeshAxes
from rwkv_jax.models.language_model import Part, PartTransform, identity
from rwkv_jax.models.packed import PackedMatrix
from rwkv_jax.models.stacks import has_layer_axis
from rwkv_jax.models.tuned import is_matrix
from rwkv_jax.parallel.rules import (
    RULES,
    HasParameterAxes,
    check_model,
    entry_axes,
    is_spec,
    packed_specs,
    parameter_specs,
    part_spec,
    spec_axes,
    state_specs,
)


@dataclasses.dataclass(frozen=True)
class ShardedModel:
    """Partition specs and collectives of a model on a mesh; `ONE_DEVICE` has no mesh."""

    mesh: Mesh | None
    param_specs: Any
    """Nested dict of partition specs by official parameter names."""
    state_specs: Any
    """Partition specs of the recurrent state."""
    tokens_spec: PartitionSpec
    """For arrays [B, T]."""
    rows_spec: PartitionSpec
    """For arrays [B]."""
    token_axes: tuple[str, ...]
    """Mesh axes along which devices have different tokens."""
    axes: MeshAxes
    gather_params: PartTransform
    """All-gathers the weights of a block, the embedding or the head over `fsdp`."""
    shard_params: PartTransform
    """Slices this device's shard out of a part's whole matrices."""
    initial_param_specs: Any
    """`param_specs` after `shard_params`, which leaves vectors whole."""
    carried_specs: Any = None
    """Partition specs of what a run carries from step to step, if that is more than the model's state."""

    def shard_map(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`jax.shard_map` over the mesh; without a mesh, the function itself."""
        if self.mesh is None:
            return function
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs)

    def psum(self, values: Any) -> Any:
        """Sums over devices with different tokens."""
        return lax.psum(values, self.token_axes) if self.token_axes else values

    def as_varying(self, params: Any) -> Any:
        """Marks parameters as varying over `token_axes`: their gradients stay local until `psum_gradients`."""
        return self._map(lambda x, axes: lax.pcast(x, axes, to="varying"), params)

    def psum_gradients(self, gradients: Any) -> Any:
        """Sums the local gradients of `as_varying` parameters over `token_axes`.

        Gradients of weights sharded over `fsdp` were reduce-scattered over it in `gather_params`' backward pass.
        """
        return self._map(lax.psum, gradients)

    def select_param_specs(self, params: Any) -> Any:
        """Partition specs of a nested dict of some of the parameters; None without a mesh."""
        return None if self.mesh is None else jax.tree.map_with_path(lambda path, _: self._spec(path), params)

    def batch_specs(self, batch: Any) -> Any:
        """Partition specs of a batch's arrays [B, ...].

        Arrays with the leading axes [B, T] of the first one are split over rows and time, all others over rows.
        """
        first = jax.tree.leaves(batch)[0].shape[:2]
        return jax.tree.map(
            lambda x: self.tokens_spec if x.ndim > 1 and x.shape[:2] == first else self.rows_spec, batch
        )

    def _map(self, change: Callable[[Array, tuple[str, ...]], Array], params: Any) -> Any:
        """Applies change(parameter, axes) with the axes of `token_axes` over which the parameter is replicated."""
        if self.mesh is None:
            return params

        def changed(path: tuple[Any, ...], x: Array) -> Array:
            axes = tuple(name for name in self.token_axes if name not in spec_axes(self._spec(path)))
            return change(x, axes) if axes else x

        return jax.tree.map_with_path(changed, params)

    def _spec(self, path: tuple[Any, ...]) -> PartitionSpec:
        """The partition spec of the parameter at a path of the nested dict."""

        def within(specs: Any, entry: Any) -> Any:  # of a dict, or of a packed matrix
            return specs[entry.key] if isinstance(entry, jax.tree_util.DictKey) else getattr(specs, entry.name)

        return functools.reduce(within, path, self.param_specs)


ONE_DEVICE = ShardedModel(None, None, None, PartitionSpec(), PartitionSpec(), (), UNSHARDED, identity, identity, None)


def shard_model(
    config: ModelConfig, params: Any, mesh: Mesh | None, kind: HasParameterAxes | None = None
) -> ShardedModel:
    """Shards a model over a mesh.

    Args:
      params: nested dict of the parameters' shapes.
      kind: knows the parameters' axes; None is the config's model class.
      mesh: from `mesh_from_shape`; None for one device.

    Raises:
      ConfigError: a size that the mesh does not divide; the message has the parameter's name and the nearest sizes.
    """
    if mesh is None:
        return ONE_DEVICE
    kind = kind or model_type(config)
    has_attention = len(config.rwkv_layers) < config.num_layers  # whose heads of keys and values queries may share
    heads = config.num_kv_heads if has_attention else config.num_heads
    check_model(kind, params, heads if config.spec.has_heads else None, mesh)
    rules = RULES.on(mesh)
    full_specs, specs = parameter_specs(kind, params), parameter_specs(kind, params, rules)
    # Initial vectors are computed and kept whole, since XLA may round a shard of the computation differently. Matrices
    # are drawn whole in a loop, and only the results are sliced.
    initial_specs = jax.tree.map(
        lambda full, spec: spec if "fsdp" in spec_axes(full) else PartitionSpec(), full_specs, specs, is_leaf=is_spec
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
    """Applies change(parameter, spec) to each parameter of a part, whose name may be a path, such as encoder.blocks."""

    def transform(name: str, part: Part) -> Part:
        graphdef, params = nnx.split(part)
        path = name.split(".")
        own = functools.reduce(lambda specs, key: specs[key], path, specs)
        if has_layer_axis(path):  # the part is one layer, without the leading axis
            own = jax.tree.map(lambda spec: PartitionSpec(*spec[1:]), own, is_leaf=is_spec)
        return nnx.merge(graphdef, jax.tree.map(change, nnx.to_pure_dict(params), own, is_leaf=is_matrix))

    return transform


def _gather(x: Any, spec: PartitionSpec, *, dtype: jnp.dtype) -> Any:
    if isinstance(x, AdaptedMatrix):
        parts = {name: _gather(part, part_spec(x.kind, name, spec), dtype=dtype) for name, part in x.parts.items()}
        inputs_over = "tensor" if "tensor" in entry_axes(spec[-1]) else None
        return dataclasses.replace(x, base=_gather(x.base, spec, dtype=dtype), parts=parts, inputs_over=inputs_over)
    if isinstance(x, PackedMatrix):
        return jax.tree.map(_gather_frozen, x, packed_specs(x, spec))
    for axis, entry in enumerate(spec):
        if "fsdp" in entry_axes(entry):
            return _all_gather(x, axis, dtype, x.dtype)
    return x


def _gather_frozen(x: Array, spec: PartitionSpec) -> Array:
    """All-gathers an array without a gradient, as stored."""
    for axis, entry in enumerate(spec):
        if "fsdp" in entry_axes(entry):
            return lax.all_gather(x, "fsdp", axis=axis, tiled=True)
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _all_gather(x: Array, axis: int, dtype: jnp.dtype, own_dtype: jnp.dtype) -> Array:
    """All-gathers a weight over `fsdp` in the compute dtype and casts it back to its own dtype.

    The cast back keeps the gradient, a sum over tokens or loss chunks, from being rounded at every term.
    """
    return lax.all_gather(x.astype(dtype), "fsdp", axis=axis, tiled=True).astype(own_dtype)


def _all_gather_forward(x: Array, axis: int, dtype: jnp.dtype, own_dtype: jnp.dtype) -> tuple[Array, None]:
    return _all_gather(x, axis, dtype, own_dtype), None


def _all_gather_backward(
    axis: int, dtype: jnp.dtype, own_dtype: jnp.dtype, saved: None, cotangent: Array
) -> tuple[Array]:
    return (lax.psum_scatter(cotangent, "fsdp", scatter_dimension=axis, tiled=True),)


_all_gather.defvjp(_all_gather_forward, _all_gather_backward)


def _local_shard(x: Array, spec: PartitionSpec) -> Array:
    for axis, entry in enumerate(spec):
        if names := entry_axes(entry):
            size = x.shape[axis] // lax.axis_size(names)
            x = lax.dynamic_slice_in_dim(x, lax.axis_index(names) * size, size, axis)
    return x
