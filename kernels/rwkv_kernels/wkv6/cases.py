"""Named inputs of WKV-6, easy and adversarial, for tests and benchmarks; numpy only."""

from __future__ import annotations

import numpy as np

from rwkv_kernels.cases import ATTENTION_CASES, AttentionCase, Floats, Shape, attention_inputs

CASES: dict[str, AttentionCase] = dict(ATTENTION_CASES)
"""Every case, by name."""


def make_inputs(case: str, shape: Shape, seed: int = 0) -> dict[str, Floats]:
    """Arguments of `wkv6`, by name, as float64 arrays whose values float32 holds exactly.

    r, log_w, k: [B, T, H, N]; v: [B, T, H, M]; u: [H, N]; state: [B, H, M, N]. Drawn decays are e^{-e^x} with x normal.
    """
    rng = np.random.default_rng([seed, *shape])
    log_w = -np.exp(rng.standard_normal((shape.batch, shape.time, shape.heads, shape.key_dim)))
    return attention_inputs(CASES[case], shape, rng, log_w)
