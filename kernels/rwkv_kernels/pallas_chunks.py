"""Runs an operator's chunk function as a Pallas kernel: on NVIDIA through Triton, on TPU through Mosaic.

One program loops over the chunks of one head of one row, with the state in registers or VMEM. The backward kernel loops
in reverse from the stored state at each chunk's start, with JAX's derivative of the chunk function, taken while the
kernel is traced. Both backends share the chunk function, written for [C, N] tiles; they differ in how time is split
into blocks and where the state is kept.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

from rwkv_kernels import chunks, products
from rwkv_kernels.arguments import broadcast_varying_axes, is_active, pad_time, varying_like
from rwkv_kernels.chunks import ChunkFunction
from rwkv_kernels.precision import Precision
from rwkv_kernels.products import Products

MakeChunk = Callable[[Products], ChunkFunction]
"""(products) -> chunk function of an operator."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An operator's chunk function and launch parameters."""

    name: str
    chunk: MakeChunk
    chunk_size: int
    """Steps in a chunk, a power of two, at least 16."""
    num_warps: int = 4
    """Triton only: warps per program, forward."""
    num_warps_backward: int = 8
    fixed_decay: bool = False
    """The decay does not depend on the token, so steps beyond a length must be masked."""


@dataclasses.dataclass(frozen=True)
class _Call:
    """An operator on a backend, for arrays whose T is a multiple of the chunk size."""

    kernel: Kernel
    products: Products
    interpret: bool

    @property
    def size(self) -> int:
        return self.kernel.chunk_size

    def _chunk(self, constants: Any) -> Callable[..., tuple[Array, Array]]:
        chunk = self.kernel.chunk(self.products)
        return lambda state, over_time, per_head: chunk(state, over_time, per_head, *constants)

    def chunk(self, state: Array, over_time: Any, per_head: Any, constants: Any) -> tuple[Array, Array]:
        """The chunk's final state and its y."""
        return products.without_rules(self._chunk(constants))(state, over_time, per_head)

    def chunk_backward(
        self, state: Array, over_time: Any, per_head: Any, constants: Any, dstate: Array, dy: Array
    ) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
        """Cotangents of the chunk's initial state, its arrays over time and those per head."""
        _, pull_back = jax.vjp(self._chunk(constants), state, over_time, per_head)
        return pull_back((dstate, dy))


# --- Triton ---


def _cast(x: Array) -> Array:
    return x.astype(jnp.float32)


def _triton_parameters(num_warps: int) -> Any:
    from jax.experimental.pallas import triton  # here: importing it warns where it is deprecated

    return triton.CompilerParams(num_warps=num_warps, num_stages=1)


def _triton_call(
    call: _Call,
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
        compiler_params=_triton_parameters(num_warps),
        interpret=call.interpret,
        name=f"{call.kernel.name}_{name}",
    )(*(x for x, _ in inputs))


def _forward_name(trace: bool) -> str:
    return "forward_saving_states" if trace else "forward"


def _with_kind(xs: Sequence[Array | None], kind: str) -> list[tuple[Array, str]]:
    return [(x, kind) for x in xs if x is not None]


def _take_constants(constants: Sequence[Array | None], loaded: Sequence[Array]) -> list[Array | None]:
    """Loads segment numbers and activity, where given."""
    remaining = iter(loaded)
    return [None if x is None else next(remaining) for x in constants]


