"""The digest that says of which model a state is: over all parameters by official names, wherever they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax.config import ModelConfig
from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.inference.state.state_file import model_identity, parameters_digest
from rwkv_jax.models.decoding import unstacked
from tests.fake_devices import run_on_fake_devices
from tests.inference.small_identities import SEVEN, SINGLE, identity_of, model_of, params_of
from tests.models.parameters import SMALL, random_params, to_official


def _by_definition(params: Any, config: ModelConfig) -> str:
    lines = []
    for name, x in sorted(to_official(config, params).items()):
        content = hashlib.sha256(x.tobytes()).hexdigest()
        lines.append(f"{name} {list(x.shape)} {x.dtype} {content}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


@pytest.mark.parametrize("generation", ["4", "7"])
def test_the_digest_is_over_official_names(generation: str) -> None:
    config = SINGLE[generation]
    expected = _by_definition(params_of(config), config)
    assert identity_of(config).model == expected
    assert model_identity(unstacked(model_of(config)), ByteTokenizer()) == identity_of(config)


def test_the_digest_does_not_depend_on_devices() -> None:
    report = run_on_fake_devices(4, "tests.inference.digested")
    assert report["devices"] == 4
    assert report["split"] > 4
    assert len(set(report["digests"])) == 1
    assert report["kept on the host"] == 0


def test_the_digest_of_float64_is_of_float64() -> None:
    params = params_of(SMALL["4"])
    expected = _by_definition(params, SMALL["4"])
    with jax.enable_x64(True):
        placed = jax.tree.map(jnp.asarray, params)
    assert parameters_digest(placed) == expected  # while JAX has it switched off
    assert parameters_digest(params) == expected


@pytest.mark.parametrize("place", range(0, len(jax.tree.leaves(random_params(SEVEN))), 5))
def test_every_number_counts(place: int) -> None:
    leaves, structure = jax.tree.flatten(params_of(SEVEN))
    changed = leaves[place].copy()
    changed.reshape(-1)[-1] += 1
    assert parameters_digest(structure.unflatten([*leaves[:place], changed, *leaves[place + 1 :]])) != (
        identity_of(SEVEN).model
    )


def _change_dtype(params: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32).view(np.int32), params)


def _swap_layers(params: Any) -> Any:
    return params | {"blocks": jax.tree.map(lambda x: x[::-1], params["blocks"])}


@pytest.mark.parametrize("change", [_change_dtype, _swap_layers])
def test_dtypes_and_the_order_of_layers_count(change: Callable[[Any], Any]) -> None:
    assert parameters_digest(change(params_of(SEVEN))) != identity_of(SEVEN).model


def test_packed_parameters_have_digests_too() -> None:
    packed = {"integers": np.ones((2, 3, 4), np.int8), "scales": np.ones((2, 3), np.float32)}
    stacked = {"head": {"weight": {"integers": np.ones((5, 4), np.int8)}}, "blocks": {"att": {"key": packed}}}
    layers = {i: {"att": {"key": jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), packed)}} for i in range(2)}
    digest = parameters_digest(stacked)
    assert parameters_digest(stacked | {"blocks": layers}) == digest
    packed["scales"][1, 2] = 2
    assert parameters_digest(stacked) != digest
