"""One token of RWKV-7 within the heads of a layer: all that decoding does between a layer's projections."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array, lax

from rwkv_kernels import arguments, dispatch
from rwkv_kernels.ops.wkv7.output import gated_output, refuse_heads
from rwkv_kernels.ops.wkv7.scan import step

PER_TOKEN: tuple[str, ...] = ("r", "w", "k", "v", "a", "g")
"""What a layer projects, [B, H, N] each."""

PER_HEAD: tuple[str, ...] = ("w0", "a0", "k_k", "k_a", "r_k", "weight", "bias")
"""Its parameters, [H, N] each."""

RESIDUAL: tuple[str, ...] = ("v_first", "nu", "v0")
"""What layers with a value residual have as well."""


def operator_inputs(x: Mapping[str, Array], decay_scale: float, rate_scale: float) -> tuple[Array, ...]:
    """r, log_w, k, v, a and b of `wkv7` from what a layer projects, where the last axis is one head's channels.

    RWKV-7 (arXiv 2503.14456), equations 4, 6 to 8, 10, 12 and 15. Shared by all implementations.

    Args:
      x: arrays by the names of `wkv7_step`'s arguments, all of one dtype, float32 or float64, and of shapes that
        broadcast; without `RESIDUAL`, v is as projected.
    """
    k, v = x["k"], x["v"]
    log_w = decay_scale * jax.nn.sigmoid(x["w0"] + x["w"])
    eta = jax.nn.sigmoid(x["a0"] + x["a"])
    if rate_scale != 1:
        eta = rate_scale * eta
    if "v0" in x:
        v = v + (x["v_first"] - v) * jax.nn.sigmoid(x["v0"] + x["nu"])
    kappa = k * x["k_k"]
    kappa = kappa * lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(kappa), axis=-1, keepdims=True), 1e-24))
    k = k * (1 + (eta - 1) * x["k_a"])
    return x["r"], log_w, k, v, -kappa, kappa * eta


def wkv7_step_xla(
    inputs: Mapping[str, Array],
    state: Array,
    *,
    epsilon: float,
    decay_scale: float,
    rate_scale: float = 1.0,
    lengths: Array | None = None,
) -> tuple[Array, Array]:
    """The definition, in the state's dtype.

    Args:
      inputs: by the names of `wkv7_step`'s arguments.
    """
    dtype = state.dtype
    x = {name: y.astype(dtype) if y.ndim == 3 else y.astype(dtype)[None] for name, y in inputs.items()}
    r, _, k, v, _, _ = vectors = operator_inputs(x, decay_scale, rate_scale)
    if lengths is not None:
        vectors = tuple(jnp.where((lengths > 0)[:, None, None], x, 0) for x in vectors)
    state, y = step(state, *vectors, precision="full")
    return gated_output(y, r, k, v, x["g"], x["r_k"], x["weight"], x["bias"], epsilon), state


STEP = dispatch.Alternatives(
    name="wkv7_step",
    implementations={
        "xla": dispatch.Implementation(wkv7_step_xla, dispatch.anything),
        "pallas_triton": dispatch.Implementation(
            dispatch.on_first_use("rwkv_kernels.ops.wkv7.step_pallas_triton:wkv7_step_pallas_triton"), refuse_heads
        ),
    },
    order=("xla",),
    axes={**dict.fromkeys((*PER_TOKEN, "v_first", "nu"), "B H N"), **dict.fromkeys((*PER_HEAD, "v0"), "H N")},
)
"""Its implementations; the kernel runs only when named, or measured to be the faster."""


def wkv7_step(
    r: Array,
    w: Array,
    k: Array,
    v: Array,
    a: Array,
    g: Array,
    w0: Array,
    a0: Array,
    k_k: Array,
    k_a: Array,
    r_k: Array,
    weight: Array,
    bias: Array,
    state: Array,
    *,
    v_first: Array | None = None,
    nu: Array | None = None,
    v0: Array | None = None,
    epsilon: float,
    decay_scale: float,
    rate_scale: float = 1.0,
    lengths: Array | None = None,
    implementation: str | dispatch.Implementation | None = None,
) -> tuple[Array, Array]:
    """One token of a layer's heads, from projections to what its output matrix multiplies.

    RWKV-7 (arXiv 2503.14456), equations 4, 6 to 8, 10, 12, 15, 17 and 20 to 22: decay, in-context learning rate, value
    residual, removal and replacement key, S' = S (diag(w) - kappa^T (eta kappa)) + v^T k, norm of S' r over each head,
    bonus and gate. All is computed in at least float32, and only the output is rounded.

    Args:
      r, k, v, g: [B, H, N], of any floating dtype: receptance, key, value and gate as projected.
      w, a: [B, H, N], the low-rank maps of decay and in-context learning rate, without biases.
      w0, a0: [H, N], the biases; k_k, k_a: [H, N], of the two keys.
      r_k, weight, bias: [H, N], of the bonus and the norm.
      state: [B, H, N, N], float32 or float64, the value axis first. The kernel writes the next state where this one
        lies, if nothing else reads it.
      v_first, nu: [B, H, N], the first layer's values and the low-rank map of the value residual, and v0: [H, N], its
        bias; None, all three, in a layer without one.
      epsilon: of the norm.
      decay_scale: log w = decay_scale sigmoid(w0 + w).
      rate_scale: eta = rate_scale sigmoid(a0 + a); 1, or 2 for negative eigenvalues (arXiv 2411.12537).
      lengths: integers [B], 0 or 1; 0 leaves a row's state as it was, and takes 0 for S' r.
      implementation: a name or an `Implementation`; None is "xla".

    Returns:
      o [B, H, N] in v's dtype, and the next state. Both are differentiable in every array.

    Raises:
      ValueError: shapes or dtypes that do not go together, a positive decay_scale, a rate_scale outside 0 to 2, an
        unknown implementation, or one that cannot run here.
    """
    given = (r, w, k, v, a, g, w0, a0, k_k, k_a, r_k, weight, bias)
    inputs = dict(zip(PER_TOKEN + PER_HEAD, map(jnp.asarray, given), strict=True))
    residual = {name: x for name, x in zip(RESIDUAL, (v_first, nu, v0), strict=True) if x is not None}
    if residual:
        if absent := [name for name in RESIDUAL if name not in residual]:
            raise ValueError(f"{', '.join(absent)}: goes with {', '.join(residual)}; give all of a residual or none")
        inputs |= {name: jnp.asarray(x) for name, x in residual.items()}
    if decay_scale > 0:
        raise ValueError(f"decay_scale = {decay_scale}: scales the log of a decay, so it is at most 0")
    if not 0 < rate_scale <= 2:
        raise ValueError(f"rate_scale = {rate_scale}: must be above 0 and at most 2, or the state would grow")
    sizes = arguments.axis_sizes(inputs, STEP.axes, ("r",))
    arguments.check_inputs(inputs, STEP.axes, sizes, "r")
    batch, heads, size = (sizes[axis] for axis in "BHN")
    state = jnp.asarray(state)
    arguments.check_state("state", state, (batch, heads, size, size), "[B, H, N, N] with the value axis first")
    lengths = arguments.check_lengths(lengths, batch, 1)
    dtype = arguments.recurrence_dtype(inputs, state)
    chosen = STEP.choose(dispatch.problem_here((batch, 1, heads, size, size), dtype.name), implementation)
    inputs, state, lengths = arguments.broadcast_varying_axes(inputs, state.astype(dtype), lengths)
    run = functools.partial(chosen.run, epsilon=epsilon, decay_scale=decay_scale, rate_scale=rate_scale)
    o, state = run(inputs, state, lengths=lengths)
    return o.astype(inputs["v"].dtype), state