def _triton_forward(call: _Call, constants: Any, over_time: Any, per_head: Any, state: Array, trace: bool) -> Any:
    batch, time, heads = over_time[0].shape[:3]
    size, count = call.size, time // call.size
    steps = [x for x in constants if x is not None]
    inputs = [*_with_kind(over_time, "time"), *_with_kind(steps, "steps"), *_with_kind(per_head, "head")]
    inputs.append((state, "state"))
    struct = functools.partial(varying_like, state)
    outputs = [
        (struct((batch, time, heads, state.shape[-2]), jnp.float32), "time"),
        (struct(state.shape, jnp.float32), "state"),
    ]
    if trace:
        outputs.append((struct((batch, heads, count, *state.shape[2:]), jnp.float32), "state"))

    def body(*refs: Any) -> None:
        time_refs, refs = refs[: len(over_time)], refs[len(over_time) :]
        step_refs, refs = refs[: len(steps)], refs[len(steps) :]
        head_refs, (state_ref, y_ref, final_ref, *trace_ref) = refs[: len(per_head)], refs[len(per_head) :]
        heads_only = tuple(_cast(ref[...])[None, :] for ref in head_refs)

        def one(index: Array, state: Array) -> Array:
            here = pl.ds(index * size, size)
            for ref in trace_ref:
                ref[index] = state
            parts = tuple(_cast(ref[here, :]) for ref in time_refs)
            selected = _take_constants(constants, [ref[here][:, None] for ref in step_refs])
            state, y = call.chunk(state, parts, heads_only, selected)
            y_ref[here, :] = y
            return state

        final_ref[...] = jax.lax.fori_loop(0, count, one, state_ref[...])

    return _triton_call(call, _forward_name(trace), body, call.kernel.num_warps, inputs, outputs)


def _triton_backward(
    call: _Call, constants: Any, over_time: Any, per_head: Any, trace: Array, dy: Array, dstate: Array
) -> tuple[list[Array], list[Array], Array]:
    size, count = call.size, over_time[0].shape[1] // call.size
    batch, heads = dstate.shape[:2]
    steps = [x for x in constants if x is not None]
    inputs = [*_with_kind([*over_time, dy], "time"), *_with_kind(steps, "steps"), *_with_kind(per_head, "head")]
    inputs += _with_kind([trace, dstate], "state")
    struct = functools.partial(varying_like, dstate)
    outputs = [(struct(x.shape, jnp.float32), "time") for x in over_time]
    outputs += [(struct((batch, heads, x.shape[-1]), jnp.float32), "state") for x in per_head]
    outputs.append((struct(dstate.shape, jnp.float32), "state"))

    def body(*refs: Any) -> None:
        time_refs, refs = refs[: len(over_time) + 1], refs[len(over_time) + 1 :]
        step_refs, refs = refs[: len(steps)], refs[len(steps) :]
        head_refs, refs = refs[: len(per_head)], refs[len(per_head) :]
        (trace_ref, dstate_ref), refs = refs[:2], refs[2:]
        dtime_refs, dhead_refs, dfirst_ref = refs[: len(over_time)], refs[len(over_time) : -1], refs[-1]
        heads_only = tuple(_cast(ref[...])[None, :] for ref in head_refs)

        def one(backwards: Array, carry: tuple[Array, tuple[Array, ...]]) -> tuple[Array, tuple[Array, ...]]:
            dstate, dheads = carry
            index = count - 1 - backwards
            here = pl.ds(index * size, size)
            *parts, dy = (_cast(ref[here, :]) for ref in time_refs)
            selected = _take_constants(constants, [ref[here][:, None] for ref in step_refs])
            dstate, dparts, more = call.chunk_backward(trace_ref[index], tuple(parts), heads_only, selected, dstate, dy)
            for ref, dpart in zip(dtime_refs, dparts, strict=True):
                ref[here, :] = dpart
            return dstate, tuple(d + m for d, m in zip(dheads, more, strict=True))

        zeros = tuple(jnp.zeros((1, ref.shape[0]), jnp.float32) for ref in head_refs)
        dfirst_ref[...], dheads = jax.lax.fori_loop(0, count, one, (dstate_ref[...], zeros))
        for ref, dhead in zip(dhead_refs, dheads, strict=True):
            ref[...] = jnp.sum(dhead, axis=0)

    *gradients, dfirst = _triton_call(call, "backward", body, call.kernel.num_warps_backward, inputs, outputs)
    return gradients[: len(over_time)], gradients[len(over_time) :], dfirst


