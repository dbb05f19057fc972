"""WKV-7 as the five kernels of split_tiles.py through Mosaic GPU, for NVIDIA Hopper."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from rwkv_kernels.arguments import broadcast_varying_axes, varying_like
from rwkv_kernels.matmul import triton_matmul
from rwkv_kernels.ops.wkv7 import split_tiles
from rwkv_kernels.ops.wkv7.chunk import make_chunk
from rwkv_kernels.ops.wkv7.split_tiles import (
    Factors,
    Gradients,
    Inputs,
    OfCotangents,
    OfGradients,
    OfOutputs,
    OfStates,
    StateCotangents,
    States,
)
from rwkv_kernels.pallas import interpreted_tiles
from rwkv_kernels.pallas.driver import Backend, Cotangents, ForwardResult, Kernel, Launch, Operands, implementation
from rwkv_kernels.pallas.tiles import EXACT, SIZE, Body, Kind, Stored, join, split
from rwkv_kernels.precision import Precision

PARTS: dict[Precision, int] = {"full": 3, "default": 2, "fast": 1}
"""Planes of bfloat16 of an operand: six, three or one pass a product."""


class _Residuals(NamedTuple):
    """What the backward pass starts from besides the inputs; arrays are planes of bfloat16."""

    transition: Stored
    reads: Stored
    inverse: Stored
    states: Stored


class _Sizes(NamedTuple):
    batch: int
    heads: int
    chunks: int


def _sizes(operands: Operands) -> _Sizes:
    batch, time, heads, _ = operands.over_time[0].shape
    return _Sizes(batch, heads, time // SIZE)


def _planes(x: Array, parts: int) -> int:
    """Of an input or result over time."""
    return 1 if x.dtype == jnp.bfloat16 else parts


def _over_time(x: Array, parts: int) -> Stored:
    planes = _planes(x, parts)
    return Stored(x[None] if x.dtype == jnp.bfloat16 else split(x, planes), "time")


def _inputs(launch: Launch, operands: Operands) -> Inputs:
    parts = PARTS[launch.precision]
    r, log_w, k, v, a, b = operands.over_time
    r, k, v, a, b = (_over_time(x, parts) for x in (r, k, v, a, b))
    masks = Stored(broadcast_varying_axes(split_tiles.masks(operands.local_segments), v.array)[0], "masks")
    return Inputs(r, _over_time(log_w, EXACT), k, v, a, b, masks)


def _result(like: Array, kind: Kind, planes: int, sizes: _Sizes) -> Stored:
    """The description of a kernel's result."""
    batch, heads, chunks = sizes
    shapes: dict[Kind, tuple[int, ...]] = {
        "time": (batch, chunks * SIZE, heads, SIZE),
        "chunks": (batch, heads, chunks, SIZE, SIZE),
        "state": (batch, heads, SIZE, SIZE),
    }
    return Stored(varying_like(like, (planes, *shapes[kind]), jnp.bfloat16), kind)


def _filled(described: Any, arrays: Any) -> Any:
    """Results with their arrays, as inputs of the next kernel."""
    return type(described)._make(x and Stored(y, x.kind) for x, y in zip(described, arrays, strict=True))


def _call(launch: Launch, name: str, body: Body, by_chunk: bool, sizes: _Sizes, inputs: Any, outputs: Any) -> Any:
    parts = PARTS[launch.precision]
    if launch.interpret:
        return interpreted_tiles.call(body, parts, by_chunk, sizes, inputs, outputs)
    from rwkv_kernels.pallas import mosaic_gpu  # here: it needs more of JAX than other machines may have

    name = f"{launch.kernel.name}_{name}"
    return mosaic_gpu.call(name, body, parts, by_chunk, sizes, inputs, outputs)


def forward(launch: Launch, operands: Operands, state: Array, with_residuals: bool) -> ForwardResult:
    """y and the final state: factors of all chunks, the states between them, then y of all chunks."""
    parts, sizes, inputs = PARTS[launch.precision], _sizes(operands), _inputs(launch, operands)
    result = functools.partial(_result, state, sizes=sizes)
    described = Factors(
        transition=result("chunks", parts),
        contribution=result("chunks", parts),
        reads=result("time", parts),
        y=result("time", parts),
        inverse=result("chunks", parts) if with_residuals else None,
    )
    body = functools.partial(split_tiles.factors, is_packed=operands.local_segments is not None)
    name = "factors_with_inverse" if with_residuals else "factors"
    factors = _filled(described, _call(launch, name, body, True, sizes, inputs, described))

    initial = Stored(split(state, EXACT), "state")
    of_states = OfStates(initial, factors.transition, factors.contribution)
    described = States(result("chunks", parts), result("state", EXACT))
    states = _filled(described, _call(launch, "states", split_tiles.states, False, sizes, of_states, described))

    of_outputs = OfOutputs(factors.reads, factors.y, states.states)
    v = operands.over_time[launch.kernel.values]
    y = result("time", _planes(v, max(parts, 2)))
    y = join(_call(launch, "outputs", split_tiles.outputs, True, sizes, of_outputs, y), v.dtype)
    residuals = _Residuals(factors.transition, factors.reads, factors.inverse, states.states)
    return ForwardResult(y, join(states.final.array, jnp.float32), _arrays(residuals) if with_residuals else None)


def _arrays(residuals: _Residuals) -> tuple[Array, ...]:
    return tuple(x.array for x in residuals)


def backward(launch: Launch, operands: Operands, residuals: tuple[Array, ...], dy: Array, dfinal: Array) -> Cotangents:
    """The cotangents of the states between chunks, then the gradients of all chunks."""
    parts, sizes, inputs = PARTS[launch.precision], _sizes(operands), _inputs(launch, operands)
    kinds: tuple[Kind, ...] = ("chunks", "time", "chunks", "chunks")
    transition, reads, inverse, states = map(Stored, residuals, kinds)
    result = functools.partial(_result, dfinal, sizes=sizes)
    of_y = _over_time(dy, parts)

    of_cotangents = OfCotangents(Stored(split(dfinal, EXACT), "state"), transition, reads, of_y)
    described = StateCotangents(result("chunks", parts), result("state", EXACT))
    found = _call(launch, "cotangents", split_tiles.cotangents, False, sizes, of_cotangents, described)
    cotangents = _filled(described, found)

    of_gradients = OfGradients(inputs, of_y, inverse, states, cotangents.dstates)
    described = Gradients._make(result("time", _planes(x, max(parts, 2))) for x in operands.over_time)
    body = functools.partial(split_tiles.gradients, is_packed=operands.local_segments is not None)
    gradients = _call(launch, "gradients", body, True, sizes, of_gradients, described)
    over_time = tuple(join(d, x.dtype) for d, x in zip(gradients, operands.over_time, strict=True))
    return Cotangents(over_time, (), join(cotangents.dinitial.array, jnp.float32))


KERNEL = Kernel("wkv7_tiles", make_chunk, chunk_size=SIZE, values=3, decays=1, forward=forward, backward=backward)
BACKEND = Backend(forward, backward, triton_matmul, smallest_size=SIZE)

wkv7_pallas_mosaic_gpu = implementation(BACKEND, KERNEL)
