"""Small models of every generation as official tensors, for tests of reading and writing them."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from rwkv_jax.config import ModelConfig
from rwkv_jax.weights.official import official_shapes

_SMALL = {"vocab_size": 29, "num_layers": 3, "width": 32, "head_dim": 8, "ffn_width": 48}

CONFIGS = {
    "4": ModelConfig(generation="4", **{**_SMALL, "head_dim": 64}),
    "5.0": ModelConfig(generation="5.0", exponential_bonus=True, **_SMALL),
    "5.1": ModelConfig(generation="5.1", **_SMALL),
    "5.2": ModelConfig(generation="5.2", **_SMALL),
    "6": ModelConfig(generation="6", mix_rank=3, decay_rank=5, **_SMALL),
    "7": ModelConfig(generation="7", decay_rank=4, iclr_rank=5, value_rank=6, gate_rank=7, **_SMALL),
    "7, from the trainer": ModelConfig(
        generation="7", decay_rank=4, iclr_rank=5, value_rank=6, gate_rank=7, unused_value_residual=True, **_SMALL
    ),
}
"""By what tells them apart; all sizes of a model differ."""

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def random_tensors(config: ModelConfig, dtype: str = "float32", seed: int = 0) -> dict[str, NDArray]:
    """Tensors of a model's official names and shapes, no two alike."""
    rng = np.random.default_rng(seed)
    return {
        name: (0.3 * rng.standard_normal(shape)).astype(DTYPES[dtype])
        for name, shape in official_shapes(config).items()
    }


def computed_in(config: ModelConfig, dtype: str) -> ModelConfig:
    """What a file of this dtype is read as."""
    return dataclasses.replace(config, dtype="bfloat16" if dtype == "bfloat16" else "float32")


def assert_same_bits(found: dict[str, NDArray], expected: dict[str, NDArray]) -> None:
    """The same names, shapes, dtypes and bytes."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype), name
        assert found[name].tobytes() == tensor.tobytes(), name
