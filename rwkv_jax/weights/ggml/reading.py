"""Opens files of ggml's programs under official names."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_jax.checks import shown
from rwkv_jax.config import ModelConfig
from rwkv_jax.weights.derived import rounded, selected
from rwkv_jax.weights.ggml import ggmf_file, gguf_file
from rwkv_jax.weights.ggml.ggmf_names import official_from_ggmf
from rwkv_jax.weights.ggml.gguf_file import GGUFFile, Texts, read_gguf
from rwkv_jax.weights.ggml.names import ARCHITECTURES, Architecture, is_divided
from rwkv_jax.weights.ggml.types import mapped_tensors, numbers
from rwkv_jax.weights.layouts import from_rules
from rwkv_jax.weights.official import read_config
from rwkv_jax.weights.tensors import DerivedTensors, LazyTensor, MappedTensors, WeightsError, prefix_errors, tensor_spec

DTYPE = "rwkv_jax.dtype"
"""Key of our files under which the dtype of all tensors stands, also of those that llama.cpp wants wider."""

LAYER_NORM_EPSILON = 1e-5

_NARROW = ("bfloat16", "float16")

_TRANSFORMERS = {"arwkv7": "RWKV-7's time mixing", "rwkv6qwen2": "RWKV-6's time mixing"}


class Opened(NamedTuple):
    """A file under official names."""

    layout: str
    """gguf or ggmf."""
    tensors: Mapping[str, NDArray]
    file: MappedTensors
    """As stored."""


def open_ggml(path: Path) -> Opened | None:
    """The tensors of a GGUF or ggmf file, quantized ones in float32; None for other files, by their first bytes.

    Raises:
      WeightsError: it is of another architecture than RWKV-6 or 7 (ggmf: RWKV-4 to 7), or what it says of the model
        contradicts its tensors; computing numbers from blocks needs the package gguf.
      UnsafeFileError: as `read_gguf` and `read_ggmf`.
    """
    start = _start(path)
    if start == gguf_file.MAGIC:
        return _open_gguf(path)
    return _open_ggmf(path) if start == ggmf_file.MAGIC else None


def is_ggml(path: Path) -> bool:
    """Whether a file begins like those that `open_ggml` opens."""
    return path.is_file() and _start(path) in (gguf_file.MAGIC, ggmf_file.MAGIC)


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(4)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror}); name a file of weights") from error


def _open_ggmf(path: Path) -> Opened:
    found = ggmf_file.read_ggmf(path)
    with prefix_errors(path):
        official = official_from_ggmf(found)
    return Opened("ggmf", official, mapped_tensors(found.tensors, found.mapped))


def _open_gguf(path: Path) -> Opened:
    found = read_gguf(path)
    with prefix_errors(path):
        model = _architecture(found)
        stored = numbers(found.tensors)
        if model.unused:
            stored = selected(stored, [name for name in stored if name not in model.unused])
        rules = [*model.rules(_head_dim(found, model, stored)), *model.old_rules]
        official = from_rules(stored, rules, f"llama.cpp's {model.name}")
        official = _multiplied(official, found.metadata.get(f"{model.name}.rescale_every_n_layers", 0))
        _check_sizes(found, model, read_config(official))
        dtype = found.metadata.get(DTYPE)
        if dtype not in (None, *_NARROW):
            raise WeightsError(f"{DTYPE} = {shown(dtype)}: must be {' or '.join(_NARROW)}; get the file again")
        is_quantized = any(tensor.type.dtype is None for tensor in found.tensors.values())  # since it was written
        if dtype is not None and not is_quantized:
            official = rounded(official, str(dtype))
    return Opened("gguf", official, mapped_tensors(found.tensors, found.mapped))


def _architecture(file: GGUFFile) -> Architecture:
    told = file.metadata.get("general.architecture")
    if isinstance(told, str) and (found := ARCHITECTURES.get(told)) is not None:
        if (kind := file.metadata.get("general.type", "model")) != "model":
            raise WeightsError(f"general.type = {shown(kind)}: is no model; name the file of the model")
        return found
    if isinstance(told, str) and told in _TRANSFORMERS:
        raise WeightsError(
            f"general.architecture = {told!r}: is {_TRANSFORMERS[told]} in a Qwen2, which is no model here; llama.cpp "
            "runs it"
        )
    raise WeightsError(
        f"general.architecture = {shown(told)}: of GGUF files only {' and '.join(ARCHITECTURES)} are read"
    )


def _head_dim(file: GGUFFile, model: Architecture, stored: Mapping[str, NDArray]) -> int:
    """The size of a head, which the tensors of RWKV-7 do not tell."""
    key, vector = f"{model.name}.wkv.head_size", "blk.0.attn_norm.weight"
    found: Any = file.metadata.get(key)
    width = math.prod(tensor_spec(stored, vector).shape) if vector in stored else 0
    if not _is_count(found) or width % found:
        raise WeightsError(
            f"{key} = {shown(found)}: does not divide the {width} channels into heads; get the file again"
        )
    return found


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _multiplied(official: Mapping[str, NDArray], every: Any) -> Mapping[str, NDArray]:
    """Official tensors without the division by a power of two that halved hidden states go with."""
    if every == 0:
        return official
    if not _is_count(every):
        raise WeightsError(f"rescale_every_n_layers = {shown(every)}: must be a number of layers; get the file again")

    def tensor(name: str) -> LazyTensor:
        spec = tensor_spec(official, name)
        power = int(name.split(".")[1]) // every if is_divided(name) else 0
        return LazyTensor(spec, functools.partial(_times, official, name, power))

    return DerivedTensors({name: tensor(name) for name in official})


def _times(official: Mapping[str, NDArray], name: str, power: int) -> NDArray:
    tensor = official[name]
    if not power:
        return tensor
    wide = np.asarray(tensor, np.promote_types(tensor.dtype, np.float32))
    with np.errstate(over="ignore"):
        return np.ldexp(wide, power).astype(tensor.dtype)


def _check_sizes(file: GGUFFile, architecture: Architecture, model: ModelConfig) -> None:
    """Holds what the file says of the model against its tensors."""
    expected = architecture.sizes(model) | {
        f"{architecture.name}.vocab_size": model.vocab_size,
        f"{architecture.name}.token_shift_count": 2,
    }
    for key, value in expected.items():
        if (found := file.metadata.get(key, value)) != value:
            raise WeightsError(f"{key} = {shown(found)}, but by the tensors it is {value}; get the file again")
    epsilon = file.metadata.get(f"{architecture.name}.attention.layer_norm_epsilon", LAYER_NORM_EPSILON)
    if not isinstance(epsilon, float) or abs(epsilon - LAYER_NORM_EPSILON) > 1e-9:
        raise WeightsError(f"layer_norm_epsilon = {shown(epsilon)}: only {LAYER_NORM_EPSILON} is computed here")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, Texts) and tokens.count != model.vocab_size:
        raise WeightsError(
            f"its tokenizer has {tokens.count} tokens and its embedding {model.vocab_size} rows; get the file again"
        )
