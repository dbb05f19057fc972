"""The WKV operator of RWKV-5 (Eagle): the public function."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import Array

from rwkv_kernels import dispatch
from rwkv_kernels.operator import Operator
from rwkv_kernels.ops.wkv5.chunked import wkv5_chunked
from rwkv_kernels.ops.wkv5.scan import wkv5_scan
from rwkv_kernels.precision import Precision
from rwkv_kernels.xla import state_passing


def _affine_map(
    run: state_passing.Run, inputs: dict[str, Array], state: Array, segments: Array | None, lengths: Array | None
) -> state_passing.AffineMap:
    steps = jnp.full((1,), inputs["r"].shape[1]) if lengths is None else lengths
    total = inputs["log_w"].astype(state.dtype) * steps[:, None, None]
    return state_passing.diagonal_map(functools.partial(run, inputs), total, state, segments)


OPERATOR = Operator(
    name="wkv5",
    axes={"r": "B T H N", "log_w": "H N", "k": "B T H N", "v": "B T H M", "u": "H N"},
    implementations={
        "scan": dispatch.Implementation(wkv5_scan, dispatch.anything),
        "chunked": dispatch.Implementation(wkv5_chunked, dispatch.anything, min_chunk_size=1),
        "pallas_triton": dispatch.Implementation(
            dispatch.on_first_use("rwkv_kernels.ops.wkv5.pallas:wkv5_pallas_triton"),
            dispatch.unless_nvidia,
            min_chunk_size=16,
        ),
        "pallas_triton_split": dispatch.Implementation(
            dispatch.on_first_use("rwkv_kernels.ops.wkv5.pallas:wkv5_pallas_triton_split"),
            dispatch.unless_nvidia,
            min_chunk_size=16,
        ),
        "pallas_mosaic_tpu": dispatch.Implementation(
            dispatch.on_first_use("rwkv_kernels.ops.wkv5.pallas:wkv5_pallas_mosaic_tpu"),
            dispatch.unless_tpu,
            min_chunk_size=16,
        ),
    },
    transition_ops=state_passing.DIAGONAL,
    affine_map=_affine_map,
)
"""WKV-5 with all its implementations."""


def wkv5(
    r: Array,
    log_w: Array,
    k: Array,
    v: Array,
    u: Array,
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
    """WKV-5 over a sequence: y_t = (S_{t-1} + v_t (u k_t)^T) r_t and S_t = S_{t-1} diag(w) + v_t k_t^T.

    RWKV-5 (arXiv 2404.05892). The decay w = e^{log_w} is the same for every token; any decay is exact.

    Args:
      r, k: [B, T, H, N], float16, bfloat16, float32 or float64, T from 1.
      log_w: the log of the decay, at most 0; [H, N], or [H, 1] for one decay a head (RWKV-5.0 and 5.1).
      v: [B, T, H, M].
      u: the bonus that a token's own key gets; [H, N], or [H, 1].
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
        {"r": r, "log_w": log_w, "k": k, "v": v, "u": u},
        state,
        axis_name=axis_name,
        segment_ids=segment_ids,
        lengths=lengths,
        implementation=implementation,
        chunk_size=chunk_size,
        precision=precision,
        validate=validate,
    )


__all__ = ["OPERATOR", "wkv5", "wkv5_chunked", "wkv5_scan"]
