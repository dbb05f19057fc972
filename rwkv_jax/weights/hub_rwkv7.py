"""RWKV-7 as the RWKV organization publishes it on the Hugging Face hub since August 2026: without JAX.

Tensors have their official names, shapes and numbers, behind a prefix (`rwkv7.`, or `model.` in a competing proposal
for transformers) that `head.weight` alone lacks. Layer 0 has the value residual, too, which nothing uses: zeros where
the official file has none. `config.json` says sizes that the tensors tell as well, so it is held against them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkv_jax.checks import is_whole, shown
from rwkv_jax.json_object import parse_object
from rwkv_jax.weights.model_config import UNUSED
from rwkv_jax.weights.tensors import WeightsError, join_names, tensor_spec

LAYOUT = "huggingface"

MODEL_TYPES = {"7": "rwkv7"}
"""The generations that it has, and what a config.json calls each."""

PREFIXES = ("rwkv7.", "model.")
"""What names begin with, but for the head's; the first is written."""

HEAD = "head.weight"

KEEPS_UNUSED = "rwkv_jax.unused_value_residual"
"""Metadata of files that we write: "true" if the official tensors had layer 0's value residual, zeros or not."""

_MAX_CONFIG_BYTES = 2**20
_KIND = MODEL_TYPES["7"]
_CANDIDATE = "rwkv"  # model_type of the competing proposal, whose architecture_version is the generation
_ARCHITECTURES = ("Rwkv7ForCausalLM", "RWKV7ForCausalLM", "RwkvForCausalLM")
_EPSILON = 1e-5

# By keys of config.json: the official name of a tensor, and the axis that is as long.
_SIZES = {
    "vocab_size": ("emb.weight", 0),
    "hidden_size": ("emb.weight", 1),
    "attention_hidden_size": ("blocks.0.att.receptance.weight", 0),
    "num_heads": ("blocks.0.att.r_k", 0),
    "num_attention_heads": ("blocks.0.att.r_k", 0),
    "head_dim": ("blocks.0.att.r_k", 1),
    "head_size": ("blocks.0.att.r_k", 1),
    "intermediate_size": ("blocks.0.ffn.key.weight", 0),
    "decay_low_rank_dim": ("blocks.0.att.w1", 1),
    "a_low_rank_dim": ("blocks.0.att.a1", 1),
    "v_low_rank_dim": ("blocks.1.att.v1", 1),
    "gate_low_rank_dim": ("blocks.0.att.g1", 1),
}
_LAYERS = "num_hidden_layers"
_ROOM = "context_length"  # no tensor tells it


def prefix_of(names: Iterable[str]) -> str | None:
    """The one of `PREFIXES` with which all names but the head's begin; None if there is none."""
    others = [name for name in names if name != HEAD]
    return next((prefix for prefix in PREFIXES if others and all(name.startswith(prefix) for name in others)), None)


def refuse_both_prefixes(names: Iterable[str]) -> None:
    """Raises WeightsError, with examples, if there are names behind each of `PREFIXES`."""
    found = {prefix: [name for name in names if name.startswith(prefix)] for prefix in PREFIXES}
    if all(found.values()):
        listed = " and ".join(f"{prefix!r} ({join_names(own, 2)})" for prefix, own in found.items())
        raise WeightsError(f"some names begin with {listed}; the layout has one prefix, so these are two models in one")


def are_placeholders(tensors: Mapping[str, NDArray]) -> bool:
    """Whether official tensors have `UNUSED` as writers of this layout make it up: zeros of the right shapes and dtype.

    Anything else is an official file's own, or cannot be, and is refused as it is in an official file.
    """
    if not {*UNUSED, "blocks.0.att.w0", "blocks.0.att.w1"} <= tensors.keys():
        return False
    v0, v1, v2 = (tensor_spec(tensors, name) for name in UNUSED)
    later = tensor_spec(tensors, "blocks.1.att.v1") if "blocks.1.att.v1" in tensors else v1
    w0, w1 = (tensor_spec(tensors, f"blocks.0.att.{name}") for name in ("w0", "w1"))
    if {v0.dtype, v1.dtype, v2.dtype} != {w1.dtype} or v0.shape != w0.shape or v1.shape != later.shape:
        return False
    if len(v1.shape) != 2 or v1.shape[:1] != v0.shape[-1:] or v2.shape != v1.shape[::-1]:
        return False
    # Bytes, since -0 is not what a writer puts there.
    return not any(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).any() for name in UNUSED)


