"""The first values of adapters, the same on every mesh: those that Hugging Face PEFT and RWKV-PEFT begin with.

lora, rslora, dora   A uniform within 1 / sqrt(in) (Kaiming's with a = sqrt(5)), B zero; m the norms of W's rows
pissa                A0 = sqrt(S) V^T and B0 = U sqrt(S) of the r largest singular values of W; A, B the same
miss, bat            D zero
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from rwkv_jax.config import ModelConfig, TuningConfig
from rwkv_jax.models.adapted import AdaptedMatrix
from rwkv_jax.models.tuned import TunedMatrix, adapted_matrices, adapter_shapes, at, replaced_at, set_at

_POWER_ITERATIONS = 4  # as RWKV-PEFT's svd_niter
_OVERSAMPLING = 10


def initial_adapter(
    tensors: Mapping[str, NDArray], tuning: TuningConfig, model: ModelConfig, seed: int
) -> dict[str, Any]:
    """The first values of all adapters' parts, on the host; dora's magnitudes are ones (`with_magnitudes`).

    Args:
      tensors: of the base, under official names.
    """
    shapes, values = adapter_shapes(tuning, model), dict[str, Any]()
    for path, matrix in adapted_matrices(tuning, model).items():
        layers = [_layer(tensors, tuning, path, matrix, i, seed) for i in range(len(matrix.layers))]
        own = {}
        for part, like in at(shapes, path).items():
            drawn = [layer.get(part, np.zeros(like.shape[-2:])) for layer in layers]
            if part == "lora_magnitude_vector":
                own[part] = np.ones(like.shape, like.dtype)
            elif part == "miss_block":
                own[part] = np.zeros(like.shape, like.dtype)
            else:
                own[part] = np.stack(drawn).astype(like.dtype).reshape(like.shape)
        set_at(values, path, own)
    return values


def _layer(
    tensors: Mapping[str, NDArray], tuning: TuningConfig, path: Any, matrix: TunedMatrix, index: int, seed: int
) -> dict[str, NDArray]:
    """The low-rank parts of one layer that are not zero."""
    if not matrix.is_adapted[index] or tuning.adapter in ("miss", "bat"):
        return {}
    name = ".".join(["blocks", str(matrix.layers[index]), *path[1:], "weight"])
    draws = np.random.default_rng([seed, *name.encode()])
    if tuning.adapter == "pissa":
        low, up = principal(np.asarray(tensors[name], np.float32), tuning.rank, draws)
        return {"lora_A": low, "lora_B": up, "init_lora_A": low, "init_lora_B": up}
    bound = matrix.num_inputs**-0.5
    return {"lora_A": draws.uniform(-bound, bound, (tuning.rank, matrix.num_inputs))}


def principal(weight: NDArray, rank: int, draws: np.random.Generator) -> tuple[NDArray, NDArray]:
    """A [r, in] and B [out, r] whose product has the r largest singular values of a matrix [out, in].

    By the randomized method of Halko, Martinsson and Tropp (2011): exact for matrices not much larger than the rank.
    """
    size = min(rank + _OVERSAMPLING, *weight.shape)
    basis = weight @ draws.standard_normal((weight.shape[1], size)).astype(weight.dtype)
    for _ in range(_POWER_ITERATIONS):
        basis, _ = np.linalg.qr(basis)
        basis, _ = np.linalg.qr(weight.T @ basis)
        basis = weight @ basis
    basis, _ = np.linalg.qr(basis)
    left, values, right = np.linalg.svd(basis.T @ weight, full_matrices=False)
    root = np.sqrt(values[:rank])
    return root[:, None] * right[:rank], basis @ left[:, :rank] * root


def with_magnitudes(adapter: Any, base: Any, tuning: TuningConfig, model: ModelConfig) -> Any:
    """Adapters of dora with the norms of the base's rows as magnitudes; others as they are.

    Args:
      base: the run's own parameters of the model, packed or not, on their devices, as the adapters are.
    """
    if tuning.adapter != "dora":
        return adapter
    for path in adapted_matrices(tuning, model):
        parts = at(adapter, path)
        norms = functools.partial(_row_norms, dtype=parts["lora_magnitude_vector"].dtype)
        where = parts["lora_magnitude_vector"].sharding
        magnitudes = jax.jit(norms, out_shardings=where)(at(base, (*path, "weight")), parts)
        adapter = replaced_at(adapter, (*path, "lora_magnitude_vector"), magnitudes)
    return adapter


def _row_norms(base: Any, parts: Any, dtype: Any) -> Any:
    scale = jnp.ones(base.shape[:-2], dtype)
    return AdaptedMatrix(base, parts, scale, kind="dora").row_norms().astype(dtype)
