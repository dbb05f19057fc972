"""The frozen base of a tuning run: a model's weights, packed and without what an adapter has taken out of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from numpy.typing import NDArray

from rwkv_jax.config import ModelConfig, TuningConfig
from rwkv_jax.models import abstract_model
from rwkv_jax.models.packed import Int4Matrix, PackedMatrix
from rwkv_jax.models.tuned import (
    ADAPTER,
    INITIAL_PARTS,
    INITIAL_STATE,
    adapted_matrices,
    at,
    is_matrix,
    packed_matrices,
    tuned_shapes,
)
from rwkv_jax.parallel.mesh import default_device
from rwkv_jax.weights.official import official_names, place_param
from rwkv_jax.weights.quantized import pack, packed_matrix
from rwkv_jax.weights.sources import Weights
from rwkv_jax.weights.tensors import DerivedTensors, LazyTensor, WeightsError, tensor_spec


def place_base(weights: Weights, tuning: TuningConfig, model: ModelConfig, kept: Any, shardings: Any = None) -> Any:
    """The model's own parameters of a tuning run, as its steps read them, in the dtype in which it trains others.

    Args:
      weights: from `weights_for`.
      kept: what the run's checkpoints hold: pissa's base lacks B0 A0.
      shardings: where each goes, a nested dict; None is the first device.

    Raises:
      WeightsError: a number is not finite, which integers cannot hold.
    """
    tensors = without_initial(weights.tensors, tuning, model, kept)
    added = (ADAPTER, INITIAL_STATE)
    shapes = {name: x for name, x in tuned_shapes(abstract_model(model)[1], tuning, model).items() if name not in added}
    packed = packed_matrices(tuning, model)

    def leaf(path: tuple[Any, ...], like: Any, sharding: Any) -> Any:
        if isinstance(like, PackedMatrix):
            return _packed(tensors, model, path, like, sharding, weights)
        is_packed = tuple(str(entry.key) for entry in path) in packed
        dtype = "bfloat16" if is_packed else model.parameter_dtype
        return place_param(tensors, model, path, like.shape, sharding, dtype, weights.drop_pages)

    if shardings is None:
        shardings = jax.tree.map(lambda _: SingleDeviceSharding(default_device()), shapes, is_leaf=is_matrix)
    return jax.tree.map_with_path(leaf, shapes, shardings, is_leaf=is_matrix)


def _packed(
    tensors: Mapping[str, NDArray], model: ModelConfig, path: Any, like: PackedMatrix, sharding: Any, weights: Weights
) -> PackedMatrix:
    """A packed matrix, or those of layers 1 to L - 1."""
    kind = "int4" if isinstance(like, Int4Matrix) else "int8"
    layers: list[dict[str, NDArray]] = []
    for name in official_names(path, model.num_layers):
        try:
            layers.append(pack(tensors[name], kind))
        except WeightsError as error:
            raise WeightsError(f"{name}: {error}") from error
        weights.drop_pages()
    stacked = str(path[0].key) == "blocks"

    def place(part: str) -> jax.Array:
        whole = np.stack([layer[part] for layer in layers]) if stacked else layers[0][part]
        where = getattr(sharding, part) if isinstance(sharding, PackedMatrix) else sharding
        if isinstance(where, NamedSharding) and not isinstance(sharding, PackedMatrix):
            where = NamedSharding(where.mesh, PartitionSpec())
        return jax.make_array_from_callback(whole.shape, where, whole.__getitem__)

    return packed_matrix({part: place(part) for part in layers[0]}, transposed=False)


def without_initial(
    tensors: Mapping[str, NDArray], tuning: TuningConfig, model: ModelConfig, kept: Any
) -> Mapping[str, NDArray]:
    """The tensors of a base, of pissa without B0 A0."""
    if tuning.adapter != "pissa":
        return tensors
    found = {name: LazyTensor(tensor_spec(tensors, name), lambda name=name: tensors[name]) for name in tensors}
    for path, matrix in adapted_matrices(tuning, model).items():
        parts = at(kept[ADAPTER], path)
        low, up = (whole_on_host(parts[name]) for name in INITIAL_PARTS)
        for i, layer in enumerate(matrix.layers):
            name = ".".join(["blocks", str(layer), *path[1:], "weight"])
            own = (low[i], up[i]) if path[0] == "blocks" else (low, up)

            def rest(name: str = name, own: Any = own) -> NDArray:
                return np.asarray(tensors[name], own[0].dtype) - own[1] @ own[0]

            found[name] = LazyTensor(tensor_spec(tensors, name)._replace(dtype=np.dtype(low.dtype)), rest)
    return DerivedTensors(found)


def whole_on_host(x: Any) -> NDArray:
    """An array of any sharding as a host has it, in every process."""
    if isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding):
        whole = NamedSharding(x.sharding.mesh, PartitionSpec())
        x = jax.jit(lambda x: x, out_shardings=whole)(x).addressable_data(0)
    return np.asarray(x)
