"""Tensors derived from others on access: selected, cast, or with those that only the trainer has."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from rwkv_jax.config import ModelConfig
from rwkv_jax.weights.official import official_shapes
from rwkv_jax.weights.tensors import DerivedTensors, LazyTensor, TensorSpec, WeightsError, tensor_spec

FILE_DTYPES = ("float32", "bfloat16", "float16", "float64")
"""dtypes in which floating-point tensors can be written."""

UNUSED = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")
"""RWKV-7's value residual in layer 0, which the trainer has but nothing uses."""


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


def add_unused(tensors: Mapping[str, NDArray], config: ModelConfig) -> DerivedTensors:
    """Official tensors of RWKV-7 with `UNUSED`, zeros if missing, as the trainer requires; others may be missing."""
    shapes = official_shapes(dataclasses.replace(config, unused_value_residual=True))
    like = "blocks.0.att.w1" if "blocks.0.att.w1" in tensors else next(iter(tensors))
    dtype = tensor_spec(tensors, like).dtype

    def tensor(name: str) -> LazyTensor:
        if name not in UNUSED or name in tensors:
            return _itself(tensors, name)
        return LazyTensor(TensorSpec(shapes[name], dtype), functools.partial(np.zeros, shapes[name], dtype))

    return DerivedTensors({name: tensor(name) for name in shapes if name in UNUSED or name in tensors})


def without_unused(tensors: Mapping[str, NDArray]) -> DerivedTensors:
    """Official tensors of RWKV-7 without `UNUSED`."""
    return selected(tensors, [name for name in tensors if name not in UNUSED])


def may_have_unused(config: ModelConfig) -> bool:
    """Whether a model is of the generation that has the tensors of `UNUSED`, or not, as its config says."""
    return "unused_value_residual" in config.spec.own_fields


def _itself(tensors: Mapping[str, NDArray], name: str) -> LazyTensor:
    return LazyTensor(tensor_spec(tensors, name), functools.partial(tensors.__getitem__, name))
