"""Named inputs of WKV-6, easy and adversarial, for tests and benchmarks; numpy only."""

from __future__ import annotations

import numpy as np

from rwkv_kernels.testing.cases import ATTENTION_CASES, AttentionCase, Floats, Shape, attention_inputs

CASES: dict[str, AttentionCase] = dict(ATTENTION_CASES)
"""All cases, by name."""


def make_inputs(case: str, shape: Shape, seed: int = 0) -> dict[str, Floats]:
    """Arguments of `wkv6`, by name, as float64 arrays whose values float32 holds exactly.

    r, log_w, k: [B, T, H, N]; v: [B, T, H, M]; u: [H, N]; state: [B, H, M, N]. Decays e^{-e^x} are drawn with x from -6
    to -1 by channel, where official initialization puts them, and normal by token around it.
    """
    rng = np.random.default_rng([seed, *shape])
    by_channel = rng.uniform(-6, -1, (shape.heads, shape.key_dim))
    by_token = 0.5 * rng.standard_normal((shape.batch, shape.time, shape.heads, shape.key_dim))
    return attention_inputs(CASES[case], shape, rng, -np.exp(by_channel + by_token))
