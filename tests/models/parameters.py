"""Small models for tests: parameters under their official names, random ones, and models built from them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from rwkv_jax.config import ModelConfig
from rwkv_jax.models import RWKV7

Flat = dict[str, Any]

SMALL = ModelConfig(
    vocab_size=29,
    num_layers=3,
    width=32,
    head_dim=8,
    ffn_width=48,
    decay_rank=4,
    iclr_rank=5,
    value_rank=6,
    gate_rank=7,
    dtype="float64",
)
"""Every size differs from every other, so that no two can be confused."""


@functools.cache
def abstract(config: ModelConfig) -> tuple[Any, Any]:
    """The model's static part and its parameters' shapes; allocates nothing."""
    with jax.enable_x64(config.dtype == "float64"):
        model = nnx.eval_shape(lambda: RWKV7(config, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(params)


def merge(config: ModelConfig, params: Any) -> RWKV7:
    """The model with these parameters; cheap enough to be called within jit."""
    return nnx.merge(abstract(config)[0], params)


def from_official(weights: Mapping[str, NDArray], dtype: Any) -> Any:
    """Official names (`blocks.1.att.w0`) -> our nested dict: layer 0 as first_block, the others stacked as blocks.

    The first layer's v0, v1 and v2, which some checkpoints hold and nothing reads, are left out.
    """
    unused = {f"blocks.0.att.{name}" for name in ("v0", "v1", "v2")}
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    flat: Flat = {}
    for name in weights.keys() - unused:
        if name.startswith("blocks.0."):
            flat[name.replace("blocks.0.", "first_block.", 1)] = weights[name]
        elif name.startswith("blocks.1."):
            suffix = name.removeprefix("blocks.1.")
            flat[f"blocks.{suffix}"] = np.stack([weights[f"blocks.{layer}.{suffix}"] for layer in range(1, layers)])
        elif not name.startswith("blocks."):
            flat[name] = weights[name]
    tree: Any = {}
    for name, value in flat.items():
        *folders, leaf = name.split(".")
        functools.reduce(lambda node, folder: node.setdefault(folder, {}), folders, tree)[leaf] = value.astype(dtype)
    return tree


def to_official(tree: Any) -> dict[str, NDArray]:
    """Our nested dict -> official names, layer by layer."""
    official: dict[str, NDArray] = {}
    for path, value in jax.tree.leaves_with_path(tree):
        folder, *rest = (str(entry.key) for entry in path)
        if folder == "blocks":
            official |= {f"blocks.{layer}.{'.'.join(rest)}": x for layer, x in enumerate(np.asarray(value), start=1)}
        else:
            official[".".join(["blocks.0" if folder == "first_block" else folder, *rest])] = np.asarray(value)
    return official


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
        if names[-1].startswith("x_"):
            return 0.5 + 0.3 * x
        if names[-1] == "w0":
            return x - 1
        is_matrix = names[-1] == "weight" or names[-1][-1] in "12"
        return x / np.sqrt(shape.shape[-1]) if is_matrix else 0.5 * x

    return jax.tree.map_with_path(draw, shapes)


def in_dtype(params: Any, config: ModelConfig) -> Any:
    """Parameters in the dtype in which the config trains them."""
    return jax.tree.map(lambda x: np.asarray(x, config.parameter_dtype), params)
