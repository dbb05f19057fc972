"""The WKV operator of RWKV-7 (Goose): arguments checked, an implementation chosen, one token or a sequence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, core

from rwkv_kernels import dispatch
from rwkv_kernels.wkv7.chunked import LOG_DECAY_FLOOR, wkv7_chunked
from rwkv_kernels.wkv7.scan import step, wkv7_scan

IMPLEMENTATIONS: dict[str, dispatch.Implementation] = {
    "scan": dispatch.Implementation(wkv7_scan, refuses=lambda problem: None),
    "chunked": dispatch.Implementation(wkv7_chunked, refuses=lambda problem: None),
}
"""Every way to compute the operator, by name."""


def _preferred(problem: dispatch.Problem) -> tuple[str, ...]:
    """Names from the fastest down, as measured by benchmarks/wkv7_cpu.py."""
    length = problem.shape[1]
    return ("scan", "chunked") if length == 1 else ("chunked", "scan")


def _check_log_decay(log_w: Array) -> None:
    """Refuses decays that cannot be right, where the values are at hand (outside jit)."""
    if isinstance(log_w, core.Tracer) or not log_w.is_fully_addressable:
        return
    values = np.asarray(log_w, np.float32)
    if values.size and not values.max() <= 0:
        raise ValueError(f"log_w: its largest value is {values.max()}; it is the log of a decay, so at most 0")


def _problem(r: Array, v: Array, dtype: jnp.dtype) -> dispatch.Problem:
    batch, time, heads, key_dim = r.shape
    return dispatch.Problem(jax.default_backend(), (batch, time, heads, key_dim, v.shape[-1]), dtype.name)


def _check(r: Array, log_w: Array, k: Array, v: Array, a: Array, b: Array, state: Array | None, axes: str) -> jnp.dtype:
    """Checks shapes and dtypes against `axes` (B T H N, or B H N for one token) and returns the recurrence's dtype."""
    inputs = {"r": r, "log_w": log_w, "k": k, "v": v, "a": a, "b": b}
    for name, x in inputs.items():
        if x.ndim != len(axes.split()):
            raise ValueError(f"{name}: shape {x.shape} must be [{axes}]")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name}: dtype {x.dtype} must be a floating one")
        expected = r.shape[:-1] if name == "v" else r.shape
        if x.shape[: len(expected)] != expected:
            raise ValueError(f"{name}: shape {x.shape} does not go with r of shape {r.shape}, [{axes}]")
        if 0 in x.shape:
            raise ValueError(f"{name}: shape {x.shape} has an empty axis")
    dtype = jnp.promote_types(jnp.result_type(*inputs.values()), jnp.float32)
    if state is not None:
        expected = (r.shape[0], r.shape[-2], v.shape[-1], r.shape[-1])
        if state.shape != expected:
            raise ValueError(f"state: shape {state.shape} must be {expected}, [B, H, M, N] with the value axis first")
        if state.dtype not in (jnp.float32, jnp.float64):
            raise ValueError(
                f"state: dtype {state.dtype} must be float32 or float64; the recurrence is not kept in less"
            )
        dtype = jnp.promote_types(dtype, state.dtype)
    return dtype


def _initial_state(r: Array, v: Array, dtype: jnp.dtype) -> Array:
    return jnp.zeros((r.shape[0], r.shape[-2], v.shape[-1], r.shape[-1]), dtype)


def wkv7(
    r: Array,
    log_w: Array,
    k: Array,
    v: Array,
    a: Array,
    b: Array,
    state: Array | None = None,
    *,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """WKV-7 over a sequence: S_t = S_{t-1} (diag(w_t) + a_t b_t^T) + v_t k_t^T and y_t = S_t r_t.

    RWKV-7 (arXiv 2503.14456), the generalised delta rule; the model passes a = -kappa and b = kappa * eta.

    Args:
      r, log_w, k, a, b: [B, T, H, N], float16, bfloat16, float32 or float64, T from 1; log_w is the log of the
        decay, at most 0. RWKV-7 keeps it above -e^{-1/2}; far below that (float32: `LOG_DECAY_FLOOR` = -4) only
        `scan` is exact, and `chunked` gives NaN rather than a wrong number.
      v: [B, T, H, M].
      state: [B, H, M, N], value axis first, float32 or float64; None is the empty state.
      implementation: `scan` or `chunked`; None takes the fastest for the problem.

    Returns:
      y [B, T, H, M] in v's dtype, and the final state [B, H, M, N], float32 (float64 where an input is). Both are
      differentiable in every input and in the initial state.

    Raises:
      ValueError: shapes or dtypes that do not go together, a log_w above 0 (where its values are at hand), an unknown
        implementation.
    """
    r, log_w, k, v, a, b = (jnp.asarray(x) for x in (r, log_w, k, v, a, b))
    dtype = _check(r, log_w, k, v, a, b, state, "B T H N")
    _check_log_decay(log_w)
    problem = _problem(r, v, dtype)
    chosen = dispatch.choose("wkv7", IMPLEMENTATIONS, _preferred(problem), problem, implementation)
    state = _initial_state(r, v, dtype) if state is None else state.astype(dtype)
    y, state = chosen.run(r, log_w, k, v, a, b, state)
    return y.astype(v.dtype), state


def wkv7_step(
    r: Array, log_w: Array, k: Array, v: Array, a: Array, b: Array, state: Array | None = None
) -> tuple[Array, Array]:
    """WKV-7 for one token: `wkv7` without the time axis.

    Args:
      r, log_w, k, a, b: [B, H, N]; v: [B, H, M]; state: [B, H, M, N] or None.

    Returns:
      y [B, H, M] in v's dtype, and the next state.

    Raises:
      ValueError: as `wkv7`.
    """
    r, log_w, k, v, a, b = (jnp.asarray(x) for x in (r, log_w, k, v, a, b))
    dtype = _check(r, log_w, k, v, a, b, state, "B H N")
    _check_log_decay(log_w)
    state = _initial_state(r, v, dtype) if state is None else state.astype(dtype)
    state, y = step(state, *(x.astype(dtype) for x in (r, log_w, k, v, a, b)))
    return y.astype(v.dtype), state


def implementations(r: Array, v: Array) -> dict[str, str | None]:
    """What would run `wkv7` for inputs of these shapes here: None, or the reason why not, for each implementation."""
    return dispatch.explain(IMPLEMENTATIONS, _problem(r, v, jnp.promote_types(r.dtype, jnp.float32)))


__all__ = ["IMPLEMENTATIONS", "LOG_DECAY_FLOOR", "implementations", "wkv7", "wkv7_chunked", "wkv7_scan", "wkv7_step"]