# --- Mosaic TPU ---


def _tpu_call(
    call: _Call,
    name: str,
    body: Callable[..., None],
    inputs: Sequence[tuple[Array, str]],
    outputs: Sequence[tuple[jax.ShapeDtypeStruct, str]],
    state_shape: tuple[int, ...],
    *,
    backwards: bool,
) -> Any:
    """Calls a kernel on a grid of rows, heads and sequential chunks; an array's kind says which block a program gets.

    Kinds: `time` [B, H, T, N] -> [C, N]; `steps` [B, T, 1] -> [C, 1]; `head` [H, 1, N] -> [1, N];
    `state` [B, H, ...] -> [...]; `trace` [B, H, T / C, M, N] -> [M, N].
    """
    from jax.experimental.pallas import tpu  # here: a backend that other machines need not have

    size = call.size
    count = inputs[0][0].shape[2] // size

    def at(index: Array) -> Array:
        return count - 1 - index if backwards else index

    specs = {
        "time": lambda s: pl.BlockSpec((None, None, size, s[3]), lambda b, h, i: (b, h, at(i), 0)),
        "steps": lambda s: pl.BlockSpec((None, size, 1), lambda b, h, i: (b, at(i), 0)),
        "head": lambda s: pl.BlockSpec((None, 1, s[2]), lambda b, h, i: (h, 0, 0)),
        "state": lambda s: pl.BlockSpec((None, None, *s[2:]), lambda b, h, i: (b, h, 0, 0)),
        "trace": lambda s: pl.BlockSpec((None, None, None, *s[3:]), lambda b, h, i: (b, h, at(i), 0, 0)),
    }
    batch, heads = inputs[0][0].shape[:2]
    return pl.pallas_call(
        body,
        grid=(batch, heads, count),
        in_specs=[specs[kind](x.shape) for x, kind in inputs],
        out_specs=[specs[kind](x.shape) for x, kind in outputs],
        out_shape=[x for x, _ in outputs],
        scratch_shapes=[tpu.VMEM(state_shape, jnp.float32)],
        compiler_params=tpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=call.interpret,
        name=f"{call.kernel.name}_{name}",
    )(*(x for x, _ in inputs))


def _tpu_forward(call: _Call, constants: Any, over_time: Any, per_head: Any, state: Array, trace: bool) -> Any:
    batch, time, heads = over_time[0].shape[:3]
    count = time // call.size
    steps = [x[:, :, None] for x in constants if x is not None]
    inputs = [*_with_kind([x.swapaxes(1, 2) for x in over_time], "time"), *_with_kind(steps, "steps")]
    inputs += [*_with_kind([x[:, None] for x in per_head], "head"), (state, "state")]
    struct = functools.partial(varying_like, state)
    outputs = [
        (struct((batch, heads, time, state.shape[-2]), jnp.float32), "time"),
        (struct(state.shape, jnp.float32), "state"),
    ]
    if trace:
        outputs.append((struct((batch, heads, count, *state.shape[2:]), jnp.float32), "trace"))

    def body(*refs: Any) -> None:
        time_refs, refs = refs[: len(over_time)], refs[len(over_time) :]
        step_refs, refs = refs[: len(steps)], refs[len(steps) :]
        head_refs, refs = refs[: len(per_head)], refs[len(per_head) :]
        state_ref, y_ref, final_ref, *trace_ref, carried = refs

        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            carried[...] = state_ref[...]

        for ref in trace_ref:
            ref[...] = carried[...]
        parts = tuple(_cast(ref[...]) for ref in time_refs)
        selected = _take_constants(constants, [ref[...] for ref in step_refs])
        heads_only = tuple(_cast(ref[...]) for ref in head_refs)
        carried[...], y_ref[...] = call.chunk(carried[...], parts, heads_only, selected)

        @pl.when(pl.program_id(2) == count - 1)
        def _() -> None:
            final_ref[...] = carried[...]

    y, *rest = _tpu_call(call, _forward_name(trace), body, inputs, outputs, state.shape[2:], backwards=False)
    return y.swapaxes(1, 2), *rest


