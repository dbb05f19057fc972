"""Runs an operator's chunk function as Pallas kernels; triton.py and mosaic_tpu.py have what differs between devices.

One program loops over the chunks of one head of one row, with the state in registers or VMEM. The backward kernel loops
in reverse from the stored state at each chunk's start, with JAX's derivative of the chunk function, taken while the
kernel is traced. The chunk function is written for [C, N] tiles and shared by all backends; they differ in how time is
split into blocks and where the state is kept. A `Kernel` may bring a forward or backward pass of its own instead.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from rwkv_kernels.arguments import broadcast_varying_axes, is_active, pad_time
from rwkv_kernels.chunking import ChunkFunction, local_segment_index
from rwkv_kernels.matmul import Matmul, inline_custom_rules, interpreted_matmul
from rwkv_kernels.precision import Precision

MakeChunk = Callable[[Matmul], ChunkFunction]
"""(matmul) -> chunk function of an operator."""


class Operands(NamedTuple):
    """An operator's arrays as passes take them: T a multiple of the chunk size, sizes as the backend needs them."""

    local_segments: Array | None
    """int32 [B, T], from `local_segment_index`."""
    active: Array | None
    """float32 [B, T], 1 where a step counts; None where zero inputs say so, or all do."""
    over_time: tuple[Array, ...]
    """[B, T, H, N] or [B, T, H, M]."""
    per_head: tuple[Array, ...]
    """[H, N]."""

    @property
    def constants(self) -> tuple[Array | None, Array | None]:
        """Those without gradients."""
        return self.local_segments, self.active


class ForwardResult(NamedTuple):
    """Results of a forward pass, all float32 but y."""

    y: Array
    """[B, T, H, M], in v's dtype."""
    final: Array
    """[B, H, M, N]."""
    residuals: Any = None
    """What the backward pass reads besides the operands; None if no gradient is wanted."""


class Cotangents(NamedTuple):
    """Results of a backward pass."""

    over_time: Sequence[Array]
    """As the operands, in their dtypes."""
    per_head: Sequence[Array]
    """float32 [B, H, N], of each row; summed over rows by whoever calls."""
    state: Array
    """float32 [B, H, M, N], of the initial state."""


ForwardPass = Callable[["Launch", Operands, Array, bool], ForwardResult]
"""(launch, operands, initial state, whether residuals are wanted) -> results."""

BackwardPass = Callable[["Launch", Operands, Any, Array, Array], Cotangents]
"""(launch, operands, residuals, dy, cotangent of the final state) -> cotangents."""


