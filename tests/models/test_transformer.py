"""The Transformer: attention and positions against their definitions, its cache, packing, ragged rows."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array
from numpy.typing import NDArray

from rwkv_jax.config import ModelConfig
from rwkv_jax.models import Transformer
from rwkv_jax.models.decoding import unstacked
from rwkv_jax.models.transformer import (
    CACHE_BLOCK,
    MAX_PREFIXES,
    PIECE,
    KeyValueCache,
    attend_to_cache,
    attend_to_call,
    rotate,
    token_positions,
)
from tests.golden import QUICK, relative_error
from tests.models.parameters import in_dtype, merge, random_params
from tests.models.small_transformers import LLAMA, ROWS, SMALL, TIME, TOKENS, alone, empty_state, program, run

each_config = pytest.mark.parametrize("config", [SMALL, LLAMA], ids=lambda config: config.architecture)


def held(state: KeyValueCache, row: int) -> tuple[NDArray, NDArray]:
    """The keys and values of a row that mean something: [L, H, position, N]."""
    positions = np.unique(np.asarray(state.position)[:, row])
    assert positions.size == 1
    keys, values = (np.asarray(x)[:, row, :, : positions[0]] for x in (state.keys, state.values))
    return keys, values


def assert_same_text(state: KeyValueCache, row: int, expected: KeyValueCache, expected_row: int = 0) -> None:
    for x, y in zip(held(state, row), held(expected, expected_row), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-11)


# Definitions


def test_positions_turn_pairs_of_channels_as_complex_numbers(float64: None) -> None:
    rng = np.random.default_rng(1)
    x, positions = rng.standard_normal((2, 5, 3, 8)), rng.integers(0, 100_000, (2, 5))
    theta = 10000.0 ** (-2 * np.arange(4) / 8)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * positions[:, :, None, None] * theta)
    found = rotate(jnp.asarray(x), jnp.asarray(positions, jnp.int32))
    np.testing.assert_allclose(found, np.concatenate([turned.real, turned.imag], axis=-1), rtol=0, atol=1e-10)


def softmax_attention(q: NDArray, k: NDArray, v: NDArray, is_visible: NDArray) -> NDArray:
    """Attention by its definition, of [T, N] to [S, N]."""
    scores = np.where(is_visible, q @ k.T / np.sqrt(q.shape[-1]), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def attention_of_one_text(params: Any, x: NDArray) -> NDArray:
    """The attention layer by its definition, on x [T, C]."""
    heads = []
    turn = np.exp(1j * np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(4) / 4))
    for head in range(4):
        own = slice(8 * head, 8 * head + 8)
        q, k, v = (x @ params[name]["weight"][own].T for name in ("query", "key", "value"))
        q, k = ((z[:, :4] + 1j * z[:, 4:]) * turn for z in (q, k))
        q, k = (np.concatenate([z.real, z.imag], axis=1) for z in (q, k))
        heads.append(softmax_attention(q, k, v, np.tril(np.ones((len(x), len(x)), bool))))
    return np.concatenate(heads, axis=1) @ params["output"]["weight"].T


def test_the_model_is_its_definition(float64: None) -> None:
    params = random_params(SMALL)

    def normalized(x: NDArray, norm: Any) -> NDArray:
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * norm["weight"] + norm[
            "bias"
        ]

    x = params["emb"]["weight"][TOKENS[0]]
    for layer in range(3):
        block = jax.tree.map(lambda leaf: leaf[layer - 1], params["blocks"]) if layer else params["first_block"]  # noqa: B023  used at once
        x = x + attention_of_one_text(block["att"], normalized(x, block["ln1"]))
        hidden = np.maximum(normalized(x, block["ln2"]) @ block["ffn"]["key"]["weight"].T, 0) ** 2
        x = x + hidden @ block["ffn"]["value"]["weight"].T
    expected = normalized(x, params["ln_out"]) @ params["head"]["weight"].T
    np.testing.assert_allclose(run(TOKENS)[0][0], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("time", [PIECE + 1, 3 * PIECE * MAX_PREFIXES - PIECE + 5])
def test_pieces_of_a_long_text_are_one_attention(float64: None, time: int) -> None:
    rng = np.random.default_rng(2)
    q, k, v = rng.standard_normal((3, 1, 1, time, 2))
    segments = np.sort(rng.integers(0, 3, (1, time)), axis=1)
    is_visible = np.tril(segments[0][:, None] == segments[0])
    found = jax.jit(attend_to_call, compiler_options=QUICK)(q, k, v, segments).y[0, 0]
    np.testing.assert_allclose(found, softmax_attention(q[0, 0], k[0, 0], v[0, 0], is_visible), rtol=0, atol=1e-12)


@pytest.mark.parametrize("longest", [0, 1, 256, 257, 599, 600])
def test_of_a_cache_what_it_holds_is_read(float64: None, longest: int) -> None:
    """Block by block, of which the last is not whole."""
    assert 600 % CACHE_BLOCK
    rng = np.random.default_rng(3)
    q = rng.standard_normal((2, 1, 3, 2))
    k, v = rng.standard_normal((2, 2, 1, 600, 2))
    position: Any = np.array([longest, longest // 2], np.int32)
    k[0, 0, longest:] = v[0, 0, longest:] = 1e9  # what an earlier text left there
    segments = np.array([[0, 0, 1], [0, 0, 0]], np.int32)
    found = jax.jit(attend_to_cache, compiler_options=QUICK)(q, KeyValueCache(k, v, position), segments)
    for row, time in np.ndindex(2, 3):
        if position[row] == 0 or segments[row, time]:
            assert found.log_total[row, 0, time] < -1e29
            continue
        own = slice(0, position[row])
        expected = softmax_attention(q[row, 0, time : time + 1], k[row, 0, own], v[row, 0, own], np.array(True))
        np.testing.assert_allclose(found.y[row, 0, time], expected[0], rtol=0, atol=1e-12)


# State
@each_config
def test_prefill_and_decoding_are_the_whole_text(float64: None, config: ModelConfig) -> None:
    expected, end = run(TOKENS, config=config)
    logits, state = run(TOKENS, empty_state(config), None, [11] * ROWS, config=config)
    np.testing.assert_allclose(logits[:, :11], expected[:, :11], rtol=0, atol=1e-11)
    for step in range(11, TIME):
        one, state = run(TOKENS[:, step : step + 1], state, config=config)
        np.testing.assert_allclose(one[:, 0], expected[:, step], rtol=0, atol=1e-11)
    for row in range(ROWS):
        assert_same_text(state, row, end, row)


@each_config
def test_rows_at_positions_of_their_own_are_each_alone(float64: None, config: ModelConfig) -> None:
    first, second = [7, 0, 12, 3], [2, 9, 0, 8]
    _, state = run(TOKENS, empty_state(config), None, first, config=config)
    following = np.zeros_like(TOKENS)
    for row in range(ROWS):
        following[row, : second[row]] = TOKENS[row, first[row] : first[row] + second[row]]
    logits, state = run(following, state, None, second, config=config)
    for row in range(ROWS):
        expected, end = alone(TOKENS[row, : first[row] + second[row]], config)
        np.testing.assert_allclose(logits[row, : second[row]], expected[first[row] :], rtol=0, atol=1e-11)
        assert_same_text(state, row, end)


@pytest.mark.parametrize("packed", [False, True])
def test_a_row_of_length_zero_is_untouched(float64: None, packed: bool) -> None:
    segment_ids = np.arange(TIME) // 2 + np.zeros((ROWS, 1), np.int32) if packed else None
    _, state = run(TOKENS, empty_state(), None, [9, 3, 0, 6])
    _, after = run(TOKENS, state, segment_ids, [0, 4, 0, 1])
    for row in (0, 2):
        for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
            np.testing.assert_array_equal(x[:, row], y[:, row])


@each_config
def test_texts_packed_into_a_row_are_each_alone(float64: None, config: ModelConfig) -> None:
    """The first of them goes on with the state; the state that is left is the last one's."""
    _, state = run(TOKENS, empty_state(config), None, [4] * ROWS, config=config)
    ends, lengths = [(5, 9, 20), (20,), (1, 2, 3), (6, 12, 20)], [20, 20, 3, 14]
    segment_ids = np.stack([np.searchsorted(own, np.arange(TIME), side="right") for own in ends])
    logits, after = run(TOKENS, state, segment_ids, lengths, config=config)
    for row, own in enumerate(ends):
        begin, before, last = 0, TOKENS[row, :4], state
        for end in (min(end, lengths[row]) for end in own):
            expected, last = alone(np.concatenate([before, TOKENS[row, begin:end]]), config)
            np.testing.assert_allclose(logits[row, begin:end], expected[len(before) :], rtol=0, atol=1e-11)
            begin, before = end, before[:0]
        assert_same_text(after, row, last)


