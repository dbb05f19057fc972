"""Tensors derived from others on access: selected, cast, or with those that only the trainer has."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from rwkv_jax.config import ModelConfig
from rwkv_jax.weights.official import official_shapes
from rwkv_jax.weights.tensors import DerivedTensors, TensorSpec, WeightsError, tensor_spec

FILE_DTYPES = ("float32", "bfloat16", "float16", "float64")
"""dtypes in which floating-point tensors can be written."""

UNUSED = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")
"""RWKV-7's value residual in layer 0, which the trainer has but nothing uses."""


class Selected(DerivedTensors):
    """Selected tensors, in the order of the given names."""

    def __init__(self, tensors: Mapping[str, NDArray], names: Iterable[str]) -> None:
        self._tensors, self._names = tensors, tuple(names)

    def __getitem__(self, name: str) -> NDArray:
        return self._tensors[name]

    @override
    def spec(self, name: str) -> TensorSpec:
        return tensor_spec(self._tensors, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Rounded(Selected):
    """Tensors cast to another dtype on access."""

    def __init__(self, tensors: Mapping[str, NDArray], dtype: str) -> None:
        if dtype not in FILE_DTYPES:
            raise WeightsError(f"dtype = {dtype!r}: must be {', '.join(FILE_DTYPES[:-1])} or {FILE_DTYPES[-1]}")
        super().__init__(tensors, tensors)
        self._dtype = np.dtype(jnp.dtype(dtype))

    @override
    def __getitem__(self, name: str) -> NDArray:
        tensor = self._tensors[name]
        if tensor.dtype == self._dtype:
            return tensor
        with np.errstate(over="ignore"):
            rounded = tensor.astype(self._dtype)
        if not np.array_equal(np.isfinite(rounded), np.isfinite(tensor)):
            raise WeightsError(f"{name}: has numbers too large for {self._dtype.name}; take another dtype")
        return rounded

    @override
    def spec(self, name: str) -> TensorSpec:
        return tensor_spec(self._tensors, name)._replace(dtype=self._dtype)


class WithUnused(Selected):
    """Official tensors of RWKV-7 with `UNUSED`, zeros if missing, as the trainer requires."""

    def __init__(self, tensors: Mapping[str, NDArray], config: ModelConfig) -> None:
        shapes = official_shapes(dataclasses.replace(config, unused_value_residual=True))
        super().__init__(tensors, shapes)
        dtype = tensor_spec(tensors, "blocks.0.att.w1").dtype
        self._zeros = {name: TensorSpec(shapes[name], dtype) for name in UNUSED if name not in tensors}

    @override
    def __getitem__(self, name: str) -> NDArray:
        return np.zeros(*self._zeros[name]) if name in self._zeros else self._tensors[name]

    @override
    def spec(self, name: str) -> TensorSpec:
        return self._zeros[name] if name in self._zeros else tensor_spec(self._tensors, name)


def may_have_unused(config: ModelConfig) -> bool:
    """Whether a model is of the generation that has the tensors of `UNUSED`, or not, as its config says."""
    return "unused_value_residual" in config.spec.own_fields


def without_unused(tensors: Mapping[str, NDArray]) -> Selected:
    """Official tensors of RWKV-7 without `UNUSED`."""
    return Selected(tensors, [name for name in tensors if name not in UNUSED])
