"""The WKV operators of RWKV in JAX: one function per generation, on any platform.

Shape letters: B batch, T time, C width, H heads, N head size of keys, M head size of values. The package imports jax
only.
"""

from __future__ import annotations

import dataclasses

from rwkv_kernels import dispatch
from rwkv_kernels.operator import Operator
from rwkv_kernels.ops.wkv4.api import OPERATOR as _WKV4
from rwkv_kernels.ops.wkv4.api import wkv4
from rwkv_kernels.ops.wkv5.api import OPERATOR as _WKV5
from rwkv_kernels.ops.wkv5.api import wkv5
from rwkv_kernels.ops.wkv6.api import OPERATOR as _WKV6
from rwkv_kernels.ops.wkv6.api import wkv6
from rwkv_kernels.ops.wkv7.api import OPERATOR as _WKV7
from rwkv_kernels.ops.wkv7.api import wkv7
from rwkv_kernels.ops.wkv7.output import OUTPUT as _WKV7_OUTPUT
from rwkv_kernels.ops.wkv7.output import wkv7_output
from rwkv_kernels.ops.wkv7.step import STEP as _WKV7_STEP
from rwkv_kernels.ops.wkv7.step import wkv7_step
from rwkv_kernels.sharded import from_previous_shard

OPERATORS: dict[str, Operator] = {operator.name: operator for operator in (_WKV4, _WKV5, _WKV6, _WKV7)}
"""All operators, by name."""

PARTS: dict[str, dispatch.Alternatives] = {part.name: part for part in (_WKV7_STEP, _WKV7_OUTPUT)}
"""Functions around an operator that have several implementations too, by name."""


def _find(name: str) -> Operator | dispatch.Alternatives:
    known = OPERATORS | PARTS
    if name not in known:
        raise ValueError(f"operator = {name!r}: must be one of {', '.join(known)}")
    return known[name]


def implementations(operator: str) -> tuple[str, ...]:
    """Names of all implementations of an operator such as "wkv7"; `explain` says which can run.

    Raises:
      ValueError: an unknown operator.
    """
    return tuple(_find(operator).implementations)


def explain(
    operator: str,
    shape: tuple[int, ...],
    dtype: str = "float32",
    platform: str | None = None,
    device_kind: str | None = None,
    measured: str | None = None,
) -> dispatch.Explanation:
    """Explains which implementation would run, and why others cannot.

    Args:
      operator: "wkv4" to "wkv7", or of `PARTS`.
      shape: (B, T, H, N, M), (B, T, H, N) if M equals N, or (B, T, C) for WKV-4.
      dtype: of the recurrence: float32, or float64 if any argument is.
      platform: `cpu`, `gpu` or `tpu`; None is JAX's default backend.
      device_kind: as JAX names it, such as `NVIDIA H100 80GB HBM3`; None is the device of JAX's default backend if that
        is of this platform, and otherwise not known.
      measured: the implementation that `rwkv_kernels.autotune` found to be the fastest; None is the table's choice.

    Returns:
      The chosen implementation, and for each other one the reason why it cannot run, if any; print it.

    Raises:
      ValueError: an unknown operator, a shape of another length, or a measured implementation that cannot run.
    """
    if len(shape) not in (3, 4, 5):
        raise ValueError(f"shape = {shape}: must be (B, T, H, N), (B, T, H, N, M) or, for wkv4, (B, T, C)")
    known = _find(operator)
    batch, time, heads, key_dim, value_dim = (*shape, 1, 1) if len(shape) == 3 else (*shape, shape[3])[:5]
    problem = dispatch.problem_here((batch, time, heads, key_dim, value_dim), dtype)
    if platform not in (None, problem.platform) or device_kind is not None:
        problem = dataclasses.replace(problem, platform=platform or problem.platform, device_kind=device_kind)
    return dispatch.explain(known.name, known.implementations, known.preferred(problem), problem, measured)


__all__ = [
    "OPERATORS",
    "PARTS",
    "explain",
    "from_previous_shard",
    "implementations",
    "wkv4",
    "wkv5",
    "wkv6",
    "wkv7",
    "wkv7_output",
    "wkv7_step",
]
