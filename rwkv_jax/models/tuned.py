"""Which parameters of a model a tuning run adapts, trains in full and packs, and its model made of them.

A run's parameters are the model's own and, under `adapter`, those of its adapters: {first_block | blocks: {att: {key:
{part: array}}}}, with the leading axis of layers 1 to L - 1 under `blocks`, as the model's own have it.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rwkv_jax.config import ConfigError, ModelConfig, TuningConfig
from rwkv_jax.models import abstract_model
from rwkv_jax.models.adapted import AdaptedMatrix, mixed
from rwkv_jax.models.initial_state import SHIFTS, state_shapes
from rwkv_jax.models.packed import GROUP_SIZE, Int4Matrix, Int8Matrix, PackedMatrix

ADAPTER, INITIAL_STATE = "adapter", "initial_state"
"""Parameters of a tuning run beside the model's own."""

ADAPTER_PARTS = ("lora_A", "lora_B", "lora_magnitude_vector", "miss_block")
"""Trained parts of adapters, whose names follow that of their matrix."""

INITIAL_PARTS = ("init_lora_A", "init_lora_B")
"""Parts of pissa that say what the base lacks; not trained."""

Path = tuple[str, ...]
"""Names of a parameter in the nested dict, such as ("blocks", "att", "key", "weight")."""


class TunedMatrix(NamedTuple):
    """A matrix of all layers of a stack, some of which are adapted."""

    num_outputs: int
    num_inputs: int
    layers: tuple[int, ...]
    """Those of its arrays, in order."""
    is_adapted: tuple[bool, ...]


@functools.cache
def adapted_matrices(tuning: TuningConfig, model: ModelConfig) -> Mapping[Path, TunedMatrix]:
    """The matrices that have an adapter, by path without `weight`.

    Raises:
      ConfigError: a target that matches no matrix, or one that another target has, or a rank above a matrix.
    """
    if tuning.adapter is None:
        return {}
    if not model.spec.has_official_names:
        raise ConfigError(
            f"tuning.adapter = {tuning.adapter!r}: {model.spec.a_title} has no official names; only RWKV is adapted"
        )
    matrices = {
        path[:-1]: leaf.shape
        for path, leaf in _leaves(model).items()
        if path[0] in ("blocks", "first_block")
        and path[-1] == "weight"
        and len(leaf.shape) - (path[0] == "blocks") == 2
    }
    chosen_by: dict[tuple[str, int], str] = {}
    for target in tuning.targets:
        found = [
            (".".join(path[1:]), layer)
            for path in matrices
            for layer in _layers(path, model)
            if _matches(target, path[1:], layer) and (not tuning.layers or layer in tuning.layers)
        ]
        if not found:
            names = sorted({".".join(path[1:]) for path in matrices})
            raise ConfigError(f"tuning.targets = {target}: matches no matrix; there are {', '.join(names)} in a layer")
        for name, layer in found:
            if (other := chosen_by.setdefault((name, layer), target)) != target:
                raise ConfigError(
                    f"tuning.targets = {target}: has {name} of layer {layer}, and so has {other}; name it once"
                )
    result = {}
    for path, shape in matrices.items():
        layers = _layers(path, model)
        is_adapted = tuple((".".join(path[1:]), layer) in chosen_by for layer in layers)
        if any(is_adapted):
            result[path] = TunedMatrix(shape[-2], shape[-1], layers, is_adapted)
            _check_rank(tuning, path, result[path])
    return result


def _check_rank(tuning: TuningConfig, path: Path, matrix: TunedMatrix) -> None:
    name, sizes = ".".join(path[1:]), (matrix.num_outputs, matrix.num_inputs)
    if tuning.rank > min(sizes):
        raise ConfigError(f"tuning.rank = {tuning.rank}: is above the matrix {name}, {list(sizes)}")
    if tuning.adapter == "bat" and any(size % tuning.rank for size in sizes):
        raise ConfigError(
            f"tuning.rank = {tuning.rank}: bat cuts {name} {list(sizes)} into blocks, so it must divide it"
        )


def _leaves(model: ModelConfig) -> dict[Path, Any]:
    """The shapes of a model's parameters by path."""
    leaves = jax.tree.leaves_with_path(abstract_model(model)[1])
    return {tuple(str(entry.key) for entry in path): leaf for path, leaf in leaves}


def _layers(path: Path, model: ModelConfig) -> tuple[int, ...]:
    """The layers whose parameters lie in one array."""
    return {"first_block": (0,), "blocks": tuple(range(1, model.num_layers))}.get(path[0], ())


def _matches(pattern: str, names: Path, layer: int) -> bool:
    """Whether a pattern is of a name in a layer, or of the whole official name."""
    own = ".".join(names)
    return fnmatch.fnmatchcase(own, pattern) or fnmatch.fnmatchcase(f"blocks.{layer}.{own}", pattern)


