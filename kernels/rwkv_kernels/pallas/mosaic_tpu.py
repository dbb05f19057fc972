"""Kernels through Mosaic, for TPUs: a program runs a chunk of a few heads, those of a head in sequence, state in VMEM.

A core runs one program at a time, and a chunk's products wait for each other: heads are computed in lockstep, so that
the matrix units have those of another head meanwhile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from rwkv_kernels.arguments import varying_like
from rwkv_kernels.matmul import mosaic_tpu_matmul
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
from rwkv_kernels.pallas.lockstep import in_lockstep


def call_kernel(
    launch: Launch,
    name: str,
    body: Callable[..., None],
    inputs: Sequence[tuple[Array, str]],
    outputs: Sequence[tuple[jax.ShapeDtypeStruct, str]],
    state_shape: tuple[int, ...],
    *,
    backwards: bool,
) -> Any:
    """Calls a kernel on a grid of rows, groups of heads and sequential chunks; a kind says which block a program gets.

    Kinds, with G heads in a group: `time` [B, H, T, N] -> [G, C, N]; `steps` [B, T, 1] -> [C, 1];
    `head` [H, 1, N] -> [G, 1, N]; `state` [B, H, ...] -> [G, ...]; `chunk_states` [B, H, T / C, M, N] -> [G, M, N].
    """
    from jax.experimental.pallas import tpu  # here: a backend that other machines need not have

    size = launch.size
    batch, heads, time = inputs[0][0].shape[:3]
    count, group = time // size, launch.kernel.heads if heads % launch.kernel.heads == 0 else 1

    def at(index: Array) -> Array:
        return count - 1 - index if backwards else index

    specs = {
        "time": lambda s: pl.BlockSpec((None, group, size, s[3]), lambda b, h, i: (b, h, at(i), 0)),
        "steps": lambda s: pl.BlockSpec((None, size, 1), lambda b, h, i: (b, at(i), 0)),
        "head": lambda s: pl.BlockSpec((group, 1, s[2]), lambda b, h, i: (h, 0, 0)),
        "state": lambda s: pl.BlockSpec((None, group, *s[2:]), lambda b, h, i: (b, h, 0, 0)),
        "chunk_states": lambda s: pl.BlockSpec((None, group, None, *s[3:]), lambda b, h, i: (b, h, at(i), 0, 0)),
    }
    return pl.pallas_call(
        body,
        grid=(batch, heads // group, count),
        in_specs=[specs[kind](x.shape) for x, kind in inputs],
        out_specs=[specs[kind](x.shape) for x, kind in outputs],
        out_shape=[x for x, _ in outputs],
        scratch_shapes=[tpu.VMEM((group, *state_shape), jnp.float32)],
        compiler_params=tpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=launch.interpret,
        name=f"{launch.kernel.name}_{name}",
    )(*(x for x, _ in inputs))


def _loaded(refs: Sequence[Any], head: int) -> tuple[Array, ...]:
    """A head's part of a group's blocks."""
    return tuple(as_float32(ref[head]) for ref in refs)


def forward(launch: Launch, operands: Operands, state: Array, with_residuals: bool) -> ForwardResult:
    """y, the final state, and the initial states of all chunks if residuals are wanted."""
    over_time, per_head, constants = operands.over_time, operands.per_head, operands.constants
    batch, time, heads = over_time[0].shape[:3]
    count = time // launch.size
    steps = [x[:, :, None] for x in constants if x is not None]
    inputs = [*with_kind([x.swapaxes(1, 2) for x in over_time], "time"), *with_kind(steps, "steps")]
    inputs += [*with_kind([x[:, None] for x in per_head], "head"), (state, "state")]
    struct = functools.partial(varying_like, state)
    outputs = [
        (struct((batch, heads, time, state.shape[-2]), over_time[launch.kernel.values].dtype), "time"),
        (struct(state.shape, jnp.float32), "state"),
    ]
    chunk, kept_shapes = launch.chunk, [state.shape[2:]]
    if with_residuals and launch.kernel.derivative is not None:
        chunk, kept_shapes = launch.chunk_for_derivative, [*kept_shapes, (launch.size, launch.size)]
    if with_residuals:
        outputs += [(struct((batch, heads, count, *x), jnp.float32), "chunk_states") for x in kept_shapes]

    def body(*refs: Any) -> None:
        time_refs, step_refs, head_refs, refs = split_refs(refs, len(over_time), len(steps), len(per_head))
        state_ref, y_ref, final_ref, *kept_refs, carried = refs

        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            carried[...] = state_ref[...]

        for ref in kept_refs[:1]:
            ref[...] = carried[...]
        selected = take_constants(constants, [ref[...] for ref in step_refs])
        calls = [
            (carried[head], _loaded(time_refs, head), _loaded(head_refs, head), selected)
            for head in range(carried.shape[0])
        ]
        for head, (state, y, *kept) in enumerate(in_lockstep(chunk, calls)):
            carried[head] = state
            y_ref[head] = y.astype(y_ref.dtype)
            for ref, x in zip(kept_refs[1:], kept, strict=True):
                ref[head] = x

        @pl.when(pl.program_id(2) == count - 1)
        def _() -> None:
            final_ref[...] = carried[...]

    name = name_of_forward(with_residuals)
    y, final, *kept = call_kernel(launch, name, body, inputs, outputs, state.shape[2:], backwards=False)
    return ForwardResult(y.swapaxes(1, 2), final, tuple(kept))


def backward(launch: Launch, operands: Operands, kept: tuple[Array, ...], dy: Array, dstate: Array) -> Cotangents:
    """Cotangents, the last chunk first; each chunk is recomputed from its initial state, the first of what is kept."""
    over_time, per_head, constants = operands.over_time, operands.per_head, operands.constants
    count = over_time[0].shape[1] // launch.size
    batch, heads = dstate.shape[:2]
    steps = [x[:, :, None] for x in constants if x is not None]
    time_inputs = [x.swapaxes(1, 2) for x in (*over_time, dy)]
    inputs = [*with_kind(time_inputs, "time"), *with_kind(steps, "steps")]
    inputs += [*with_kind([x[:, None] for x in per_head], "head"), *with_kind(kept, "chunk_states"), (dstate, "state")]
    struct = functools.partial(varying_like, dstate)
    outputs = [(struct(x.shape, x.dtype), "time") for x in time_inputs[:-1]]
    outputs += [(struct((batch, heads, 1, x.shape[-1]), jnp.float32), "state") for x in per_head]
    outputs.append((struct(dstate.shape, jnp.float32), "state"))

    chunk_backward = launch.chunk_backward
    if launch.kernel.derivative is not None:
        chunk_backward = functools.partial(launch.kernel.derivative.backward, launch.matmul)

    def body(*refs: Any) -> None:
        groups = split_refs(refs, len(time_inputs), len(steps), len(per_head), len(kept), 1)
        time_refs, step_refs, head_refs, kept_refs, (dstate_ref,), refs = groups
        dtime_refs, dhead_refs, (dfirst_ref, carried) = split_refs(refs, len(over_time), len(per_head))

        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            carried[...] = dstate_ref[...]
            for ref in dhead_refs:
                ref[...] = jnp.zeros_like(ref)

        selected = take_constants(constants, [ref[...] for ref in step_refs])

        def of(head: int) -> tuple[Any, ...]:
            *parts, dy = _loaded(time_refs, head)
            before = _loaded(kept_refs, head)
            return *before, tuple(parts), _loaded(head_refs, head), selected, carried[head], dy

        results = in_lockstep(chunk_backward, [of(head) for head in range(carried.shape[0])])
        for head, (dstate, dparts, dheads) in enumerate(results):
            carried[head] = dstate
            for ref, dpart in zip(dtime_refs, dparts, strict=True):
                ref[head] = dpart.astype(ref.dtype)
            for ref, dhead in zip(dhead_refs, dheads, strict=True):
                ref[head] += dhead

        @pl.when(pl.program_id(2) == count - 1)
        def _() -> None:
            dfirst_ref[...] = carried[...]

    *gradients, dfirst = call_kernel(launch, "backward", body, inputs, outputs, dstate.shape[2:], backwards=True)
    dover_time = [x.swapaxes(1, 2) for x in gradients[: len(over_time)]]
    return Cotangents(dover_time, [x[:, :, 0] for x in gradients[len(over_time) :]], dfirst)


BACKEND = Backend(forward, backward, mosaic_tpu_matmul, smallest_size=1, cannot_load=("float16",))
