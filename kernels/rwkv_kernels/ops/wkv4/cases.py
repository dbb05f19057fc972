"""Named inputs of WKV-4, easy and adversarial, for tests and benchmarks; numpy only."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from rwkv_kernels.testing.cases import FAST, NEAR_ONE, Shape


class Case(NamedTuple):
    """Settings of a test case."""

    log_w: float | None = None
    """One value for every channel; None spreads -log w from a millionth to 20, like a trained model's."""
    key_scale: float = 1.0
    """Standard deviation of the keys, which are clipped at `LARGEST_KEY`."""
    key_offset: float = 0.0
    """Added to every key."""
    state_scale: float = 1.0
    """Standard deviation of the initial state's numerator, and of the size of its denominator."""


LARGEST_KEY = 60.0
"""Official trainers clip keys here; e^60 is finite in float32."""

CASES: dict[str, Case] = {
    "realistic": Case(),
    "slow_decay": Case(log_w=NEAR_ONE),
    "fast_decay": Case(log_w=FAST),
    "large_keys": Case(key_scale=30.0),
    "large_keys_slow_decay": Case(log_w=-1e-6, key_scale=0.5, key_offset=59.0),
    "large_state": Case(state_scale=1e3),
}
"""All cases, by name. In `large_keys_slow_decay` a step's decay is below the spacing of float32 at the exponent."""


def make_inputs(case: str, shape: Shape, seed: int = 0) -> dict[str, Any]:
    """Arguments of `wkv4`, by name, as float64 arrays whose values float32 holds exactly.

    log_w, u: [C]; k, v: [B, T, C]; state: numerator, denominator and max_exponent [B, C]; C is heads * key_dim.
    """
    log_w, key_scale, key_offset, state_scale = CASES[case]
    batch, time, channels = shape.batch, shape.time, shape.heads * shape.key_dim
    rng = np.random.default_rng([seed, *shape])
    tokens, row = (batch, time, channels), (batch, channels)
    spread = -np.geomspace(1e-6, 20, channels) if channels > 1 else np.full(1, -0.1)
    keys = key_scale * rng.standard_normal(tokens) + key_offset
    inputs = {
        "log_w": rng.permutation(spread) if log_w is None else np.full(channels, log_w),
        "u": rng.standard_normal(channels),
        "k": np.clip(keys, -LARGEST_KEY, LARGEST_KEY),
        "v": rng.standard_normal(tokens),
        "state": (
            state_scale * rng.standard_normal(row),
            state_scale * np.exp(rng.standard_normal(row)),
            key_offset + rng.standard_normal(row),
        ),
    }

    def rounded(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(rounded(part) for part in x)
        return x.astype(np.float32).astype(np.float64)

    return {name: rounded(x) for name, x in inputs.items()}