@functools.cache
def trained_in_full(tuning: TuningConfig, model: ModelConfig) -> frozenset[Path]:
    """The model's own parameters that are trained besides, by path.

    Raises:
      ConfigError: a pattern that matches nothing, or only some layers of what lies in one array, or an adapted matrix.
    """
    adapted, found = adapted_matrices(tuning, model), set[Path]()
    for pattern in tuning.also:
        own = {path for path, leaf in _leaves(model).items() if _is_also(pattern, path, leaf, model)}
        if not own:
            raise ConfigError(
                f"tuning.also = {pattern}: matches no parameter; name ln, time, or such as blocks.*.att.w0"
            )
        for path in sorted(own):
            if path[:-1] in adapted and path[-1] == "weight":
                raise ConfigError(
                    f"tuning.also = {pattern}: {'.'.join(path[1:])} has an adapter; leave out one of them"
                )
        found |= own
    return frozenset(found)


def _is_also(pattern: str, path: Path, leaf: Any, model: ModelConfig) -> bool:
    names = path[1:] if path[0] in ("blocks", "first_block") else path
    is_norm = any(name.startswith("ln") for name in names)
    if pattern == "ln":
        return is_norm
    if pattern == "time":
        in_mixer, own = names[0] in ("att", "ffn"), ".".join(names)
        return in_mixer and names[-1] != "weight" and not is_norm and own not in model.spec.low_rank
    layers = _layers(path, model)
    if not layers:
        return fnmatch.fnmatchcase(".".join(path), pattern)
    matched = [layer for layer in layers if fnmatch.fnmatchcase(f"blocks.{layer}.{'.'.join(names)}", pattern)]
    if matched and len(matched) < len(layers):
        raise ConfigError(
            f"tuning.also = {pattern}: of {'.'.join(names)} it matches layers {matched}, and layers 1 to "
            f"{model.num_layers - 1} are one array; name all of these, as in blocks.*.{'.'.join(names)}"
        )
    return bool(matched)


def is_trained(tuning: TuningConfig, model: ModelConfig, path: Path) -> bool:
    """Whether a parameter of a tuning run is trained."""
    if path[0] == ADAPTER:
        return path[-1] not in INITIAL_PARTS
    if path[0] == INITIAL_STATE:
        return tuning.state_shifts or path[-1] not in SHIFTS
    return path in trained_in_full(tuning, model)


def is_kept(tuning: TuningConfig, model: ModelConfig, path: Path) -> bool:
    """Whether a parameter is in a tuning run's checkpoints: what is trained, and what says how the base was changed."""
    return path[0] in (ADAPTER, INITIAL_STATE) or is_trained(tuning, model, path)


def kept_shapes(tuning: TuningConfig, model: ModelConfig) -> Any:
    """The shapes of what a tuning run's checkpoints hold of its parameters, as a nested dict."""
    shapes: dict[str, Any] = {}
    for path in trained_in_full(tuning, model):
        set_at(shapes, path, at(abstract_model(model)[1], path))
    return shapes | added_shapes(tuning, model)


def added_shapes(tuning: TuningConfig, model: ModelConfig) -> dict[str, Any]:
    """The shapes of the parameters that a tuning run has beside its model's, as a nested dict."""
    adapters, added = adapter_shapes(tuning, model), dict[str, Any]()
    if adapters:
        added[ADAPTER] = adapters
    if tuning.state:
        # A state into which something has been read has the token shifts' inputs, too, trained or not.
        has_shifts = tuning.state_shifts or tuning.initial_state is not None or tuning.initial_prompt is not None
        added[INITIAL_STATE] = state_shapes(model, shifts=has_shifts)
    return added


