"""The whole model of every generation: state in and out, packing, ragged rows, causality, precision, arguments."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array
from numpy.typing import NDArray

from rwkv_jax.config import ModelConfig, Remat
from rwkv_jax.models import RWKV4, RWKV5, RWKV6, RWKV7, model_type
from rwkv_jax.models.state import State
from rwkv_jax.training.loss import sum_losses
from tests.golden import QUICK, assert_close, relative_error
from tests.models.parameters import SMALL, abstract, in_dtype, initial_params, merge, random_params, to_official

ROWS, TIME = 4, 20
TOKENS = np.random.default_rng(0).integers(0, 41, (ROWS, TIME)).astype(np.int32)
FLOAT32 = {name: dataclasses.replace(config, dtype="float32") for name, config in SMALL.items()}

# The previews differ from 5.2 in shapes only, which test_modules.py looks at each time.
every_generation = pytest.mark.parametrize(
    "generation",
    [pytest.param(name, marks=pytest.mark.long) if name in ("5.0", "5.1") else name for name in SMALL],
)
every_class = pytest.mark.parametrize("generation", ["4", "5.2", "6", "7"])


def in_compute_dtype(name: str, dtype: Literal["float32", "bfloat16", "float64"]) -> ModelConfig:
    return dataclasses.replace(SMALL[name], dtype=dtype)


# Programs, each compiled once for all tests


@functools.cache
def streams(config: ModelConfig) -> Callable[..., tuple[Array, Array, State]]:
    """(params, inputs_embeds) -> every layer's hidden states, logits, state; nothing else is given."""

    def call(params: Any, inputs_embeds: Array) -> tuple[Array, Array, State]:
        model = merge(config, params)
        hidden, state = model.residual_stream(None, inputs_embeds=inputs_embeds)
        return hidden, model.logits(model.ln_out(hidden[-1])), state

    return jax.jit(call, compiler_options=QUICK)


@functools.cache
def token_program(config: ModelConfig) -> Callable[..., tuple[Array, State]]:
    """(params, tokens [B, 1], state) -> logits, state."""
    return jax.jit(lambda params, tokens, state: merge(config, params)(tokens, state), compiler_options=QUICK)


@functools.cache
def rows_program(config: ModelConfig) -> Callable[..., tuple[Array, State]]:
    """(params, tokens [B, T], state, segment_ids, lengths) -> logits, state."""

    def call(params: Any, tokens: Array, state: State, segment_ids: Array, lengths: Array) -> tuple[Array, State]:
        return merge(config, params)(tokens, state, segment_ids=segment_ids, lengths=lengths)

    return jax.jit(call, compiler_options=QUICK)


def run_rows(
    generation: str,
    tokens: NDArray = TOKENS,
    state: State | None = None,
    segment_ids: NDArray | None = None,
    lengths: Any = TIME,
) -> tuple[NDArray, State]:
    """Logits and states of the small model with random parameters, in float64."""
    config = SMALL[generation]
    state = empty_state(config) if state is None else state
    segments = np.zeros_like(tokens) if segment_ids is None else segment_ids
    ends = np.broadcast_to(np.asarray(lengths, np.int32), (ROWS,))
    return jax.device_get(rows_program(config)(random_params(config), tokens, state, segments, ends))


def empty_state(config: ModelConfig) -> State:
    return merge(config, random_params(config)).initial_state(ROWS)


@functools.cache
def one_by_one(generation: str) -> tuple[NDArray, list[State]]:
    """Logits [B, T, V] token by token, and the states before each token and after the last."""
    config = SMALL[generation]
    states, logits = [empty_state(config)], []
    for token in TOKENS.T:
        one, state = token_program(config)(random_params(config), token[:, None], states[-1])
        logits.append(one)
        states.append(state)
    return np.concatenate(logits, axis=1), jax.device_get(states)