class ChunkDerivative(NamedTuple):
    """The derivative of a chunk function, written by hand, for a loop over chunks on a TPU."""

    forward: Callable[[Matmul], Callable[..., tuple[Array, Array, Array]]]
    """(matmul) -> the chunk function with a third result [C, C], which is kept for the derivative."""
    backward: Callable[..., tuple[Array, tuple[Array, ...], tuple[Array, ...]]]
    """(matmul, state, what was kept, *as in `Launch.chunk_backward`) -> as there."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An operator's chunk function and launch parameters, or passes of its own."""

    name: str
    chunk: MakeChunk
    chunk_size: int
    """Steps in a chunk, a power of two, at least 16."""
    values: int
    """Which of the arrays over time is v."""
    decays: int | None = None
    """Which of them is log w, if any."""
    num_warps: int = 4
    """Triton only: warps per program, forward."""
    num_warps_backward: int = 8
    heads: int = 2
    """TPU only: heads that a program computes side by side; one where they do not divide H."""
    derivative: ChunkDerivative | None = None
    """TPU only: in place of JAX's derivative of the chunk function."""
    fixed_decay: bool = False
    """The decay does not depend on the token, so steps beyond a length must be masked."""
    forward: ForwardPass | None = None
    """In place of the backend's loop over `chunk`."""
    backward: BackwardPass | None = None
    """In place of the backend's; from its `forward` it gets the initial states of all chunks [B, H, T / C, M, N]."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """Runs chunk functions on one kind of device."""

    forward: ForwardPass
    """Its residuals are the initial states of all chunks, [B, H, T / C, M, N]."""
    backward: BackwardPass
    matmul: Callable[[Precision], Matmul]
    smallest_size: int
    """Head sizes are padded to a power of two of at least this; 1 means no padding."""
    cannot_load: tuple[str, ...] = ()
    """Dtypes that kernels cannot load; such arrays are cast to float32 first."""
    multiplies_bfloat16: bool = False
    """Its matmuls take fewer passes for operands that are bfloat16 already."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel with all that is chosen when an operator is called."""

    kernel: Kernel
    matmul: Matmul
    precision: Precision
    """Of `matmul`, for kernels that do not take it."""
    interpret: bool
    """Pallas' interpret mode."""

    @property
    def size(self) -> int:
        """Steps in a chunk."""
        return self.kernel.chunk_size

    def _chunk(self, constants: Any) -> Callable[..., tuple[Array, Array]]:
        chunk = self.kernel.chunk(self.matmul)
        return lambda state, over_time, per_head: chunk(state, over_time, per_head, *constants)

    def chunk_for_derivative(
        self, state: Array, over_time: Any, per_head: Any, constants: Any
    ) -> tuple[Array, Array, Array]:
        """As `chunk`, and what `Kernel.derivative` keeps."""
        assert self.kernel.derivative is not None
        chunk = self.kernel.derivative.forward(self.matmul)
        return inline_custom_rules(lambda *arguments: chunk(*arguments, *constants))(state, over_time, per_head)

    def chunk(self, state: Array, over_time: Any, per_head: Any, constants: Any) -> tuple[Array, Array]:
        """Of one chunk, inside a kernel: its final state and y."""
        return inline_custom_rules(self._chunk(constants))(state, over_time, per_head)

    def chunk_backward(
        self, state: Array, over_time: Any, per_head: Any, constants: Any, dstate: Array, dy: Array
    ) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
        """Cotangents of the chunk's initial state, its arrays over time and those per head."""
        _, pull_back = jax.vjp(self._chunk(constants), state, over_time, per_head)
        return pull_back((dstate, dy))


def name_of_forward(with_residuals: bool) -> str:
    """A forward kernel's name in profiles and compiled programs, after the operator's."""
    return "forward_saving_states" if with_residuals else "forward"


def with_kind(xs: Sequence[Array | None], kind: str) -> list[tuple[Array, str]]:
    """Arrays, each with the kind of block that a program gets of it."""
    return [(x, kind) for x in xs if x is not None]


def split_refs(refs: Sequence[Any], *counts: int) -> list[Any]:
    """A kernel's references in groups of these numbers, and a last group of what remains."""
    ends = list(itertools.accumulate(counts))
    return [refs[begin:end] for begin, end in zip([0, *ends], [*ends, len(refs)], strict=True)]


def take_constants(constants: Sequence[Array | None], loaded: Sequence[Array]) -> list[Array | None]:
    """Local segments and activity as a kernel has loaded them, None where they are not given."""
    remaining = iter(loaded)
    return [None if x is None else next(remaining) for x in constants]


def as_float32(x: Array) -> Array:
    """What a kernel computes with, of what it has loaded."""
    return x.astype(jnp.float32)


def padded_size(size: int, smallest: int) -> int:
    """The size of an axis whose tiles are powers of two of at least `smallest`; any size where that is 1."""
    return size if smallest == 1 else max(smallest, 1 << (size - 1).bit_length())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(backend: Backend, launch: Launch, operands: Operands, state: Array) -> tuple[Array, Array]:
    y, final, _ = (launch.kernel.forward or backend.forward)(launch, operands, state, False)
    return y, final


