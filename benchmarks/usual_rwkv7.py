"""RWKV-7 written straight from the paper's equations: the row `usual` of benchmarks/train_cpu.py.

It does nothing for a CPU: products are over [B, T, C] and every activation is kept for the backward pass. It takes the
parameters of this library, by their official names, so that its losses must be ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rwkv_jax.training.batch import Batch
from rwkv_jax.training.step import LossSums

HEAD_DIM = 64
L2WRAP = 1e-4

Wkv7 = Callable[..., tuple[Array, Array]]
"""(r, log_w, k, v, a, b), each [B, T, H, N], to y [B, T, H, N] and the final state."""


def _linear(x: Array, parameters: Any) -> Array:
    return jnp.einsum("btc,oc->bto", x, parameters["weight"])


def _layer_norm(x: Array, parameters: Any) -> Array:
    x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * parameters["weight"] + parameters["bias"]


def _token_shift(x: Array) -> Array:
    return jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]


def _time_mix(x: Array, v_first: Array | None, p: Any, wkv7: Wkv7) -> tuple[Array, Array]:
    batch, time, width = x.shape
    xx = _token_shift(x) - x
    xr, xw, xk, xv, xa, xg = (x + xx * p[f"x_{name}"] for name in "rwkvag")
    r, k, v = _linear(xr, p["receptance"]), _linear(xk, p["key"]), _linear(xv, p["value"])
    log_w = -jnp.exp(-0.5) * jax.nn.sigmoid(p["w0"] + jnp.tanh(xw @ p["w1"]) @ p["w2"])
    if v_first is None:
        v_first = v
    else:
        v = v + (v_first - v) * jax.nn.sigmoid(p["v0"] + xv @ p["v1"] @ p["v2"])
    a = jax.nn.sigmoid(p["a0"] + xa @ p["a1"] @ p["a2"])
    g = jax.nn.sigmoid(xg @ p["g1"]) @ p["g2"]

    def heads(x: Array) -> Array:
        return x.reshape(batch, time, width // HEAD_DIM, HEAD_DIM)

    kk = heads(k * p["k_k"])
    kk = kk / jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(kk), -1, keepdims=True)), 1e-12)
    k = k * (1 + (a - 1) * p["k_a"])
    r, log_w, k, v, a = map(heads, (r, log_w, k, v, a))
    y, _ = wkv7(r, log_w, k, v, -kk, kk * a)
    y = (y - y.mean(-1, keepdims=True)) * jax.lax.rsqrt(y.var(-1, keepdims=True) + 64e-5)
    y = y.reshape(batch, time, width) * p["ln_x"]["weight"] + p["ln_x"]["bias"]
    bonus = jnp.sum(r * k * p["r_k"], -1, keepdims=True) * v
    return _linear((y + bonus.reshape(batch, time, width)) * g, p["output"]), v_first


def _channel_mix(x: Array, p: Any) -> Array:
    x = x + (_token_shift(x) - x) * p["x_k"]
    return _linear(jnp.square(jax.nn.relu(_linear(x, p["key"]))), p["value"])


def _block(x: Array, v_first: Array | None, p: Any, wkv7: Wkv7) -> tuple[Array, Array]:
    y, v_first = _time_mix(_layer_norm(x, p["ln1"]), v_first, p["att"], wkv7)
    x = x + y
    return x + _channel_mix(_layer_norm(x, p["ln2"]), p["ffn"]), v_first


def logits(params: Any, tokens: Array, wkv7: Wkv7) -> Array:
    """Logits [B, T, V] of tokens [B, T], by the nested dict of parameters of a `TrainState`."""
    x = _layer_norm(params["emb"]["weight"][tokens], params["first_block"]["ln0"])
    x, v_first = _block(x, None, params["first_block"], wkv7)
    x, _ = jax.lax.scan(lambda x, p: (_block(x, v_first, p, wkv7)[0], None), x, params["blocks"])
    return _linear(_layer_norm(x, params["ln_out"]), params["head"])


@dataclasses.dataclass(frozen=True)
class UsualNextToken:
    """The objective of `rwkv_jax.training`, with this model in the place of the library's."""

    wkv7: Wkv7

    def count(self, batch: Batch) -> Array:
        """Number of tokens."""
        return jnp.float32(batch.tokens.size)

    def loss_sums(self, params: Any, batch: Batch, recurrent_state: Any) -> tuple[LossSums, Any]:
        """Sums over all rows."""
        scores = logits(params, batch.tokens, self.wkv7)
        chosen = jnp.take_along_axis(scores, batch.targets[..., None], -1)[..., 0]
        loss = jnp.sum(jax.nn.logsumexp(scores, -1) - chosen)
        # The official trainer penalizes the largest logit by its square, whose gradient is that logit times L2WRAP.
        penalty = 0.5 * L2WRAP * jnp.sum(jnp.square(scores.max(-1)))
        return LossSums(loss + penalty, loss), recurrent_state
