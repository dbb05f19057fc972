"""Weights in 8-bit floating point, with or without scales beside them, as float32.

A matrix NAME of float8_e4m3fn or float8_e5m2 is multiplied by NAME_scale or NAME_scale_inv, if there is one (both names
hold what to multiply by, the second in spite of its name): one number, one for each row, or one for each block of
128 x 128. Without one, the numbers are taken as they are, exactly. Scales of inputs (`input_scale`) are left out.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from rwkv_jax.weights.tensors import BFLOAT16, DerivedTensors, LazyTensor, TensorSpec, WeightsError, tensor_spec

FLOAT8 = {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2)}
"""dtypes by their names in safetensors."""

_BLOCK = 128
_ENDINGS = ("_scale", "_scale_inv")
_SCALE_DTYPES = (np.dtype("float32"), np.dtype("float16"), BFLOAT16)


def open_fp8(tensors: Mapping[str, NDArray]) -> DerivedTensors | None:
    """A file's tensors, those in 8 bits multiplied by their scales on access; None if there are no such tensors.

    Raises:
      WeightsError: scales of another shape or dtype, or two for one tensor; on access, scales that are not finite.
    """
    packed = [name for name in tensors if tensor_spec(tensors, name).dtype in FLOAT8.values()]
    if not packed:
        return None
    beside: set[str] = set()
    made: dict[str, LazyTensor] = {}
    for name in packed:
        scales = [name + ending for ending in _ENDINGS if name + ending in tensors]
        if len(scales) > 1:
            raise WeightsError(f"{name} has two scales, {scales[0]} and {scales[1]}; remove the wrong one")
        spec = tensor_spec(tensors, name)
        for scale in scales:
            _check(name, spec, scale, tensor_spec(tensors, scale))
        beside |= {*scales, f"{name.removesuffix('weight')}input_scale"}
        make = functools.partial(_multiplied, tensors, name, scales[0] if scales else None)
        made[name] = LazyTensor(TensorSpec(spec.shape, np.dtype("float32")), make)
    kept = {name: made.get(name) or _itself(tensors, name) for name in tensors if name not in beside}
    return DerivedTensors(kept)


def _itself(tensors: Mapping[str, NDArray], name: str) -> LazyTensor:
    return LazyTensor(tensor_spec(tensors, name), functools.partial(tensors.__getitem__, name))


def _check(name: str, spec: TensorSpec, scale: str, found: TensorSpec) -> None:
    possible = [(), (1,)]
    if spec.shape:
        possible += [spec.shape[:1], (spec.shape[0], *(1 for _ in spec.shape[1:]))]
    if len(spec.shape) == 2:
        possible.append(_blocks(spec.shape))
    if found.dtype not in _SCALE_DTYPES:
        raise WeightsError(f"{scale} is {found.dtype}, scales must be float32, float16 or bfloat16; get the file again")
    if found.shape not in possible:
        raise WeightsError(
            f"{scale} {list(found.shape)} does not go with {name} {list(spec.shape)}: must be one number, one for each "
            f"row, or one for each block of {_BLOCK} x {_BLOCK}; get the file again"
        )


def _blocks(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-size // _BLOCK) for size in shape)


def _multiplied(tensors: Mapping[str, NDArray], name: str, scale_name: str | None) -> NDArray:
    numbers = tensors[name].astype(np.float32)
    if scale_name is None:
        return numbers
    scale = tensors[scale_name].astype(np.float32)
    if not np.isfinite(scale).all():
        raise WeightsError(f"{scale_name} has numbers that are not finite; get the file again")
    if scale.size == 1:
        numbers *= scale.reshape(())
        return numbers
    if scale.size == numbers.shape[0] and scale.shape != _blocks(numbers.shape):
        numbers *= scale.reshape(-1, *(1 for _ in numbers.shape[1:]))
        return numbers
    for i, row in enumerate(scale):
        numbers[_BLOCK * i : _BLOCK * (i + 1)] *= np.repeat(row, _BLOCK)[: numbers.shape[1]]
    return numbers
