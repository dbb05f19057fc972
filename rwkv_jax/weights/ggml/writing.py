"""Writes GGUF files, by the package gguf, as llama.cpp reads RWKV-6 and 7."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_jax.atomic import new_file
from rwkv_jax.config import ModelConfig
from rwkv_jax.weights.derived import rounded
from rwkv_jax.weights.ggml.names import ARCHITECTURES, Architecture, may_be_narrow
from rwkv_jax.weights.ggml.reading import DTYPE, LAYER_NORM_EPSILON
from rwkv_jax.weights.ggml.types import MISSING
from rwkv_jax.weights.ggml.vocabulary import Vocabulary
from rwkv_jax.weights.layouts import to_rules
from rwkv_jax.weights.model_config import UNUSED
from rwkv_jax.weights.tensors import BFLOAT16, DerivedTensors, LazyTensor, WeightsError, tensor_spec

QUANTIZED = "q8_0"
"""What `dtype` may be for these files alone: matrices in 8 bits, with a scale for 32 inputs, the rest in float32."""

_CONTEXT_LENGTH = 2**20  # no limit of the model's, but llama.cpp wants one
_BLOCK = 32
_TYPES = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", BFLOAT16: "BF16"}
_FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}
_TOKEN_KINDS = {"normal": "NORMAL", "control": "CONTROL", "unused": "UNUSED"}


class _Tensor(NamedTuple):
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    type: str
    num_bytes: int


def write_gguf(
    path: Path,
    tensors: Mapping[str, NDArray],
    model: ModelConfig,
    dtype: str | None,
    vocabulary: Vocabulary | None,
) -> None:
    """Writes one file atomically, one tensor in memory at a time.

    Matrices are held in the tensors' dtype, or in `dtype`, and what llama.cpp takes in float32 only in float32; that
    bfloat16 or float16 was the dtype of all is recorded, so that we read what was written. RWKV-7's unused value
    residual of layer 0 is not kept: llama.cpp wants another one there, which is written as zeros.

    Args:
      tensors: under official names.
      dtype: float32, bfloat16, float16, or `QUANTIZED`; None keeps the tensors' own.
      vocabulary: the tokenizer's; None for a file without one.

    Raises:
      WeightsError: the file exists, gguf is missing, llama.cpp does not have such a model, a tensor is in float64, or
        has numbers that are too large.
    """
    by_generation = {each.generation: each for each in ARCHITECTURES.values()}
    if (target := by_generation.get(model.spec.name)) is None:
        raise WeightsError(f"{path}: GGUF files hold RWKV-6 and 7, which llama.cpp runs, not {model.title}")
    try:
        import gguf  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise WeightsError(f"{path}: {MISSING}") from error
    if dtype is not None:
        tensors = rounded(tensors, "float32" if dtype == QUANTIZED else dtype)
    common = {tensor_spec(tensors, name).dtype for name in tensors}
    foreign = _foreign(tensors, target, model)
    plan = [_planned(foreign, name, dtype == QUANTIZED) for name in foreign]
    writer = gguf.GGUFWriter(None, target.name)
    _add_metadata(writer, target, model, path.stem, max(plan, key=lambda tensor: tensor.num_bytes).type)
    if dtype != QUANTIZED and len(common) == 1 and (only := common.pop()) != np.float32:
        writer.add_string(DTYPE, only.name)
    _add_vocabulary(writer, vocabulary, model.vocab_size)
    for tensor in plan:
        kind = gguf.GGMLQuantizationType[tensor.type]
        # The dtype is looked at for bytes only, whose last axis would be one of blocks.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes, kind)
    with new_file(path, WeightsError) as file:
        writer.write_header_to_file(Path(file.name))
        try:
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in plan:
                writer.write_tensor_data(_content(foreign, tensor))
        finally:
            writer.close()


def _foreign(tensors: Mapping[str, NDArray], architecture: Architecture, model: ModelConfig) -> Mapping[str, NDArray]:
    """The tensors under llama.cpp's names, as views but for the joined blends."""
    found = to_rules(tensors, architecture.rules(model.head_dim), f"llama.cpp's {architecture.name}", UNUSED)
    made = {name: LazyTensor(tensor_spec(found, name), functools.partial(found.__getitem__, name)) for name in found}
    for unused, like in architecture.unused.items():
        spec = tensor_spec(found, like)
        made[unused] = LazyTensor(spec, functools.partial(np.zeros, spec.shape, spec.dtype))
    return DerivedTensors(made)


def _planned(foreign: Mapping[str, NDArray], name: str, quantize: bool) -> _Tensor:
    shape, dtype = tensor_spec(foreign, name)
    if dtype not in _TYPES:
        raise WeightsError(f"{name} is {dtype}, which llama.cpp does not compute; give dtype float32")
    count = int(np.prod(shape, dtype=np.int64))
    if not may_be_narrow(name, len(shape)):
        return _Tensor(name, shape, "F32", 4 * count)
    if quantize and shape[-1] % _BLOCK == 0:
        return _Tensor(name, shape, "Q8_0", count // _BLOCK * 34)
    if quantize:
        return _Tensor(name, shape, "F32", 4 * count)
    return _Tensor(name, shape, _TYPES[dtype], dtype.itemsize * count)


def _content(foreign: Mapping[str, NDArray], tensor: _Tensor) -> NDArray:
    """The bytes of a tensor, as an array."""
    found = foreign[tensor.name]
    if tensor.type in ("F16", "BF16"):
        return np.ascontiguousarray(found).view(np.uint16)
    found = np.ascontiguousarray(found, np.float32)
    if tensor.type == "F32":
        return found
    import gguf  # pyright: ignore[reportMissingImports]

    if not np.abs(found).max() < 127 * 65504:  # of a scale in float16; also what is no number
        raise WeightsError(f"{tensor.name}: has numbers too large for {QUANTIZED}; take another dtype")
    return gguf.quantize(found, gguf.GGMLQuantizationType.Q8_0)


def _add_metadata(writer: Any, architecture: Architecture, model: ModelConfig, name: str, largest: str) -> None:
    import gguf  # pyright: ignore[reportMissingImports]

    writer.add_type("model")
    writer.add_name(name.encode(errors="replace").decode())  # a path may have bytes that are no text
    writer.add_context_length(_CONTEXT_LENGTH)
    for key, value in architecture.sizes(model).items():
        writer.add_uint32(key, value)
    writer.add_layer_norm_eps(LAYER_NORM_EPSILON)
    writer.add_rescale_every_n_layers(0)
    writer.add_head_count(0)  # wanted, and not used
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[largest]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary | None, vocab_size: int) -> None:
    import gguf  # pyright: ignore[reportMissingImports]

    if vocabulary is None:
        writer.add_tokenizer_model("none")
        writer.add_vocab_size(vocab_size)
        return
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list(vocabulary.texts)
    writer.add_token_types([gguf.TokenType[_TOKEN_KINDS[kind]] for kind in vocabulary.kinds])
    writer.add_bos_token_id(vocabulary.end_of_text)
    writer.add_eos_token_id(vocabulary.end_of_text)
    if vocabulary.end_of_turn is not None:
        writer.add_eot_token_id(vocabulary.end_of_turn)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)
