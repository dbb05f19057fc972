"""One token of WKV-7 with the norm, bonus and gate that follow it: what decoding takes of every head in every layer."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import Array

from rwkv_kernels import arguments, dispatch
from rwkv_kernels.ops.wkv7.output import gated_output, refuse_heads
from rwkv_kernels.ops.wkv7.scan import step


def wkv7_step_xla(
    r: Array,
    log_w: Array,
    k: Array,
    v: Array,
    a: Array,
    b: Array,
    g: Array,
    r_k: Array,
    weight: Array,
    bias: Array,
    state: Array,
    *,
    epsilon: float,
    lengths: Array | None = None,
) -> tuple[Array, Array]:
    """The definition, in the state's dtype; arguments as of `wkv7_step`."""
    r, log_w, k, v, a, b, g, r_k, weight, bias = (
        x.astype(state.dtype) for x in (r, log_w, k, v, a, b, g, r_k, weight, bias)
    )
    inputs = (r, log_w, k, v, a, b)
    if lengths is not None:
        inputs = tuple(jnp.where((lengths > 0)[:, None, None], x, 0) for x in inputs)
    state, y = step(state, *inputs, precision="full")
    return gated_output(y, r, k, v, g, r_k[None], weight[None], bias[None], epsilon), state


STEP = dispatch.Alternatives(
    name="wkv7_step",
    implementations={
        "xla": dispatch.Implementation(wkv7_step_xla, dispatch.anything),
        "pallas_triton": dispatch.Implementation(
            dispatch.on_first_use("rwkv_kernels.ops.wkv7.step_pallas_triton:wkv7_step_pallas_triton"), refuse_heads
        ),
    },
    order=("xla",),
)
"""Its implementations; the kernel runs only when named."""


def wkv7_step(
    r: Array,
    log_w: Array,
    k: Array,
    v: Array,
    a: Array,
    b: Array,
    g: Array,
    r_k: Array,
    weight: Array,
    bias: Array,
    state: Array,
    *,
    epsilon: float,
    lengths: Array | None = None,
    implementation: str | dispatch.Implementation | None = None,
    validate: bool | None = None,
) -> tuple[Array, Array]:
    """One token of `wkv7` and what follows: S' = S (diag(w) + a b^T) + v k^T, o = (norm(S' r) + (r . r_k k) v) g.

    RWKV-7 (arXiv 2503.14456), equations 17 and 20 to 22; the norm is over each head, with weight and bias. All is
    computed in at least float32, and only o is rounded.

    Args:
      r, log_w, k, v, a, b: [B, H, N], of any floating dtype; as in `wkv7` with T = 1 and M = N.
      g: [B, H, N], the gate.
      r_k, weight, bias: [H, N], of the bonus and the norm.
      state: [B, H, N, N], float32 or float64. The kernel writes the next state where this one lies, if nothing else
        reads it.
      epsilon: of the norm.
      lengths: integers [B], 0 or 1; 0 leaves a row's state as it was, and takes 0 for S' r.
      implementation: a name or an `Implementation`; None is "xla".
      validate: whether to check values of log_w, as in `wkv7`.

    Returns:
      o [B, H, N] in v's dtype, and the next state. Both are differentiable in every array.

    Raises:
      ValueError: shapes or dtypes that do not go together, a log_w above 0 (where values are known), an unknown
        implementation, or one that cannot run here.
    """
    per_token = {"r": r, "log_w": log_w, "k": k, "v": v, "a": a, "b": b, "g": g}
    per_head = {"r_k": r_k, "weight": weight, "bias": bias}
    inputs = {name: jnp.asarray(x) for name, x in (per_token | per_head).items()}
    axes = dict.fromkeys(per_token, "B H N") | dict.fromkeys(per_head, "H N")
    sizes = arguments.axis_sizes(inputs, axes, ("r",))
    arguments.check_inputs(inputs, axes, sizes, "r")
    batch, heads, size = (sizes[axis] for axis in "BHN")
    arguments.check_log_decay(inputs["log_w"], validate)
    state = jnp.asarray(state)
    arguments.check_state("state", state, (batch, heads, size, size), "[B, H, N, N] with the value axis first")
    lengths = arguments.check_lengths(lengths, batch, 1)
    dtype = arguments.recurrence_dtype(inputs, state)
    chosen = STEP.choose(dispatch.problem_here((batch, 1, heads, size, size), dtype.name), implementation)
    arrays, lengths = arguments.broadcast_varying_axes((*inputs.values(), state.astype(dtype)), lengths)
    o, state = functools.partial(chosen.run, epsilon=epsilon, lengths=lengths)(*arrays)
    return o.astype(inputs["v"].dtype), state
