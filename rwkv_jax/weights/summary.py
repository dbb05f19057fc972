"""What a file of weights is whose names are official, or are so behind a prefix: without JAX, from names and shapes."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_jax.config import ModelConfig
from rwkv_jax.config.generations import recognize
from rwkv_jax.data.tokenizers import TOKENIZER_FILES
from rwkv_jax.weights.hub_rwkv7 import HEAD, KEEPS_UNUSED, MODEL_TYPES, are_placeholders, check_config, prefix_of
from rwkv_jax.weights.hub_rwkv7 import LAYOUT as HUGGINGFACE
from rwkv_jax.weights.hugging_face import CONFIG_FILE
from rwkv_jax.weights.model_config import UNUSED, read_config, refuse_adapters, refuse_converted
from rwkv_jax.weights.pinned import files_of
from rwkv_jax.weights.sources import read_tensors
from rwkv_jax.weights.tensors import MappedTensors, join_names, prefix_errors, tensor_spec

_OFFICIAL = re.compile(r"(?:emb|ln_out|head|blocks\.(?:0|[1-9][0-9]{0,8}))\.[\w.]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ROWS = 32  # of emb and head that are compared
_VOCABULARIES = {
    65536: "world, the tokenizer of RWKV's World models",
    50277: "GPT-NeoX's tokenizer.json (20B_tokenizer.json of the Pile models)",
    257: "bytes",
    256: "bytes",
}
_BLOCK = 2**24  # numbers of a tensor that are looked at at a time


class Summary(NamedTuple):
    """What is known of a file of weights without reading its numbers."""

    path: Path
    file: MappedTensors
    """As stored."""
    tensors: MappedTensors
    """The same under official names, without made-up ones."""
    layout: str
    """official, or huggingface."""
    model: ModelConfig
    is_regular: bool
    """Whether its layers are alike and its tensors have as many numbers as the model; then only shapes could differ."""


def summarize(path: Path) -> Summary | None:
    """Opens a .pth, safetensors or index, official or huggingface; None for 8 or 4 bits, tied ones and other layouts.

    Raises:
      WeightsError: as `read_tensors` and `check_config`, and for files that the `rwkv` package has converted.
    """
    file, values = read_tensors(path)
    with prefix_errors(path):
        refuse_converted(file, values)
        refuse_adapters(file)
        layout, tensors = _official(file)
        names_fit = HEAD in tensors and all(map(_OFFICIAL.fullmatch, tensors))
        if not names_fit or any(tensor.dtype.itemsize == 1 for tensor in tensors.values()):  # int8, int4, fp8
            return None
        if recognize({name: tensor.shape for name, tensor in tensors.items()}) is None:
            return None
    if layout == HUGGINGFACE:
        check_config(path.with_name(CONFIG_FILE), tensors, has_head=True)
    with prefix_errors(path):
        model = read_config(tensors, file.metadata, path.name)
    num_parameters = sum(tensor.size for tensor in tensors.values())
    is_regular = num_parameters == model.num_parameters() and not uneven_layers(tensors)
    return Summary(path, file, tensors, layout, model, is_regular)


def _official(file: MappedTensors) -> tuple[str, MappedTensors]:
    """The layout of a file, and its tensors under official names, if a prefix is all that it has before them."""
    prefix = None if HEAD not in file else prefix_of(file)
    names = {name: name.removeprefix(prefix or "") for name in file}
    spec = None if prefix is None else recognize({new: file[old].shape for old, new in names.items()})
    if spec is None or MODEL_TYPES.get(spec.name) is None or not all(map(_OFFICIAL.fullmatch, names.values())):
        return "official", file
    tensors = file.renamed(names)
    if file.metadata.get(KEEPS_UNUSED) != "true" and are_placeholders(tensors):
        tensors = tensors.renamed({name: name for name in tensors if name not in UNUSED})
    return HUGGINGFACE, tensors


def uneven_layers(tensors: Mapping[str, NDArray]) -> list[str]:
    """Names of tensors that some layers have and others lack, or have in another shape; layer 0 is not compared."""
    layers: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name in tensors:
        if name.startswith("blocks."):
            _, layer, within = name.split(".", 2)
            layers[layer][within] = tensor_spec(tensors, name).shape
    others = {layer: found for layer, found in layers.items() if layer != "0"}
    counted = Counter(item for found in others.values() for item in found.items())
    return [
        f"blocks.{layer}.{within}"
        for layer, found in others.items()
        for within, shape in found.items()
        if counted[within, shape] < len(others)
    ]


def ranks(model: ModelConfig) -> str:
    """The ranks of a model's low-rank maps, as "decay 64, ..."; empty if it has none."""
    resolved = model.resolved()
    return ", ".join(f"{name.removesuffix('_rank')} {getattr(resolved, name)}" for name in _rank_fields(model))


def _rank_fields(model: ModelConfig) -> list[str]:
    return [name for name in model.spec.own_fields if name.endswith("_rank")]