def adapter_shapes(tuning: TuningConfig, model: ModelConfig) -> Any:
    """The shapes of all adapters' parts, as a nested dict."""
    shapes: dict[str, Any] = {}
    for path, matrix in adapted_matrices(tuning, model).items():
        rank, leading = tuning.rank, (len(matrix.layers),) if path[0] == "blocks" else ()
        low = {"lora_A": (rank, matrix.num_inputs), "lora_B": (matrix.num_outputs, rank)}
        parts = {
            "dora": low | {"lora_magnitude_vector": (matrix.num_outputs,)},
            "pissa": low | {f"init_{name}": shape for name, shape in low.items()},
            "miss": {"miss_block": (rank, matrix.num_outputs)},
            "bat": {"miss_block": (matrix.num_outputs // rank, rank, rank)},
        }.get(str(tuning.adapter), low)
        set_at(
            shapes,
            path,
            {name: jax.ShapeDtypeStruct(leading + shape, model.parameter_dtype) for name, shape in parts.items()},
        )
    return shapes


def tuned_shapes(shapes: Any, tuning: TuningConfig, model: ModelConfig) -> Any:
    """The shapes of a tuning run's parameters, from those of its model's: packed matrices in place, and adapters."""
    for path in packed_matrices(tuning, model):
        shapes = replaced_at(shapes, path, _packed_shape(at(shapes, path), str(tuning.quantize)))
    return shapes | added_shapes(tuning, model)


def _packed_shape(x: Any, quantization: str) -> Any:
    *leading, num_inputs = x.shape
    struct: Any = jax.ShapeDtypeStruct
    if quantization == "bfloat16":
        return struct(x.shape, jnp.bfloat16)
    scale = struct(tuple(leading), jnp.float32)
    if quantization == "int8" or num_inputs % GROUP_SIZE:
        return Int8Matrix(struct(x.shape, jnp.int8), scale)
    groups = (*leading, num_inputs // GROUP_SIZE)
    parts = struct(groups, jnp.int8)
    return Int4Matrix(struct((*groups, GROUP_SIZE // 2), jnp.uint8), scale, parts, parts)


def packed_matrices(tuning: TuningConfig, model: ModelConfig) -> frozenset[Path]:
    """Paths of the frozen matrices that `tuning.quantize` is of: all in layers but low-rank maps."""
    if tuning.quantize is None:
        return frozenset()
    return frozenset(
        path
        for path, leaf in _leaves(model).items()
        if path[0] in ("blocks", "first_block")
        and path[-1] == "weight"
        and len(leaf.shape) - (path[0] == "blocks") == 2
        and path not in trained_in_full(tuning, model)
    )


def grafted(params: Any, tuning: TuningConfig, model: ModelConfig, dropout_keys: Array | None = None) -> Any:
    """The model's parameters of a run's, with adapted matrices in place.

    Args:
      dropout_keys: uint32 [B, T], random numbers of the tokens; None without dropout.
    """
    own = {name: part for name, part in params.items() if name not in (ADAPTER, INITIAL_STATE)}
    for number, (path, matrix) in enumerate(adapted_matrices(tuning, model).items()):
        scale = np.where(matrix.is_adapted, tuning.factor, 0.0).astype(model.parameter_dtype)
        salts = np.asarray([0x632BE5AB * (1 + number + 997 * layer) % 2**32 for layer in matrix.layers], np.uint32)
        keys = None
        if dropout_keys is not None and tuning.dropout:
            keys = jax.vmap(lambda salt: mixed(dropout_keys ^ salt))(jnp.asarray(salts))
        stacked = path[0] == "blocks"
        adapted = AdaptedMatrix(
            at(own, (*path, "weight")),
            {name: x for name, x in at(params[ADAPTER], path).items() if name not in INITIAL_PARTS},
            jnp.asarray(scale if stacked else scale[0]),
            dropout_keys=keys if stacked or keys is None else keys[0],
            kind=tuning.adapter or "lora",
            dropout=tuning.dropout,
        )
        own = replaced_at(own, (*path, "weight"), adapted)
    return own


def merged_params(params: Any, tuning: TuningConfig, model: ModelConfig) -> Any:
    """The plain parameters of the same model: adapters are merged, packed matrices unpacked."""

    def plain(x: Any) -> Any:
        if isinstance(x, AdaptedMatrix):
            x = x.merged()
        return (x.dequantized() if isinstance(x, PackedMatrix) else x).astype(model.parameter_dtype)

    return jax.tree.map(plain, grafted(params, tuning, model), is_leaf=is_matrix)


def merge_nested(first: Any, second: Any) -> Any:
    """Two nested dicts as one; values of the second take the place of the first's."""
    if not (isinstance(first, dict) and isinstance(second, dict)):
        return second
    return first | {name: merge_nested(first[name], x) if name in first else x for name, x in second.items()}


def is_matrix(x: Any) -> bool:
    """Whether a value of a nested dict of parameters is no array but a matrix of several."""
    return isinstance(x, AdaptedMatrix | PackedMatrix)


def at(tree: Any, path: Path) -> Any:
    """The part of a nested dict at a path."""
    return functools.reduce(lambda part, name: part[name], path, tree)


def set_at(tree: dict[str, Any], path: Path, value: Any) -> None:
    """Puts a value into a nested dict, whose dicts are made as needed."""
    *folders, last = path
    functools.reduce(lambda part, name: part.setdefault(name, {}), folders, tree)[last] = value


def replaced_at(tree: Any, path: Path, value: Any) -> Any:
    """A nested dict with another value at a path; everything else is shared."""
    first, *rest = path
    return tree | {first: replaced_at(tree[first], tuple(rest), value) if rest else value}
