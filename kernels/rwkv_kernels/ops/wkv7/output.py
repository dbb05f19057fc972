"""What follows WKV-7 within a head of a model: norm, bonus and gate."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import Array, lax

from rwkv_kernels import arguments, dispatch
from rwkv_kernels.chunking import is_power_of_two

LARGEST_HEAD = 128
"""Head size up to which kernels hold a whole head in a program's registers: a state of N x N, or rows of N channels."""


def gated_output(
    y: Array, r: Array, k: Array, v: Array, g: Array, r_k: Array, weight: Array, bias: Array, epsilon: float
) -> Array:
    """(norm(y) weight + bias + (r . r_k k) v) g, where the last axis is one head's channels.

    RWKV-7 (arXiv 2503.14456), equations 20 to 22. Shared by all implementations; all arrays have one dtype, float32 or
    float64, and shapes that broadcast.
    """
    centered = y - jnp.mean(y, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
    bonus = jnp.sum(r * r_k * k, axis=-1, keepdims=True) * v
    return (centered * lax.rsqrt(variance + epsilon) * weight + bias + bonus) * g


def refuse_heads(problem: dispatch.Problem) -> str | None:
    """Refuses what kernels with whole heads in registers cannot run."""
    if refusal := dispatch.unless_nvidia(problem):
        return refusal
    size = problem.shape[3]
    if not is_power_of_two(size) or size > LARGEST_HEAD:
        return f"a program holds a whole head: sizes are powers of two up to {LARGEST_HEAD}, and this one is {size}"
    return None


def wkv7_output_xla(
    y: Array, r: Array, k: Array, v: Array, g: Array, r_k: Array, weight: Array, bias: Array, *, epsilon: float
) -> Array:
    """The definition; arguments as of `wkv7_output`. The result has at least float32."""
    inputs = {"y": y, "r": r, "k": k, "v": v, "g": g, "r_k": r_k, "weight": weight, "bias": bias}
    dtype = arguments.recurrence_dtype(inputs)
    wide = (x.astype(dtype) if x.ndim == 4 else x.astype(dtype)[None, None] for x in inputs.values())
    return gated_output(*wide, epsilon=epsilon)


OUTPUT = dispatch.Alternatives(
    name="wkv7_output",
    implementations={
        "xla": dispatch.Implementation(wkv7_output_xla, dispatch.anything),
        "pallas_triton": dispatch.Implementation(
            dispatch.on_first_use("rwkv_kernels.ops.wkv7.output_pallas_triton:wkv7_output_pallas_triton"), refuse_heads
        ),
    },
    order=("xla",),
    axes={**dict.fromkeys(("y", "r", "k", "v", "g"), "B T H N"), **dict.fromkeys(("r_k", "weight", "bias"), "H N")},
)
"""Its implementations; the kernels run only when named."""


def wkv7_output(
    y: Array,
    r: Array,
    k: Array,
    v: Array,
    g: Array,
    r_k: Array,
    weight: Array,
    bias: Array,
    *,
    epsilon: float,
    implementation: str | dispatch.Implementation | None = None,
) -> Array:
    """What follows `wkv7` in a model: (norm(y) weight + bias + (r . r_k k) v) g, with a norm over each head.

    RWKV-7 (arXiv 2503.14456), equations 20 to 22. All is computed in at least float32, and only the result is rounded.

    Args:
      y, r, k, v, g: [B, T, H, N], of any floating dtype: the operator's result, its inputs, the gate.
      r_k, weight, bias: [H, N], of the bonus and the norm.
      epsilon: of the norm.
      implementation: a name or an `Implementation`; None is "xla".

    Returns:
      [B, T, H, N] in v's dtype, differentiable in every array.

    Raises:
      ValueError: shapes or dtypes that do not go together, an unknown implementation, or one that cannot run here.
    """
    inputs = dict(zip(OUTPUT.axes, map(jnp.asarray, (y, r, k, v, g, r_k, weight, bias)), strict=True))
    sizes = arguments.axis_sizes(inputs, OUTPUT.axes, ("y",))
    arguments.check_inputs(inputs, OUTPUT.axes, sizes, "y")
    batch, time, heads, size = (sizes[axis] for axis in "BTHN")
    dtype = arguments.recurrence_dtype(inputs)
    chosen = OUTPUT.choose(dispatch.problem_here((batch, time, heads, size, size), dtype.name), implementation)
    arrays = arguments.broadcast_varying_axes(*inputs.values())
    return functools.partial(chosen.run, epsilon=epsilon)(*arrays).astype(inputs["v"].dtype)