def unusual(summary: Summary) -> list[str]:
    """What a user may stumble over, a line each; reads some rows of the embedding and the head."""
    path, tensors, model = summary.path, summary.tensors, summary.model
    lines: list[str] = []
    default = model.spec.sizes(_without_ranks(model))
    for name in _rank_fields(model):
        own, usual = getattr(model.resolved(), name), getattr(default, name)
        if own != usual:
            lines.append(f"{name} is {own}; for this width the official trainer takes {usual}")
    dtypes = Counter(map(tensors.held_in, tensors))
    if len(dtypes) > 1:
        rarest = min(dtypes, key=lambda dtype: dtypes[dtype])
        named = join_names([name for name in tensors if tensors.held_in(name) == rarest], 4)
        lines.append(f"several dtypes; {rarest}: {named}")
    if (uneven := uneven_layers(tensors)) or not summary.is_regular:
        lines.append(
            f"not the tensors of such a model{f': layers differ in {join_names(uneven, 6)}' if uneven else ''}"
        )
    if {"emb.weight", "head.weight"} <= tensors.keys() and _are_tied(tensors["emb.weight"], tensors["head.weight"]):
        lines.append(f"tied: head.weight is emb.weight, in all of {_ROWS} rows compared")
    lacks_unused = "unused_value_residual" in model.spec.own_fields and not model.unused_value_residual
    if lacks_unused and summary.layout == "official":
        lines.append("blocks.0.att.v0, v1, v2 are missing: unused, but the official trainer wants them (--with-unused)")
    if model.vocab_size % 64 and model.vocab_size > 512:
        lines.append(f"a vocabulary of {model.vocab_size}, no multiple of 64")
    if path.suffix == ".pth" and any(not tensor.flags.c_contiguous for tensor in tensors.values()):
        lines.append("tensors saved as transposed views")
    return lines


def _without_ranks(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model, **dict.fromkeys(_rank_fields(model)))


def _are_tied(embedding: NDArray, head: NDArray) -> bool:
    """Whether both are one memory, or the first, the last and some other rows have the same bytes."""
    if embedding.shape != head.shape or embedding.dtype != head.dtype or not embedding.size or embedding.ndim != 2:
        return False
    if embedding.__array_interface__["data"] == head.__array_interface__["data"]:
        return True
    rows = sorted({int(row) for row in np.linspace(0, len(head) - 1, _ROWS)})
    found = embedding[rows]
    return bool((found != 0).any()) and found.tobytes() == head[rows].tobytes()


def guess_tokenizer(path: Path, vocab_size: int) -> str:
    """The tokenizer beside a file, or which has a vocabulary of this size."""
    beside = [name for name in TOKENIZER_FILES if path.with_name(name).is_file()]
    if beside:
        return f"{', '.join(beside)} beside it"
    if vocab_size in _VOCABULARIES:
        return f"by the vocabulary's size {_VOCABULARIES[vocab_size]}"
    if vocab_size % 64 == 0 and 50277 < vocab_size < 50277 + 512:
        return f"by the vocabulary's size {_VOCABULARIES[50277]}, padded"
    return f"none beside it, and none known of {vocab_size} ids"


def recorded_hash(path: Path) -> str:
    """The SHA-256 that is the name of the hub's stored file; empty if there is none, or there are several files."""
    stored = path.resolve().name
    is_stored = path.is_symlink() and _SHA256.fullmatch(stored) is not None and files_of(path) == [path]
    return f"{stored}, by the hub's cache" if is_stored else ""


def unusual_numbers(tensors: Mapping[str, NDArray], drop_pages: Callable[[], None]) -> list[str]:
    """What the numbers have that is unusual, a line each; reads the whole file.

    NaN and infinity by tensor; a head that is the embedding; weights of later layers divided by powers of two, as
    transformers' RWKV-4 leaves them after it has evaluated.
    """
    lines = []
    for name in tensors:
        rows = tensors[name].reshape(-1)
        bad = sum(int((~np.isfinite(rows[i : i + _BLOCK])).sum()) for i in range(0, len(rows), _BLOCK))
        if bad:
            lines.append(f"{name} has {bad} numbers that are NaN or infinite")
        drop_pages()
    if every := _rescaled_every(tensors):
        lines.append(
            f"att.output and ffn.value are half as large after every {every} layers, as files are that transformers "
            "saved after it had evaluated"
        )
    return lines


def _rescaled_every(tensors: Mapping[str, NDArray], every: int = 6) -> int:
    """6 if layers look divided by 2^(layer // 6), else 0."""
    sizes: list[float] = []
    while (name := f"blocks.{len(sizes)}.att.output.weight") in tensors:
        sizes.append(float(np.sqrt(np.square(tensors[name][:64].astype(np.float64)).mean())))
    groups = [float(np.median(sizes[i : i + every])) for i in range(0, len(sizes), every)]
    return every if len(groups) > 1 and all(_is_half(groups[i], groups[i + 1]) for i in range(len(groups) - 1)) else 0


def _is_half(larger: float, smaller: float) -> bool:
    return larger > 0 and 0.45 < smaller / larger < 0.55
