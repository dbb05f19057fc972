"""WKV-6 in chunks: `decayed_attention` within chunks, a recurrence between them, a recomputing backward pass."""

from __future__ import annotations

from jax import Array

from rwkv_kernels import chunking
from rwkv_kernels.arguments import pad_time
from rwkv_kernels.decayed_attention import decay_is_mild, mild_attention_chunk
from rwkv_kernels.matmul import xla_matmul
from rwkv_kernels.ops.wkv6.chunk import make_chunk
from rwkv_kernels.precision import Precision
from rwkv_kernels.xla.chunk_loop import ChunkedRecurrence
from rwkv_kernels.xla.linear_rule import with_backward

CHUNK_SIZE = 32
"""Default steps in a chunk; chosen by benchmarks/wkv_cpu.py --chunk-sizes."""


def wkv6_chunked(
    r: Array,
    log_w: Array,
    k: Array,
    v: Array,
    u: Array,
    state: Array,
    *,
    segments: Array | None = None,
    precision: Precision = "full",
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Array, Array]:
    """WKV-6 over a sequence, chunk by chunk; exact for any decay.

    Args:
      r, log_w, k: [B, T, H, N]; v: [B, T, H, M]; u: [H, N]; any floating dtype, any T from 1.
      state: [B, H, M, N] in the dtype of the recurrence.
      segments: int32 [B, T] from `arguments.segment_index`, or None.
      precision: of matrix products.
      chunk_size: steps in a chunk, a power of two; a sequence shorter than that is one chunk.

    Returns:
      y [B, T, H, M] in the state's dtype, and the final state.

    Raises:
      ValueError: chunk_size is not a power of two.
    """
    size = chunking.fitting_size(chunk_size, r.shape[1])
    time, padding = r.shape[1], -r.shape[1] % size
    # Steps of zeros change nothing: no decay (log w = 0), nothing written.
    over_time = tuple(pad_time(x, padding) for x in (r, log_w, k, v))
    local_segments = chunking.local_segment_index(segments, padding, size)
    matmul = xla_matmul(precision)
    form = ChunkedRecurrence(
        size,
        chunk=make_chunk(matmul),
        chunk_fast=make_chunk(matmul, mild_attention_chunk),
        decay_is_mild=lambda over_time, per_head: decay_is_mild(over_time[1], size),
    )
    run = with_backward(form.forward, form.forward_with_residuals, form.backward)
    y, state = run((local_segments, None), over_time, (u,), state)
    return y[:, :time], state