def named(state: State) -> dict[str, Any]:
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
    wkv = (
        (((layers, ROWS, width), wide),) * 3 if generation == "4" else ((layers, ROWS, heads, head_dim, head_dim), wide)
    )
    with jax.enable_x64(dtype == "float64"):
        params = abstract(config)[1]
        first = jax.eval_shape(lambda params: merge(config, params).initial_state(ROWS), params)
        logits, state = token_program(config).eval_shape(params, TOKENS[:, :1], first)
        streams_shape = streams(config).eval_shape(params, jnp.zeros((ROWS, 2, width), dtype))[0]

    def shapes(state: State) -> Any:
        return jax.tree.map(lambda x: (x.shape, x.dtype.name), state)

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
    for layer in (1, 2):
        norm = jax.tree.map(lambda x, layer=layer: x[layer - 1], params["blocks"]["ln1"])
        last = np.asarray(hidden[layer - 1, :, -1])
        normalised = (last - last.mean(-1, keepdims=True)) / np.sqrt(last.var(-1, keepdims=True) + 1e-5)
        assert relative_error(state.att_shift[layer], normalised * norm["weight"] + norm["bias"]) < 1e-12


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


def segments_of(*lengths: int) -> NDArray:
    """Ids that neither rise nor begin at zero, and come again."""
    assert sum(lengths) == TIME
    return np.repeat(np.array([7, 2, 7, 0][: len(lengths)], np.int32), lengths)


PACKED = ((7, 1, 12), (20,), (3, 16, 1), (9, 5, 2, 4))


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


# Gradients


@functools.cache
def gradients_program(config: ModelConfig, remat: Remat = "none", chunk: int | None = None) -> Callable[..., Any]:
    """(params, state, added [B, T, C], tokens, targets, mask, segment_ids, lengths) -> loss, gradients of the first 3.

    `added` is added to the embeddings, for their gradient.
    """

    def loss(
        params: Any, state: State, added: Array, tokens: Array, targets: Array, mask: Array, ids: Array, lengths: Array
    ) -> Array:
        model = merge(config, params)
        embeds = model.emb(tokens) + added
        hidden, final = model.hidden(None, state, inputs_embeds=embeds, remat=remat, segment_ids=ids, lengths=lengths)
        total = sum_losses(model.logits, hidden, targets, mask, chunk)
        return total.nll + 1e-2 * total.peak + 1e-3 * sum(jnp.sum(x) for x in (final.att_shift, final.ffn_shift))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)), compiler_options=QUICK)


def gradients(generation: str, mask: NDArray, segment_ids: NDArray, lengths: Any) -> tuple[Any, Any]:
    """Sizes of the gradients of a masked loss: of embeddings [B, T], and of the state [B], nested as it is."""
    config = SMALL[generation]
    ends = np.asarray(lengths, np.int32)
    inputs = (TOKENS, np.roll(TOKENS, -1, axis=1), mask.astype(np.float32), segment_ids, ends)
    state = one_by_one(generation)[1][9]
    program = gradients_program(config)
    added = np.zeros((ROWS, TIME, 32))
    _, (_, dstate, dadded) = jax.device_get(program(random_params(config), state, added, *inputs))
    largest = jax.tree.map(lambda x: np.abs(x).reshape((*x.shape[:2], -1)).max(axis=(0, 2)), dstate)
    return np.abs(dadded).max(axis=-1), largest


@every_generation
def test_nothing_reaches_where_it_must_not(float64: None, generation: str) -> None:
    """By gradient: of one token's loss with respect to every embedding and to the state, which are exactly zero.

    Row 0 is one text, row 1 holds three, row 2 ends early, row 3 is three texts and ends within the second.
    """
    segment_ids = np.stack([segments_of(20), segments_of(6, 5, 9), segments_of(20), segments_of(6, 5, 9)])
    lengths = np.array([20, 20, 11, 9])
    begin = np.array([[0] * 20, [0] * 6 + [6] * 5 + [11] * 9, [0] * 20, [0] * 6 + [6] * 5 + [11] * 9])
    positions = np.arange(TIME)
    # Without the loss of any token only the final shifts are left, a function of each row's last segment.
    base, base_state = gradients(generation, np.zeros((ROWS, TIME)), segment_ids, lengths)
    for position in (0, 5, 6, 7, 8, 10, 11, 19):
        mask = np.zeros((ROWS, TIME))
        mask[:, position] = position < lengths
        size, of_state = gradients(generation, mask, segment_ids, lengths)
        for row in range(ROWS):
            counts = position < lengths[row]
            seen = (positions >= begin[row, position]) & (positions <= position) & counts
            ending = (positions >= begin[row, lengths[row] - 1]) & (positions < lengths[row])
            np.testing.assert_array_equal(base[row] > 0, ending, err_msg=f"{row=}")
            np.testing.assert_array_equal(size[row] > 0, seen | ending, err_msg=f"{row=} {position=}")
            first = counts and begin[row, position] == 0
            for leaf, base_leaf in zip(jax.tree.leaves(of_state), jax.tree.leaves(base_state), strict=True):
                assert (base_leaf[row] > 0) == (begin[row, lengths[row] - 1] == 0)
                assert (leaf[row] > 0) == (first or begin[row, lengths[row] - 1] == 0)


