"""The map of every generation is its paper's, and its product with the values is the operator's output."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from rwkv_jax.evaluation.inspect import (
    attention_map,
    attention_share,
    mean_distance,
    read_texts,
    record,
    state_matrices,
)
from rwkv_jax.evaluation.inspect.layers import Recording, run_block
from tests.evaluation.inspect.looked_into import TOKENS, small_model

# The previews differ from 5.2 in shapes only.
PREVIEWS = [pytest.param(name, marks=pytest.mark.long) for name in ("5.0", "5.1")]
BASELINES = [pytest.param(name, marks=pytest.mark.long) for name in ("gla", "mamba2", "deltanet", "gated_deltanet")]
GENERATIONS = ["4", *PREVIEWS, "5.2", "6", "7", "transformer", *BASELINES]


def by_equations(recording: Recording, row: int) -> NDArray:
    """[H, T, T] of one row, entry by entry from its paper's equation; RWKV-4's channels are its heads."""
    x = {name: a if recording.operator == "softmax" or a.ndim <= 2 else a[row] for name, a in recording.inputs.items()}
    if recording.operator == "softmax":
        q, k = recording.inputs["q"][row], recording.inputs["k"][row]
        scores = np.einsum("thn,ihn->hti", q, k) / np.sqrt(q.shape[-1])
        weights = np.exp(scores) * np.tri(len(q))
        return weights / weights.sum(axis=-1, keepdims=True)
    k = x["k"]
    time, heads = k.shape[:2]
    a = np.zeros((heads, time, time))
    for t in range(time):
        for i in range(t + 1):
            if recording.operator == "wkv4":
                a[:, t, i] = np.exp(x["u"] + k[t] if i == t else (t - 1 - i) * x["log_w"] + k[i])
                continue
            key = k[i]
            if recording.operator == "wkv7":
                for j in range(i + 1, t + 1):  # k_i G_{i+1} ... G_t
                    outer = np.einsum("hn,hm->hnm", x["a"][j], x["b"][j])
                    transition = outer + np.exp(x["log_w"][j])[:, :, None] * np.eye(k.shape[-1])
                    key = np.einsum("hn,hnm->hm", key, transition)
            elif i == t:
                key = x["u"] * key
            else:
                for j in range(i + 1, t):
                    log_w = x["log_w"] if recording.operator == "wkv5" else x["log_w"][j]
                    key = key * np.exp(log_w)
            a[:, t, i] = np.sum(key * x["r"][t], axis=-1)
    return a / a.sum(axis=-1, keepdims=True) if recording.operator == "wkv4" else a


def read(recording: Recording, attention: NDArray) -> NDArray:
    """A @ v, in the shape of the operator's output."""
    v = recording.inputs["v"]
    return np.einsum("bhti,bihm->bthm", attention, v.reshape(*v.shape[:2], attention.shape[1], -1)).reshape(v.shape)


@pytest.mark.parametrize("name", GENERATIONS)
def test_is_that_of_the_papers_and_reads_what_the_operator_gives(name: str) -> None:
    for recording in record(small_model(name), TOKENS):
        attention = attention_map(recording)
        np.testing.assert_allclose(attention[1], by_equations(recording, 1), atol=1e-12)
        np.testing.assert_allclose(read(recording, attention), recording.output, atol=1e-12)
        assert np.all(np.triu(attention, 1) == 0)
        assert np.abs(recording.output).max() > 0.01


@pytest.mark.parametrize("name", ["4", "7", *(pytest.param(name, marks=pytest.mark.long) for name in ("5.2", "6"))])
def test_reads_the_same_in_float32(name: str) -> None:
    for recording in record(small_model(name, "float32"), TOKENS):
        assert recording.output.dtype == np.float32
        error = np.abs(read(recording, attention_map(recording)) - recording.output).max()
        assert error < 1e-5 * np.abs(recording.output).max()


@pytest.mark.parametrize("name", ["transformer", "llama"])
def test_the_transformers_is_what_it_computes(name: str) -> None:
    """No operator records it, but a copy of its equations."""
    model = small_model(name)
    recording, attention = record(model, TOKENS)[0], model.first_block.att
    own = jax.jit(lambda x: attention(model.first_block.ln1(x)).y)(model.emb(jnp.asarray(TOKENS)))
    np.testing.assert_allclose(
        recording.output.reshape(*own.shape[:2], -1) @ attention.output.weight[...].T, own, atol=1e-12
    )


@pytest.mark.parametrize("name", ["4", "7"])
def test_layers_are_those_of_the_whole_model(name: str) -> None:
    """With the first layer's values, which RWKV-7 passes on."""
    model = small_model(name)
    x, v_first = model.emb(jnp.asarray(TOKENS)), None
    whole = jax.jit(lambda tokens: model.residual_stream(tokens).hidden)(TOKENS)
    for layer in range(model.config.num_layers):
        x, v_first, _ = run_block(model, layer, x, v_first, record=True)
        np.testing.assert_allclose(x, whole[layer], atol=1e-12)


def test_shares_are_of_one_scale() -> None:
    attention = np.array([[0.0, 0, 0], [-1, 3, 0], [2, 0, 2]])
    share = attention_share(attention)
    np.testing.assert_array_equal(share, [[0, 0, 0], [0.25, 0.75, 0], [0.5, 0, 0.5]])
    assert mean_distance(attention) == pytest.approx((0 + 0.25 + 1) / 3)


@pytest.mark.parametrize("name", ["4", "6"])
def test_the_order_of_a_prefix_matters(name: str) -> None:
    """A state is no bag of words."""
    model = small_model(name)
    states = (state_matrices(model, read_texts(model, TOKENS[:, order])) for order in ([0, 1, 2], [1, 0, 2]))
    assert np.abs(next(states) - next(states)).max() > 1e-3
