"""Sharding rules: which mesh axes split which array axes, and the partition specs that follow from them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rwkv_jax.config import ConfigError, ModelConfig
from rwkv_jax.models import model_type
from rwkv_jax.models.adapted import BY_INPUTS
from rwkv_jax.models.packed import PackedMatrix
from rwkv_jax.models.stacks import has_layer_axis
from rwkv_jax.parallel.mesh import divisors, nearest_multiples


@dataclasses.dataclass(frozen=True)
class Rules:
    """For each logical axis the mesh axes that split it, outermost first."""

    rows: tuple[str, ...] = ("data", "fsdp")
    """B of tokens, activations and states."""
    time: tuple[str, ...] = ("sequence",)
    """T of tokens and activations."""
    vocab: tuple[str, ...] = ("tensor",)
    """V of embedding, head and logits."""
    heads: tuple[str, ...] = ("tensor",)
    """H, or C split by heads: projections, per-head parameters, WKV states."""
    ffn: tuple[str, ...] = ("tensor",)
    """F."""
    gate: tuple[str, ...] = ("tensor",)
    """C of the feed-forward network's gate."""
    embed: tuple[str, ...] = ("fsdp",)
    """C where a matrix reads or writes the residual stream; weights are all-gathered along it before use."""
    low_rank_heads: tuple[str, ...] = ("tensor", "fsdp")
    """C of a low-rank projection's output for the heads; the other axis, D, is too short to split."""

    def __post_init__(self) -> None:
        own = {name: set(axes) for name, axes in vars(self).items()}
        if not self.vocab == self.heads == self.ffn == self.gate or len(self.heads) > 1:
            raise ConfigError(
                f"rules: vocab {self.vocab}, heads {self.heads}, ffn {self.ffn} and gate {self.gate} must be split "
                "over the same one mesh axis, along which the model sums partial results"
            )
        if self.embed not in ((), ("fsdp",)) or not own["embed"] <= own["rows"]:
            raise ConfigError(
                f"rules: embed {self.embed} must be ('fsdp',) or (), and rows {self.rows} be split over it too: "
                "weights are gathered along it by devices that have different rows"
            )
        if self.low_rank_heads != self.heads + self.embed:
            raise ConfigError(f"rules: low_rank_heads {self.low_rank_heads} must be {self.heads + self.embed}")
        if len(self.time) > 1 or own["rows"] & own["time"] or (own["rows"] | own["time"]) & own["heads"]:
            raise ConfigError(
                f"rules: rows {self.rows}, time {self.time} and heads {self.heads} must not share mesh axes, and time "
                "has at most one"
            )

    def spec(self, axes: tuple[str | None, ...], name: str) -> PartitionSpec:
        """The partition spec of an array with these logical axes.

        Raises:
          ConfigError: two axes would be split over the same mesh axis.
        """
        entries = [() if axis is None else getattr(self, axis) for axis in axes]
        used = [mesh_axis for entry in entries for mesh_axis in entry]
        for mesh_axis in used:
            if used.count(mesh_axis) > 1:
                meanings = [axis for axis, entry in zip(axes, entries, strict=True) if mesh_axis in entry]
                raise ConfigError(
                    f"{name}: its axes {' and '.join(map(str, meanings))} would both be split over the mesh axis "
                    f"{mesh_axis!r}; change one of these rules"
                )
        return PartitionSpec(*(entry[0] if len(entry) == 1 else entry or None for entry in entries))

    def on(self, mesh: Mesh) -> Rules:
        """The same rules without the mesh axes of size 1."""
        own = {name: tuple(axis for axis in axes if mesh.shape[axis] > 1) for name, axes in vars(self).items()}
        return Rules(**own)


RULES = Rules()
"""Megatron's tensor parallelism over `tensor` (arXiv 1909.08053), fully sharded weights over `fsdp`."""


def check_divisible(shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh, name: str) -> None:
    """Raises ConfigError, naming the nearest valid sizes, if the mesh does not divide an axis of an array."""
    for axis, entry in enumerate(spec):
        mesh_axes = entry_axes(entry)
        ways = math.prod(mesh.shape[mesh_axis] for mesh_axis in mesh_axes)
        if shape[axis] % ways:
            nearest = " and ".join(map(str, nearest_multiples(shape[axis], ways)))
            over = " x ".join(f"parallel.{mesh_axis} = {mesh.shape[mesh_axis]}" for mesh_axis in mesh_axes)
            raise ConfigError(
                f"{name}: size {shape[axis]} of axis {axis} of {list(shape)} is no multiple of {over}; the nearest "
                f"sizes that are: {nearest}"
            )


