"""Infers a model's config from its tensors' names, shapes and dtypes, without JAX: nothing is read or built."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rwkv_jax.config import ConfigError, ModelConfig
from rwkv_jax.config.generations import recognize, size_of
from rwkv_jax.weights.tensors import BFLOAT16, WeightsError, join_names, tensor_spec

_COMPUTE_DTYPES: dict[np.dtype[Any], Literal["bfloat16", "float64"]] = {
    BFLOAT16: "bfloat16",
    np.dtype("float64"): "float64",
}

UNUSED = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")
"""RWKV-7's value residual in layer 0, which the trainer has but nothing uses."""

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
_OF_ADAPTERS = re.compile(r"\.(?:(?:init_)?lora_(?:[AB]|magnitude_vector)|disha|miss_block)(?:\.|$)")
_CONVERTED = ("_strategy", "_rescale_layer")  # only in files converted by the rwkv package


def refuse_converted(tensors: Mapping[str, NDArray], values: Mapping[str, Any]) -> None:
    """Raises WeightsError for a file that the `rwkv` package has converted; values stand beside the tensors."""
    if any(name in tensors or name in values for name in _CONVERTED):
        strategy = f" with strategy {str(values['_strategy'])[:80]!r}" if "_strategy" in values else ""
        raise WeightsError(
            f"these weights were converted by the rwkv package{strategy}: it transposes matrices, precomputes decays, "
            "divides weights of later layers and may quantize; name the original file"
        )


def refuse_adapters(tensors: Mapping[str, NDArray]) -> None:
    """Raises WeightsError for a file with an adapter's tensors, alone or beside a model's, or a tuned state's."""
    if of_adapters := [name for name in tensors if _OF_ADAPTERS.search(name)]:
        raise WeightsError(
            f"{join_names(of_adapters, 3)} are of an adapter that is not merged: rwkv merge BASE ADAPTER OUT merges "
            "one into its base, and --adapter takes one beside it"
        )
    if states := [name for name in tensors if name.endswith(".att.time_state")]:
        raise WeightsError(f"{join_names(states, 3)} are a tuned state: name the model, and this file with --state")


def read_config(
    tensors: Mapping[str, NDArray], metadata: Mapping[str, str] | None = None, file_name: str = ""
) -> ModelConfig:
    """Infers a model's config: sizes from the shapes of its tensors, the compute dtype from theirs.

    bfloat16 is computed in bfloat16, float64 in float64, everything else in float32.

    Args:
      metadata, file_name: of the file, for the fields that no tensor tells (`fields_in_metadata`).

    Raises:
      WeightsError: no generation is recognized, or the sizes contradict each other.
    """
    specs = {name: tensor_spec(tensors, name) for name in tensors}
    shapes = {name: spec.shape for name, spec in specs.items()}
    spec = recognize(shapes)
    if spec is None:
        raise WeightsError(
            f"no generation of RWKV has such names ({join_names(list(shapes), 4) or 'there is no tensor'}); "
            "RWKV-4, 5, 6 and 7 under their official names are known, and the layouts of transformers, "
            "flash-linear-attention and RWKV's own folders on the Hugging Face hub"
        )
    layers = [name.split(".")[1] for name in tensors if name.startswith("blocks.")]
    num_layers = 1 + max((int(layer) for layer in layers if layer.isdecimal()), default=0)
    if num_layers > len(tensors):  # before creating as many names
        raise WeightsError(
            f"a name has layer {num_layers - 1}, but there are {len(tensors)} tensors; get the file again"
        )
    if missing := sorted(set(range(num_layers)) - {int(layer) for layer in layers if layer.isdecimal()}):
        raise WeightsError(
            f"of the layers 0 to {num_layers - 1}, these are missing: {join_names([*map(str, missing)])}; get the file "
            "again or, if they were pruned, number those that are left from 0 on"
        )
    width = size_of(shapes, "emb.weight", 1) or size_of(shapes, "blocks.0.ln1.weight", 0) or 1
    heads = None if spec.heads_tensor is None else size_of(shapes, f"blocks.0.{spec.heads_tensor}", 0)
    # Where the tensor that tells it is missing, any that is possible does: loading lists what is missing.
    head_dim = 64 if spec.heads_tensor is None else math.gcd(width, 64)
    told = spec.fields_in_name(file_name)
    told |= {name: _told(name, metadata[name]) for name in spec.fields_beside_tensors if metadata and name in metadata}
    try:
        return ModelConfig(
            generation=spec.name,
            vocab_size=size_of(shapes, "emb.weight", 0) or size_of(shapes, "head.weight", 0) or 1,
            num_layers=num_layers,
            width=width,
            head_dim=max(width // heads, 1) if heads else head_dim,
            ffn_width=size_of(shapes, "blocks.0.ffn.key.weight", 0),
            dtype=compute_dtype(tensors),
            **spec.read_fields(shapes),
            **told,
        )
    except ConfigError as error:
        raise WeightsError(f"the shapes of {spec.a_title} model that cannot be: {error}") from error


def compute_dtype(tensors: Mapping[str, NDArray]) -> Literal["float32", "bfloat16", "float64"]:
    """The dtype in which a model computes whose file has these tensors: theirs, float32 for others and mixtures."""
    dtypes = {tensor_spec(tensors, name).dtype for name in tensors}
    return _COMPUTE_DTYPES.get(dtypes.pop(), "float32") if len(dtypes) == 1 else "float32"


def fields_in_metadata(config: ModelConfig) -> dict[str, str]:
    """What a file must say of a model because no tensor tells it: its `fields_beside_tensors` that are set."""
    names = config.spec.fields_beside_tensors
    plain = dataclasses.replace(config, **{name: _DEFAULTS[name] for name in names}).resolved()
    values = {name: getattr(config.resolved(), name) for name in names}
    told = {name: value for name, value in values.items() if value != getattr(plain, name)}
    return {name: str(value).lower() for name, value in told.items()}


def _told(name: str, value: str) -> int | bool:
    """A field that a file's metadata say: a size, or whether it is true. It decides what is computed, so no guesses."""
    is_flag = isinstance(_DEFAULTS[name], bool)
    if re.fullmatch("true|false" if is_flag else "[0-9]{1,18}", value) is None:
        wanted = "true or false" if is_flag else "a whole number"
        raise WeightsError(f"{name} = {value[:80]!r} in its metadata: must be {wanted}; write the file anew")
    return value == "true" if is_flag else int(value)
