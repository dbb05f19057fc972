"""Small random tensors under official names, with shapes written down by hand, and the layouts that they go through."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkv_jax.weights.tensors import tensor_spec

V, C, L, N, F = 11, 8, 2, 4, 12
FLA, HUB = "flash-linear-attention", "huggingface"
PAIRS = [("transformers", 4), (FLA, 6), (FLA, 7), (HUB, 7)]
"""Layouts that are written, and generations."""


def norm(name: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (C,), f"{name}.bias": (C,)}


def matrices(*names: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (C, C) for name in names}


def rows(*names: str) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(names, (1, 1, C))


def _attention_shapes(generation: int, layer: int) -> dict[str, tuple[int, ...]]:
    if generation == 4:
        return {
            "time_decay": (C,),
            "time_first": (C,),
            **rows("time_mix_k", "time_mix_v", "time_mix_r"),
            **matrices("key", "value", "receptance", "output"),
        }
    if generation == 5:
        return {
            **rows("time_mix_k", "time_mix_v", "time_mix_r", "time_mix_g"),
            "time_decay": (C // N, N),
            "time_faaaa": (C // N, N),
            **matrices("receptance", "key", "value", "gate", "output"),
            **norm("ln_x"),
        }
    if generation == 6:
        return {
            **rows(*(f"time_maa_{x}" for x in "xwkvrg"), "time_decay"),
            "time_maa_w1": (C, 5 * 3),
            "time_maa_w2": (5, 3, C),
            "time_decay_w1": (C, 2),
            "time_decay_w2": (2, C),
            "time_faaaa": (C // N, N),
            **matrices("receptance", "key", "value", "gate", "output"),
            **norm("ln_x"),
        }
    low_ranks = {"w": 2, "a": 3, "g": 5} | ({"v": 6} if layer else {})
    return {
        **rows(*(f"x_{x}" for x in "rwkvag"), *(f"{x}0" for x in low_ranks if x != "g"), "k_k", "k_a"),
        **{f"{x}1": (C, rank) for x, rank in low_ranks.items()},
        **{f"{x}2": (rank, C) for x, rank in low_ranks.items()},
        "r_k": (C // N, N),
        **matrices("receptance", "key", "value", "output"),
        **norm("ln_x"),
    }


def official(generation: int, dtype: Any = np.float32) -> dict[str, NDArray]:
    """Small random tensors with the official names and shapes of RWKV-4, 5.2, 6 or 7."""
    shapes: dict[str, tuple[int, ...]] = {"emb.weight": (V, C), "head.weight": (V, C), **norm("ln_out")}
    for layer in range(L):
        feed_forward = {"key.weight": (F, C), "value.weight": (C, F)}
        if generation < 7:
            mix = "time_maa" if generation == 6 else "time_mix"
            feed_forward |= rows(f"{mix}_k", f"{mix}_r") | matrices("receptance")
        else:
            feed_forward |= rows("x_k")
        parts = {
            **(norm("ln0") if layer == 0 else {}),
            **norm("ln1"),
            **norm("ln2"),
            **{f"att.{name}": shape for name, shape in _attention_shapes(generation, layer).items()},
            **{f"ffn.{name}": shape for name, shape in feed_forward.items()},
        }
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in parts.items()}
    rng = np.random.default_rng(generation)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def assert_same(found: Mapping[str, NDArray], expected: Mapping[str, NDArray]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert tensor_spec(found, name) == (tensor.shape, tensor.dtype), name
        assert found[name].tobytes() == tensor.tobytes(), name