def test_token_positions_of_packed_ragged_rows() -> None:
    segment_ids = jnp.array([[3, 3, 1, 1, 1], [0, 0, 0, 2, 5]])
    tokens = token_positions(jnp.array([10, 4], jnp.int32), 5, segment_ids, jnp.array([4, 3], jnp.int32))
    np.testing.assert_array_equal(tokens.positions[0], [10, 11, 0, 1, 2])
    np.testing.assert_array_equal(tokens.positions[1, :3], [4, 5, 6])
    np.testing.assert_array_equal(tokens.is_kept, [[False, False, True, True, False], [True, True, True, False, False]])
    np.testing.assert_array_equal(tokens.next_position, [2, 7])


def test_no_token_sees_what_comes_after_it(float64: None) -> None:
    params = random_params(SMALL)

    def of_inputs(x: Array) -> Array:
        return jnp.sum(merge(SMALL, params).hidden(None, inputs_embeds=x)[0] ** 2, axis=(0, 2))

    x = params["emb"]["weight"][TOKENS[:1]]
    influence = np.abs(jax.jit(jax.jacrev(of_inputs), compiler_options=QUICK)(x)).sum(axis=(1, 3))
    np.testing.assert_array_equal(influence > 0, np.tril(np.ones((TIME, TIME), bool)))


