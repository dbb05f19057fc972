"""RWKV-7's time mixing in the place of attention, in some layers or in all: state and cache side by side."""

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

from rwkv_jax.config import ConfigError, ModelConfig
from rwkv_jax.models import LanguageModel, Transformer
from rwkv_jax.models.context import SequenceContext
from rwkv_jax.models.decoding import unstacked
from rwkv_jax.models.hybrid import HybridState
from rwkv_jax.models.rwkv7 import RWKV7, TimeMix
from rwkv_jax.models.stacks import layer_runs, stacked_layers
from rwkv_jax.training.optimizer import parameter_groups
from rwkv_jax.training.rates import rate_factors
from tests.golden import QUICK
from tests.models.parameters import abstract, initial_params, merge, random_params
from tests.models.small_transformers import SMALL as TRANSFORMER
from tests.models.small_transformers import TOKENS, program

RANKS: dict[str, Any] = {"decay_rank": 9, "iclr_rank": 5, "value_rank": 6, "gate_rank": 7}
ALL = dataclasses.replace(TRANSFORMER, num_layers=3, rwkv_layers=(0, 1, 2), context_length=None, **RANKS)
SOME = dataclasses.replace(TRANSFORMER, num_layers=4, rwkv_layers=(1, 2), **RANKS)
CONFIGS = [pytest.param(ALL, id="all"), pytest.param(SOME, id="some")]
FIRST = dataclasses.replace(SOME, rwkv_layers=(0, 3))
LLAMA = ModelConfig(
    architecture="llama",
    vocab_size=41,
    num_layers=3,
    width=32,
    head_dim=8,
    ffn_width=48,
    kv_heads=2,
    qkv_bias=True,
    qk_norm=True,
    tied_head=True,
    context_length=24,
    dtype="float64",
    rwkv_layers=(1, 2),
    **RANKS,
)
"""Its value residual takes the values of grouped heads."""
ROWS, TIME = TOKENS.shape


def run(config: ModelConfig, tokens: NDArray, state: Any = None, segments: Any = None, lengths: Any = None) -> Any:
    lengths = None if lengths is None else np.asarray(lengths, np.int32)
    return jax.device_get(program(config)(random_params(config), tokens, state, segments, lengths))


def empty_state(config: ModelConfig, rows: int = ROWS) -> Any:
    return merge(config, random_params(config)).initial_state(rows)


def assert_same_state(config: ModelConfig, state: Any, row: int, expected: Any, expected_row: int) -> None:
    """Of what means something: entries of a cache from its position on do not."""
    for part, other in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        x, y = part[:, row], other[:, expected_row]
        if x.ndim == 4 and x.shape[2] == config.context_length:
            position = int(state.attention.position[0, row])
            x, y = x[:, :, :position], y[:, :, :position]
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-11)


def alone(config: ModelConfig, text: NDArray) -> tuple[NDArray, Any]:
    """Logits [T, V] and state of one text, in rows of one shape for all."""
    row = np.zeros((ROWS, TIME), np.int32)
    row[0, : text.size] = text
    logits, state = run(config, row, empty_state(config), np.zeros_like(row), [text.size, 0, 0, 0])
    return logits[0, : text.size], state


# What it is


@pytest.mark.parametrize("config", [*CONFIGS, pytest.param(FIRST, id="first")])
def test_it_is_its_parts_one_after_the_other(float64: None, config: ModelConfig) -> None:
    """Blocks of attention and time mixing, which takes its value residual from layer 0, whatever mixes there."""
    params = jax.tree.map(jnp.asarray, random_params(config))

    def by_parts(params: Any) -> Array:
        model = merge(config, params)
        x, values = model.emb(TOKENS, "float64"), None
        for layer in range(config.num_layers):
            block: Any = model.block(layer)
            y, attention = block.ln1(x), block.att
            assert isinstance(attention, TimeMix) == (layer in config.rwkv_layers)
            if isinstance(attention, TimeMix):
                state = attention.initial_state(ROWS)
                mixed = attention.mix_with_residual(y, state=state, v_first=values, context=SequenceContext())
                values = mixed.v_first if layer == 0 else values
                mixed = mixed.y
            else:
                mixed = attention.mix(y, state=None, context=SequenceContext()).y
                values = y @ attention.value.weight[...].T if layer == 0 else values
            x = x + mixed
            hidden = jnp.square(jax.nn.relu(block.ln2(x) @ block.ffn.key.weight[...].T))
            x = x + hidden @ block.ffn.value.weight[...].T
        return model.logits(model.ln_out(x))

    expected = jax.jit(by_parts, compiler_options=QUICK)(params)
    found, state = run(config, TOKENS, None)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11)
    assert isinstance(state, HybridState)
    assert (state.attention is None) == (config is ALL)


