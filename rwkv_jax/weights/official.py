"""Maps official names and shapes to our parameter tree and back, and infers the model's config.

Our tree has the official names with one difference: layer 0 is `first_block`, and layers 1 to L - 1 are stacked on a
leading axis under `blocks`. Nothing is transposed, reshaped or rounded, so a round trip is bit-exact.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from numpy.typing import NDArray

from rwkv_jax.config import ModelConfig
from rwkv_jax.models import abstract_model, model_type
from rwkv_jax.models.decoding import tables_by_token
from rwkv_jax.models.host_tables import HostTable, host_table
from rwkv_jax.models.stacks import FIRST, is_stack, stacked_layers
from rwkv_jax.parallel.mesh import AXES, default_device
from rwkv_jax.parallel.rules import shardings
from rwkv_jax.parallel.sharded_model import shard_model
from rwkv_jax.weights.model_config import compute_dtype as compute_dtype
from rwkv_jax.weights.model_config import fields_in_metadata as fields_in_metadata
from rwkv_jax.weights.model_config import read_config as read_config
from rwkv_jax.weights.tensors import BFLOAT16, DerivedTensors, LazyTensor, TensorSpec, WeightsError, tensor_spec

_LISTED = 40  # mismatched tensors listed in an error


def _abstract_params(config: ModelConfig) -> Any:
    """The shapes of a model's parameters; does not need JAX's float64 mode."""
    return abstract_model(dataclasses.replace(config, dtype="float32") if config.dtype == "float64" else config)[1]


def official_names(path: tuple[Any, ...], num_layers: int) -> list[str]:
    """The official names of a parameter: one, or for stacked layers one of each."""
    folder, *rest = (str(entry.key) for entry in path)
    if is_stack(folder):
        return [".".join(["blocks", str(layer), *rest]) for layer in stacked_layers(folder, num_layers)]
    return [".".join([*(["blocks", "0"] if folder == FIRST else [folder]), *rest])]


def official_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a model's official file, in the order in which we write them."""
    params = _abstract_params(config)
    shapes = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        names = official_names(path, config.num_layers)
        own = leaf.shape[1:] if is_stack(str(path[0].key)) else leaf.shape
        shapes |= dict.fromkeys(names, own)

    def order(name: str) -> tuple[int, int]:
        first, second, *_ = name.split(".")
        return {"emb": 0, "ln_out": 2, "head": 3}.get(first, 1), int(second) if first == "blocks" else 0

    return {name: shapes[name] for name in sorted(shapes, key=order)}


def check_tensors(tensors: Mapping[str, NDArray], config: ModelConfig) -> None:
    """Checks names, shapes and dtypes of a file's tensors against its model.

    Raises:
      WeightsError: lists every tensor that is missing, unexpected, misshapen or of an unsupported dtype.
    """
    specs = {name: tensor_spec(tensors, name) for name in tensors}
    lines = [
        f"wrong dtype  {name} is {spec.dtype}, must be float32, bfloat16, float16 or float64"
        for name, spec in specs.items()
        if not _is_floating(spec.dtype)
    ]
    _check_shapes({name: spec.shape for name, spec in specs.items()}, config, lines)