@every_class
def test_loss_and_gradients_do_not_depend_on_how_they_are_computed(float64: None, generation: str) -> None:
    """By chunks with all kept and all logits at once, or step by step with each block and logits recomputed."""
    config = SMALL[generation]
    params, state = random_params(config), one_by_one(generation)[1][9]
    segment_ids = np.stack([segments_of(*lengths) for lengths in PACKED])
    rng = np.random.default_rng(1)
    mask = rng.integers(0, 2, (ROWS, TIME)).astype(np.float32)
    lengths = np.array([20, 7, 20, 18], np.int32)
    targets = np.roll(TOKENS, -1, axis=1)
    inputs = (params, state, np.zeros((ROWS, TIME, 32)), TOKENS, targets, mask, segment_ids, lengths)
    loss, (gradient, *others) = gradients_program(config)(*inputs)
    scan = dataclasses.replace(config, wkv_implementation="scan")
    other_loss, (other_gradient, *other_others) = gradients_program(scan, "full", 16)(*inputs)
    assert relative_error(other_loss, loss) < 1e-12
    assert_close(to_official(config, other_gradient), to_official(config, gradient), 1e-11)
    for x, expected in zip(jax.tree.leaves(other_others), jax.tree.leaves(others), strict=True):
        assert relative_error(x, expected) < 1e-11
    assert all(np.any(x) for x in to_official(config, gradient).values())


@every_generation
def test_remat_keeps_less_for_the_backward_pass(generation: str) -> None:
    config = dataclasses.replace(FLOAT32[generation], num_layers=12)
    tokens = jnp.zeros((8, 256), jnp.int32)

    def kept(remat: Remat) -> int:
        def hidden(params: Any) -> Array:
            return merge(config, params).hidden(tokens, remat=remat)[0]

        return sum(
            x.size for x in jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(hidden, p)[1], abstract(config)[1]))
        )

    block_inputs = config.num_layers * tokens.size * config.width
    full, operator, none = (kept(remat) for remat in ("full", "operator", "none"))
    assert block_inputs < full < 2 * block_inputs
    assert 2 * full < operator < none


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
    """So the first logits are those of the embedding, normalised twice."""
    params = initial_params(SMALL[generation])
    embedding = params["emb"]["weight"][TOKENS]
    hidden, logits, _ = streams(SMALL[generation])(params, embedding)

    def normalise(x: NDArray) -> NDArray:
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)

    expected = normalise(normalise(embedding)) @ params["head"]["weight"].T
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


# Arguments


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((2, 3), np.float32), r"tokens: float32 of shape \(2, 3\) must be integers of shape \[B, T\]"),
        (np.zeros(3, np.int32), r"tokens: int32 of shape \(3,\) must be integers of shape \[B, T\]"),
        (np.zeros((1, 2, 3), np.int32), r"tokens: int32 of shape \(1, 2, 3\) must be integers"),
        (np.zeros((1, 0), np.int32), r"tokens: int32 of shape \(1, 0\) must be integers of shape \[B, T\], T from 1"),
        (np.array([[3, 41]]), r"tokens: from 3 to 41 must lie from 0 to V - 1 = 40"),
        (np.array([[-1, 4]]), r"tokens: from -1 to 4 must lie from 0 to V - 1 = 40"),
    ],
)
def test_wrong_tokens_are_named(tokens: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_float32("7")(jnp.asarray(tokens))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"segment_ids": np.zeros((4, 21), int)}, r"segment_ids: shape \(4, 21\) must be \(4, 20\), \[B, T\]"),
        ({"segment_ids": np.zeros((4, 20))}, "segment_ids: dtype .* must be an integer one"),
        ({"lengths": [20, 1, 2, 21]}, "lengths: values from 1 to 21 must lie from 0 to T = 20"),
        ({"lengths": np.zeros((1, 2), int)}, r"lengths: shape \(1, 2\) must be \(4,\), \[B\]"),
        ({"lengths": [1.0, 2.0, 3.0, 4.0]}, "lengths: dtype .* must be an integer one"),
    ],
    ids=["too long", "no integers", "out of range", "no vector", "fractions"],
)
def test_wrong_rows_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_float32("7")(jnp.asarray(TOKENS), **arguments)


