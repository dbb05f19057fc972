"""Models of random weights against other people's implementations; tests/golden/README.md explains the keys."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from numpy.typing import NDArray

from rwkv_jax.config import ModelConfig
from rwkv_jax.models.state import State
from rwkv_jax.training.loss import sum_losses
from rwkv_jax.weights.official import check_tensors, place_params, read_config
from tests.golden import AS_USERS, QUICK, assert_close, load_golden, relative_error
from tests.models.parameters import merge, to_official
from tests.models.states import from_golden, to_golden

CONFIGS = {
    "v4": ModelConfig("4", vocab_size=97, num_layers=2, width=128, ffn_width=192),
    "v5": ModelConfig("5.2", vocab_size=97, num_layers=2, width=128, ffn_width=192),
    "v6": ModelConfig("6", vocab_size=97, num_layers=2, width=128, ffn_width=192, mix_rank=32, decay_rank=64),
    "v7": ModelConfig(
        "7",
        vocab_size=97,
        num_layers=3,
        width=128,
        ffn_width=160,
        decay_rank=32,
        iclr_rank=24,
        value_rank=16,
        gate_rank=40,
        unused_value_residual=True,
    ),
}
"""What the README says of each file."""

LONGEST, ROWS = 257, 2
FLOAT32_LOGITS = {"v4": 3e-5, "v5": 3e-5, "v6": 3e-5, "v7": 1e-4}

every_model = pytest.mark.parametrize("name", CONFIGS)


def golden(name: str) -> dict[str, NDArray]:
    return load_golden(f"random/{name}_s0.npz")


def weights_of(name: str) -> dict[str, NDArray]:
    return {key.removeprefix("w."): x for key, x in golden(name).items() if key.startswith("w.")}


@functools.cache
def model_of(name: str, dtype: Any) -> tuple[ModelConfig, Any]:
    config = dataclasses.replace(CONFIGS[name], dtype=dtype)
    return config, jax.device_get(place_params(weights_of(name), config, dtype=dtype))


class Result(NamedTuple):
    """Of one text or several of one length."""

    logits: NDArray
    state: State
    loss: NDArray
    gradients: Any
    state_gradients: State


@functools.cache
def program(config: ModelConfig) -> Callable[..., Any]:
    """Compiled (params, state, tokens, targets, mask, lengths) -> (loss, (logits, state)), (gradients, of the state).

    One program for every length up to the longest: tokens behind a row's end count for nothing.
    """

    def loss(params: Any, state: State, tokens: Array, targets: Array, mask: Array, lengths: Array) -> Any:
        logits, final = merge(config, params)(tokens, state, lengths=lengths)
        total = sum_losses(lambda x: x, logits, targets, mask)
        return total.nll / total.count, (logits, final)

    options = QUICK if config.dtype == "float64" else AS_USERS
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), compiler_options=options)


def run(name: str, dtype: str, tokens: NDArray, targets: NDArray | None = None, state: State | None = None) -> Result:
    """Everything about tokens [B, T], B up to ROWS."""
    config, params = model_of(name, dtype)
    rows, length = tokens.shape
    fill = ((0, ROWS - rows), (0, LONGEST - length))
    mask = np.pad(np.ones(tokens.shape, np.float32), fill)
    lengths = np.pad(np.full(rows, length, np.int32), fill[0])
    inputs = [np.pad(x.astype(np.int32), fill) for x in (tokens, tokens if targets is None else targets)]
    empty = merge(config, params).initial_state(ROWS)
    if state is not None:
        empty = jax.tree.map(lambda zeros, own: zeros.at[:, :1].set(own), empty, state)
    answer = jax.device_get(program(config)(params, empty, *inputs, mask, lengths))
    (loss, (logits, final)), (gradients, state_gradients) = answer
    final, state_gradients = (jax.tree.map(lambda x: x[:, :1], z) for z in (final, state_gradients))
    return Result(logits[:rows, :length], final, loss, gradients, state_gradients)


@functools.cache
def run_length(name: str, dtype: str, length: int) -> Result:
    return run(name, dtype, golden(name)[f"tokens_T{length}"], golden(name).get(f"targets_T{length}"))


def check_state(name: str, state: State, prefix: str, bound: float) -> None:
    layers = range(CONFIGS[name].num_layers)
    expected = {
        f"L{layer}.{key}": golden(name)[f"{prefix}.L{layer}.{key}"]
        for layer in layers
        for key in to_golden(CONFIGS[name], state, layer)
    }
    ours = {f"L{layer}.{key}": x for layer in layers for key, x in to_golden(CONFIGS[name], state, layer).items()}
    if CONFIGS[name].generation == "4":
        # Numerator and denominator may be held relative to any exponent.
        ours, expected = _without_exponent(ours), _without_exponent(expected)
    assert_close(ours, expected, bound)


def _without_exponent(states: dict[str, NDArray]) -> dict[str, NDArray]:
    out = {key: x for key, x in states.items() if key.endswith("_x")}
    for key in states.keys() - out.keys():
        layer, name = key.split(".")
        if name != "pp":
            out[key] = states[key] * np.exp(states[f"{layer}.pp"].astype(np.float64))
    return out


def probed(name: str, kind: str, gradient: NDArray) -> Any:
    """What a golden key of this kind holds of a gradient: all of it, products with random vectors, or its norm."""
    if kind == "grad":
        return gradient
    matrix = gradient.reshape(-1, gradient.shape[-1]).astype(np.float64)
    rows, columns = matrix.shape
    if kind == "gradR":
        return matrix @ np.stack([golden(name)[f"probe.{columns}.{j}"] for j in (0, 1)], axis=1)
    if kind == "gradL":
        return np.stack([golden(name)[f"probe.{rows}.{j}"] for j in (2, 3)]) @ matrix
    return np.linalg.norm(matrix)


def check_gradients(name: str, gradients: Any, length: int, bound: float) -> None:
    ours = to_official(CONFIGS[name], gradients)
    seen, kinds = set(), set()
    for key, expected in golden(name).items():
        kind, separator, parameter = key.partition(f"_T{length}.")
        if separator and kind.startswith("grad"):
            assert relative_error(probed(name, kind, ours[parameter]), expected) <= bound, key
            seen.add(parameter)
            kinds.add(kind)
    assert kinds == {"grad", "gradR", "gradL", "gradN"}
    # What has no key has no gradient: what nothing reads.
    unseen = {parameter: ours[parameter] for parameter in ours.keys() - seen}
    assert unseen.keys() == ({f"blocks.0.att.v{i}" for i in (0, 1, 2)} if name == "v7" else set())
    assert not any(np.any(x) for x in unseen.values())
    norm = np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in ours.values()))
    assert relative_error(norm, golden(name)[f"gradnorm_T{length}"]) <= bound


@every_model
def test_names_and_shapes_say_which_model_it_is(name: str) -> None:
    weights = weights_of(name)
    assert read_config(weights) == CONFIGS[name]
    check_tensors(weights, CONFIGS[name])


@every_model
@pytest.mark.parametrize(
    "length",
    [pytest.param(n, marks=() if n in (1, 17, 100) else pytest.mark.long) for n in (1, 2, 15, 16, 17, 64, 100)],
)
def test_logits_and_states(float64: None, name: str, length: int) -> None:
    result = run_length(name, "float64", length)
    assert result.logits.dtype == np.float64
    np.testing.assert_allclose(result.logits, golden(name)[f"logits_T{length}"], rtol=0, atol=1e-10)
    if f"state_T{length}.L0.att_x" in golden(name):
        check_state(name, result.state, f"state_T{length}", 1e-11)


@every_model
def test_a_long_sequence(float64: None, name: str) -> None:
    tokens, positions = golden(name)["tokens_T257"], golden(name)["pos_T257"]
    result = run_length(name, "float64", 257)
    np.testing.assert_allclose(result.logits[:, positions], golden(name)["logits_T257"], rtol=0, atol=1e-10)
    nll = -jax.nn.log_softmax(jnp.asarray(result.logits[0, :-1]))[np.arange(256), tokens[0, 1:]]
    np.testing.assert_allclose(nll, golden(name)["nll_T257"], rtol=0, atol=1e-10)
    check_state(name, result.state, "state_T257", 1e-11)


@every_model
@pytest.mark.parametrize("length", [17, 100])
def test_loss_and_gradients(float64: None, name: str, length: int) -> None:
    result = run_length(name, "float64", length)
    assert relative_error(result.loss, golden(name)[f"loss_T{length}"]) < 1e-12
    check_gradients(name, result.gradients, length, 1e-9)


@every_model
def test_from_a_state_that_is_not_empty(float64: None, name: str) -> None:
    numbers = golden(name)
    config = dataclasses.replace(CONFIGS[name], dtype="float64")
    result = run(name, "float64", numbers["st_tokens"], numbers["st_targets"], from_golden(config, numbers, "st_init"))
    np.testing.assert_allclose(result.logits[0], numbers["st_logits"], rtol=0, atol=1e-10)
    check_state(name, result.state, "st_final", 1e-11)
    assert relative_error(result.loss, numbers["st_loss"]) < 1e-12
    for layer in range(config.num_layers):
        gradients = to_golden(config, result.state_gradients, layer)
        expected = {key: numbers[f"st_grad.L{layer}.{key}"] for key in gradients}
        # The reference's own are finite differences.
        assert_close(gradients, expected, 1e-7)


@pytest.mark.long
@every_model
def test_float32_logits_and_states(name: str) -> None:
    result = run_length(name, "float32", 257)
    ours, expected = result.logits[:, golden(name)["pos_T257"]], golden(name)["logits_T257"]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=FLOAT32_LOGITS[name])
    check_state(name, result.state, "state_T257", 2e-5)


@pytest.mark.long
@every_model
def test_float32_loss_and_gradients(name: str) -> None:
    result = run_length(name, "float32", 100)
    assert relative_error(result.loss, golden(name)["loss_T100"]) < 1e-6
    check_gradients(name, result.gradients, 100, 1e-4)
