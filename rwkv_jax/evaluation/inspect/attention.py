"""Which tokens a layer reads: the attention map that every operator amounts to.

Every operator's output is linear in the values: y_t = sum_i A[t, i] v_i, where A depends on all its other arguments.
So column i of A is the output for values that are 1 at token i and 0 elsewhere:

    WKV-4        A[t, i] = e^{(t-1-i) log w + k_i} / sum_j (the same for j), e^{u + k_t} for i = t; one map a channel
    WKV-5, 6     A[t, i] = r_t . (w_{i+1} ... w_{t-1} k_i), r_t . (u k_t) for i = t
    WKV-7        A[t, i] = k_i G_{i+1} ... G_t r_t, where G_t = diag(w_t) + a_t b_t^T is the transition of token t
    softmax      the weights themselves

The entries of WKV-5, 6 and 7 have both signs, and their rows have any sum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

import rwkv_kernels
from rwkv_jax.evaluation.inspect.layers import SOFTMAX, Recording, softmax_weights


def attention_map(recording: Recording) -> NDArray:
    """A [B, H, T, T] of a layer, such that y[:, t, h] = sum_i A[:, h, t, i] v[:, i, h]; rows t read columns i.

    In RWKV-4 each channel is a head, H = C. It takes H T^2 numbers of memory, as the state of T values.
    """
    inputs = dict(recording.inputs)
    if recording.operator == SOFTMAX:
        return np.asarray(softmax_weights(jnp.asarray(inputs["q"]), jnp.asarray(inputs["k"])))
    v = inputs.pop("v")
    return np.asarray(_mapper(recording.operator)(inputs, jnp.zeros_like(v)))


@functools.cache
def _mapper(name: str) -> Callable[..., Array]:
    """(arguments but v, zeros like v) -> the map."""
    operator: Any = getattr(rwkv_kernels, name)
    each_channel = "M" not in rwkv_kernels.OPERATORS[name].axes["v"]

    def columns(inputs: dict[str, Array], zeros: Array) -> Array:
        batch, time, heads = zeros.shape[:3]
        if not each_channel:  # all at once, as T values of a head
            values = jnp.broadcast_to(jnp.eye(time, dtype=zeros.dtype)[:, None], (batch, time, heads, time))
            return jnp.moveaxis(operator(**inputs, v=values, implementation="scan")[0], 1, 2)

        def column(i: Array) -> Array:
            return operator(**inputs, v=zeros.at[:, i].set(1), implementation="scan")[0]

        return jnp.moveaxis(jax.lax.map(column, jnp.arange(time)), (0, 1, 2, 3), (3, 0, 2, 1))

    return jax.jit(columns)


def attention_share(attention: NDArray) -> NDArray:
    """|A[t, i]| / sum_i |A[t, i]|, of one scale for all generations; zero in rows of zeros."""
    size = np.abs(attention)
    total = size.sum(axis=-1, keepdims=True)
    return np.divide(size, total, out=np.zeros_like(size), where=total > 0)


def mean_distance(attention: NDArray) -> NDArray:
    """How far back a head reads: the mean of t - i by `attention_share`, over all t; [..., T, T] -> [...]."""
    time = attention.shape[-1]
    distance = np.arange(time)[:, None] - np.arange(time)
    return np.sum(attention_share(attention) * distance, axis=-1).mean(axis=-1)
