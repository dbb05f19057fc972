"""WKV-6 in chunks: `decayed_attention` within chunks, a recurrence between them, a recomputing backward pass."""

from __future__ import annotations

from jax import Array

from rwkv_kernels import chunks, products
from rwkv_kernels.arguments import pad_time
from rwkv_kernels.decayed_attention import gauged_attention_chunk, is_weak
from rwkv_kernels.derivatives import with_backward
from rwkv_kernels.ops.wkv6.chunk import make_chunk
from rwkv_kernels.precision import Precision

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
      segments: int32 [B, T] from `arguments.number_segments`, or None.
      precision: of matrix products.
      chunk_size: steps in a chunk, a power of two; a sequence shorter than that is one chunk.

    Returns:
      y [B, T, H, M] in the state's dtype, and the final state.

    Raises:
      ValueError: chunk_size is not a power of two.
    """
    size = chunks.fitting_size(chunk_size, r.shape[1])
    time, padding = r.shape[1], -r.shape[1] % size
    # Steps of zeros change nothing: no decay (log w = 0), nothing written.
    over_time = tuple(pad_time(x, padding) for x in (r, log_w, k, v))
    within = chunks.number_within_chunks(segments, padding, size)
    multiply = products.xla(precision)
    form = chunks.Recomputing(
        size,
        chunk=make_chunk(multiply),
        chunk_if_weak=make_chunk(multiply, gauged_attention_chunk),
        is_weak=lambda over_time, per_head: is_weak(over_time[1], size),
    )
    run = with_backward(form.forward, form.forward_with_residuals, form.backward)
    y, state = run((within, None), over_time, (u,), state)
    return y[:, :time], state
