"""The WKV operator of RWKV-4 (Dove): the public function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from rwkv_kernels import arguments, dispatch
from rwkv_kernels.operator import Operator
from rwkv_kernels.ops.wkv4.associative import wkv4_associative
from rwkv_kernels.ops.wkv4.chunked import wkv4_chunked
from rwkv_kernels.ops.wkv4.scan import EMPTY_EXPONENT, State, empty_state, wkv4_scan
from rwkv_kernels.xla import state_passing


def _advance(state: State, log_decay: Array) -> State:
    numerator, denominator, exponent = state
    return numerator, denominator, exponent + log_decay


def _add(first: State, second: State) -> State:
    """The sum of two states, over the larger exponent."""
    largest = lax.stop_gradient(jnp.maximum(first[2], second[2]))
    from_first, from_second = jnp.exp(first[2] - largest), jnp.exp(second[2] - largest)
    numerator = from_first * first[0] + from_second * second[0]
    return numerator, from_first * first[1] + from_second * second[1], largest


def _affine_map(
    run: state_passing.Run, inputs: dict[str, Array], state: State, segments: Array | None, lengths: Array | None
) -> state_passing.AffineMap:
    batch, time, channels = inputs["k"].shape
    _, left = run(inputs, empty_state(batch, channels, state[0].dtype))
    steps = jnp.full((1,), time) if lengths is None else lengths
    decay = jnp.broadcast_to(inputs["log_w"] * steps[:, None], (batch, channels))
    if segments is not None:
        decay = jnp.where(segments[:, -1:] == 0, decay, -jnp.inf)
    return state_passing.AffineMap(decay, left)


def _check_state(state: Any, sizes: Mapping[str, int]) -> State:
    """An initial state's parts.

    Raises:
      ValueError: a wrong structure, shape or dtype; names the part, what it is and what it must be.
    """
    layout = "a tuple (numerator, denominator, max_exponent), each [B, C]"
    if not isinstance(state, (tuple, list)) or len(state) != 3:
        shown = f" of {len(state)}" if isinstance(state, (tuple, list)) else ""
        raise ValueError(f"state: {type(state).__name__}{shown} must be {layout}")
    numerator, denominator, exponent = map(jnp.asarray, state)
    parts = {"numerator": numerator, "denominator": denominator, "max_exponent": exponent}
    for name, part in parts.items():
        arguments.check_state(f"state ({name})", part, (sizes["B"], sizes["C"]), "[B, C]")
    # Other code writes the empty state with -inf, and -inf - -inf is NaN.
    return numerator, denominator, jnp.where(exponent < EMPTY_EXPONENT, EMPTY_EXPONENT, exponent)


OPERATOR = Operator(
    name="wkv4",
    axes={"log_w": "C", "u": "C", "k": "B T C", "v": "B T C"},
    sized_by=("k",),
    empty_state=lambda sizes, dtype: empty_state(sizes["B"], sizes["C"], dtype),
    check_state=_check_state,
    implementations={
        "scan": dispatch.Implementation(wkv4_scan, dispatch.anything),
        "associative_scan": dispatch.Implementation(wkv4_associative, dispatch.anything),
        "chunked": dispatch.Implementation(wkv4_chunked, dispatch.anything, min_chunk_size=1),
        "pallas_triton": dispatch.Implementation(
            dispatch.on_first_use("rwkv_kernels.ops.wkv4.pallas_triton:wkv4_pallas_triton"), dispatch.unless_nvidia
        ),
        "pallas_mosaic_tpu": dispatch.Implementation(
            dispatch.on_first_use("rwkv_kernels.ops.wkv4.pallas_mosaic_tpu:wkv4_pallas_mosaic_tpu"),
            dispatch.unless_tpu,
            min_chunk_size=8,
        ),
    },
    # A transition is the log of a decay, [B, C].
    transition_ops=state_passing.TransitionOps(advance=_advance, compose=jnp.add, add=_add),
    affine_map=_affine_map,
)
"""WKV-4 with all its implementations."""


def wkv4(
    log_w: Array,
    u: Array,
    k: Array,
    v: Array,
    state: State | None = None,
    *,
    axis_name: str | None = None,
    segment_ids: Array | None = None,
    lengths: Array | None = None,
    implementation: str | dispatch.Implementation | None = None,
    chunk_size: int | None = None,
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
      axis_name: a mesh axis over which time is split evenly, inside `shard_map`: arrays over time and segment_ids are
        then this shard's steps; `state`, `lengths` and the final state are those of the whole sequence, the same on
        every shard. Values and gradients are those of the whole sequence; each shard runs its steps twice, and shards
        exchange four numbers per row and channel.
      segment_ids: integers [B, T]; the state is reset where the id changes along a row. The first segment of a row
        continues `state`.
      lengths: integers [B] from 0 to T (of the whole sequence); steps beyond a row's length leave its state as it was,
        and their y is zero.
      implementation: a name or an `Implementation`; None is the platform's default (see `explain`).
      chunk_size: steps between the states that `chunked` stores, at most, or in a block of `pallas_mosaic_tpu`; a power
        of two, None is the implementation's own. The others have no chunks.
      validate: whether to check values of log_w outside jit: None does if nothing has to be copied from an accelerator,
        True always, False never.

    Returns:
      y [B, T, C] in v's dtype, and the final state, float32 (float64 where an input is). Both are differentiable in
      every input and in the initial state, by the exponent rule that wkv4/scan.py explains: whatever uses a state
      may depend on numerator * e^max_exponent and denominator * e^max_exponent only.

    Raises:
      ValueError: shapes, dtypes or a state that do not go together, a log_w above 0 or lengths outside 0 to T (if
        values are known), an unknown implementation, one that cannot run here or has no chunks
        of that size.
    """
    return OPERATOR.run(
        {"log_w": log_w, "u": u, "k": k, "v": v},
        state,
        axis_name=axis_name,
        segment_ids=segment_ids,
        lengths=lengths,
        implementation=implementation,
        chunk_size=chunk_size,
        validate=validate,
    )


__all__ = ["OPERATOR", "wkv4", "wkv4_associative", "wkv4_chunked", "wkv4_scan"]
