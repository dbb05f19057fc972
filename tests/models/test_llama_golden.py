"""Llamas and Qwens of random weights give the numbers that transformers gives (tests/golden/llama/README.md)."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from numpy.typing import NDArray

from rwkv_jax.config import ModelConfig
from rwkv_jax.models.llama import stretched_frequencies
from rwkv_jax.models.transformer import rotary_frequencies
from rwkv_jax.training.loss import token_losses
from rwkv_jax.weights.hugging_face import read_hub_config
from rwkv_jax.weights.layout_rules import LLAMA_RULES
from rwkv_jax.weights.layouts import from_layout
from rwkv_jax.weights.official import check_tensors, official_names, official_shapes, place_params
from tests.golden import AS_USERS, GOLDEN_DIR, QUICK, assert_close, load_golden, relative_error
from tests.models.parameters import abstract, merge

CASES = ("llama2", "llama2_tied", "llama3", "qwen2", "qwen3", "qwen3_untied")
each_case = pytest.mark.parametrize("case", CASES)


def config_of(case: str, dtype: Any) -> ModelConfig:
    config = read_hub_config(GOLDEN_DIR / "llama" / f"{case}.json")
    assert config is not None
    return dataclasses.replace(config, dtype=dtype)


def draw(name: str, shape: tuple[int, ...]) -> NDArray:
    """As `llama_oracle.draw`."""
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if "norm" in name:
        x = 1 + 0.2 * x
    elif name.endswith("weight"):
        x = x / np.sqrt(shape[-1])
    return x.astype(np.float32)


@functools.cache
def tensors_of(case: str) -> Mapping[str, NDArray]:
    """The model's tensors under our names."""
    config = config_of(case, "float32")
    theirs = {name: draw(name, shape) for name, shape in hub_shapes(config).items()}
    layout, tensors = from_layout(theirs, tied=config.tied_head)
    assert layout == "llama"
    check_tensors(tensors, config)
    return tensors


def hub_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a model's tensors in transformers."""
    rules = {official: rule.foreign for rule in LLAMA_RULES for official in rule.official}
    found = {}
    for name, shape in official_shapes(config).items():
        *block, within = name.split(".", 2) if name.startswith("blocks.") else (name,)
        foreign = rules[f"blocks.{{}}.{within}" if block else name]
        found[foreign.format(block[1] if block else "")] = shape
    return found


def params_of(case: str, config: ModelConfig) -> Any:
    return jax.device_get(place_params(tensors_of(case), config, dtype=config.dtype))


@functools.cache
def program(config: ModelConfig) -> Any:
    """(params, tokens) -> logits, streams of all layers, after the last norm."""

    def run(params: Any, tokens: Array) -> tuple[Array, Array, Array]:
        model = merge(config, params)
        streams = model.residual_stream(tokens)[0]
        return model(tokens)[0], streams, model.ln_out(streams[-1])

    return jax.jit(run, compiler_options=QUICK if config.dtype == "float64" else AS_USERS)


@each_case
def test_logits_and_hidden_states_are_theirs(float64: None, case: str) -> None:
    golden = load_golden(f"llama/{case}.npz")
    config = config_of(case, "float64")
    logits, streams, last = program(config)(params_of(case, config), golden["tokens"])
    assert relative_error(logits, golden["logits"]) < 1e-12
    assert relative_error(jnp.concatenate([streams[:-1, 0], last[None, 0]]), golden["hidden"]) < 1e-12


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in ("llama3", "qwen3") else pytest.mark.long) for case in CASES]
)
def test_logits_in_float32_are_theirs(case: str) -> None:
    golden = load_golden(f"llama/{case}.npz")
    config = config_of(case, "float32")
    logits, _, _ = program(config)(params_of(case, config), golden["tokens"])
    for name in ("logits", "logits_float32"):
        np.testing.assert_allclose(logits, golden[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["llama3", "qwen2", "qwen3"])
def test_gradients_are_theirs(float64: None, case: str) -> None:
    golden = load_golden(f"llama/{case}.npz")
    config, tokens = config_of(case, "float64"), jnp.asarray(golden["tokens"])

    def loss(params: Any) -> Array:
        logits = merge(config, params)(tokens)[0][:, :-1]
        return jnp.mean(token_losses(logits.reshape(-1, config.vocab_size), tokens[:, 1:].reshape(-1), None)[0])

    found, gradients = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(params_of(case, config))
    assert found == pytest.approx(float(golden["loss"]), rel=1e-12)
    theirs = {name.removeprefix("grad."): x for name, x in golden.items() if name.startswith("grad.")}
    _, expected = from_layout(theirs, tied=config.tied_head)
    ours = {}
    for path, x in jax.tree.leaves_with_path(gradients):
        names = official_names(path, config.num_layers)
        ours |= dict(zip(names, x if path[0].key == "blocks" else [x], strict=True))
    assert_close(ours, dict(expected), 1e-6)


def test_some_wavelengths_are_stretched_in_part() -> None:
    """All three branches of Llama 3's rule are in the numbers above."""
    config = config_of("llama3", "float32")
    ratio = rotary_frequencies(8, 5e5) / stretched_frequencies(config)
    np.testing.assert_allclose(ratio[[0, 2, 3]], [1, 8, 8])
    assert 1.2 < ratio[1] < 7


def test_parameters_and_shapes() -> None:
    for case in CASES:
        config = config_of(case, "float32")
        assert sum(x.size for x in jax.tree.leaves(abstract(config)[1])) == config.num_parameters()
