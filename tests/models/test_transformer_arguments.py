"""What a Transformer refuses: texts beyond the room of a state, states of others, files that it cannot be."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rwkv_jax import save_pretrained
from rwkv_jax.config import ConfigError
from rwkv_jax.models import Transformer
from rwkv_jax.models.context import MeshAxes, SequenceContext
from rwkv_jax.models.state import State
from rwkv_jax.models.transformer import Attention
from rwkv_jax.weights.tensors import WeightsError
from tests.models.parameters import initial_params, merge, random_params
from tests.models.small_transformers import FLOAT32, SMALL, TOKENS, alone, empty_state, program, run, small_float32

NO_ROOM = r"model\.context_length = 24: the state has no room for 2 of the tokens of row 1; make it larger, or read"


def test_more_tokens_than_a_state_has_room_for_are_refused() -> None:
    model = small_float32()
    with pytest.raises(
        ConfigError, match=r"model\.context_length = 24: a state has no room for T = 25 tokens; make it"
    ):
        model(jnp.zeros((1, 25), jnp.int32))
    tokens = jnp.zeros((2, 20), jnp.int32)
    _, state = program(FLOAT32)(initial_params(FLOAT32), tokens, model.initial_state(2), None, jnp.array([20, 6]))
    _, full = program(FLOAT32)(initial_params(FLOAT32), tokens, state, None, jnp.array([4, 18]))
    _, beyond = program(FLOAT32)(initial_params(FLOAT32), tokens, state, None, jnp.array([0, 20]))
    model.check_room(full)
    with pytest.raises(ConfigError, match=NO_ROOM):
        model.check_room(beyond)


@pytest.mark.long  # without jit every operation is compiled by itself
def test_a_call_outside_jit_refuses_what_does_not_fit() -> None:
    model = small_float32()
    tokens = jnp.zeros((2, 13), jnp.int32)
    _, state = model(tokens)
    _, full = model(tokens, state, lengths=[0, 11])
    np.testing.assert_array_equal(model.room(full), [11, 0])
    with pytest.raises(ConfigError, match=NO_ROOM):
        model(tokens, state, lengths=[11, 13])


def test_under_jit_what_does_not_fit_is_forgotten_and_told(float64: None) -> None:
    _, state = run(TOKENS, empty_state(), None, [20, 1, 0, 4])
    _, state = run(TOKENS, state, None, [5, 20, 20, 20])
    model = merge(SMALL, random_params(SMALL))
    assert isinstance(model, Transformer)
    np.testing.assert_array_equal(model.room(state), [-1, 3, 4, 0])
    _, expected = alone(np.concatenate([TOKENS[0], TOKENS[0, :4]]))
    for x, y in zip((state.keys, state.values), (expected.keys, expected.values), strict=True):
        np.testing.assert_allclose(x[:, 0], y[:, 0], rtol=0, atol=1e-11)


def test_time_that_is_split_is_refused() -> None:
    attention = Attention(FLOAT32, rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match=r"axes\.sequence = 'time': a Transformer's attention is not split over time"):
        attention.mix(jnp.zeros((1, 2, 32)), state=None, context=SequenceContext(axes=MeshAxes(sequence="time")))


def test_a_state_of_another_kind_is_refused() -> None:
    model = small_float32()
    shift = jnp.zeros((2, 1, 32))
    with pytest.raises(ValueError, match=r"state: is none of Transformer, whose states have the form of"):
        model(jnp.zeros((1, 2), jnp.int32), State(shift, shift, jnp.zeros((2, 1, 4, 8, 8)), generation="7"))
    with pytest.raises(ValueError, match=r"state\.keys: shape \(2, 3, 4, 24, 8\) must be \(2, 1, 4, 24, 8\)"):
        model(jnp.zeros((1, 2), jnp.int32), model.initial_state(3))


def test_its_weights_have_no_official_names(tmp_path: Path) -> None:
    with pytest.raises(
        WeightsError, match=r"model\.architecture = 'transformer': only RWKV's weights have official names"
    ):
        save_pretrained(small_float32(), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())
