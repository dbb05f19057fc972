"""A state of another generation or model is refused, also where its arrays have the right shapes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from rwkv_jax.models import LanguageModel, model_type, rwkv4, rwkv5, rwkv6, rwkv7
from rwkv_jax.models.decoding import unstacked
from tests.models.parameters import SMALL
from tests.models.small_models import FLOAT32, small_float32

TOKENS = jnp.zeros((2, 3), jnp.int32)
FAMILIES = {"4": rwkv4, "5.0": rwkv5, "5.1": rwkv5, "5.2": rwkv5, "6": rwkv6, "7": rwkv7, "7a": rwkv7}
MATRIX_STATES = [name for name in SMALL if name in FAMILIES and name != "4"]


every_pair = pytest.mark.parametrize(("own", "other"), list(itertools.permutations(MATRIX_STATES, 2)))


@functools.cache
def layers_apart(generation: str) -> LanguageModel:
    return unstacked(small_float32(generation))


@every_pair
def test_models_refuse_states_of_other_generations(own: str, other: str) -> None:
    for build in (small_float32, layers_apart):
        model, state = build(own), build(other).initial_state(2)
        pairs = zip(jax.tree.leaves(state), jax.tree.leaves(model.initial_state(2)), strict=True)
        assert all(one.shape == like.shape for one, like in pairs)
        expected = (
            rf"state: is none of RWKV-{own}, whose .* model\.initial_state\(batch_size=2\); it is one of RWKV-{other}$"
        )
        with pytest.raises(ValueError, match=expected):
            model(TOKENS, state)


@every_pair
def test_layers_refuse_states_of_other_generations(own: str, other: str) -> None:
    layer = nnx.eval_shape(lambda: FAMILIES[own].TimeMix(FLOAT32[own], 1, rngs=nnx.Rngs(0)))
    state = model_type(FLOAT32[other]).initial_block_state(FLOAT32[other], 2).time_mix
    with pytest.raises(ValueError, match=rf"state: is none of this layer, .*; it is one of RWKV-{other}$"):
        layer(jnp.zeros((2, 3, 32)), state)
    with pytest.raises(ValueError, match=r"state\.shift: shape \(2, 32\) must be \(3, 32\)"):
        layer(jnp.zeros((3, 3, 32)), dataclasses.replace(state, generation=own))


def test_a_state_keeps_its_generation_through_transformations() -> None:
    model = small_float32("6")
    graphdef, params = nnx.split(model)
    state = model.initial_state(2)
    found: list[Any] = [
        jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state))(state),
        jax.lax.scan(lambda carry, _: (carry, None), state, length=2)[0],
        jax.device_get(state),
        jax.eval_shape(lambda params: nnx.merge(graphdef, params)(TOKENS, state)[1], params),
        *unstacked(model).initial_state(2),
    ]
    assert {state.generation for state in found} == {"6"}


def test_block_is_a_layer_in_either_form() -> None:
    model = small_float32("7")
    apart: LanguageModel = unstacked(model)
    for layer in range(3):
        for one, other in zip(
            *(jax.tree.leaves(nnx.state(each.block(layer), nnx.Param)) for each in (model, apart)), strict=True
        ):
            assert one.shape == other.shape
            assert (one == other).all()
    assert model.block(0) is model.first_block
    assert apart.block(2) is apart.blocks[1]
    for layer in (-1, 3):
        with pytest.raises(IndexError, match=rf"layer {layer}: must lie from 0 to L - 1 = 2"):
            model.block(layer)