def _tpu_backward(
    call: _Call, constants: Any, over_time: Any, per_head: Any, trace: Array, dy: Array, dstate: Array
) -> tuple[list[Array], list[Array], Array]:
    count = over_time[0].shape[1] // call.size
    batch, heads = dstate.shape[:2]
    steps = [x[:, :, None] for x in constants if x is not None]
    time_inputs = [x.swapaxes(1, 2) for x in (*over_time, dy)]
    inputs = [*_with_kind(time_inputs, "time"), *_with_kind(steps, "steps")]
    inputs += [*_with_kind([x[:, None] for x in per_head], "head"), (trace, "trace"), (dstate, "state")]
    struct = functools.partial(varying_like, dstate)
    outputs = [(struct(x.shape, jnp.float32), "time") for x in time_inputs[:-1]]
    outputs += [(struct((batch, heads, 1, x.shape[-1]), jnp.float32), "state") for x in per_head]
    outputs.append((struct(dstate.shape, jnp.float32), "state"))

    def body(*refs: Any) -> None:
        time_refs, refs = refs[: len(over_time) + 1], refs[len(over_time) + 1 :]
        step_refs, refs = refs[: len(steps)], refs[len(steps) :]
        head_refs, refs = refs[: len(per_head)], refs[len(per_head) :]
        (trace_ref, dstate_ref), refs = refs[:2], refs[2:]
        dtime_refs, dhead_refs, dfirst_ref, carried = (
            refs[: len(over_time)],
            refs[len(over_time) : -2],
            refs[-2],
            refs[-1],
        )

        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            carried[...] = dstate_ref[...]
            for ref in dhead_refs:
                ref[...] = jnp.zeros_like(ref)

        *parts, dy = (_cast(ref[...]) for ref in time_refs)
        selected = _take_constants(constants, [ref[...] for ref in step_refs])
        heads_only = tuple(_cast(ref[...]) for ref in head_refs)
        dstate, dparts, dheads = call.chunk_backward(
            trace_ref[...], tuple(parts), heads_only, selected, carried[...], dy
        )
        carried[...] = dstate
        for ref, dpart in zip(dtime_refs, dparts, strict=True):
            ref[...] = dpart
        for ref, dhead in zip(dhead_refs, dheads, strict=True):
            ref[...] += dhead

        @pl.when(pl.program_id(2) == count - 1)
        def _() -> None:
            dfirst_ref[...] = carried[...]

    *gradients, dfirst = _tpu_call(call, "backward", body, inputs, outputs, dstate.shape[2:], backwards=True)
    dover_time = [x.swapaxes(1, 2) for x in gradients[: len(over_time)]]
    return dover_time, [x[:, :, 0] for x in gradients[len(over_time) :]], dfirst


# --- Both ---


@dataclasses.dataclass(frozen=True)
class Backend:
    """Runs chunk functions on one kind of device."""

    forward: Callable[..., Any]
    backward: Callable[..., tuple[list[Array], list[Array], Array]]
    products: Callable[[Precision], Products]
    smallest_size: int
    """Head sizes are padded to a power of two of at least this; 1 means no padding."""
    cannot_load: tuple[str, ...] = ()
    """Dtypes that kernels cannot load; such arrays are cast to float32 first."""


TRITON = Backend(_triton_forward, _triton_backward, products.triton, smallest_size=16)
MOSAIC_TPU = Backend(_tpu_forward, _tpu_backward, products.mosaic_tpu, smallest_size=1, cannot_load=("float16",))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(
    backend: Backend, call: _Call, constants: Any, over_time: Any, per_head: Any, state: Array
) -> tuple[Array, Array]:
    y, final = backend.forward(call, constants, over_time, per_head, state, False)
    return y, final


