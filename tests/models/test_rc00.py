"""RWKV-8 rc00 against its published equations, written out once more in NumPy; there are no numbers of others' code.

Gradients are those of the equations by complex steps: f(p + ih d) has h times the derivative along d as imaginary part,
without a difference of close numbers.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.typing import NDArray

from rwkv_jax.models.rc00 import ChannelMix
from rwkv_jax.weights.layouts import from_layout
from rwkv_jax.weights.official import check_tensors, read_config
from rwkv_jax.weights.tensors import WeightsError
from tests.golden import QUICK, relative_error
from tests.models.parameters import SMALL, merge, random_params, to_official

pytestmark = pytest.mark.usefixtures("float64")

CONFIG = dataclasses.replace(SMALL["8-rc00"], num_layers=2)
HEADS, SIZE = CONFIG.num_heads, CONFIG.head_dim
TOKENS = np.array([3, 17, 3, 3, 40, 0, 17])
LABELS = np.array([17, 3, 3, 40, 0, 17, 5])
STEP = 1e-30


def sigmoid(x: NDArray) -> NDArray:
    return 1 / (1 + np.exp(-x))


def norm(x: NDArray, p: dict[str, NDArray], name: str, epsilon: float = 1e-5) -> NDArray:
    centered = x - x.mean(-1, keepdims=True)
    normal = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + epsilon)
    return normal.reshape(len(x), -1) * p[f"{name}.weight"] + p[f"{name}.bias"]


def shifted(x: NDArray) -> NDArray:
    return np.concatenate([np.zeros_like(x[:1]), x[:-1]]) - x


def time_mixing(x: NDArray, p: dict[str, NDArray], first: NDArray | None) -> tuple[NDArray, NDArray]:
    """RWKV-7's, arXiv 2503.14456."""
    xr, xw, xk, xv, xa, xg = (x + shifted(x) * p[f"x_{name}"][0, 0] for name in "rwkvag")
    r, k, v = xr @ p["receptance.weight"].T, xk @ p["key.weight"].T, xv @ p["value.weight"].T
    w = np.exp(-np.exp(-0.5) * sigmoid(p["w0"][0, 0] + np.tanh(xw @ p["w1"]) @ p["w2"]))
    a = sigmoid(p["a0"][0, 0] + xa @ p["a1"] @ p["a2"])
    g = sigmoid(xg @ p["g1"]) @ p["g2"]
    own = v
    if first is not None:
        v = v + (first - v) * sigmoid(p["v0"][0, 0] + xv @ p["v1"] @ p["v2"])
    kk = (k * p["k_k"][0, 0]).reshape(-1, HEADS, SIZE)
    kk = kk / np.sqrt((kk**2).sum(-1, keepdims=True))
    k = k * (1 + (a - 1) * p["k_a"][0, 0])
    r, w, k, v, a = (z.reshape(-1, HEADS, SIZE) for z in (r, w, k, v, a))
    state, y = np.zeros((HEADS, SIZE, SIZE), complex), np.zeros_like(r)
    for t in range(len(x)):
        removed = np.einsum("hij,hj->hi", state, kk[t])
        state = state * w[t][:, None] - removed[:, :, None] * (kk[t] * a[t])[:, None] + v[t][:, :, None] * k[t][:, None]
        y[t] = np.einsum("hij,hj->hi", state, r[t])
    bonus = (r * k * p["r_k"]).sum(-1, keepdims=True) * v
    out = norm(y, p, "ln_x", 64e-5) + bonus.reshape(x.shape)
    return (out * g) @ p["output.weight"].T, own if first is None else first


def channel_mixing(x: NDArray, p: dict[str, NDArray], tokens: NDArray) -> NDArray:
    k = (x + shifted(x) * p["x_k"][0, 0]) @ p["key.weight"].T
    k = np.where(k.real > 0, k, 0) ** 2
    return (k @ p["value.weight"].T) * p["enn.weight"][tokens]


