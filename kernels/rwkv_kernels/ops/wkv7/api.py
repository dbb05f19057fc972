"""The WKV operator of RWKV-7 (Goose): the public function."""

from __future__ import annotations

from jax import Array

from rwkv_kernels import dispatch
from rwkv_kernels.operator import Operator
from rwkv_kernels.ops.wkv7.associative import wkv7_associative
from rwkv_kernels.ops.wkv7.chunked import log_decay_floor, wkv7_chunked
from rwkv_kernels.ops.wkv7.scan import wkv7_scan
from rwkv_kernels.precision import Precision
from rwkv_kernels.xla import state_passing


def _affine_map(
    run: state_passing.Run, inputs: dict[str, Array], state: Array, segments: Array | None, lengths: Array | None
) -> state_passing.AffineMap:
    del segments, lengths  # the run sees to both
    return state_passing.matrix_map(lambda v, state: run(inputs | {"v": v}, state), inputs["v"], state)


OPERATOR = Operator(
    name="wkv7",
    axes={"r": "B T H N", "log_w": "B T H N", "k": "B T H N", "v": "B T H M", "a": "B T H N", "b": "B T H N"},
    implementations={
        "scan": dispatch.Implementation(wkv7_scan, dispatch.anything),
        "associative_scan": dispatch.Implementation(wkv7_associative, dispatch.anything, min_chunk_size=1),
        "chunked": dispatch.Implementation(wkv7_chunked, dispatch.anything, min_chunk_size=1),
        "pallas_triton": dispatch.Implementation(
            dispatch.on_first_use("rwkv_kernels.ops.wkv7.pallas:wkv7_pallas_triton"),
            dispatch.unless_nvidia,
            min_chunk_size=16,
        ),
        "pallas_triton_split": dispatch.Implementation(
            dispatch.on_first_use("rwkv_kernels.ops.wkv7.pallas:wkv7_pallas_triton_split"),
            dispatch.unless_nvidia,
            min_chunk_size=16,
        ),
        "pallas_mosaic_gpu": dispatch.Implementation(
            dispatch.on_first_use("rwkv_kernels.ops.wkv7.pallas_mosaic_gpu:wkv7_pallas_mosaic_gpu"),
            dispatch.unless_hopper(largest_head=64),
        ),
        "pallas_mosaic_tpu": dispatch.Implementation(
            dispatch.on_first_use("rwkv_kernels.ops.wkv7.pallas:wkv7_pallas_mosaic_tpu"),
            dispatch.unless_tpu,
            min_chunk_size=16,
        ),
        "pallas_mosaic_tpu_split": dispatch.Implementation(
            dispatch.on_first_use("rwkv_kernels.ops.wkv7.pallas:wkv7_pallas_mosaic_tpu_split"),
            dispatch.unless_tpu,
            min_chunk_size=16,
        ),
    },
    transition_ops=state_passing.MATRIX,
    affine_map=_affine_map,
)
"""WKV-7 with all its implementations."""


def wkv7(
    r: Array,
    log_w: Array,
    k: Array,
    v: Array,
    a: Array,
    b: Array,
    state: Array | None = None,
    *,
    axis_name: str | None = None,
    segment_ids: Array | None = None,
    lengths: Array | None = None,
    implementation: str | dispatch.Implementation | None = None,
    chunk_size: int | None = None,
    precision: Precision = "full",
    validate: bool | None = None,
) -> tuple[Array, Array]:
    """WKV-7 over a sequence: S_t = S_{t-1} (diag(w_t) + a_t b_t^T) + v_t k_t^T and y_t = S_t r_t.

    RWKV-7 (arXiv 2503.14456), the generalized delta rule; the model passes a = -kappa and b = kappa * eta.

    Args:
      r, log_w, k, a, b: [B, T, H, N], float16, bfloat16, float32 or float64, T from 1; log_w is the log of the
        decay, at most 0. RWKV-7 keeps it above -e^{-1/2}; far below that (float32: `log_decay_floor(chunk_size)`, -4
        for chunks of 32) only `scan` is exact, and the others give NaN rather than a wrong number.
      v: [B, T, H, M].
      state: [B, H, M, N], value axis first, float32 or float64; None is the empty state.
      axis_name: a mesh axis over which time is split evenly, inside `shard_map`: arrays over time and segment_ids are
        then this shard's steps; `state`, `lengths` and the final state are those of the whole sequence, the same on
        every shard. Values and gradients are those of the whole sequence; each shard runs its steps twice, and shards
        exchange one affine map of the state per row and head.
      segment_ids: integers [B, T]; the state is reset where the id changes along a row. The first segment of a row
        continues `state`.
      lengths: integers [B] from 0 to T (of the whole sequence); steps beyond a row's length leave its state as it was,
        and their y is zero.
      implementation: a name or an `Implementation`; None is the platform's default (see `explain`).
      chunk_size: steps in a chunk, a power of two; None is the implementation's own. `scan` has no chunks.
      precision: of matrix products: `full`, `default` or `fast`.
      validate: whether to check values of log_w outside jit: None does if nothing has to be copied from an accelerator,
        True always, False never.

    Returns:
      y [B, T, H, M] in v's dtype, and the final state [B, H, M, N], float32 (float64 where an input is). Both are
      differentiable in every input and in the initial state.

    Raises:
      ValueError: shapes or dtypes that do not go together, a log_w above 0 or lengths outside 0 to T (where values are
        known), an unknown implementation, one that cannot run here or has no chunks
        of that size.
    """
    return OPERATOR.run(
        {"r": r, "log_w": log_w, "k": k, "v": v, "a": a, "b": b},
        state,
        axis_name=axis_name,
        segment_ids=segment_ids,
        lengths=lengths,
        implementation=implementation,
        chunk_size=chunk_size,
        precision=precision,
        validate=validate,
    )


__all__ = ["OPERATOR", "log_decay_floor", "wkv7", "wkv7_chunked", "wkv7_scan"]
