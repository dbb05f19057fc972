"""Small models for tests: one config a generation, random and initial parameters, models built from them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from rwkv_jax.config import ModelConfig
from rwkv_jax.config.generations import OTHER_ARCHITECTURES
from rwkv_jax.models import LanguageModel, abstract_model, model_type
from rwkv_jax.models.stacks import is_stack
from rwkv_jax.weights.official import official_names
from tests.golden import QUICK

HYBRIDS = {"hybrid": "transformer", "converted": "transformer"}
"""Architectures of models with some, or all, layers of time mixing; `rwkv_layers` says which."""


def named_config(name: str, **sizes: Any) -> ModelConfig:
    """The config of a generation, of another architecture, or of one whose layers are hybrids."""
    name = HYBRIDS.get(name, name)
    fields = {"architecture": name} if name in OTHER_ARCHITECTURES else {"generation": name}
    return ModelConfig(**fields, **sizes)  # pyright: ignore[reportArgumentType]


def _small(generation: str, **sizes: Any) -> ModelConfig:
    return ModelConfig(
        generation, vocab_size=41, num_layers=3, width=32, head_dim=8, ffn_width=48, dtype="float64", **sizes
    )


SMALL: dict[str, ModelConfig] = {
    "4": _small("4"),
    "5.0": _small("5.0", exponential_bonus=True),
    "5.1": _small("5.1"),
    "5.2": _small("5.2"),
    "6": _small("6", mix_rank=6, decay_rank=5),
    "7": _small("7", decay_rank=9, iclr_rank=5, value_rank=6, gate_rank=7),
    "7-rosa": _small("7-rosa", decay_rank=9, iclr_rank=5, value_rank=6, gate_rank=7, rosa_bits=2, rosa_window=11),
    "8-rosa": _small("8-rosa", rosa_bits=4, rosa_window=11),
    "8-rc00": _small("8-rc00", decay_rank=9, iclr_rank=5, value_rank=6, gate_rank=7),
    "7a": _small("7a", decay_rank=9, iclr_rank=5, value_rank=6, gate_rank=7, deep_embed_rank=3),
    "7b": _small(
        "7b",
        decay_rank=9,
        iclr_rank=5,
        value_rank=6,
        gate_rank=7,
        deep_embed_rank=3,
        dea_width=10,
        dea_rank=4,
        context_length=64,
    ),
}
"""By generation. Every size differs from every other, so that no two can be confused."""


def abstract(config: ModelConfig) -> tuple[Any, Any]:
    """The model's static part and its parameters' shapes; allocates nothing."""
    with jax.enable_x64(config.dtype == "float64"):
        return abstract_model(config)


def table_row(config: ModelConfig) -> int:
    """Numbers of a token in the tables by token of a layer, counted in its parameters."""
    axes = model_type(config).block_axes
    official = to_official(config, jax.tree.map(lambda x: np.broadcast_to(0, x.shape), abstract(config)[1]))
    layer = {name.removeprefix("blocks.0."): x for name, x in official.items() if name.startswith("blocks.0.")}
    return sum(x.shape[-1] for name, x in layer.items() if axes.get(name, (None,))[0] == "vocab")


def merge(config: ModelConfig, params: Any) -> LanguageModel:
    """The model with these parameters; cheap enough to be called within jit."""
    return nnx.merge(abstract(config)[0], params)


def to_official(config: ModelConfig, params: Any) -> dict[str, NDArray]:
    """Our nested dict -> official names, layer by layer."""
    official: dict[str, NDArray] = {}
    for path, leaf in jax.tree.leaves_with_path(jax.device_get(params)):
        names = official_names(path, config.num_layers)
        official |= dict(zip(names, leaf if is_stack(path[0].key) else [leaf], strict=True))
    return official


@functools.cache
def _builder(config: ModelConfig) -> Any:
    def build(key: jax.Array) -> Any:
        return nnx.to_pure_dict(nnx.state(model_type(config)(config, rngs=nnx.Rngs(key)), nnx.Param))

    return jax.jit(build, compiler_options=QUICK)


def initial_params(config: ModelConfig, seed: int = 0) -> Any:
    """The parameters of a new model."""
    with jax.enable_x64(config.dtype == "float64"):
        return jax.device_get(_builder(config)(jax.random.key(seed)))


@functools.cache
def random_params(config: ModelConfig, seed: int = 0) -> Any:
    """Parameters far from their initial values, at which every residual branch is zero; float64."""
    return random_like(abstract(config)[1], seed)


def random_like(shapes: Any, seed: int = 0) -> Any:
    """Random parameters, of sizes that a trained model might have, for a nested dict of shapes; float64."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> NDArray:
        names = ["", *(str(entry.key) for entry in path)]
        x = rng.standard_normal(shape.shape)
        if names[-1] == "weight" and names[-2].startswith("ln"):
            return 1 + 0.2 * x
        if names[-1] == "weight" or names[-1][-1] in "12":
            return x / np.sqrt(shape.shape[-1])
        if names[-1].startswith(("x_", "time_mix_", "time_maa_")):
            return 0.5 + 0.3 * x
        return x - 1 if names[-1] in ("w0", "time_decay") else 0.5 * x

    return jax.tree.map_with_path(draw, shapes)


def in_dtype(params: Any, config: ModelConfig) -> Any:
    """Parameters in the dtype in which the config trains them."""
    return jax.tree.map(lambda x: np.asarray(x, config.parameter_dtype), params)
