"""Merges adapters into their base: the matrices that take its place, computed in float64 and rounded once."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rwkv_jax.checks import is_number, shown
from rwkv_jax.config import ModelConfig
from rwkv_jax.tuning.adapter import Adapter, AdapterError
from rwkv_jax.weights.digest import weights_digest
from rwkv_jax.weights.official import official_shapes
from rwkv_jax.weights.pretrained import convert
from rwkv_jax.weights.quantized import DequantizedTensors
from rwkv_jax.weights.sources import find_weights, open_weights
from rwkv_jax.weights.tensors import DerivedTensors, LazyTensor, TensorSpec, tensor_spec

_WIDE = np.dtype("float64")


def merge_weights(
    base: str | os.PathLike[str],
    adapters: Sequence[Adapter],
    target: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    layout: str = "official",
    dtype: str = "float32",
    tokenizer: str | None = None,
    dequantize: bool = False,
    allow_other_base: bool = False,
    license: str | None = None,
) -> ModelConfig:
    """Writes a model with adapters merged into it, tensor by tensor, as `convert` writes one.

    Args:
      base: what `from_pretrained` takes, in any layout and dtype.
      weights: of what each adapter changes, one each; None is 1. Several adapters add up what each alone changes.
      layout, dtype, tokenizer: as in `convert`. In bfloat16 an adapter's changes may be smaller than what is rounded.
      dequantize: whether matrices of 8 or 4 bits are merged in floating point, with their rounding.
      allow_other_base: as in `Adapter.check_base`.
      license: as in `convert`.

    Raises:
      AdapterError: an adapter does not fit, or the base is quantized and `dequantize` is not set.
      WeightsError: as `convert`.
    """
    path = find_weights(base)
    if not dequantize and path.is_file() and isinstance(open_weights(path, warn=False).tensors, DequantizedTensors):
        raise AdapterError(
            f"{path}: its matrices are quantized, and merging cannot keep them so; merge into the original weights, "
            "or set dequantize, which keeps their rounding"
        )
    shares = checked_weights(adapters, weights)

    def change(tensors: Mapping[str, NDArray], config: ModelConfig) -> DerivedTensors:
        check_adapters(adapters, tensors, config, allow_other_base=allow_other_base)
        return merged_tensors(tensors, adapters, shares)

    kinds = ", ".join(adapter.kind for adapter in adapters)
    return convert(
        path,
        target,
        layout=layout,
        dtype=dtype,
        tokenizer=tokenizer,
        change=change,
        changed=f"with adapters merged into it ({kinds})",
        license=license,
    )


def checked_weights(adapters: Sequence[Adapter], weights: Sequence[float] | None) -> list[float]:
    """A finite weight for each adapter; raises AdapterError."""
    if not adapters:
        raise AdapterError("adapters: there are none; name at least one")
    shares = [1.0] * len(adapters) if weights is None else list(weights)
    if len(shares) != len(adapters) or not all(is_number(share) and np.isfinite(share) for share in shares):
        raise AdapterError(f"weights = {shown(shares)}: must be a number for each of {len(adapters)} adapters")
    return [float(share) for share in shares]


def check_adapters(
    adapters: Sequence[Adapter],
    tensors: Mapping[str, NDArray],
    config: ModelConfig,
    *,
    allow_other_base: bool = False,
) -> None:
    """Holds adapters against their base, whose digest is computed at most once; raises as `Adapter.check_base`."""
    digest = functools.cache(lambda: weights_digest(tensors))
    shapes = official_shapes(dataclasses.replace(config, dtype="float32"))
    for adapter in adapters:
        adapter.check_base(shapes, digest, allow_other_base=allow_other_base)


def merged_tensors(
    tensors: Mapping[str, NDArray], adapters: Sequence[Adapter], weights: Sequence[float]
) -> DerivedTensors:
    """A base's tensors with adapters merged into them: those that change in float64, others as they are."""

    def tensor(name: str) -> LazyTensor:
        own = [
            (adapter, weight)
            for adapter, weight in zip(adapters, weights, strict=True)
            if name.removesuffix(".weight") in adapter.parts or name in adapter.replaced
        ]
        if not own:
            return LazyTensor(tensor_spec(tensors, name), functools.partial(tensors.__getitem__, name))
        spec = TensorSpec(tensor_spec(tensors, name).shape, _WIDE)
        return LazyTensor(spec, lambda: _merged(name, tensors[name].astype(_WIDE), own))

    return DerivedTensors({name: tensor(name) for name in tensors})


def _merged(name: str, base: NDArray, own: Sequence[tuple[Adapter, float]]) -> NDArray:
    each = [(_alone(adapter, name, base), weight) for adapter, weight in own]
    if len(each) == 1 and each[0][1] == 1:
        return each[0][0]
    return base + sum(weight * (changed - base) for changed, weight in each)


def _alone(adapter: Adapter, name: str, base: NDArray) -> NDArray:
    """A tensor as one adapter changes it."""
    if name in adapter.replaced:
        base = np.asarray(adapter.replaced[name]).astype(_WIDE)
    matrix = name.removesuffix(".weight")
    return adapter.merged(matrix, base) if matrix in adapter.parts else base
