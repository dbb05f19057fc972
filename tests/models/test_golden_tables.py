"""RWKV-7a and 7b of random weights against the official inference code; tests/golden/README.md explains the keys."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.typing import NDArray

from rwkv_jax.config import ModelConfig
from rwkv_jax.weights.layouts import from_layout
from rwkv_jax.weights.official import check_tensors, place_params, read_config
from rwkv_jax.weights.safetensors import read_safetensors
from rwkv_jax.weights.tensors import WeightsError
from tests.golden import AS_USERS, GOLDEN_DIR, QUICK, load_golden, relative_error
from tests.models.parameters import merge, to_official
from tests.weights.files import assert_same_bits

_RANKS = dict.fromkeys(("decay_rank", "iclr_rank", "value_rank", "gate_rank", "deep_embed_rank"), 32)
CONFIGS = {
    "v7a": ModelConfig(
        "7a",
        vocab_size=64,
        num_layers=2,
        width=128,
        ffn_width=192,
        dtype="bfloat16",
        unused_value_residual=True,
        **_RANKS,
    ),
    "v7b": ModelConfig(
        "7b",
        vocab_size=64,
        num_layers=2,
        width=128,
        ffn_width=192,
        dtype="bfloat16",
        unused_value_residual=True,
        dea_width=256,
        dea_rank=32,
        **_RANKS,
    ),
}
"""Of the one file of weights, whose tensors of attention are RWKV-7b's alone."""

every_model = pytest.mark.parametrize("name", CONFIGS)


def golden(name: str) -> dict[str, NDArray]:
    return load_golden(f"random/{name}_s0.npz")


@functools.cache
def weights_of(name: str) -> dict[str, NDArray]:
    weights = read_safetensors(GOLDEN_DIR / "random" / "v7ab_s0.safetensors")
    return {key: np.asarray(x) for key, x in weights.items() if name == "v7b" or ".qkv." not in key}


@functools.cache
def run(name: str, dtype: Any) -> tuple[NDArray, NDArray, dict[str, NDArray]]:
    """Logits [T, V], the loss, and its gradients by official names."""
    config = dataclasses.replace(read_config(weights_of(name)), dtype=dtype)
    tokens, labels = (jnp.asarray(golden(name)[key])[None] for key in ("tokens", "labels"))

    def loss(params: Any) -> Any:
        logits, _ = merge(config, params)(tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits[0]

    params = place_params(weights_of(name), config, dtype=dtype)
    options = QUICK if dtype == "float64" else AS_USERS
    program = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=options)
    (value, logits), gradients = jax.device_get(program(params))
    return logits, value, to_official(config, gradients)


def probed(name: str, kind: str, gradient: NDArray) -> Any:
    """What a golden key of this kind holds of a gradient."""
    if kind == "grad":
        return gradient
    rows, columns = gradient.shape
    if kind == "gradR":
        return gradient @ np.stack([golden(name)[f"probe.{columns}.{j}"] for j in (0, 1)], axis=1)
    if kind == "gradL":
        return np.stack([golden(name)[f"probe.{rows}.{j}"] for j in (2, 3)]) @ gradient
    return np.linalg.norm(gradient)


@every_model
def test_names_and_shapes_say_which_model_it_is(name: str) -> None:
    config = read_config(weights_of(name))
    assert config == CONFIGS[name]
    check_tensors(weights_of(name), config)


@every_model
def test_vectors_of_one_axis_are_read(name: str) -> None:
    weights = weights_of(name)
    flat = {key: x.reshape(-1) if key.endswith("ffn.s0") or ".qkv.x_" in key else x for key, x in weights.items()}
    said: list[str] = []
    layout, found = from_layout(flat, report=said.append)
    assert layout == "official"
    assert_same_bits(dict(found), weights)
    (line,) = said
    assert re.search(r"^blocks\.0\.ffn\.s0.*: of one axis, read as \[1, 1, C\], and so written$", line)
    # Others of one axis are not: such files are other people's.
    with pytest.raises(WeightsError, match=r"misshapen +blocks\.0\.att\.w0 is \[128\], must be \[1, 1, 128\]"):
        check_tensors(
            from_layout(weights | {"blocks.0.att.w0": weights["blocks.0.att.w0"].reshape(-1)})[1], CONFIGS[name]
        )


@every_model
def test_logits(float64: None, name: str) -> None:
    np.testing.assert_allclose(run(name, "float64")[0], golden(name)["logits"], rtol=0, atol=1e-10)


@every_model
def test_logits_of_a_text_in_calls(float64: None, name: str) -> None:
    config = dataclasses.replace(read_config(weights_of(name)), dtype="float64")
    params = place_params(weights_of(name), config, dtype="float64")
    call = jax.jit(lambda params, *arguments: merge(config, params)(*arguments), compiler_options=QUICK)
    tokens, state, logits = jnp.asarray(golden(name)["tokens"])[None], merge(config, params).initial_state(1), []
    for begin, end in itertools.pairwise((0, 9, 18, 19)):
        of_call, state = call(params, tokens[:, begin:end], state)
        logits.append(of_call)
    np.testing.assert_allclose(jnp.concatenate(logits, axis=1)[0], golden(name)["logits"], rtol=0, atol=1e-10)


@every_model
def test_loss_and_gradients_of_tables_and_attention(float64: None, name: str) -> None:
    _, loss, gradients = run(name, "float64")
    assert relative_error(loss, golden(name)["loss"]) < 1e-12
    kinds = set()
    for key, expected in golden(name).items():
        kind, _, parameter = key.partition(".")
        if kind.startswith("grad"):
            assert relative_error(probed(name, kind, gradients[parameter]), expected) <= 1e-9, key
            kinds.add(kind)
    assert kinds == {"grad", "gradR", "gradL", "gradN"}


@pytest.mark.long
@every_model
def test_float32_logits(name: str) -> None:
    logits, _, _ = run(name, "float32")
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, golden(name)["logits"], rtol=0, atol=1e-4)
