"""Puts an adapter into a model: its matrices become `AdaptedMatrix`, what was trained in full is replaced."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from numpy.typing import NDArray

from rwkv_jax.models import LanguageModel
from rwkv_jax.models.adapted import AdaptedMatrix
from rwkv_jax.models.folded_tables import fixed_parameters
from rwkv_jax.models.packed import PackedMatrix
from rwkv_jax.tuning.adapter import Adapter, AdapterError, Parts
from rwkv_jax.weights.official import official_shapes

_RANK_AXES = {"lora_A": 0, "lora_B": 1}
"""Of parts that zeros may fill up to another rank."""


def adapted_model(model: LanguageModel, adapter: Adapter) -> LanguageModel:
    """The same model with an adapter that it has been checked against; shares the arrays that do not change.

    Raises:
      AdapterError: what was trained in full is packed in the model, Bat has several ranks in the layers of a matrix, or
        as `refuse_fixed`.
    """
    refuse_fixed(adapter, fixed_parameters(model))
    shapes = official_shapes(model.config)
    graphdef, state = nnx.split(model, nnx.Param)
    state = jax.tree.map(lambda x: x, state)  # variables of its own, or the given model would change
    for names, variable in parameters_of(state, model.config.num_layers):
        value = variable.get_value()
        if any(name in adapter.replaced for name in names):
            value = _replaced(names, value, adapter.replaced)
        matrices = [name.removesuffix(".weight") for name in names]
        if any(matrix in adapter.parts for matrix in matrices):
            value = _adapted(matrices, value, adapter, shapes)
        variable.set_value(value)
    return nnx.merge(graphdef, state)


def refuse_fixed(adapter: Adapter, fixed: Collection[str]) -> None:
    """Raises AdapterError for an adapter of parameters that can no longer change (`fixed_parameters`)."""
    changed = {*adapter.replaced, *(f"{name}.weight" for name in adapter.parts)}
    if touched := sorted(changed.intersection(fixed)):
        raise AdapterError(
            f"{touched[0]}: the adapter changes it, of which the model's tables are made; load the base with tables = "
            "'device'"
        )


def parameters_of(state: Any, num_layers: int) -> Iterator[tuple[list[str], Any]]:
    """Each parameter of a model's state with its official names: one, or for stacked layers those of 1 to L - 1."""
    for path, variable in nnx.to_flat_state(state):
        folder, *rest = path
        if folder == "first_block":
            yield [_joined("blocks", 0, *rest)], variable
        elif folder != "blocks":
            yield [_joined(*path)], variable
        elif isinstance(rest[0], int):
            yield [_joined("blocks", rest[0] + 1, *rest[1:])], variable
        else:
            yield [_joined("blocks", layer, *rest) for layer in range(1, num_layers)], variable


def _joined(*entries: object) -> str:
    return ".".join(map(str, entries))


def _replaced(names: Sequence[str], value: Any, replaced: Mapping[str, NDArray]) -> Array:
    if isinstance(value, PackedMatrix):
        raise AdapterError(f"{names[0]}: was trained in full, and is quantized here; load the base without quantize")
    if len(names) == 1 and value.ndim == replaced[names[0]].ndim:
        return jax.device_put(jnp.asarray(replaced[names[0]], value.dtype), value.sharding)
    for layer, name in enumerate(names):
        if name in replaced:
            value = value.at[layer].set(jnp.asarray(replaced[name], value.dtype))
    return value


def _adapted(matrices: Sequence[str], base: Any, adapter: Adapter, shapes: Mapping[str, Any]) -> AdaptedMatrix:
    own = {matrix: adapter.parts[matrix] for matrix in matrices if matrix in adapter.parts}
    kind = adapter.kind
    if kind == "miss" and len({len(parts["miss_block"]) for parts in own.values()}) > 1:
        own, kind = dict(adapter.as_lora(shapes).parts), "lora"
    dtype = np.promote_types(np.float32, base.dtype if base.dtype in (np.float32, np.float64) else np.float32)
    stacked = {
        part: np.stack([_of_layer(own.get(matrix), part, list(own.values())) for matrix in matrices]).astype(dtype)
        for part in next(iter(own.values()))
    }
    scale = np.array([adapter.scales.get(matrix, 0.0) for matrix in matrices], dtype)
    if base.ndim == 2:
        stacked, scale = {part: x[0] for part, x in stacked.items()}, scale[0]
    parts, scale = jax.device_put((stacked, scale), beside(base))
    return AdaptedMatrix(base, parts, scale, kind="lora" if kind == "rslora" else kind)


def _of_layer(parts: Parts | None, part: str, all_parts: Sequence[Parts]) -> NDArray:
    """A part of one layer, filled up with zeros to the largest rank; zeros where the layer is not adapted."""
    shape = tuple(map(max, *(of[part].shape for of in all_parts))) if len(all_parts) > 1 else all_parts[0][part].shape
    if parts is None:
        return np.zeros(shape, np.float32)
    x = np.asarray(parts[part])
    x = x if x.dtype == np.float64 else x.astype(np.float32)
    if x.shape == shape:
        return x
    if part not in _RANK_AXES:
        raise AdapterError(
            f"{part}: has several sizes ({list(x.shape)} and up to {list(shape)}) in the layers of a matrix, which are "
            "held as one array; merge the adapter (rwkv merge)"
        )
    return np.pad(x, [(0, to - size) for size, to in zip(x.shape, shape, strict=True)])


def beside(base: Any) -> Any:
    """Where an adapter's parts go: on its matrix's device, or on all devices of its mesh."""
    sharding = jax.tree.leaves(base)[0].sharding
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding
