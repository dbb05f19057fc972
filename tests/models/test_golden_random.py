"""RWKV-7 against numbers from other people's implementations; shared/golden/README.md explains the keys."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from numpy.typing import NDArray

from rwkv_jax.config import ModelConfig
from rwkv_jax.models.rwkv7 import State
from rwkv_jax.training.loss import sum_losses
from tests.golden import QUICK, assert_close, load_golden, relative_error
from tests.models.parameters import abstract, from_official, in_dtype, merge, to_official

CONFIG = ModelConfig(
    vocab_size=97,
    num_layers=3,
    width=128,
    head_dim=64,
    ffn_width=160,
    decay_rank=32,
    iclr_rank=24,
    value_rank=16,
    gate_rank=40,
    dtype="float64",
)
FLOAT32 = dataclasses.replace(CONFIG, dtype="float32")
FIELDS = {"att_x": "att_shift", "ffn_x": "ffn_shift", "S": "wkv"}
"""Golden names of a layer's state and ours."""


def golden() -> dict[str, NDArray]:
    return load_golden("random/v7_s0.npz")


def params_of(config: ModelConfig) -> Any:
    weights = {key.removeprefix("w."): x for key, x in golden().items() if key.startswith("w.")}
    return in_dtype(from_official(weights, np.float64), config)


def first_row(state: State) -> dict[str, Array]:
    return {name: x[:, :1] for name, x in state._asdict().items()}


def golden_state(prefix: str, config: ModelConfig) -> State:
    """A state of one batch row, from keys such as PREFIX.L0.att_x."""
    layers = range(config.num_layers)
    dtype = config.parameter_dtype
    return State(
        **{
            ours: jnp.asarray(np.stack([golden()[f"{prefix}.L{layer}.{theirs}"] for layer in layers])[:, None], dtype)
            for theirs, ours in FIELDS.items()
        }
    )


def options(config: ModelConfig) -> dict[str, Any] | None:
    return QUICK if config.dtype == "float64" else None


@functools.cache
def run(config: ModelConfig) -> Callable[..., tuple[Array, State]]:
    """(params, tokens, state) -> logits, state."""
    return jax.jit(lambda params, tokens, state: merge(config, params)(tokens, state), compiler_options=options(config))


@functools.cache
def loss_and_gradients(config: ModelConfig) -> Callable[..., Any]:
    """(params, state, tokens, targets) -> loss, (gradients of the parameters, of the state)."""

    def loss(params: Any, state: State | None, tokens: Array, targets: Array) -> Array:
        model = merge(config, params)
        hidden, _ = model.hidden(tokens, state)
        total = sum_losses(model.logits, hidden, targets)
        return total.nll / total.count

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), compiler_options=options(config))


def probed(kind: str, gradient: NDArray) -> Any:
    """What a golden key of this kind holds of a gradient: all of it, products with random vectors, or its norm."""
    if kind == "grad":
        return gradient
    matrix = gradient.reshape(-1, gradient.shape[-1]).astype(np.float64)
    rows, columns = matrix.shape
    if kind == "gradR":
        return matrix @ np.stack([golden()[f"probe.{columns}.{j}"] for j in (0, 1)], axis=1)
    if kind == "gradL":
        return np.stack([golden()[f"probe.{rows}.{j}"] for j in (2, 3)]) @ matrix
    return np.linalg.norm(matrix)


def check_gradients(gradients: Any, length: int, bound: float) -> None:
    ours = to_official(gradients)
    seen = set()
    for key, expected in golden().items():
        kind, separator, name = key.partition(f"_T{length}.")
        if separator and kind.startswith("grad"):
            assert relative_error(probed(kind, ours[name]), expected) <= bound, key
            seen.add(name)
    assert seen == ours.keys()
    norm = np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in ours.values()))
    assert relative_error(norm, golden()[f"gradnorm_T{length}"]) <= bound


def test_names_and_shapes_are_the_official_ones() -> None:
    expected, ours = params_of(CONFIG), abstract(CONFIG)[1]
    assert jax.tree.map(np.shape, expected) == jax.tree.map(lambda x: x.shape, ours)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 64, 100])
def test_logits(float64: None, length: int) -> None:
    tokens, params = golden()[f"tokens_T{length}"], params_of(CONFIG)
    logits, _ = run(CONFIG)(params, tokens, merge(CONFIG, params).initial_state(len(tokens)))
    assert logits.dtype == jnp.float64
    np.testing.assert_allclose(logits, golden()[f"logits_T{length}"], rtol=0, atol=1e-10)


def test_a_long_sequence(float64: None) -> None:
    tokens = golden()["tokens_T257"]
    logits, state = run(CONFIG)(params_of(CONFIG), tokens, None)
    np.testing.assert_allclose(logits[:, golden()["pos_T257"]], golden()["logits_T257"], rtol=0, atol=1e-10)
    nll = -jax.nn.log_softmax(logits[0, :-1])[np.arange(256), tokens[0, 1:]]
    np.testing.assert_allclose(nll, golden()["nll_T257"], rtol=0, atol=1e-10)
    assert_close(state._asdict(), golden_state("state_T257", CONFIG)._asdict(), 1e-11)


@pytest.mark.parametrize("length", [17, 100])
def test_loss_and_gradients(float64: None, length: int) -> None:
    tokens, targets = golden()[f"tokens_T{length}"], golden()[f"targets_T{length}"]
    params = params_of(CONFIG)
    state = merge(CONFIG, params).initial_state(len(tokens))
    loss, (gradients, _) = loss_and_gradients(CONFIG)(params, state, tokens, targets)
    assert relative_error(loss, golden()[f"loss_T{length}"]) < 1e-12
    check_gradients(gradients, length, 1e-9)


def test_from_a_state_that_is_not_empty(float64: None) -> None:
    # Both rows are the same, so that the programs of the tests above, of two rows, serve here too.
    tokens, targets = (np.repeat(golden()[name], 2, axis=0) for name in ("st_tokens", "st_targets"))
    state = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=1), golden_state("st_init", CONFIG))
    params = params_of(CONFIG)
    logits, final = run(CONFIG)(params, tokens, state)
    np.testing.assert_allclose(logits[0], golden()["st_logits"], rtol=0, atol=1e-10)
    assert_close(first_row(final), golden_state("st_final", CONFIG)._asdict(), 1e-11)
    loss, (_, gradients) = loss_and_gradients(CONFIG)(params, state, tokens, targets)
    assert relative_error(loss, golden()["st_loss"]) < 1e-12
    both = jax.tree.map(lambda x: x.sum(axis=1, keepdims=True), gradients)
    # The reference's own gradients of the state are finite differences.
    assert_close(both._asdict(), golden_state("st_grad", CONFIG)._asdict(), 1e-7)


def test_float32_logits() -> None:
    logits, state = run(FLOAT32)(params_of(FLOAT32), golden()["tokens_T257"], None)
    np.testing.assert_allclose(logits[:, golden()["pos_T257"]], golden()["logits_T257"], rtol=0, atol=1e-4)
    assert_close(state._asdict(), golden_state("state_T257", FLOAT32)._asdict(), 2e-5)


def test_float32_loss_and_gradients() -> None:
    tokens, targets = golden()["tokens_T100"], golden()["targets_T100"]
    loss, (gradients, _) = loss_and_gradients(FLOAT32)(params_of(FLOAT32), None, tokens, targets)
    assert relative_error(loss, golden()["loss_T100"]) < 1e-6
    check_gradients(gradients, 100, 1e-4)
