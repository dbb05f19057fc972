"""The WKV operator of RWKV-4 (Dove): the public functions, for one token or a sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from rwkv_kernels import arguments, dispatch, pieces, sharded
from rwkv_kernels.ops.wkv4.associative import wkv4_associative
from rwkv_kernels.ops.wkv4.chunked import wkv4_chunked
from rwkv_kernels.ops.wkv4.scan import EMPTY_EXPONENT, State, empty_state, step, wkv4_scan


def _pallas_triton(*inputs: Any, **options: Any) -> tuple[Array, State]:
    # Imported when it runs: most users never need it.
    from rwkv_kernels.ops.wkv4.pallas_triton import wkv4_pallas_triton

    return wkv4_pallas_triton(*inputs, **options)


def _pallas_mosaic_tpu(*inputs: Any, **options: Any) -> tuple[Array, State]:
    from rwkv_kernels.ops.wkv4.pallas_mosaic_tpu import wkv4_pallas_mosaic_tpu

    return wkv4_pallas_mosaic_tpu(*inputs, **options)


@dataclasses.dataclass(frozen=True)
class ChannelOperator:
    """A WKV operator with a state of three numbers per channel."""

    name: str
    implementations: Mapping[str, dispatch.Implementation]
    """All implementations, by name."""
    preferred: Callable[[dispatch.Problem], tuple[str, ...]]
    """Names in the order that `implementation=None` tries; docs/operators.md says what was measured where."""


OPERATOR = ChannelOperator(
    name="wkv4",
    implementations={
        "scan": dispatch.Implementation(wkv4_scan, dispatch.anything),
        "associative_scan": dispatch.Implementation(wkv4_associative, dispatch.anything),
        "chunked": dispatch.Implementation(wkv4_chunked, dispatch.anything),
        "pallas_triton": dispatch.Implementation(_pallas_triton, dispatch.refuse_unless("gpu", "an NVIDIA GPU")),
        "pallas_mosaic_tpu": dispatch.Implementation(_pallas_mosaic_tpu, dispatch.refuse_unless("tpu", "a TPU")),
    },
    preferred=dispatch.default_order,
)
"""WKV-4 with all its implementations."""


def wkv4(
    log_w: Array,
    u: Array,
    k: Array,
    v: Array,
    state: State | None = None,
    *,
    segment_ids: Array | None = None,
    lengths: Array | None = None,
    implementation: str | dispatch.Implementation | None = None,
    validate: bool | None = None,
) -> tuple[Array, State]:
    """WKV-4 over a sequence: a mean of all values so far, weighted by e^key and a decay per channel.

    RWKV-4 (arXiv 2305.13048): y_t = (A_t + e^{u + k_t} v_t) / (B_t + e^{u + k_t}), then A <- w A + e^k v and
    B <- w B + e^k. The state holds A and B over a common e^max_exponent, and nothing overflows whatever k is.

    Args:
      log_w, u: [C]; log_w is the log of the decay, at most 0 (-e^{time_decay} of a checkpoint); u is the bonus of the
        present token (time_first).
      k, v: [B, T, C], float16, bfloat16, float32 or float64, T from 1.
      state: (numerator, denominator, max_exponent), each [B, C], float32 or float64; None is the empty state, which is
        (0, 0, -1e38).
      segment_ids: integers [B, T]; the state is reset where the id changes along a row. The first segment of a row
        continues `state`.
      lengths: integers [B] from 0 to T; steps beyond a row's length leave its state as it was, and their y is zero.
      implementation: a name or an `Implementation`; None is the platform's default (see `explain`).
      validate: whether to check values of log_w outside jit: None does if nothing has to be copied from an accelerator,
        True always, False never.

    Returns:
      y [B, T, C] in v's dtype, and the final state, float32 (float64 where an input is). Both are differentiable in
      every input and in the initial state, by the gauge rule that wkv4/scan.py explains: whatever uses a state
      may depend on numerator * e^max_exponent and denominator * e^max_exponent only.

    Raises:
      ValueError: shapes, dtypes or a state that do not go together, a log_w above 0 or lengths outside 0 to T (if
        values are known), an unknown implementation or one that cannot run here.
    """
    inputs, state = _prepare(log_w, u, k, v, state, "B T C", validate)
    batch, time = inputs["k"].shape[:2]
    chosen = _choose(inputs, state, implementation)
    lengths = arguments.check_lengths(lengths, batch, time)
    segments = arguments.number_segments(segment_ids, lengths, batch, time)
    y, state = _run(chosen, _silence(inputs, lengths), state, segments, lengths)
    return y.astype(inputs["v"].dtype), state


def wkv4_sharded(
    log_w: Array,
    u: Array,
    k: Array,
    v: Array,
    state: State | None = None,
    *,
    axis_name: str,
    segment_ids: Array | None = None,
    lengths: Array | None = None,
    implementation: str | dispatch.Implementation | None = None,
) -> tuple[Array, State]:
    """`wkv4` over a sequence whose time is split evenly over a mesh axis; called inside `shard_map`.

    Values and gradients are those of `wkv4` over the whole sequence. Each shard runs its steps twice;
    shards exchange four numbers per row and channel.

    Args:
      k, v and segment_ids: this shard's steps. `state` and `lengths`: of the whole sequence, the same on every shard of
        the axis; lengths go from 0 to T times the size of the axis.
      axis_name: the mesh axis over which time is split.

    Returns:
      y of this shard's steps, and the final state of the whole sequence, the same on every shard of the axis.

    Raises:
      ValueError: as `wkv4`.
    """
    inputs, state = _prepare(log_w, u, k, v, state, "B T C")
    batch, time, channels = inputs["k"].shape
    chosen = _choose(inputs, state, implementation)
    lengths = arguments.check_lengths(lengths, batch, time * lax.axis_size(axis_name))
    lengths = sharded.lengths_of_this_shard(lengths, time, axis_name)
    segments = sharded.segments_of_this_shard(segment_ids, lengths, batch, time, axis_name)
    dtype = state[0].dtype
    # In the state's dtype, so that the gradients of the two runs are summed before they are rounded.
    silenced = {name: x.astype(dtype) for name, x in _silence(inputs, lengths).items()}

    _, left = _run(chosen, silenced, empty_state(batch, channels, dtype), segments, lengths)
    steps = jnp.full((1,), time) if lengths is None else lengths
    decay = jnp.broadcast_to(silenced["log_w"] * steps[:, None], (batch, channels))
    if segments is not None:
        decay = jnp.where(segments[:, -1:] == 0, decay, -jnp.inf)
    piece = pieces.AffineMap(decay, left)
    y, final = _run(chosen, silenced, sharded.state_of_shard(_ALGEBRA, piece, state, axis_name), segments, lengths)
    return y.astype(inputs["v"].dtype), sharded.from_last_shard(final, axis_name)


def wkv4_step(log_w: Array, u: Array, k: Array, v: Array, state: State | None = None) -> tuple[Array, State]:
    """WKV-4 for one token: `wkv4` without the time axis.

    Args:
      log_w, u: [C]; k, v: [B, C]; state: (numerator, denominator, max_exponent), each [B, C], or None.

    Returns:
      y [B, C] in v's dtype, and the next state.

    Raises:
      ValueError: as `wkv4`.
    """
    inputs, state = _prepare(log_w, u, k, v, state, "B C")
    state, y = step(state, *(x.astype(state[0].dtype) for x in inputs.values()))
    return y.astype(inputs["v"].dtype), state


def _choose(
    inputs: dict[str, Array], state: State, implementation: str | dispatch.Implementation | None
) -> dispatch.Implementation:
    batch, time, channels = inputs["k"].shape
    problem = dispatch.Problem(jax.default_backend(), (batch, time, channels, 1, 1), state[0].dtype.name)
    return dispatch.choose(
        OPERATOR.name, OPERATOR.implementations, OPERATOR.preferred(problem), problem, implementation
    )


def _silence(inputs: dict[str, Array], lengths: Array | None) -> dict[str, Array]:
    """Zeroes keys and values beyond lengths."""
    k, v = arguments.silence((inputs["k"], inputs["v"]), lengths)
    return inputs | {"k": k, "v": v}


def _run(
    chosen: dispatch.Implementation,
    inputs: dict[str, Array],
    state: State,
    segments: Array | None,
    lengths: Array | None,
) -> tuple[Array, State]:
    """Runs an implementation on arguments that all vary over the same mesh axes."""
    arrays, state, segments, lengths = arguments.broadcast_varying_axes(
        tuple(inputs.values()), state, segments, lengths
    )
    return chosen.run(*arrays, state, segments=segments, lengths=lengths)


def _advance(state: State, log_decay: Array) -> State:
    numerator, denominator, exponent = state
    return numerator, denominator, exponent + log_decay


def _add(first: State, second: State) -> State:
    """The sum of two states, over the larger exponent."""
    largest = lax.stop_gradient(jnp.maximum(first[2], second[2]))
    from_first, from_second = jnp.exp(first[2] - largest), jnp.exp(second[2] - largest)
    numerator = from_first * first[0] + from_second * second[0]
    return numerator, from_first * first[1] + from_second * second[1], largest


_ALGEBRA = pieces.Algebra(advance=_advance, compose=jnp.add, add=_add)
"""Operations on WKV-4's transitions, each the logarithm of a decay, [B, C]."""