def test_a_state_of_another_model_or_batch_is_refused() -> None:
    model, other = small_float32("7"), small_float32("4")
    tokens = jnp.asarray(TOKENS)
    with pytest.raises(
        ValueError, match=r"state: is none of RWKV-7, whose states have the form of model\.initial_state"
    ):
        model(tokens, other.initial_state(4))
    with pytest.raises(ValueError, match=r"state\.att_shift: shape \(3, 1, 32\) must be \(3, 4, 32\)"):
        model(tokens, model.initial_state(1))
    shallow = jax.tree.map(lambda x: x[:2], model.initial_state(4))
    with pytest.raises(ValueError, match=r"state\.att_shift: shape \(2, 4, 32\) must be \(3, 4, 32\)"):
        model(tokens, shallow)


def small_float32(generation: str) -> Any:
    config = FLOAT32[generation]
    return merge(config, in_dtype(random_params(config), config))


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 31), (1, 2, 3, 32)], ids=str)
def test_wrong_embeddings_are_named(shape: tuple[int, ...]) -> None:
    named_shape = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"inputs_embeds: shape {named_shape} must be \[B, T, C = 32\]"):
        small_float32("4")(None, inputs_embeds=jnp.zeros(shape))


@pytest.mark.parametrize("method", ["__call__", "hidden", "residual_stream"])
def test_tokens_and_embeddings_are_one_or_the_other(method: str) -> None:
    call = getattr(small_float32("6"), method)
    for arguments in ((None, {}), (jnp.zeros((1, 2), jnp.int32), {"inputs_embeds": jnp.zeros((1, 2, 32))})):
        with pytest.raises(ValueError, match="give tokens, or inputs_embeds in their place, and not both"):
            call(arguments[0], **arguments[1])


@every_class
def test_an_unknown_implementation_is_refused(generation: str) -> None:
    config = dataclasses.replace(FLOAT32[generation], wkv_implementation="cuda")
    with pytest.raises(ValueError, match=f"implementation = 'cuda': wkv{generation[0]} has .*scan"):
        jax.eval_shape(lambda params: merge(config, params)(jnp.asarray(TOKENS)), abstract(config)[1])


@pytest.mark.parametrize(
    ("kind", "generation", "remedy"),
    [
        (RWKV4, "5.2", "RWKV4 is 4;"),
        (RWKV5, "6", r"RWKV5 is 5.0, 5.1, 5.2;"),
        (RWKV6, "7", "RWKV6 is 6;"),
        (RWKV7, "4", "RWKV7 is 7;"),
    ],
)
def test_a_class_refuses_other_generations(kind: Any, generation: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=rf"model.generation = '{generation}': {remedy} .*model_type\(config\)"):
        kind(SMALL[generation], rngs=nnx.Rngs(0))


def test_every_generation_has_its_class() -> None:
    expected = {"4": RWKV4, "5.0": RWKV5, "5.1": RWKV5, "5.2": RWKV5, "6": RWKV6, "7": RWKV7}
    assert {name: model_type(config) for name, config in SMALL.items()} == expected


@pytest.mark.long  # without jit every operation is compiled by itself
@every_generation
def test_a_model_is_a_module_that_can_be_called(generation: str) -> None:
    config = dataclasses.replace(FLOAT32[generation], num_layers=2)
    model = model_type(config)(config, rngs=nnx.Rngs(0))
    logits, state = model(jnp.asarray(TOKENS[:, :3]))
    more, _ = model(jnp.asarray(TOKENS[:, 3:4]), state)
    whole, _ = model(jnp.asarray(TOKENS[:, :4]))
    np.testing.assert_allclose(jnp.concatenate([logits, more], axis=1), whole, rtol=0, atol=1e-5)
