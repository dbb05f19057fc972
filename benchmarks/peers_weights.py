"""Weights on which peers are compared: random, and of the sizes that training gives them.

With the official initial values every block's output is zero, and a peer that had half of the model wrong would pass.
They are not those of `rwkv_jax.inference.random_model`, on which speed alone is measured in any generation: here mixes,
decays and biases of RWKV-7 are spread as training spreads them, so that each tensor shows in the logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from rwkv_jax.config import ModelConfig
from rwkv_jax.weights.official import official_shapes


class RandomWeights(Mapping[str, NDArray]):
    """float32 tensors of an RWKV-7 under official names, drawn when they are asked for, always alike."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        self._shapes = official_shapes(config)
        self._seeds = dict(zip(self._shapes, np.random.SeedSequence(seed).spawn(len(self._shapes)), strict=True))

    def __getitem__(self, name: str) -> NDArray:
        shape = self._shapes[name]
        normal = np.random.default_rng(self._seeds[name]).standard_normal(shape, np.float32)
        centre, spread = centre_and_spread(name, shape)
        return np.asarray(centre + spread * normal, np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def centre_and_spread(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's numbers, such that logits are neither constant nor chaotic."""
    layer_name = name.rsplit("blocks.", 1)[-1].partition(".")[2] if name.startswith("blocks.") else name
    is_norm = layer_name.startswith(("ln", "att.ln"))
    if is_norm:
        return (1.0, 0.2) if name.endswith("weight") else (0.0, 0.2)
    if layer_name.startswith(("att.x_", "ffn.x_")):
        return 0.5, 0.3
    if layer_name == "att.w0":
        return -1.0, 1.0
    if name == "emb.weight":
        return 0.0, 1.0
    is_linear = name.endswith("weight")
    is_low_rank = layer_name.startswith("att.") and layer_name[-1] in "12"
    if is_linear or is_low_rank:
        # Linear maps are stored [out, in], those of low rank [in, out]. Blocks add less to the residual stream than it
        # has, or rounding would grow from layer to layer.
        writes = layer_name in ("att.output.weight", "ffn.value.weight")
        return 0.0, (0.3 if writes else 1.0) * (shape[1] if is_linear else shape[0]) ** -0.5
    return 0.0, 0.5