def _prepare(
    log_w: Any, u: Any, k: Any, v: Any, state: Any, axes: str, validate: bool | None = None
) -> tuple[dict[str, Array], State]:
    """Checked arguments, and the initial state in the recurrence's dtype; `axes` are k's."""
    k = jnp.asarray(k)
    arguments.check_axes("k", k, axes)
    inputs = {"k": k, "log_w": jnp.asarray(log_w), "u": jnp.asarray(u), "v": jnp.asarray(v)}
    batch, channels = k.shape[0], k.shape[-1]
    expected = {"k": (axes, k.shape), "v": (axes, k.shape), "log_w": ("C", (channels,)), "u": ("C", (channels,))}
    arguments.check_inputs(inputs, expected)
    arguments.check_log_decay(inputs["log_w"], validate)
    inputs = {name: inputs[name] for name in ("log_w", "u", "k", "v")}
    if state is None:
        return inputs, empty_state(batch, channels, arguments.recurrence_dtype(inputs))
    numerator, denominator, exponent = _check_state(state, (batch, channels))
    dtype = arguments.recurrence_dtype(inputs, numerator, denominator, exponent)
    # Other code writes the empty state with -inf, and -inf - -inf is NaN.
    exponent = jnp.where(exponent < EMPTY_EXPONENT, EMPTY_EXPONENT, exponent)
    return inputs, (numerator.astype(dtype), denominator.astype(dtype), exponent.astype(dtype))


def _check_state(state: Any, shape: tuple[int, int]) -> State:
    """Checks an initial state's structure, shapes and dtypes.

    Raises:
      ValueError: names the part, what it is and what it must be.
    """
    layout = "a tuple (numerator, denominator, max_exponent), each [B, C]"
    if not isinstance(state, (tuple, list)) or len(state) != 3:
        shown = f" of {len(state)}" if isinstance(state, (tuple, list)) else ""
        raise ValueError(f"state: {type(state).__name__}{shown} must be {layout}")
    parts = tuple(jnp.asarray(x) for x in state)
    for name, part in zip(("numerator", "denominator", "max_exponent"), parts, strict=True):
        arguments.check_state(f"state ({name})", part, shape, "[B, C]")
    numerator, denominator, exponent = parts
    return numerator, denominator, exponent


__all__ = ["OPERATOR", "wkv4", "wkv4_associative", "wkv4_chunked", "wkv4_scan", "wkv4_sharded", "wkv4_step"]
