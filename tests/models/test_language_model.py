"""The whole model of every generation: state in and out, packing, ragged rows, precision, what is drawn."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from rwkv_jax.config import ModelConfig
from rwkv_jax.models.state import State
from tests.golden import assert_close, relative_error
from tests.models.parameters import SMALL, abstract, in_dtype, initial_params, merge, random_params
from tests.models.small_models import (
    PACKED,
    ROWS,
    TIME,
    TOKENS,
    every_generation,
    one_by_one,
    run_rows,
    segments_of,
    streams,
    token_program,
)


def in_compute_dtype(name: str, dtype: Literal["float32", "bfloat16", "float64"]) -> ModelConfig:
    return dataclasses.replace(SMALL[name], dtype=dtype)


def named(state: Any) -> dict[str, Any]:
    """Arrays by name, of a cache what lies before its position: the rest is undefined."""
    if hasattr(state, "attention"):
        own = state.attention
        is_held = np.arange(own.keys.shape[-2]) < np.asarray(own.position)[:, :, None, None]
        keys, values = (np.where(is_held[..., None], x, 0) for x in (own.keys, own.values))
        state = state._replace(attention=own._replace(keys=keys, values=values))
    paths = jax.tree.leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in paths}


def row_of(state: State, row: int) -> dict[str, Any]:
    return {name: x[:, row] for name, x in named(state).items()}


# State


@every_generation
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_shapes_and_dtypes_of_the_state(generation: str, dtype: Any) -> None:
    config = in_compute_dtype(generation, dtype)
    layers, width, heads, head_dim = 3, 32, 4, 8
    wide = "float64" if dtype == "float64" else "float32"
    shift = ((layers, ROWS, width), dtype)
    symbols, lengths = (((layers, ROWS, 8, 11), kind) for kind in ("uint8", "int32"))
    others = {
        "4": (((layers, ROWS, width), wide),) * 3,
        "8-rosa": (symbols, symbols, lengths, ((layers, ROWS), "int32")),
    }
    wkv = others.get(generation, ((layers, ROWS, heads, head_dim, head_dim), wide))
    with jax.enable_x64(dtype == "float64"):
        params = abstract(config)[1]
        first = jax.eval_shape(lambda params: merge(config, params).initial_state(ROWS), params)
        logits, state = token_program(config).eval_shape(params, TOKENS[:, :1], first)
        streams_shape = streams(config).eval_shape(params, jnp.zeros((ROWS, 2, width), dtype))[0]

    def shapes(state: State) -> Any:
        found = jax.tree.map(lambda x: (x.shape, x.dtype.name), state)
        found = getattr(found, "recurrence", found)
        return found.att_shift, found.ffn_shift, found.wkv

    # The same after a token as before, so that a loop over tokens is one program.
    assert shapes(first) == shapes(state) == (shift, shift, wkv)
    assert (logits.shape, logits.dtype) == ((ROWS, 1, 41), wide)
    assert (streams_shape.shape, streams_shape.dtype) == ((layers, ROWS, 2, width), dtype)


@every_generation
def test_without_a_state_and_from_embeddings(float64: None, generation: str) -> None:
    """Vectors in place of tokens, no state in place of the empty one, the last layer's hidden states and the head."""
    params = random_params(SMALL[generation])
    hidden, logits, state = streams(SMALL[generation])(params, params["emb"]["weight"][TOKENS])
    expected, expected_state = run_rows(generation)
    assert hidden.shape == (3, ROWS, TIME, 32)
    assert relative_error(logits, expected) < 1e-12
    assert_close(named(state), named(expected_state), 1e-12)
    # Layer by layer: what a layer adds is what its norm makes the next shift of.
    own = "ln3" if generation == "8-rosa" else "ln1"
    for layer in (1, 2):
        norm = jax.tree.map(lambda x, layer=layer: x[layer - 1], params["blocks"][own])
        last = np.asarray(hidden[layer - 1, :, -1])
        normalized = (last - last.mean(-1, keepdims=True)) / np.sqrt(last.var(-1, keepdims=True) + 1e-5)
        recurrence = getattr(state, "recurrence", state)
        assert relative_error(recurrence.att_shift[layer], normalized * norm["weight"] + norm["bias"]) < 1e-12


