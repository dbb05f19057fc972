"""The files of a Transformer's states: a cache says how many tokens it holds, and must say what the file says."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file

from rwkv_jax.config import ModelConfig
from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.inference.state.snapshot import Snapshot, StateError
from rwkv_jax.inference.state.state_file import Identity, checksums, load_snapshot, model_identity, save_snapshot
from rwkv_jax.weights.safetensors import write_safetensors
from tests.inference.models import CONFIGS, random_model
from tests.inference.operations import assert_identical

TRANSFORMER = ModelConfig(
    architecture="transformer", vocab_size=41, num_layers=2, width=16, head_dim=8, context_length=24
)


@functools.cache
def _identity(config: ModelConfig = TRANSFORMER) -> Identity:
    return model_identity(random_model(config), ByteTokenizer())


def _snapshot(num_tokens: int) -> Snapshot:
    """Random numbers in the form of a state after so many tokens."""
    rng = np.random.default_rng(num_tokens)

    def draw(like: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(rng.standard_normal(like.shape), like.dtype)

    state = jax.tree.map(draw, _identity().state)
    state = tuple(layer._replace(position=jnp.int32(num_tokens)) for layer in state)
    return Snapshot(state, draw(_identity().logits), num_tokens)


def _like(true: Path, path: Path, tensors: dict[str, NDArray], **metadata: str) -> None:
    """Writes a file of other tensors, with the metadata of the true one but for some, and checksums that are right."""
    with safe_open(true, framework="numpy") as file:
        changed = file.metadata() | metadata
    write_safetensors(path, tensors, changed | {"checksums": checksums(tensors, changed)})


@pytest.mark.parametrize("num_tokens", [1, 24])
def test_caches_come_back_bit_for_bit(tmp_path: Path, num_tokens: int) -> None:
    save_snapshot(tmp_path / "x", _snapshot(num_tokens), _identity())
    assert_identical(load_snapshot(tmp_path / "x", _identity()), _snapshot(num_tokens))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("position", [0, -5, 16, 18, 10**9, -(2**31)])
def test_caches_of_another_number_of_tokens_are_refused(tmp_path: Path, layer: int, position: int) -> None:
    snapshot, true = _snapshot(17), tmp_path / "true"
    save_snapshot(true, snapshot, _identity())
    name = f"blocks.{layer}.position"
    _like(true, tmp_path / "x", load_file(true) | {name: np.array(position, np.int32)})
    message = f"the tensor '{name}' is {position} after num_tokens = 17, and must be the same; go back"
    with pytest.raises(StateError, match=f"^{tmp_path / 'x'}: {message}"):
        load_snapshot(tmp_path / "x", _identity())
    state = list(snapshot.state)
    state[layer] = state[layer]._replace(position=jnp.int32(position))
    with pytest.raises(StateError, match=message):
        save_snapshot(tmp_path / "y", dataclasses.replace(snapshot, state=tuple(state)), _identity())
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize("num_tokens", [1, 16, 25, 10**17])
def test_a_number_of_tokens_that_is_not_the_caches_is_refused(tmp_path: Path, num_tokens: int) -> None:
    true = tmp_path / "true"
    save_snapshot(true, _snapshot(17), _identity())
    _like(true, tmp_path / "x", load_file(true), num_tokens=str(num_tokens))
    with pytest.raises(StateError, match=f"num_tokens = {num_tokens}"):
        load_snapshot(tmp_path / "x", _identity())


def test_more_tokens_than_a_cache_holds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="num_tokens = 25: a state of this model holds 24; go back to an earlier"):
        save_snapshot(tmp_path / "x", _snapshot(25), _identity())
    assert not list(tmp_path.iterdir())


def test_only_caches_have_a_limit() -> None:
    assert _identity().capacity == 24
    assert _identity(CONFIGS["7"]).capacity is None
