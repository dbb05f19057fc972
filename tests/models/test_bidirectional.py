"""Bidirectional models: both directions, rows of their own lengths, packing, and what has no second direction."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rwkv_jax.config import ConfigError, ModelConfig
from rwkv_jax.models import model_type
from rwkv_jax.models.bidirectional import (
    BACKWARD,
    BidirectionalState,
    Join,
    bidirectional_type,
    mean_over_rows,
    reverse_rows,
)
from rwkv_jax.models.context import MeshAxes, SequenceContext
from rwkv_jax.models.state import State

GENERATIONS = ("4", "5.2", "6", "7")


def config_of(generation: str) -> ModelConfig:
    return ModelConfig(
        generation=generation, vocab_size=11, num_layers=3, width=16, head_dim=4, ffn_width=24, dtype="float64"
    )


def model_of(generation: str, join: Join = "sum", **options: Any) -> Any:
    """A model with no zeros among its parameters."""
    config = config_of(generation)
    model = bidirectional_type(config, join)(config, rngs=nnx.Rngs(0), **options)
    graphdef, params = nnx.split(model, nnx.Param)
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    drawn = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape, x.dtype), params)
    return nnx.merge(graphdef, drawn)


TOKENS = np.random.default_rng(0).integers(1, 11, (2, 7))


@pytest.fixture(autouse=True)
def _float64() -> Any:
    with jax.enable_x64(True):
        yield


def test_reversing_keeps_what_is_beyond_a_row() -> None:
    x = jnp.arange(10).reshape(2, 5)
    np.testing.assert_array_equal(reverse_rows(x, None), [[4, 3, 2, 1, 0], [9, 8, 7, 6, 5]])
    np.testing.assert_array_equal(reverse_rows(x, jnp.array([2, 0])), [[1, 0, 2, 3, 4], [5, 6, 7, 8, 9]])


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_block_is_its_generation_read_both_ways(generation: str) -> None:
    """Against the generation's own block, which reads the row, and the row in reverse with the second mixer."""
    model = model_of(generation, has_head=False)
    block, config = model.block(1), model.config
    x = jax.random.normal(jax.random.key(2), (2, 7, config.width), jnp.float64)
    v_first = jax.random.normal(jax.random.key(3), (2, *x.shape), jnp.float64)
    state = jax.tree.map(lambda s: s[0], model.initial_state(2))
    context = SequenceContext()
    found = block(x=x, state=state, v_first=(v_first[0], v_first[1]), context=context)

    plain, y = model_type(config).block_type, block.ln1(x)
    forward = plain.mix_time(block, y, state=state.backward, v_first=v_first[0], context=context)
    backward = plain.mix_time(
        block, y[:, ::-1], state=state.backward, v_first=v_first[1], context=context, att=getattr(block, BACKWARD)
    )
    mixed = x + forward.y + backward.y[:, ::-1]
    channels = block.ffn.mix(block.ln2(mixed), state=jnp.zeros((2, config.width)), context=context)
    np.testing.assert_allclose(found.x, mixed + channels.y, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.state.backward.shift, y[:, 0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.state.forward.att_shift, y[:, -1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("generation", "join"), [("4", "sum"), ("5.2", "concatenate"), ("6", "sum"), ("7", "concatenate")]
)
def test_rows_do_not_see_beyond_their_text(generation: str, join: Join) -> None:
    model = model_of(generation, join, has_head=False)
    whole = model.hidden(TOKENS).hidden
    by_length = model.hidden(TOKENS, lengths=np.array([7, 4])).hidden
    np.testing.assert_allclose(by_length[0], whole[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(by_length[1, :4], model.hidden(TOKENS[1:, :4]).hidden[0], rtol=0, atol=1e-12)
    packed = model.hidden(TOKENS, segment_ids=np.array([[0, 0, 0, 1, 1, 1, 1]] * 2)).hidden
    np.testing.assert_allclose(packed[:, :3], model.hidden(TOKENS[:, :3]).hidden, rtol=0, atol=1e-12)
    np.testing.assert_allclose(packed[:, 3:], model.hidden(TOKENS[:, 3:]).hidden, rtol=0, atol=1e-12)
    # And every position sees all of it.
    changed = TOKENS.copy()
    changed[:, 6] = changed[:, 6] % 10 + 1
    assert np.all(np.max(np.abs(model.hidden(changed).hidden - whole), axis=-1) > 1e-6)


def test_means_are_over_rows_lengths() -> None:
    x = jnp.arange(12.0).reshape(2, 3, 2)
    np.testing.assert_array_equal(mean_over_rows(x, None), [[2, 3], [8, 9]])
    np.testing.assert_array_equal(mean_over_rows(x, jnp.array([2, 0])), [[1, 2], [0, 0]])


def test_state_is_of_both_directions() -> None:
    model = model_of("7", has_head=False)
    state = model.hidden(TOKENS).state
    assert isinstance(state, BidirectionalState)
    assert isinstance(state.forward, State)
    assert state.forward.wkv.shape == state.backward.wkv.shape == (3, 2, 4, 4, 4)
    assert np.max(np.abs(state.forward.wkv - state.backward.wkv)) > 1e-3


def test_recomputation_changes_no_gradient() -> None:
    model = model_of("7", has_head=False)
    graphdef, params = nnx.split(model, nnx.Param)

    def loss(params: Any, remat: Any) -> Any:
        return jnp.sum(jnp.sin(nnx.merge(graphdef, params).hidden(TOKENS, remat=remat).hidden))

    plain, again = (jax.jit(jax.grad(loss), static_argnums=1)(params, remat) for remat in ("none", "full"))
    for own, other in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-9, atol=1e-12)
        assert np.any(own != 0)


@pytest.mark.parametrize("generation", ["7a", "7b", "8-rosa", "7-rosa"])
def test_what_has_no_second_direction_is_refused(generation: str) -> None:
    config = ModelConfig(generation=generation, vocab_size=11, num_layers=2, width=32, head_dim=8)
    with pytest.raises(ConfigError, match=f"model.generation = '{generation}'.*take 4, 5.2, 6 or 7"):
        bidirectional_type(config)


def test_time_cannot_be_split() -> None:
    model = model_of("7", has_head=False)
    context = SequenceContext(axes=MeshAxes(sequence="time"))
    state = jax.tree.map(lambda s: s[0], model.initial_state(2))
    with pytest.raises(ValueError, match="split rows or heads, not time"):
        model.block(1)(x=jnp.zeros((2, 7, 16)), state=state, v_first=None, context=context)


def test_models_without_embedding_or_head() -> None:
    config = config_of("6")
    whole = model_type(config)(config, rngs=nnx.Rngs(0))
    bare = model_type(config)(config, rngs=nnx.Rngs(0), has_embedding=False, has_head=False)
    assert not hasattr(bare, "emb")
    assert not hasattr(bare, "head")
    tokens = jnp.asarray(TOKENS)
    vectors = whole.emb(tokens)
    assert bare.hidden(None, inputs_embeds=vectors).hidden.shape == (2, 7, 16)
    with pytest.raises(ValueError, match="tokens: the model has no embedding"):
        bare.hidden(tokens)
    with pytest.raises(ValueError, match=r"logits: the model has no head"):
        bare(None, inputs_embeds=vectors)


def test_tensors_are_named_beside_their_forward_ones() -> None:
    config = dataclasses.replace(config_of("7"), dtype="float32")
    kind = bidirectional_type(config)
    assert kind is bidirectional_type(config)
    axes = kind.parameter_axes(("blocks", BACKWARD, "key", "weight"))
    assert axes == model_type(config).parameter_axes(("blocks", "att", "key", "weight"))