@every_generation
def test_a_text_may_be_split_anywhere(float64: None, generation: str) -> None:
    expected, expected_state = run_rows(generation)
    logits, states = one_by_one(generation)
    assert relative_error(logits, expected) < 1e-12
    assert_close(named(states[-1]), named(expected_state), 1e-12)

    # Each row in other places, by one program.
    pieces, done, state = np.array([[5, 0, 20, 1], [14, 7, 0, 18], [1, 13, 0, 1]]), np.zeros(ROWS, int), None
    for lengths in pieces:
        tokens = np.stack([np.roll(row, -begin) for row, begin in zip(TOKENS, done, strict=True)])
        some, state = run_rows(generation, tokens, state, lengths=lengths)
        for row, (begin, length) in enumerate(zip(done, lengths, strict=True)):
            if length:
                assert relative_error(some[row, :length], expected[row, begin : begin + length]) < 1e-12
        done = done + lengths
    assert state is not None
    assert np.all(done == TIME)
    assert_close(named(state), named(expected_state), 1e-12)


@every_generation
def test_rows_of_a_batch_do_not_see_each_other(float64: None, generation: str) -> None:
    changed = TOKENS.copy()
    changed[1] = TOKENS[1, ::-1]
    before, after = (run_rows(generation, tokens)[0] for tokens in (TOKENS, changed))
    np.testing.assert_array_equal(np.delete(before, 1, axis=0), np.delete(after, 1, axis=0))
    assert np.all(np.any(before[1] != after[1], axis=-1)[:-1])


# Packed and ragged rows


@every_generation
def test_texts_packed_in_a_row_are_as_each_alone(float64: None, generation: str) -> None:
    segment_ids = np.stack([segments_of(*lengths) for lengths in PACKED])
    begin_state = one_by_one(generation)[1][9]
    logits, final = run_rows(generation, TOKENS, begin_state, segment_ids)
    for position in range(4):
        # The segments at one position in all rows at a time, alone; the first of each row continues the state.
        own = [sum(row[:position]) for row in PACKED]
        lengths = [row[position] if position < len(row) else 0 for row in PACKED]
        tokens = np.stack([np.roll(row, -begin) for row, begin in zip(TOKENS, own, strict=True)])
        alone, state = run_rows(generation, tokens, begin_state if position == 0 else None, lengths=lengths)
        for row, (begin, length) in enumerate(zip(own, lengths, strict=True)):
            if length:
                assert relative_error(logits[row, begin : begin + length], alone[row, :length]) < 1e-12
            if position == len(PACKED[row]) - 1:
                assert_close(row_of(final, row), row_of(state, row), 1e-12)
    # That the state counted at all.
    assert relative_error(run_rows(generation, TOKENS, None, segment_ids)[0][:, 0], logits[:, 0]) > 1e-2


@every_generation
def test_ragged_rows_are_as_each_cut_to_its_length(float64: None, generation: str) -> None:
    lengths, begin_state = np.array([0, 1, 13, 20]), one_by_one(generation)[1][9]
    other = np.where(np.arange(TIME) < lengths[:, None], TOKENS, TOKENS[::-1, ::-1])
    assert np.any(other != TOKENS, axis=1).tolist() == [True, True, True, False]
    expected, expected_states = one_by_one(generation)
    logits, state = run_rows(generation, TOKENS, lengths=lengths)
    padded_logits, padded_state = run_rows(generation, other, lengths=lengths)
    for row, length in enumerate(lengths):
        if length:
            assert relative_error(logits[row, :length], expected[row, :length]) < 1e-12
        np.testing.assert_array_equal(padded_logits[row, :length], logits[row, :length])
        assert_close(row_of(state, row), row_of(expected_states[length], row), 1e-12)
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(padded_state), strict=True))
    # A row of length 0 keeps the state that it had.
    _, state = run_rows(generation, TOKENS, begin_state, lengths=lengths)
    for x, begun in zip(jax.tree.leaves(state), jax.tree.leaves(begin_state), strict=True):
        np.testing.assert_array_equal(x[:, 0], begun[:, 0])


@every_generation
def test_packed_and_ragged_at_once(float64: None, generation: str) -> None:
    # Ends within the second segment, in the first, at the second's last token, and before anything.
    segment_ids = np.stack([segments_of(*lengths) for lengths in ((7, 13), (20,), (3, 16, 1), (9, 11))])
    lengths, second = np.array([15, 4, 19, 0]), np.array([7, 20, 3, 9])
    begin_state = one_by_one(generation)[1][9]
    logits, state = run_rows(generation, TOKENS, begin_state, segment_ids, lengths)
    first_logits, first_state = run_rows(generation, TOKENS, begin_state, lengths=np.minimum(lengths, second))
    tokens = np.stack([np.roll(row, -begin) for row, begin in zip(TOKENS, second, strict=True)])
    rest = np.maximum(lengths - second, 0)
    rest_logits, rest_state = run_rows(generation, tokens, None, lengths=rest)
    for row in range(ROWS):
        if whole := min(lengths[row], second[row]):
            assert relative_error(logits[row, :whole], first_logits[row, :whole]) < 1e-12
        if rest[row]:
            assert relative_error(logits[row, whole : whole + rest[row]], rest_logits[row, : rest[row]]) < 1e-12
        assert_close(row_of(state, row), row_of(rest_state if rest[row] else first_state, row), 1e-12)