@each_config
def test_every_layer_can_be_seen(float64: None, config: ModelConfig) -> None:
    params = random_params(config)

    def streams(params: Any) -> tuple[Array, Array]:
        model = merge(config, params)
        return model.logits(model.ln_out(model.residual_stream(TOKENS)[0][-1])), model(TOKENS)[0]

    found, expected = jax.jit(streams, compiler_options=QUICK)(params)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@each_config
def test_layers_of_their_own_arrays_are_the_same_model(float64: None, config: ModelConfig) -> None:
    model = merge(config, jax.tree.map(jnp.asarray, random_params(config)))
    graphdef, params = nnx.split(unstacked(model))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def call(params: Any, tokens: Array, state: Any) -> tuple[Array, Any, Array]:
        model: Any = nnx.merge(graphdef, params)
        logits, state = model(tokens, state)
        return logits, state, model.room(state)

    expected, _ = run(TOKENS, config=config)
    first, state, room = call(params, TOKENS[:, :15], None)
    assert len(state) == 3
    assert all(x.shape[0] == ROWS for x in jax.tree.leaves(state))
    np.testing.assert_array_equal(room, [9] * ROWS)
    second, _, room = call(params, TOKENS[:, 15:], state)
    np.testing.assert_array_equal(room, [4] * ROWS)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), expected, rtol=0, atol=1e-11)


@each_config
def test_gradients_pass_through_the_cache(float64: None, config: ModelConfig) -> None:
    """A text read in two calls has the gradients of the text read in one."""
    config = dataclasses.replace(config, num_layers=2)
    params = random_params(config)

    def whole(params: Any) -> Array:
        return jnp.sum(merge(config, params)(TOKENS)[0] ** 2)

    def in_two(params: Any) -> Array:
        model = merge(config, params)
        first, state = model(TOKENS[:, :9])
        return jnp.sum(first**2) + jnp.sum(model(TOKENS[:, 9:], state)[0] ** 2)

    gradients = [jax.jit(jax.grad(loss), compiler_options=QUICK)(params) for loss in (whole, in_two)]
    for x, y in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert relative_error(x, y) < 1e-11


def test_shapes_dtypes_and_room_of_the_state() -> None:
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    params = in_dtype(random_params(SMALL), config)
    model = merge(config, params)
    state = model.initial_state(2)
    assert state.keys.shape == state.values.shape == (3, 2, 4, 24, 8)
    assert (state.keys.dtype, state.values.dtype, state.position.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.int32)
    logits, after = program(config)(params, TOKENS[:2, :7], state, None, None)
    assert logits.dtype == jnp.float32
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert isinstance(model, Transformer)
    np.testing.assert_array_equal(model.room(after), [17, 17])
    with jax.enable_x64(True):
        assert 1e-4 < relative_error(logits, run(TOKENS)[0][:2, :7]) < 3e-2