def test_layers_are_stacked_by_runs_of_equal_ones() -> None:
    names = [(run.name, list(run.layers), run.index) for run in layer_runs("aabbab")]
    assert names == [
        ("first_block", [0], 0),
        ("blocks_1_1", [1], 1),
        ("blocks_2_3", [2, 3], 0),
        ("blocks_4_4", [4], 2),
        ("blocks_5_5", [5], 2),
    ]
    for name, layers, _ in names[1:]:
        assert list(stacked_layers(name, 6)) == layers
    assert [run.name for run in layer_runs("abbb")] == ["first_block", "blocks"]
    assert list(stacked_layers("blocks", 4)) == [1, 2, 3]
    assert set(abstract(ALL)[1]) == set(abstract(TRANSFORMER)[1])


@pytest.mark.parametrize(
    "config",
    [ALL, SOME, FIRST, LLAMA, ModelConfig("7", 50304, 12, 768, architecture="transformer", rwkv_layers=(0, 3, 4, 11))],
)
def test_counts(config: ModelConfig) -> None:
    shapes = abstract(config)[1]
    assert sum(x.size for x in jax.tree.leaves(shapes)) == config.num_parameters()
    plain = dataclasses.replace(config, rwkv_layers=(), **dict.fromkeys(RANKS))
    recurrence = 9 * config.head_dim * config.width
    attention = 2 * config.width * (64 + 1)
    added = config.num_parameters() - plain.num_parameters()
    vectors = config.width * (14 * len(config.rwkv_layers) - (0 in config.rwkv_layers))
    vectors -= len(config.rwkv_layers) * plain.spec.attention_vectors(plain)
    expected = 2 * (added - vectors) + len(config.rwkv_layers) * (recurrence - attention)
    assert config.flops_per_token(64) - plain.flops_per_token(64) == expected
    arrays = [x for layer in range(config.num_layers) for x in config.spec.layer_state(config, layer)]
    with jax.enable_x64(config.dtype == "float64"):
        state = jax.eval_shape(lambda: Transformer.initial_layer_states(config, 1))
    assert [(x.shape[1:], x.dtype.name) for x in jax.tree.leaves(state)] == [(a.shape, a.dtype) for a in arrays]


def test_initial_values_and_groups_are_those_of_both() -> None:
    params = initial_params(SOME)
    shapes = abstract(SOME)[1]
    factors, decays = parameter_groups(shapes, Transformer.parameter_group)
    for part in ("first_block", "blocks_1_2", "blocks_3_3"):
        assert set(jax.tree.leaves(factors[part]["ffn"])) == {1.0}
    att = "att"
    assert factors["blocks_1_2"][att]["w0"] == RWKV7.learning_rate_factors["w0"]
    assert not decays["blocks_1_2"][att]["w1"] and decays["blocks_1_2"][att]["receptance"]["weight"]  # noqa: PT018
    assert not params["blocks_1_2"][att]["output"]["weight"].any()
    assert params["blocks_3_3"][att]["output"]["weight"].std() == pytest.approx(0.02 / np.sqrt(8), rel=0.05)
    rates = rate_factors(shapes, [("blocks.2.att.w0", 0.0), ("blocks.3.*", 3.0)])
    np.testing.assert_array_equal(np.ravel(rates["blocks_1_2"][att]["w0"]), [1.0, 0.0])
    assert set(jax.tree.leaves(rates["blocks_3_3"])) == {3.0}


# State


@pytest.mark.parametrize("config", [*CONFIGS, pytest.param(LLAMA, id="llama")])
def test_prefill_and_decoding_are_the_whole_text(float64: None, config: ModelConfig) -> None:
    """With layers stacked and each by itself, of rows at positions of their own."""
    expected, end = run(config, TOKENS)
    first = [7, 0, 12, 3]
    logits, state = run(config, TOKENS, empty_state(config), np.zeros_like(TOKENS), first)
    model = unstacked(merge(config, jax.tree.map(jnp.asarray, random_params(config))))
    graphdef, params = nnx.split(model)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def by_layers(params: Any, tokens: Array, state: Any, lengths: Array) -> Any:
        return nnx.merge(graphdef, params)(tokens, state, lengths=lengths)

    _, states = by_layers(params, TOKENS, model.initial_state(ROWS), np.asarray(first, np.int32))
    assert len(states) == config.num_layers
    following = np.zeros((ROWS, TIME), np.int32)
    rest = [TIME - length for length in first]
    for row, length in enumerate(first):
        following[row, : rest[row]] = TOKENS[row, length:]
        np.testing.assert_allclose(logits[row, :length], expected[row, :length], rtol=0, atol=1e-11)
    logits, state = run(config, following, state, np.zeros_like(TOKENS), rest)
    of_layers, _ = by_layers(params, following, states, np.asarray(rest, np.int32))
    for row, length in enumerate(first):
        for found in (logits, of_layers):
            np.testing.assert_allclose(found[row, : rest[row]], expected[row, length:], rtol=0, atol=1e-11)
        assert_same_state(config, state, row, end, row)


