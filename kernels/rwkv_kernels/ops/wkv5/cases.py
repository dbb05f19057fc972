"""Named inputs of WKV-5, easy and adversarial, for tests and benchmarks; numpy only."""

from __future__ import annotations

import numpy as np

from rwkv_kernels.testing.cases import ATTENTION_CASES, AttentionCase, Floats, Shape, attention_inputs

CASES: dict[str, AttentionCase] = ATTENTION_CASES | {"one_decay_per_head": AttentionCase(one_per_head=True)}
"""All cases, by name. `one_decay_per_head` is RWKV-5.0 and 5.1, the others are 5.2."""


def make_inputs(case: str, shape: Shape, seed: int = 0) -> dict[str, Floats]:
    """Arguments of `wkv5`, by name, as float64 arrays whose values float32 holds exactly.

    r, k: [B, T, H, N]; v: [B, T, H, M]; log_w, u: [H, N] or [H, 1]; state: [B, H, M, N]. Decays e^{-e^x}
    are drawn with x from -6 to -1, where official initialization puts them.
    """
    chosen = CASES[case]
    rng = np.random.default_rng([seed, *shape])
    log_w = -np.exp(rng.uniform(-6, -1, (shape.heads, 1 if chosen.one_per_head else shape.key_dim)))
    return attention_inputs(chosen, shape, rng, log_w)