def _run_forward(
    backend: Backend, call: _Call, constants: Any, over_time: Any, per_head: Any, state: Array
) -> tuple[tuple[Array, Array], Any]:
    y, final, trace = backend.forward(call, constants, over_time, per_head, state, True)
    y, final, trace = checkpoint_name((y, final, trace), "wkv")
    return (y, final), (constants, over_time, per_head, trace)


def _run_backward(backend: Backend, call: _Call, saved: Any, cotangents: tuple[Array, Array]) -> tuple:
    constants, over_time, per_head, trace = saved
    dy, dstate = cotangents
    dover_time, dper_head, dfirst = backend.backward(call, constants, over_time, per_head, trace, dy, dstate)
    return (
        jax.tree.map(lambda _: None, constants),
        tuple(d.astype(x.dtype) for d, x in zip(dover_time, over_time, strict=True)),
        tuple(jnp.sum(d, axis=0).astype(x.dtype) for d, x in zip(dper_head, per_head, strict=True)),
        dfirst,
    )


_run.defvjp(_run_forward, _run_backward)


def implementation(backend: Backend, default_kernel: Kernel) -> Callable[..., tuple[Array, Array]]:
    """An operator's implementation by kernels on a backend.

    Returns:
      (*inputs, state, segments=, lengths=, precision=, interpret=, kernel=, with_products=) -> y [B, T, H, M] and the
      final state [B, H, M, N], both float32. Inputs are [B, T, H, N] or [B, T, H, M] over time and [H, N] per head, any
      floating dtype but float64; zeros over time must not change the state, except by a fixed decay. The state is
      float32; segments and lengths are as `Operator.run` passes them. `interpret` is Pallas' interpret mode: on any
      machine, slowly, for tests. `with_products` replaces the precision's matmuls, to measure their cost; by default,
      `full` is float32 in interpret mode.
    """

    def run(
        *arguments: Array,
        segments: Array | None = None,
        lengths: Array | None = None,
        precision: Precision = "full",
        interpret: bool = False,
        kernel: Kernel = default_kernel,
        with_products: Products | None = None,
    ) -> tuple[Array, Array]:
        *inputs, state = arguments
        over_time = tuple(x for x in inputs if x.ndim == 4)
        per_head = tuple(x for x in inputs if x.ndim == 2)
        time, (value_dim, key_dim) = over_time[0].shape[1], state.shape[-2:]
        padding = -time % kernel.chunk_size
        active = None
        if kernel.fixed_decay and (padding or lengths is not None):
            rows = jnp.full(state.shape[:1], time) if lengths is None else lengths
            active = is_active(rows, time + padding).astype(jnp.float32)
        within = chunks.number_within_chunks(segments, padding, kernel.chunk_size)

        def prepare(x: Array, axes: int) -> Array:
            if x.dtype.name in backend.cannot_load:
                x = x.astype(jnp.float32)
            sizes = [(0, chunks.padded_size(size, backend.smallest_size) - size) for size in x.shape[x.ndim - axes :]]
            return jnp.pad(x, [(0, 0)] * (x.ndim - axes) + sizes)

        if with_products is None:
            with_products = products.interpreted(precision) if interpret else backend.products(precision)
        constants, over_time, per_head, state = broadcast_varying_axes(
            (within, active),
            tuple(prepare(pad_time(x, padding), 1) for x in over_time),
            tuple(prepare(x, 1) for x in per_head),
            prepare(state, 2),
        )
        outputs: Any = _run(backend, _Call(kernel, with_products, interpret), constants, over_time, per_head, state)
        y, final = outputs
        return y[:, :time, :, :value_dim], final[:, :, :value_dim, :key_dim]

    return run