@pytest.mark.parametrize("config", CONFIGS)
def test_texts_packed_into_a_row_are_each_alone(float64: None, config: ModelConfig) -> None:
    _, state = run(config, TOKENS, empty_state(config), np.zeros_like(TOKENS), [4] * ROWS)
    ends, lengths = [(5, 9, 20), (20,), (1, 2, 3), (6, 12, 20)], [20, 20, 3, 14]
    segments = np.stack([np.searchsorted(own, np.arange(TIME), side="right") for own in ends]).astype(np.int32)
    logits, after = run(config, TOKENS, state, segments, lengths)
    for row in (0, 2, 3):
        begin, before, last = 0, TOKENS[row, :4], state
        for end in (min(end, lengths[row]) for end in ends[row]):
            expected, last = alone(config, np.concatenate([before, TOKENS[row, begin:end]]))
            np.testing.assert_allclose(logits[row, begin:end], expected[len(before) :], rtol=0, atol=1e-11)
            begin, before = end, before[:0]
        assert_same_state(config, after, row, last, 0)


@pytest.mark.parametrize("config", CONFIGS)
def test_nothing_reaches_an_earlier_token_or_another_text(float64: None, config: ModelConfig) -> None:
    params = random_params(config)
    segments = np.repeat([[0, 1]], TIME // 2, axis=1).reshape(1, 2, -1).transpose(0, 2, 1).reshape(1, -1)
    segments = np.sort(segments, axis=1).astype(np.int32)

    def of_inputs(x: Array) -> Array:
        hidden = merge(config, params).hidden(None, inputs_embeds=x, segment_ids=jnp.asarray(segments))[0]
        return jnp.sum(hidden**2, axis=(0, 2))

    x = params["emb"]["weight"][TOKENS[:1]]
    influence = np.abs(jax.jit(jax.jacrev(of_inputs), compiler_options=QUICK)(x)).sum(axis=(1, 3))
    np.testing.assert_array_equal(influence > 0, np.tril(segments[0][:, None] == segments[0]))


def test_a_model_without_attention_has_a_state_of_constant_size_and_no_limit(float64: None) -> None:
    assert ALL.sizes().context_length == 0
    model: Any = merge(ALL, random_params(ALL))
    assert model.room(model.initial_state(2)) is None
    shapes = jax.eval_shape(lambda: model.initial_state(2))
    assert [x.shape for x in jax.tree.leaves(shapes)] == [(3, 2, 32), (3, 2, 4, 8, 8)]


def test_a_cache_beside_states_has_as_much_room_as_any(float64: None) -> None:
    config = dataclasses.replace(SOME, context_length=TIME - 1)
    model: LanguageModel = merge(config, jax.tree.map(jnp.asarray, random_params(config)))
    with pytest.raises(ConfigError, match=r"model.context_length = 19: a state has no room for T = 20 tokens"):
        jax.eval_shape(model, TOKENS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rwkv_layers": (1, 0)}, r"model.rwkv_layers = \(1, 0\): must be layers from 0 to L - 1 = 2, each once"),
        ({"rwkv_layers": (0, 0)}, "each once, in ascending"),
        ({"rwkv_layers": (3,)}, "must be layers from 0 to L - 1 = 2"),
        ({"rwkv_layers": (-1, 1)}, "must be layers from 0 to L - 1 = 2"),
        ({"rwkv_layers": (0, 1, 2), "context_length": 9}, "model.context_length = 9: no layer has attention"),
        ({"rwkv_layers": (1,), "mix_rank": 9}, r"model.mix_rank = 9: Transformer/RWKV-7 hybrid has no such size, only"),
        (
            {"architecture": "llama", "attention_heads": 8, "rwkv_layers": (1,)},
            r"model.rwkv_layers = \(1,\): time mixing has as many heads as fit the width, 32 / 8, and attention 8",
        ),
        ({"decay_rank": 9}, "model.decay_rank = 9: Transformer has no such size, only RWKV-6, 7"),
        (
            {"architecture": "gla", "rwkv_layers": (1,)},
            "GLA has no such choice, only a Transformer and a Llama",
        ),
        (
            {"architecture": "rwkv", "rwkv_layers": (1,)},
            "RWKV-7 has no such choice, only a Transformer and a Llama",
        ),
    ],
)
def test_what_no_hybrid_can_be(fields: dict[str, Any], message: str) -> None:
    sizes = {"vocab_size": 41, "num_layers": 3, "width": 32, "head_dim": 8}
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**{"architecture": "transformer", **sizes, **fields})
