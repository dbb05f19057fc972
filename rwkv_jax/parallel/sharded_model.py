"""One model as shards: what each device holds of it, gathers, and adds up, within one `jax.shard_map`.

Every collective of loss and gradient is written here, in models/shards.py, models/layers.py, rwkv_kernels/sharded.py or
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
from rwkv_jax.models.language_model import Part, PartTransform, identity
from rwkv_jax.models.shards import UNSHARDED, MeshAxes
from rwkv_jax.parallel.rules import RULES, check_model, is_spec, parameter_specs, state_specs


@dataclasses.dataclass(frozen=True)
class ShardedModel:
    """A model on a mesh. `ONE_DEVICE` has none, and nothing to tell anyone."""

    mesh: Mesh | None
    params: Any
    """The partition of each parameter, a nested dict under official names."""
    state: Any
    """The partitions of a model's state."""
    tokens: PartitionSpec
    """The partition of what has axes [B, T]."""
    rows: PartitionSpec
    """The partition of what has the axis [B]."""
    token_axes: tuple[str, ...]
    """The mesh axes along which devices have different tokens."""
    axes: MeshAxes
    prepare: PartTransform
    """Gathers a part's weights."""
    keep: PartTransform
    """This device's share of a part's matrices, which it has whole."""
    kept: Any
    """The partition of each parameter after `keep`: vectors are still whole."""

    def run(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """The function on every device's shards of its arguments."""
        if self.mesh is None:
            return function
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs)

    def sum(self, values: Any) -> Any:
        """The sum over devices that have different tokens."""
        return lax.psum(values, self.token_axes) if self.token_axes else values

    def own(self, params: Any) -> Any:
        """Parameters as each device's own, so that gradients stay with the devices until `sum_gradients`."""
        return self._map(lambda x, axes: lax.pcast(x, axes, to="varying"), params)

    def sum_gradients(self, gradients: Any) -> Any:
        """The sum of the gradients that each device has of `own` parameters; of those scattered over `fsdp`, this
        device's share, which gathering has summed already.
        """
        return self._map(lax.psum, gradients)

    def _map(self, change: Callable[[Array, tuple[str, ...]], Array], params: Any) -> Any:
        """Changes what is the same on devices that have different tokens, given the axes over which it is."""
        if self.mesh is None:
            return params

        def changed(x: Array, spec: PartitionSpec) -> Array:
            axes = tuple(name for name in self.token_axes if name not in _names_in(spec))
            return change(x, axes) if axes else x

        return jax.tree.map(changed, params, self.params)


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
    check_model(kind, params, None if config.generation == "4" else config.num_heads, mesh)
    rules = RULES.on(mesh)
    full_specs, specs = parameter_specs(kind, params), parameter_specs(kind, params, rules)
    # XLA would compute a share of a vector otherwise than the same numbers of the whole, by one rounding; a matrix is
    # drawn in a loop, whose result is cut.
    kept = jax.tree.map(
        lambda full, spec: spec if "fsdp" in _names_in(full) else PartitionSpec(), full_specs, specs, is_leaf=is_spec
    )
    return ShardedModel(
        mesh=mesh,
        params=specs,
        state=state_specs(config.generation, rules),
        tokens=rules.spec(("rows", "time"), "tokens"),
        rows=rules.spec(("rows",), "rows"),
        token_axes=rules.rows + rules.time,
        axes=MeshAxes(tensor=_only(rules.heads), sequence=_only(rules.time)),
        prepare=_of_each_part(specs, functools.partial(_gather, dtype=jnp.dtype(config.dtype))),
        keep=_of_each_part(kept, _own_share),
        kept=kept,
    )


def _only(mesh_axes: tuple[str, ...]) -> str | None:
    return mesh_axes[0] if mesh_axes else None


def _of_each_part(specs: Any, change: Callable[[Array, PartitionSpec], Array]) -> PartTransform:
    """Changes each parameter of a part as its partition asks for."""

    def changed(name: str, part: Part) -> Part:
        graphdef, params = nnx.split(part)
        own = specs[name]
        if name == "blocks":  # of which this is one layer
            own = jax.tree.map(lambda spec: PartitionSpec(*spec[1:]), own, is_leaf=is_spec)
        return nnx.merge(graphdef, jax.tree.map(change, nnx.to_pure_dict(params), own))

    return changed


def _gather(x: Array, spec: PartitionSpec, *, dtype: jnp.dtype) -> Array:
    for axis, entry in enumerate(spec):
        if entry == "fsdp" or (isinstance(entry, tuple) and "fsdp" in entry):
            return _gathered(x, axis, dtype, x.dtype)
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gathered(x: Array, axis: int, dtype: jnp.dtype, own_dtype: jnp.dtype) -> Array:
    """A weight whole, rounded to the compute dtype in which it travels, from the devices of `fsdp`.

    In its own dtype again: where its gradient is a sum over tokens or pieces of them, that must not be rounded.
    """
    return lax.all_gather(x.astype(dtype), "fsdp", axis=axis, tiled=True).astype(own_dtype)


def _gathered_forward(x: Array, axis: int, dtype: jnp.dtype, own_dtype: jnp.dtype) -> tuple[Array, None]:
    return _gathered(x, axis, dtype, own_dtype), None


def _gathered_backward(
    axis: int, dtype: jnp.dtype, own_dtype: jnp.dtype, saved: None, cotangent: Array
) -> tuple[Array]:
    del dtype, own_dtype, saved
    return (lax.psum_scatter(cotangent, "fsdp", scatter_dimension=axis, tiled=True),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def _own_share(x: Array, spec: PartitionSpec) -> Array:
    for axis, entry in enumerate(spec):
        names = (entry,) if isinstance(entry, str) else entry or ()
        if names:
            size = x.shape[axis] // lax.axis_size(names)
            x = lax.dynamic_slice_in_dim(x, lax.axis_index(names) * size, size, axis)
    return x
