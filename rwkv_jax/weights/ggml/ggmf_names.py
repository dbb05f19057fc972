"""From the tensors of a ggmf file to official ones.

rwkv.cpp's names are the official ones. Its converter transposes low-rank matrices, joins RWKV-7's blends to
`att.x_rwkvag`, and computes of RWKV-4's and 5's decays what its operators take: -exp(w), and exp(-exp(w)). The
logarithms that undo it are exact to the last bits of what is in the file, where a decay near 1 has lost some of w's.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from rwkv_jax.weights.ggml.ggmf_file import GGMFFile
from rwkv_jax.weights.ggml.types import numbers
from rwkv_jax.weights.layout_rules import Change, Rule, as_row, as_vector, transposed, unchanged
from rwkv_jax.weights.layouts import from_rules
from rwkv_jax.weights.tensors import WeightsError, tensor_spec

_FUSED, _BLENDS = "att.x_rwkvag", "rwkvag"
_LOG_OF_DECAYS = (-30.0, 5.0)  # of w: decays nearer to 1 or 0 are 1 and 0 in float32
_LOW_RANK_7, _VECTORS_7 = re.compile(r"att\.[wavg][12]"), re.compile(r"att\.(?:[wav]0|k_[ka])|ffn\.x_k")


def official_from_ggmf(file: GGMFFile) -> Mapping[str, NDArray]:
    """The official tensors of a file, quantized ones in float32.

    Raises:
      WeightsError: its tensors are of no generation, or contradict its header.
    """
    tensors = numbers(file.tensors)
    in_layers = {_split(name)[1] for name in tensors}
    generation = _generation(in_layers)
    rules = [_rule(name, generation) for name in sorted({_template(name) for name in tensors})]
    official = from_rules(tensors, rules, "rwkv.cpp")
    found = tensor_spec(official, "emb.weight").shape if "emb.weight" in official else ()
    if found != (file.vocab_size, file.width):
        raise WeightsError(
            f"its header has vocabulary {file.vocab_size} and width {file.width}, its embedding the shape "
            f"{list(found)}; get the file again"
        )
    layers = {_split(name)[0] for name in tensors} - {None}
    if layers != set(map(str, range(min(file.num_layers, len(tensors) + 1)))):
        raise WeightsError(f"its header has {file.num_layers} layers, its tensors {len(layers)}; get the file again")
    return official


def _split(name: str) -> tuple[str | None, str]:
    """The layer of a tensor, None for those of none, and its name within it."""
    match = re.fullmatch(r"blocks\.(0|[1-9][0-9]{0,8})\.(.+)", name)
    return (match[1], match[2]) if match else (None, name)


def _template(name: str) -> str:
    layer, rest = _split(name)
    return name if layer is None else f"blocks.{{}}.{rest}"


def _generation(in_layers: set[str]) -> str:
    marks = {"att.k_k": "7", "att.time_maa_x": "6", "att.gate.weight": "5.2", "att.ln_x.weight": "5.0"}
    return next((generation for mark, generation in marks.items() if mark in in_layers), "4")


def _rule(name: str, generation: str) -> Rule:
    rest = name.removeprefix("blocks.{}.")
    if rest == _FUSED:
        official = tuple(f"blocks.{{}}.att.x_{blend}" for blend in _BLENDS)
        return Rule(name, official, unchanged, tuple(functools.partial(_blend, i) for i in range(len(_BLENDS))))
    return Rule(name, (name,), unchanged, (_CHANGES[generation](rest),))


def _blend(i: int, blends: NDArray) -> NDArray:
    return blends.reshape(len(_BLENDS), -1)[i].reshape(1, 1, -1)


def _heads(tensor: NDArray) -> NDArray:
    return tensor.reshape(tensor.shape[0], -1)


def _log(tensor: NDArray) -> NDArray:
    """In float64, so that no more is lost than the file has lost."""
    with np.errstate(all="ignore"):
        return np.log(np.asarray(tensor, np.float64))


def _log_decay(tensor: NDArray) -> NDArray:
    """w of exp(-exp(w))."""
    with np.errstate(all="ignore"):
        return np.clip(_log(-_log(tensor)), *_LOG_OF_DECAYS).astype(tensor.dtype)


def _changes_of_4(rest: str) -> Change:
    if rest == "att.time_decay":
        return lambda x: _log(-as_vector(x)).astype(x.dtype)
    return as_row if ".time_mix_" in rest else unchanged


def _changes_of_5(per_channel: bool, rest: str) -> Change:
    shaped = _heads if per_channel else as_vector
    if rest == "att.time_decay":
        return lambda x: shaped(_log_decay(x))
    if rest == "att.time_first":
        return lambda x: shaped(_log(x).astype(x.dtype))
    if rest == "att.time_faaaa":
        return shaped
    return as_row if ".time_mix_" in rest else unchanged


def _changes_of_6(rest: str) -> Change:
    if re.search(r"_w[12]$", rest):
        return transposed
    if rest == "att.time_faaaa":
        return _heads
    return as_row if ".time_" in rest else unchanged


def _changes_of_7(rest: str) -> Change:
    if _LOW_RANK_7.fullmatch(rest):
        return transposed
    return as_row if _VECTORS_7.fullmatch(rest) else unchanged


_CHANGES: dict[str, Callable[[str], Change]] = {
    "4": _changes_of_4,
    "5.0": functools.partial(_changes_of_5, False),
    "5.2": functools.partial(_changes_of_5, True),
    "6": _changes_of_6,
    "7": _changes_of_7,
}
