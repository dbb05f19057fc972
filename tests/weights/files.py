"""Small models of every generation as official tensors, for tests of reading and writing them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from numpy.typing import ArrayLike, NDArray

from rwkv_jax.config import ModelConfig
from rwkv_jax.models import LanguageModel
from rwkv_jax.weights.official import official_shapes
from rwkv_jax.weights.sources import find_weights, open_weights
from tests.golden import QUICK

_FOUR = ModelConfig(generation="4", vocab_size=29, num_layers=3, width=32, head_dim=64, ffn_width=48)
_FIVE = dataclasses.replace(_FOUR, generation="5.2", head_dim=8)
_SEVEN = dataclasses.replace(_FIVE, generation="7", decay_rank=4, iclr_rank=5, value_rank=6, gate_rank=7)

CONFIGS = {
    "4": _FOUR,
    "5.0": dataclasses.replace(_FIVE, generation="5.0", exponential_bonus=True),
    "5.1": dataclasses.replace(_FIVE, generation="5.1"),
    "5.2": _FIVE,
    "6": dataclasses.replace(_FIVE, generation="6", mix_rank=3, decay_rank=5),
    "7": _SEVEN,
    "7a": dataclasses.replace(_SEVEN, generation="7a", deep_embed_rank=3),
    "7b": dataclasses.replace(_SEVEN, generation="7b", deep_embed_rank=3, dea_width=10, dea_rank=9),
    "7, from the trainer": dataclasses.replace(_SEVEN, unused_value_residual=True),
    "7-rosa": dataclasses.replace(_SEVEN, generation="7-rosa"),
    "8-rc00": dataclasses.replace(_SEVEN, generation="8-rc00"),
    "8-rosa": dataclasses.replace(_FOUR, generation="8-rosa"),
    "8-rosa, official": dataclasses.replace(_FOUR, generation="8-rosa", unused_norms=True),
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


def trained_like(config: ModelConfig, seed: int = 0) -> dict[str, NDArray]:
    """float32 tensors of the sizes that training gives them, so that logits are neither constant nor chaotic."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> NDArray:
        x = rng.standard_normal(shape)
        if "ln" in name and name.endswith("weight"):
            return 1 + 0.2 * x
        if name.endswith(("time_decay", "time_first", "att.w0")):
            return x - 1
        if any(part in name for part in (".time_mix_", ".time_maa_", ".x_")) and shape[0] == 1:
            return 0.5 + 0.3 * x
        is_matrix = name.endswith("weight") or name[-1] in "12"
        return x / np.sqrt(shape[-1]) if is_matrix else 0.5 * x

    return {name: draw(name, shape).astype(np.float32) for name, shape in official_shapes(config).items()}


def tensors_in(path: Path) -> dict[str, NDArray]:
    """What a file or folder of weights holds, under official names."""
    return dict(open_weights(find_weights(path)).tensors)


def logits_of(model: LanguageModel, tokens: ArrayLike) -> NDArray:
    """Logits [B, T, V] of tokens [B, T] in one compiled program."""
    graphdef, params = nnx.split(model, nnx.Param)
    run = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens)[0], compiler_options=QUICK)
    return np.asarray(run(params, tokens))
