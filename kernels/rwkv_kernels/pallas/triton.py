"""Kernels through Triton, for NVIDIA GPUs: a program loops over all chunks of a head, its state in registers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from rwkv_kernels.arguments import varying_like
from rwkv_kernels.matmul import triton_matmul
from rwkv_kernels.pallas.driver import (
    Backend,
    Cotangents,
    ForwardResult,
    Launch,
    Operands,
    as_float32,
    name_of_forward,
    split_refs,
    take_constants,
    with_kind,
)


def compiler_params(num_warps: int) -> Any:
    """Of a kernel that prefetches nothing."""
    from jax.experimental.pallas import triton  # here: importing it warns where it is deprecated

    return triton.CompilerParams(num_warps=num_warps, num_stages=1)


def call_kernel(
    launch: Launch,
    name: str,
    body: Callable[..., None],
    num_warps: int,
    inputs: Sequence[tuple[Array, str]],
    outputs: Sequence[tuple[jax.ShapeDtypeStruct, str]],
) -> Any:
    """Calls a kernel on a grid with one program per row and head; an array's kind says which block a program gets.

    Kinds: `time` [B, T, H, N] -> [T, N]; `steps` [B, T] -> [T]; `head` [H, N] -> [N]; `state` [B, H, ...] -> [...].
    """
    specs = {
        "time": lambda s: pl.BlockSpec((None, s[1], None, s[3]), lambda b, h: (b, 0, h, 0)),
        "steps": lambda s: pl.BlockSpec((None, s[1]), lambda b, h: (b, 0)),
        "head": lambda s: pl.BlockSpec((None, s[1]), lambda b, h: (h, 0)),
        "state": lambda s: pl.BlockSpec((None, None, *s[2:]), lambda b, h: (b, h, *(0,) * (len(s) - 2))),
    }
    batch, _, heads, _ = inputs[0][0].shape
    return pl.pallas_call(
        body,
        grid=(batch, heads),
        in_specs=[specs[kind](x.shape) for x, kind in inputs],
        out_specs=[specs[kind](x.shape) for x, kind in outputs],
        out_shape=[x for x, _ in outputs],
        compiler_params=compiler_params(num_warps),
        interpret=launch.interpret,
        name=f"{launch.kernel.name}_{name}",
    )(*(x for x, _ in inputs))


def forward(launch: Launch, operands: Operands, state: Array, with_residuals: bool) -> ForwardResult:
    """y, the final state, and the initial states of all chunks if residuals are wanted."""
    over_time, per_head, constants = operands.over_time, operands.per_head, operands.constants
    batch, time, heads = over_time[0].shape[:3]
    size, count = launch.size, time // launch.size
    steps = [x for x in constants if x is not None]
    inputs = [*with_kind(over_time, "time"), *with_kind(steps, "steps"), *with_kind(per_head, "head")]
    inputs.append((state, "state"))
    struct = functools.partial(varying_like, state)
    outputs = [
        (struct((batch, time, heads, state.shape[-2]), over_time[launch.kernel.values].dtype), "time"),
        (struct(state.shape, jnp.float32), "state"),
    ]
    if with_residuals:
        outputs.append((struct((batch, heads, count, *state.shape[2:]), jnp.float32), "state"))

    def body(*refs: Any) -> None:
        time_refs, step_refs, head_refs, refs = split_refs(refs, len(over_time), len(steps), len(per_head))
        state_ref, y_ref, final_ref, *states_ref = refs
        heads_only = tuple(as_float32(ref[...])[None, :] for ref in head_refs)

        def one(index: Array, state: Array) -> Array:
            here = pl.ds(index * size, size)
            for ref in states_ref:
                ref[index] = state
            parts = tuple(as_float32(ref[here, :]) for ref in time_refs)
            selected = take_constants(constants, [ref[here][:, None] for ref in step_refs])
            state, y = launch.chunk(state, parts, heads_only, selected)
            y_ref[here, :] = y.astype(y_ref.dtype)
            return state

        final_ref[...] = jax.lax.fori_loop(0, count, one, state_ref[...])

    name = name_of_forward(with_residuals)
    return ForwardResult(*call_kernel(launch, name, body, launch.kernel.num_warps, inputs, outputs))


def backward(launch: Launch, operands: Operands, chunk_states: Array, dy: Array, dstate: Array) -> Cotangents:
    """Cotangents, the last chunk first; each chunk is recomputed from its initial state."""
    over_time, per_head, constants = operands.over_time, operands.per_head, operands.constants
    size, count = launch.size, over_time[0].shape[1] // launch.size
    batch, heads = dstate.shape[:2]
    steps = [x for x in constants if x is not None]
    inputs = [*with_kind([*over_time, dy], "time"), *with_kind(steps, "steps"), *with_kind(per_head, "head")]
    inputs += with_kind([chunk_states, dstate], "state")
    struct = functools.partial(varying_like, dstate)
    outputs = [(struct(x.shape, x.dtype), "time") for x in over_time]
    outputs += [(struct((batch, heads, x.shape[-1]), jnp.float32), "state") for x in per_head]
    outputs.append((struct(dstate.shape, jnp.float32), "state"))

    def body(*refs: Any) -> None:
        groups = split_refs(refs, len(over_time) + 1, len(steps), len(per_head), 2)
        time_refs, step_refs, head_refs, (states_ref, dstate_ref), refs = groups
        dtime_refs, dhead_refs, (dfirst_ref,) = split_refs(refs, len(over_time), len(per_head))
        heads_only = tuple(as_float32(ref[...])[None, :] for ref in head_refs)

        def one(backwards: Array, carry: tuple[Array, tuple[Array, ...]]) -> tuple[Array, tuple[Array, ...]]:
            dstate, dheads = carry
            index = count - 1 - backwards
            here = pl.ds(index * size, size)
            *parts, dy = (as_float32(ref[here, :]) for ref in time_refs)
            selected = take_constants(constants, [ref[here][:, None] for ref in step_refs])
            dstate, dparts, more = launch.chunk_backward(
                states_ref[index], tuple(parts), heads_only, selected, dstate, dy
            )
            for ref, dpart in zip(dtime_refs, dparts, strict=True):
                ref[here, :] = dpart.astype(ref.dtype)
            return dstate, tuple(d + m for d, m in zip(dheads, more, strict=True))

        zeros = tuple(jnp.zeros((1, ref.shape[0]), jnp.float32) for ref in head_refs)
        dfirst_ref[...], dheads = jax.lax.fori_loop(0, count, one, (dstate_ref[...], zeros))
        for ref, dhead in zip(dhead_refs, dheads, strict=True):
            ref[...] = jnp.sum(dhead, axis=0)

    *gradients, dfirst = call_kernel(launch, "backward", body, launch.kernel.num_warps_backward, inputs, outputs)
    return Cotangents(gradients[: len(over_time)], gradients[len(over_time) :], dfirst)


BACKEND = Backend(forward, backward, triton_matmul, smallest_size=16, multiplies_bfloat16=True)
"""Tensor cores take no operand of less than 16 rows."""