def equations(p: dict[str, NDArray]) -> NDArray:
    """Logits [T, V] of official tensors."""

    def part(prefix: str) -> dict[str, NDArray]:
        return {name.removeprefix(prefix): x for name, x in p.items() if name.startswith(prefix)}

    x, first = norm(p["emb.weight"][TOKENS].astype(complex), p, "blocks.0.ln0"), None
    for layer in range(CONFIG.num_layers):
        name = f"blocks.{layer}."
        mixed, first = time_mixing(norm(x, p, f"{name}ln1"), part(f"{name}att."), first)
        x = x + mixed
        x = x + channel_mixing(norm(x, p, f"{name}ln2"), part(f"{name}ffn."), TOKENS)
    return norm(x, p, "ln_out") @ p["head.weight"].T


def mean_loss(logits: NDArray) -> Any:
    return np.mean(np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(LABELS)), LABELS])


@functools.cache
def official() -> dict[str, NDArray]:
    return to_official(CONFIG, random_params(CONFIG))


@functools.cache
def ours() -> tuple[NDArray, NDArray, dict[str, NDArray]]:
    """Logits [T, V], the loss and its gradients by official names."""

    def loss(params: Any) -> Any:
        logits, _ = merge(CONFIG, params)(jnp.asarray(TOKENS)[None])
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(LABELS)[None]).mean(), logits[0]

    program = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)
    (value, logits), gradients = jax.device_get(program(random_params(CONFIG)))
    return logits, value, to_official(CONFIG, gradients)


def test_names_and_shapes_say_which_model_it_is() -> None:
    assert read_config(official()) == CONFIG
    check_tensors(official(), CONFIG)


def test_logits_are_those_of_the_equations() -> None:
    logits, loss, _ = ours()
    expected = equations(official())
    np.testing.assert_allclose(logits, np.real(expected), rtol=0, atol=1e-10)
    np.testing.assert_allclose(loss, mean_loss(expected).real, rtol=1e-12)


@pytest.mark.parametrize("seed", [10, pytest.param(11, marks=pytest.mark.long)])
def test_gradients_are_those_of_the_equations(seed: int) -> None:
    """Of every parameter along a random direction, which changes all its numbers."""
    _, _, gradients = ours()
    rng = np.random.default_rng(seed)
    assert gradients.keys() == official().keys()
    for name, x in official().items():
        direction = rng.standard_normal(x.shape)
        changed = official() | {name: x + 1j * STEP * direction}
        expected = mean_loss(equations(changed)).imag / STEP
        assert relative_error((gradients[name] * direction).sum(), expected) < 1e-9, name


def test_gradients_of_the_table_are_of_the_rows_that_were_read() -> None:
    _, _, gradients = ours()
    for layer in range(CONFIG.num_layers):
        name = f"blocks.{layer}.ffn.enn.weight"
        is_read = np.isin(np.arange(CONFIG.vocab_size), TOKENS)
        np.testing.assert_array_equal((gradients[name] != 0).all(-1), is_read)
        np.testing.assert_array_equal((gradients[name] != 0).any(-1), is_read)
        for token, channel in ((3, 0), (40, 31)):
            table = official()[name].astype(complex)
            table[token, channel] += 1j * STEP
            expected = mean_loss(equations(official() | {name: table})).imag / STEP
            assert relative_error(gradients[name][token, channel], expected) < 1e-9


def test_the_release_with_attention_besides_is_refused_by_name() -> None:
    """rc00-hybrid, whose equations have been published in part only."""
    tensors = official() | {"blocks.0.qkv.kkup.weight": np.zeros((2, 2))}
    with pytest.raises(WeightsError, match=r"of no known layout: blocks\.0\.qkv\.kkup\.weight"):
        from_layout(tensors)


def test_a_layer_alone_asks_for_tokens() -> None:
    layer = merge(CONFIG, random_params(CONFIG)).first_block.ffn
    assert isinstance(layer, ChannelMix)
    with pytest.raises(ValueError, match=r"context: has no tokens, which a layer with tables by token reads"):
        layer(jnp.zeros((1, 2, CONFIG.width)))