def _run_forward(
    backend: Backend, launch: Launch, operands: Operands, state: Array
) -> tuple[tuple[Array, Array], tuple[Operands, Any]]:
    results = (launch.kernel.forward or backend.forward)(launch, operands, state, True)
    y, final, residuals = checkpoint_name(tuple(results), "wkv")
    return (y, final), (operands, residuals)


def _run_backward(
    backend: Backend, launch: Launch, saved: tuple[Operands, Any], cotangents: tuple[Array, Array]
) -> tuple[Operands, Array]:
    operands, residuals = saved
    backward = launch.kernel.backward or backend.backward
    over_time, per_head, dstate = backward(launch, operands, residuals, *cotangents)
    of_operands = Operands(
        None,
        None,
        tuple(over_time),
        tuple(jnp.sum(d, axis=0).astype(x.dtype) for d, x in zip(per_head, operands.per_head, strict=True)),
    )
    return of_operands, dstate


_run.defvjp(_run_forward, _run_backward)


def implementation(backend: Backend, default_kernel: Kernel) -> Callable[..., tuple[Array, Array]]:
    """An operator's implementation by kernels on a backend.

    Returns:
      (*inputs, state, segments=, lengths=, precision=, chunk_size=, interpret=, kernel=, matmul=) -> y [B, T, H, M] in
      v's dtype (float32 where the backend cannot load that) and the final state [B, H, M, N], float32. Inputs are
      [B, T, H, N] or [B, T, H, M] over time and [H, N] per head, any floating dtype but float64; zeros over time must
      not change the state, except by a fixed decay. The state is float32; segments and lengths are as `Operator.run`
      passes them. `interpret` is Pallas' interpret mode: on any machine, slowly, for tests. `chunk_size` replaces the
      kernel's, `matmul` that of the precision, to measure what it costs; by default, `full` is float32 in interpret
      mode.
    """

    def run(
        *arguments: Array,
        segments: Array | None = None,
        lengths: Array | None = None,
        precision: Precision = "full",
        chunk_size: int | None = None,
        interpret: bool = False,
        kernel: Kernel = default_kernel,
        matmul: Matmul | None = None,
    ) -> tuple[Array, Array]:
        if chunk_size is not None:
            kernel = dataclasses.replace(kernel, chunk_size=chunk_size)
        *inputs, state = arguments
        over_time = tuple(x for x in inputs if x.ndim == 4)
        per_head = tuple(x for x in inputs if x.ndim == 2)
        time, (value_dim, key_dim) = over_time[0].shape[1], state.shape[-2:]
        padding = -time % kernel.chunk_size
        active = None
        if kernel.fixed_decay and (padding or lengths is not None):
            rows = jnp.full(state.shape[:1], time) if lengths is None else lengths
            active = is_active(rows, time + padding).astype(jnp.float32)
        local_segments = local_segment_index(segments, padding, kernel.chunk_size)

        def prepare(x: Array, axes: int) -> Array:
            if x.dtype.name in backend.cannot_load:
                x = x.astype(jnp.float32)
            sizes = [(0, padded_size(size, backend.smallest_size) - size) for size in x.shape[x.ndim - axes :]]
            return jnp.pad(x, [(0, 0)] * (x.ndim - axes) + sizes)

        if matmul is None:
            matmul = interpreted_matmul(precision) if interpret else backend.matmul(precision)
        operands, state = broadcast_varying_axes(
            Operands(
                local_segments,
                active,
                tuple(prepare(pad_time(x, padding), 1) for x in over_time),
                tuple(prepare(x, 1) for x in per_head),
            ),
            prepare(state, 2),
        )
        if backend.multiplies_bfloat16:
            values, decays = (
                index is not None and operands.over_time[index].dtype == jnp.bfloat16
                for index in (kernel.values, kernel.decays)
            )
            matmul = matmul._replace(bfloat16_values=values, bfloat16_decays=decays)
        outputs: Any = _run(backend, Launch(kernel, matmul, precision, interpret), operands, state)
        y, final = outputs
        return y[:, :time, :, :value_dim], final[:, :, :value_dim, :key_dim]

    return run