# Precision


def test_bfloat16_is_close_to_float64() -> None:
    """Of RWKV-7; the trained models of `test_golden_tiny.py` are of the other generations."""
    config = in_compute_dtype("7", "bfloat16")
    params = in_dtype(random_params(SMALL["7"]), config)
    _, logits, state = streams(config)(params, params["emb"]["weight"][TOKENS])
    with jax.enable_x64(True):
        exact, exact_state = run_rows("7")
    assert logits.dtype == jnp.float32
    # Three layers of operands that are rounded to 8 bits.
    assert 1e-4 < relative_error(logits, exact) < 3e-2
    assert relative_error(state.wkv, exact_state.wkv) < 3e-2


# A new model


@every_generation
def test_every_branch_starts_at_zero(float64: None, generation: str) -> None:
    """So the first logits are those of the embedding, normalized as often as there are norms around the blocks."""
    params = initial_params(SMALL[generation])
    embedding = params["emb"]["weight"][TOKENS]
    hidden, logits, _ = streams(SMALL[generation])(params, embedding)

    def normalize(x: NDArray) -> NDArray:
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)

    first = embedding if generation == "7-rosa" else normalize(embedding)  # which has no ln0
    expected = normalize(first) @ params["head"]["weight"].T
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(hidden[0], hidden[-1])


def _official(generation: Any, layers: int, width: int, vocab_size: int = 65536, **sizes: Any) -> ModelConfig:
    return ModelConfig(generation, vocab_size, layers, width, **sizes)


def _goose(layers: int, width: int, decay: int, iclr: int, value: int, gate: int, **more: Any) -> ModelConfig:
    ranks = {"decay_rank": decay, "iclr_rank": iclr, "value_rank": value, "gate_rank": gate}
    return _official("7", layers, width, **ranks, unused_value_residual=True, **more)


OFFICIAL: list[tuple[str, ModelConfig, int | None]] = [
    ("RWKV-4 169M", _official("4", 12, 768, 50277), 169_342_464),
    ("RWKV-4 430M", _official("4", 24, 1024, 50277), None),
    ("RWKV-4 1.5B", _official("4", 24, 2048, 50277), None),
    ("RWKV-4 3B", _official("4", 32, 2560, 50277), None),
    ("RWKV-4 7B", _official("4", 32, 4096, 50277), None),
    ("RWKV-4 14B", _official("4", 40, 5120, 50277), 14_148_597_760),
    ("RWKV-5.2 1.5B", _official("5.2", 24, 2048), None),
    ("RWKV-6 1.6B", _official("6", 24, 2048), 1_599_873_024),
    ("RWKV-6 7B", _official("6", 32, 4096), 7_635_746_816),
    ("RWKV-7 0.1B", _goose(12, 768, 64, 64, 32, 128), 191_084_544),
    ("RWKV-7 0.4B", _goose(24, 1024, 64, 64, 32, 128), 450_834_432),
    ("RWKV-7 1.5B", _goose(24, 2048, 96, 96, 64, 256), 1_527_668_736),
    ("RWKV-7 2.9B", _goose(32, 2560, 96, 96, 64, 320), 2_948_065_280),
    ("RWKV-7 7.2B", _goose(32, 4096, 128, 128, 96, 480), 7_199_932_416),
    *((f"small {name}", config, None) for name, config in SMALL.items()),
    ("wide RWKV-5.0", _official("5.0", 7, 768, ffn_width=1000), None),
    ("deep RWKV-7", _official("7", 61, 4096, ffn_width=3 * 4096), None),
]


@pytest.mark.parametrize(("config", "published"), [pytest.param(*case, id=name) for name, *case in OFFICIAL])
def test_the_number_of_parameters(config: ModelConfig, published: int | None) -> None:
    shapes = jax.tree.leaves(abstract(config)[1])
    assert {x.dtype.name for x in shapes} == {config.parameter_dtype}
    count = sum(x.size for x in shapes)
    assert count == config.num_parameters()
    assert published is None or count == published
    if config.unused_value_residual:
        # The official README's formula, which counts what the first layer does not use.
        vocab_size, layers, width, sizes = config.vocab_size, config.num_layers, config.width, config.sizes()
        ranks = sizes.decay_rank + sizes.iclr_rank + sizes.value_rank + sizes.gate_rank
        assert count == 2 * vocab_size * width + 4 * width + layers * (19 * width + 12 * width**2 + 2 * width * ranks)