def _check_shapes(found: Mapping[str, tuple[int, ...]], config: ModelConfig, others: Sequence[str] = ()) -> None:
    expected = official_shapes(config)
    lines = [f"missing      {name} {list(shape)}" for name, shape in expected.items() if name not in found]
    lines += [f"not expected {name} {list(shape)}" for name, shape in found.items() if name not in expected]
    lines += [
        f"misshapen    {name} is {list(shape)}, must be {list(expected[name])}"
        for name, shape in found.items()
        if name in expected and shape != expected[name]
    ]
    lines += others
    if lines:
        more = [f"and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
        raise WeightsError(
            f"these are not the tensors of {config.spec.a_title} model of {config.num_layers} layers of width "
            f"{config.width}:\n  " + "\n  ".join([*lines[:_LISTED], *more])
        )


def _is_floating(dtype: np.dtype[Any]) -> bool:
    return dtype == BFLOAT16 or dtype in (np.dtype("float16"), np.dtype("float32"), np.dtype("float64"))


def shardings_on(mesh: Mesh, config: ModelConfig) -> Any:
    """The sharding of each parameter of a model on a mesh, as a nested dict.

    On a mesh of `rwkv_jax.parallel.mesh` it is as in training. On any other mesh, matrices are split over all devices
    (`split_over`).

    Raises:
      ConfigError: a size that the mesh of a training run does not divide.
    """
    params = _abstract_params(config)
    if mesh.axis_names != AXES:
        return jax.tree.map_with_path(
            lambda path, x: split_over(mesh, x.shape, stacked=is_stack(str(path[0].key))), params
        )
    return shardings(mesh, shard_model(config, params, mesh).param_specs)


def split_over(mesh: Mesh, shape: tuple[int, ...], *, stacked: bool) -> NamedSharding:
    """The sharding of one parameter: matrices are split over all devices along the first axis that divides evenly.

    Vectors, and matrices that cannot be split evenly, are replicated; the axis of stacked layers is not split. The
    mesh's axes are used as `AxisType.Auto`: XLA partitions the computation.
    """
    own = shape[1:] if stacked else shape
    axes: list[Any] = [None] * len(shape)
    if len(own) == 2:
        divisible = (axis for axis in range(len(shape) - 2, len(shape)) if shape[axis] % mesh.size == 0)
        if (axis := next(divisible, None)) is not None:
            axes[axis] = mesh.axis_names
    return NamedSharding(Mesh(mesh.devices, mesh.axis_names), PartitionSpec(*axes))


def place_params(
    tensors: Mapping[str, NDArray],
    config: ModelConfig,
    *,
    dtype: str | None = None,
    shardings: Any = None,
    tables_on_host: bool = False,
    drop_pages: Callable[[], None] = lambda: None,
) -> Any:
    """Builds our parameter tree from official tensors, copying each shard straight to its device.

    Args:
      tensors: checked by `check_tensors`.
      dtype: of the parameters; None keeps each tensor's. Layers, which are one array, have the dtype that holds the
        numbers of all exactly, where a file has several, as with merged adapters.
      shardings: of each parameter, a nested dict (`shardings_on`); None is the first device.
      tables_on_host: whether tables by token stay in the host's memory (`HostTable`).
      drop_pages: frees the memory of pages read; called after each tensor.

    Raises:
      WeightsError: float64 while JAX's float64 mode is off.
    """

    on_host_names = tables_by_token(model_type(config)) if tables_on_host else ()

    def leaf(path: tuple[Any, ...], like: jax.ShapeDtypeStruct, sharding: Any) -> jax.Array | HostTable:
        on_host = ".".join(str(entry.key) for entry in path[1:]) in on_host_names
        return place_param(tensors, config, path, like.shape, None if on_host else sharding, dtype, drop_pages)

    params = _abstract_params(config)
    if shardings is None:
        shardings = jax.tree.map(lambda _: SingleDeviceSharding(default_device()), params)
    return jax.tree.map_with_path(leaf, params, shardings)


def place_param(
    tensors: Mapping[str, NDArray],
    config: ModelConfig,
    path: tuple[Any, ...],
    shape: tuple[int, ...],
    sharding: Any,
    dtype: str | None,
    drop_pages: Callable[[], None],
) -> jax.Array | HostTable:
    """One parameter of `place_params`, by its path in the tree; without a sharding a table in the host's memory."""
    stacked = is_stack(str(path[0].key))
    names = official_names(path, config.num_layers)
    own = np.dtype(dtype) if dtype is not None else _widest({tensor_spec(tensors, name).dtype for name in names})
    if own == np.float64 and not jax.config.read("jax_enable_x64"):
        raise WeightsError(f"{names[0]}: float64, which JAX has switched off; set jax_enable_x64, or give a dtype")

    def part(index: Any) -> NDArray:
        chosen = names[index[0]] if stacked else names
        sources = [tensors[name][index[1:] if stacked else index] for name in chosen]
        out = _empty((len(sources), *sources[0].shape), own)
        for target, source in zip(out, sources, strict=True):
            target[...] = source
            drop_pages()
        return out if stacked else out[0]

    if sharding is None:
        return host_table(part(tuple(slice(None) for _ in shape)), default_device())
    return jax.make_array_from_callback(shape, sharding, part)


def _widest(dtypes: set[np.dtype[Any]]) -> np.dtype[Any]:
    """The one that holds the numbers of all exactly; bfloat16 and float16 are both in float32 only."""
    return dtypes.pop() if len(dtypes) == 1 else np.dtype("float64" if np.dtype("float64") in dtypes else "float32")


def _empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray:
    """An uninitialized array, aligned so that JAX on a CPU uses its memory without another copy."""
    alignment = 64
    buffer = np.empty(math.prod(shape) * dtype.itemsize + alignment, np.uint8)
    offset = -buffer.ctypes.data % alignment
    return buffer[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


def require_official_names(config: ModelConfig) -> None:
    """Raises WeightsError for a model that has no official names."""
    if not config.spec.has_official_names:
        raise WeightsError(
            f"model.architecture = {config.architecture!r}: only RWKV's weights have official names; "
            f"{config.spec.a_title} stays in its run folder, which from_pretrained and the commands read"
        )


def fetched(array: jax.Array, layer: int | None) -> LazyTensor:
    """A tensor fetched from the device on access: one layer of an array of stacked layers; None is a whole array."""
    shape = array.shape if layer is None else array.shape[1:]
    spec = TensorSpec(shape, np.dtype(array.dtype))
    return LazyTensor(spec, lambda: np.asarray(array if layer is None else array[layer]))


def official_tensors(config: ModelConfig, params: Any) -> DerivedTensors:
    """A model's parameters under their official names, layer by layer, fetched from the device on access.

    Raises WeightsError for a model that has no official names, and parameters that are not those of the config's model.
    """
    require_official_names(config)
    return named_tensors(config, params)


def named_tensors(config: ModelConfig, params: Any) -> DerivedTensors:
    """`official_tensors` of any model, under names that are made as official ones are."""
    tensors: dict[str, LazyTensor] = {}
    if any(isinstance(x, HostTable) for x in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, HostTable))):
        raise WeightsError("the model's tables are in the host's memory; for this load it without tables='host'")
    for path, leaf in jax.tree.leaves_with_path(params):
        names = official_names(path, config.num_layers)
        if not leaf.is_fully_addressable:
            raise WeightsError(f"{names[0]}: parts of it are on other hosts; gather the parameters first")
        stacked = is_stack(str(path[0].key))
        tensors |= {name: fetched(leaf, layer if stacked else None) for layer, name in enumerate(names)}
    layer = {name.removeprefix("blocks.0.") for name in tensors if name.startswith("blocks.0.")}
    if not layer.issuperset(config.spec.table_maps.values()):
        raise WeightsError("the model's tables are folded; for this load it without tables='folded'")
    # The user may have changed the model.
    _check_shapes({name: tensor.spec.shape for name, tensor in tensors.items()}, config)
    return DerivedTensors({name: tensors[name] for name in official_shapes(config)})
