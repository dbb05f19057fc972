"""Named inputs of WKV-7, easy and adversarial, for tests and benchmarks; numpy only."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from rwkv_kernels.testing.cases import NEAR_ONE, Floats, Shape, rounded

MODEL_FLOOR = -math.exp(-0.5)
"""Smallest log w that an RWKV-7 model produces."""


class Case(NamedTuple):
    """Settings of a test case."""

    log_w: float | None = None
    """One value for every token and channel; None draws values like a trained model's, from the minimum up."""
    aligned: bool = False
    """Keys of a head point in almost one direction and eta is almost 1: every token overwrites the one before."""
    state_scale: float = 1.0
    """Standard deviation of the initial state."""


CASES: dict[str, Case] = {
    "realistic": Case(),
    "fast_decay": Case(log_w=MODEL_FLOOR),
    "slow_decay": Case(log_w=NEAR_ONE),
    "aligned_keys": Case(aligned=True),
    "aligned_keys_fast_decay": Case(log_w=MODEL_FLOOR, aligned=True),
    "aligned_keys_slow_decay": Case(log_w=NEAR_ONE, aligned=True),
    "large_state": Case(state_scale=1e3),
}
"""All cases, by name."""


def make_inputs(case: str, shape: Shape, seed: int = 0) -> dict[str, Floats]:
    """Arguments of `wkv7`, by name, as float64 arrays whose values float32 holds exactly.

    r, log_w, k, a, b: [B, T, H, N]; v: [B, T, H, M]; state: [B, H, M, N]. As in a model, a = -kappa and
    b = kappa * eta with kappa of length 1 along the raw key, and k is the raw key scaled by eta.
    """
    log_w, aligned, state_scale = CASES[case]
    batch, time, heads, key_dim, value_dim = shape
    rng = np.random.default_rng([seed, *shape])
    keys = (batch, time, heads, key_dim)
    raw_key = rng.standard_normal(keys)
    if aligned:
        raw_key = rng.standard_normal((batch, 1, heads, key_dim)) + 1e-3 * raw_key
    kappa = raw_key / np.linalg.norm(raw_key, axis=-1, keepdims=True)
    eta = _sigmoid(rng.standard_normal(keys) + (4 if aligned else 0))
    drawn = MODEL_FLOOR * _sigmoid(3 * rng.standard_normal(keys) - 2)
    inputs = {
        "r": rng.standard_normal(keys),
        "log_w": drawn if log_w is None else np.full(keys, log_w),
        "k": raw_key * eta,
        "v": rng.standard_normal((batch, time, heads, value_dim)),
        "a": -kappa,
        "b": kappa * eta,
        "state": state_scale * rng.standard_normal((batch, heads, value_dim, key_dim)),
    }
    return rounded(inputs)


def make_step_inputs(case: str, shape: Shape, seed: int = 0) -> dict[str, Floats]:
    """Arguments of `wkv7_step` by name, with a value residual, as float64 arrays whose values float32 holds exactly.

    What `CASES` asks of the operator's arguments is asked of what they are made from; time and M are not used.
    """
    log_w, aligned, state_scale = CASES[case]
    rng = np.random.default_rng([seed, *shape])
    per_head = (shape.heads, shape.key_dim)
    per_token = (shape.batch, *per_head)
    w = 3 * rng.standard_normal(per_token) - 2
    if log_w is not None:
        share = min(log_w / MODEL_FLOOR, 1 - 1e-9)
        w = np.full(per_token, math.log(share / (1 - share)))
    inputs = {name: rng.standard_normal(per_token) for name in ("r", "k", "v", "g", "v_first", "nu")}
    inputs |= {name: rng.standard_normal(per_head) for name in ("v0", "r_k", "weight", "bias")}
    inputs |= {
        "w": w,
        "a": rng.standard_normal(per_token) + (4 if aligned else 0),
        "w0": np.zeros(per_head) if log_w is not None else 0.1 * rng.standard_normal(per_head),
        "a0": 0.1 * rng.standard_normal(per_head),
        "k_k": 0.7 + 0.1 * rng.standard_normal(per_head),
        "k_a": 1 + 0.1 * rng.standard_normal(per_head),
        "state": state_scale * rng.standard_normal((*per_token, shape.key_dim)),
    }
    return rounded(inputs)


def make_output_inputs(case: str, shape: Shape, seed: int = 0) -> dict[str, Floats]:
    """Arguments of `wkv7_output` by name, as float64 arrays whose values float32 holds exactly; M is not used.

    Args:
      case: of y, which is as large as the state.
    """
    rng = np.random.default_rng([seed, *shape])
    per_head = (shape.heads, shape.key_dim)
    over_time = (shape.batch, shape.time, *per_head)
    inputs = {name: rng.standard_normal(over_time) for name in ("y", "r", "k", "v", "g")}
    inputs |= {name: rng.standard_normal(per_head) for name in ("r_k", "weight", "bias")}
    return rounded(inputs | {"y": CASES[case].state_scale * inputs["y"]})


MODEL_CONSTANTS = {"epsilon": 64e-5, "decay_scale": MODEL_FLOOR}
"""Of RWKV-7 models: `epsilon` of the norm, and `decay_scale`."""


def _sigmoid(x: Floats) -> Floats:
    return 1 / (1 + np.exp(-x))
