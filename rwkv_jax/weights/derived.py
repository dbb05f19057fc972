"""Tensors derived from others on access: selected, cast, or with those that only the trainer has."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from rwkv_jax.config import ModelConfig
from rwkv_jax.weights.model_config import UNUSED
from rwkv_jax.weights.official import official_shapes
from rwkv_jax.weights.tensors import DerivedTensors, LazyTensor, TensorSpec, WeightsError, tensor_spec

FILE_DTYPES = ("float32", "bfloat16", "float16", "float64")
"""dtypes in which floating-point tensors can be written."""

MAX_VOCABULARY = 2**20
"""The most ids to which a vocabulary is resized."""

_ROWS_AT_A_TIME = 4096


def selected(tensors: Mapping[str, NDArray], names: Iterable[str]) -> DerivedTensors:
    """Selected tensors, in the order of the given names."""
    return DerivedTensors({name: _itself(tensors, name) for name in names})


def rounded(tensors: Mapping[str, NDArray], dtype: str) -> DerivedTensors:
    """Tensors cast to one of `FILE_DTYPES` on access.

    Raises WeightsError for another dtype, and on access for numbers that are too large.
    """
    if dtype not in FILE_DTYPES:
        raise WeightsError(f"dtype = {dtype!r}: must be {', '.join(FILE_DTYPES[:-1])} or {FILE_DTYPES[-1]}")
    target = np.dtype(jnp.dtype(dtype))

    def cast(name: str) -> NDArray:
        tensor = tensors[name]
        if tensor.dtype == target:
            return tensor
        with np.errstate(over="ignore"):
            result = tensor.astype(target)
        if not np.array_equal(np.isfinite(result), np.isfinite(tensor)):
            raise WeightsError(f"{name}: has numbers too large for {target.name}; take another dtype")
        return result

    specs = {name: TensorSpec(tensor_spec(tensors, name).shape, target) for name in tensors}
    return DerivedTensors({name: LazyTensor(spec, functools.partial(cast, name)) for name, spec in specs.items()})


def resized(tensors: Mapping[str, NDArray], config: ModelConfig, vocab_size: int) -> DerivedTensors:
    """Official tensors of a model with another number of ids: rows are cut from the end, or added there.

    Each added row of the embedding, the head and other tables of a row for each id is the mean of all rows there were,
    taken in float64 and rounded to the tensor's dtype: a new id's logit begins as the mean of all logits.

    Raises:
      WeightsError: vocab_size is not from 1 to `MAX_VOCABULARY`.
    """
    if not 1 <= vocab_size <= MAX_VOCABULARY:
        raise WeightsError(f"resize_vocab = {vocab_size}: must be from 1 to {MAX_VOCABULARY}")
    shapes = official_shapes(dataclasses.replace(config, vocab_size=vocab_size))

    def changed(name: str) -> LazyTensor:
        shape, dtype = tensor_spec(tensors, name)
        wanted = shapes.get(name, shape)
        if wanted == shape:
            return _itself(tensors, name)
        return LazyTensor(TensorSpec(wanted, dtype), functools.partial(_with_rows, tensors, name, wanted[0]))

    return DerivedTensors({name: changed(name) for name in tensors})


def _with_rows(tensors: Mapping[str, NDArray], name: str, num_rows: int) -> NDArray:
    tensor = tensors[name]
    if num_rows <= len(tensor):
        return tensor[:num_rows]
    parts = range(0, len(tensor), _ROWS_AT_A_TIME)
    sums = [tensor[i : i + _ROWS_AT_A_TIME].astype(np.float64).sum(axis=0) for i in parts]
    mean = (np.sum(sums, axis=0) / len(tensor)).astype(tensor.dtype)
    return np.concatenate([tensor, np.broadcast_to(mean, (num_rows - len(tensor), *tensor.shape[1:]))])


def add_unused(tensors: Mapping[str, NDArray], config: ModelConfig) -> DerivedTensors:
    """Official tensors of RWKV-7 with `UNUSED`, zeros if missing, as the trainer requires; others may be missing.

    They have the order of official files; what is of no such model comes last.
    """
    shapes = official_shapes(dataclasses.replace(config, unused_value_residual=True))
    like = "blocks.0.att.w1" if "blocks.0.att.w1" in tensors else next(iter(tensors))
    dtype = tensor_spec(tensors, like).dtype

    def tensor(name: str) -> LazyTensor:
        if name not in UNUSED or name in tensors:
            return _itself(tensors, name)
        return LazyTensor(TensorSpec(shapes[name], dtype), functools.partial(np.zeros, shapes[name], dtype))

    known = [name for name in shapes if name in UNUSED or name in tensors]
    return DerivedTensors({name: tensor(name) for name in [*known, *(x for x in tensors if x not in shapes)]})


def without_unused(tensors: Mapping[str, NDArray]) -> DerivedTensors:
    """Official tensors of RWKV-7 without `UNUSED`."""
    return selected(tensors, [name for name in tensors if name not in UNUSED])


def may_have_unused(config: ModelConfig) -> bool:
    """Whether a model is of the generation that has the tensors of `UNUSED`, or not, as its config says."""
    return "unused_value_residual" in config.spec.own_fields


def _itself(tensors: Mapping[str, NDArray], name: str) -> LazyTensor:
    return LazyTensor(tensor_spec(tensors, name), functools.partial(tensors.__getitem__, name))