def check_config(path: Path, tensors: Mapping[str, NDArray], *, has_head: bool) -> None:
    """Holds a config.json, if there is one, against tensors under official names.

    What it leaves out is not asked for, but for model_type (or architecture_version).

    Args:
      has_head: whether the file has a head of its own.

    Raises:
      WeightsError: the file is of another model, differs from the tensors, or turns on what is not computed here; all
        that is wrong is listed.
    """
    if not path.is_file():
        return
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from error
    if len(content) > _MAX_CONFIG_BYTES:
        raise WeightsError(f"{path}: has more than {_MAX_CONFIG_BYTES} bytes, so it is no model's; get it again")
    fields = parse_object(content, path, WeightsError)
    wrong = [*_of_another_model(fields), *_wrong_sizes(fields, tensors), *_not_computed(fields, has_head=has_head)]
    if wrong:
        remedy = "get the whole folder again, or take config.json away to go by the tensors alone"
        raise WeightsError(f"{path}: {'; '.join(wrong)}; {remedy}")


def _of_another_model(fields: Mapping[str, Any]) -> list[str]:
    wrong = []
    kind, version = fields.get("model_type"), fields.get("architecture_version", _KIND)
    named_by_version = "architecture_version" in fields and kind in (None, _CANDIDATE)
    if kind != _KIND and not named_by_version:
        wrong.append(f"model_type = {shown(kind)}: the tensors are those of {_KIND!r}")
    if version != _KIND:
        wrong.append(f"architecture_version = {shown(version)}: the tensors are those of {_KIND!r}")
    architectures = fields.get("architectures")
    if architectures is not None and not (
        isinstance(architectures, list) and len(architectures) == 1 and architectures[0] in _ARCHITECTURES
    ):
        wrong.append(f"architectures = {shown(architectures)}: must be one of {', '.join(_ARCHITECTURES)}")
    return wrong


def _wrong_sizes(fields: Mapping[str, Any], tensors: Mapping[str, NDArray]) -> list[str]:
    wrong = []
    for key in (*_SIZES, _LAYERS, _ROOM):
        value = fields.get(key)
        if value is None:
            continue
        if not is_whole(value) or value < 1:
            wrong.append(f"{key} = {shown(value)}: must be a positive whole number")
        elif key == _LAYERS:
            layers = {int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")}
            if layers and value != 1 + max(layers):
                wrong.append(f"{key} = {shown(value)}: the tensors have layers up to blocks.{max(layers)}")
        elif key in _SIZES:
            name, axis = _SIZES[key]
            shape = tensor_spec(tensors, name).shape if name in tensors else None
            if shape is not None and (axis >= len(shape) or value != shape[axis]):
                wrong.append(f"{key} = {shown(value)}: {name} is {list(shape)}")
    return wrong


def _not_computed(fields: Mapping[str, Any], *, has_head: bool) -> list[str]:
    """What the config turns on that is computed otherwise here."""
    wrong = []
    for key, computed in (("norm_eps", _EPSILON), ("layer_norm_epsilon", _EPSILON), ("norm_bias", True)):
        value = fields.get(key)
        if value is not None and (isinstance(value, bool) != isinstance(computed, bool) or value != computed):
            wrong.append(f"{key} = {shown(value)}: only {computed} is computed")
    for key in ("use_deep_embed", "quantization_config"):
        if fields.get(key):
            wrong.append(f"{key} = {shown(fields[key])}: is not computed")
    tied = fields.get("tie_word_embeddings")
    if tied is not None and not isinstance(tied, bool):
        wrong.append(f"tie_word_embeddings = {shown(tied)}: must be true or false")
    elif tied and has_head:
        wrong.append(f"tie_word_embeddings = True: there is a {HEAD}, of which it cannot be told whether it is meant")
    return wrong
