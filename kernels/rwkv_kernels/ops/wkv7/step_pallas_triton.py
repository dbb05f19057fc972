"""`wkv7_step` as one Triton kernel, for NVIDIA GPUs: a program a row and head, in place."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from rwkv_kernels.arguments import varying_like
from rwkv_kernels.ops.wkv7.output import gated_output
from rwkv_kernels.ops.wkv7.step import operator_inputs, wkv7_step_xla
from rwkv_kernels.pallas.driver import as_float32
from rwkv_kernels.pallas.triton import compiler_params

NAME = "wkv7_step"
"""The kernel's name in profiles and compiled programs."""

STATE_PER_THREAD = 32
"""Numbers of the state that a thread holds."""


def num_warps(size: int) -> int:
    """Warps of a program whose heads are of a size: 1 for 32, 4 for 64, 16 for 128."""
    return max(1, size * size // (32 * STATE_PER_THREAD))


def _update(state: Array, vectors: tuple[Array, ...]) -> tuple[Array, Array]:
    """The next state [N, N], value axis first, and y [N]; as `scan.step`, but without matrix products."""
    r, log_w, k, v, a, b = vectors
    removed = jnp.sum(state * a[None, :], axis=1)
    state = state * jnp.exp(log_w)[None, :] + removed[:, None] * b[None, :] + v[:, None] * k[None, :]
    return state, jnp.sum(state * r[None, :], axis=1)


def _body(
    names: tuple[str, ...], epsilon: float, scales: tuple[float, float], with_lengths: bool, state_ref: Any, *refs: Any
) -> None:
    """One head of one row."""
    *input_refs, o_ref, next_ref = refs
    is_active = input_refs.pop()[...] > 0 if with_lengths else None
    x = {name: as_float32(ref[...]) for name, ref in zip(names, input_refs, strict=True)}
    r, _, k, v, _, _ = vectors = operator_inputs(x, *scales)
    if is_active is not None:  # not a choice between two states, which would take twice their registers
        vectors = tuple(jnp.where(is_active, x, 0) for x in vectors)
    next_ref[...], y = _update(state_ref[...], vectors)
    o_ref[...] = gated_output(y, r, k, v, x["g"], x["r_k"], x["weight"], x["bias"], epsilon).astype(o_ref.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _run(
    epsilon: float,
    scales: tuple[float, float],
    interpret: bool,
    lengths: Array | None,
    inputs: dict[str, Array],
    state: Array,
) -> tuple[Array, Array]:
    """With `scales` of decay and in-context learning rate."""
    batch, heads, size = inputs["v"].shape
    of_token = pl.BlockSpec((None, None, size), lambda b, h: (b, h, 0))
    of_head = pl.BlockSpec((None, size), lambda b, h: (h, 0))
    of_state = pl.BlockSpec((None, None, size, size), lambda b, h: (b, h, 0, 0))
    of_row = [] if lengths is None else [pl.BlockSpec((None,), lambda b, h: (b,))]
    o, state = pl.pallas_call(
        functools.partial(_body, tuple(inputs), epsilon, scales, lengths is not None),
        grid=(batch, heads),
        in_specs=[of_state, *(of_token if x.ndim == 3 else of_head for x in inputs.values()), *of_row],
        out_specs=[of_token, of_state],
        out_shape=[
            varying_like(state, (batch, heads, size), inputs["v"].dtype),
            varying_like(state, state.shape, jnp.float32),
        ],
        input_output_aliases={0: 1},
        compiler_params=compiler_params(num_warps(size)),
        interpret=interpret,
        name=NAME,
    )(state, *inputs.values(), *(() if lengths is None else (lengths,)))
    return o, state


def _run_forward(
    epsilon: float,
    scales: tuple[float, float],
    interpret: bool,
    lengths: Array | None,
    inputs: dict[str, Array],
    state: Array,
) -> tuple[Any, Any]:
    return _run(epsilon, scales, interpret, lengths, inputs, state), (lengths, inputs, state)


def _run_backward(
    epsilon: float, scales: tuple[float, float], interpret: bool, saved: Any, cotangents: tuple[Array, Array]
) -> tuple[Any, Any, Any]:
    """By the definition: a single token is differentiated in tests, hardly ever in training."""
    del interpret
    lengths, inputs, state = saved
    do, dstate = cotangents
    decay_scale, rate_scale = scales
    definition = functools.partial(
        wkv7_step_xla, epsilon=epsilon, decay_scale=decay_scale, rate_scale=rate_scale, lengths=lengths
    )
    return None, *jax.vjp(definition, inputs, state)[1]((do.astype(dstate.dtype), dstate))


_run.defvjp(_run_forward, _run_backward)


def wkv7_step_pallas_triton(
    inputs: Mapping[str, Array],
    state: Array,
    *,
    epsilon: float,
    decay_scale: float,
    rate_scale: float = 1.0,
    lengths: Array | None = None,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """The kernel; arguments as of `wkv7_step_xla`. `interpret` is Pallas' interpret mode, for tests."""
    return _run(epsilon, (decay_scale, rate_scale), interpret, lengths, dict(inputs), state)