class HasParameterAxes(Protocol):
    """What knows the axes of a model's parameters: its class, or an application."""

    def parameter_axes(self, path: tuple[str, ...], /) -> tuple[str | None, ...]:
        """As `LanguageModel.parameter_axes`."""
        ...


def parameter_specs(kind: HasParameterAxes, params: Any, rules: Rules = RULES) -> Any:
    """The partition spec of every parameter.

    Args:
      kind: the model's class, or whatever knows its parameters.
      params: nested dict of the parameters or their shapes; those of stacks have a leading axis of layers.

    Raises:
      ConfigError: as `Rules.spec`.
    """

    def spec(path: tuple[Any, ...], parameter: Any) -> PartitionSpec:
        names = tuple(str(entry.key) for entry in path)
        own = kind.parameter_axes(names)
        stacked = (None,) if has_layer_axis(names) else ()
        # RWKV-5.0 and 5.1 have one number per head where the others have one per channel.
        return rules.spec((stacked + own)[: parameter.ndim], ".".join(names))

    return jax.tree_util.tree_map_with_path(spec, params)


def state_specs(config: ModelConfig, rules: Rules = RULES) -> Any:
    """The partition spec of every array of a model's state."""
    config = dataclasses.replace(config, dtype="float32")  # whatever the dtype: float64 would need x64
    structure = jax.tree.structure(jax.eval_shape(lambda: model_type(config).initial_block_state(config, 1)))
    return structure.unflatten(rules.spec((None, "rows", *array.axes), "state") for array in config.spec.state(config))


def part_spec(kind: str, part: str, spec: PartitionSpec) -> PartitionSpec:
    """How a part is split that belongs to a matrix split like this: its last two entries are out and in."""
    *leading, outputs, inputs = spec
    own = {
        "lora_A": (None, inputs),
        "init_lora_A": (None, inputs),
        "lora_B": (outputs, None),
        "init_lora_B": (outputs, None),
        "lora_magnitude_vector": (outputs,),
        "miss_block": (outputs, None, None) if kind == "bat" else (None, outputs),
        BY_INPUTS: (inputs, None, None),
    }[part]
    return PartitionSpec(*leading, *own)


def packed_specs(matrix: PackedMatrix, spec: PartitionSpec) -> Any:
    """How the arrays of a packed matrix are split, as a tree of its form: groups of inputs as inputs."""
    *leading, outputs, inputs = spec
    own = len(leading)

    def of(x: Any) -> PartitionSpec:
        return PartitionSpec(*leading, *(outputs, inputs, None)[: x.ndim - own])

    return jax.tree.map(of, matrix)


def is_spec(x: Any) -> bool:
    """Whether x is a partition spec: a leaf of a tree of specs."""
    return isinstance(x, PartitionSpec)


def entry_axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a partition spec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def spec_axes(spec: PartitionSpec) -> set[str]:
    """All mesh axes of a partition spec."""
    return {name for entry in spec for name in entry_axes(entry)}


def shardings(mesh: Mesh, specs: Any) -> Any:
    """Shardings on a mesh from a tree of partition specs."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)


def check_model(kind: HasParameterAxes, params: Any, num_heads: int | None, mesh: Mesh) -> None:
    """Checks that a mesh divides a model's sizes.

    Args:
      num_heads: of keys and values, if several heads share them; None for a model without heads.

    Raises:
      ConfigError: an axis that the mesh does not divide, or a head that it would split.
    """
    ways = mesh.shape["tensor"]
    if num_heads is not None and num_heads % ways:
        raise ConfigError(
            f"parallel.tensor = {ways}: must divide the model's {num_heads} heads; sizes that do are "
            + ", ".join(map(str, divisors(num_heads)))
        )
    vocab_size = params["emb"]["weight"].shape[0] if "emb" in params else 0
    if vocab_size % ways:
        raise ConfigError(
            f"parallel.tensor = {ways}: must divide model.vocab_size = {vocab_size}; the next size that it divides is "
            f"{-(-vocab_size // ways) * ways}, whose further rows no token names, or split over parallel.fsdp instead"
        )
    flat = jax.tree.leaves(parameter_specs(kind, params), is_leaf=is_spec)
    for (path, leaf), spec in zip(jax.tree.leaves_with_path(params), flat, strict=True):
        check_divisible(leaf.shape, spec, mesh, ".".join(str(entry.key) for entry in path))
