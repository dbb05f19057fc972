"""The whole model: state in and out, causality, precision, remat, initial values, arguments."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

from rwkv_jax.config import ModelConfig
from rwkv_jax.models import RWKV7
from rwkv_jax.training.loss import sum_losses
from tests.golden import QUICK, assert_close, relative_error
from tests.models.parameters import SMALL, abstract, in_dtype, merge, random_params, to_official

TOKENS = np.random.default_rng(0).integers(0, SMALL.vocab_size, (2, 40))
FLOAT32 = dataclasses.replace(SMALL, dtype="float32")


@functools.cache
def run(config: ModelConfig) -> Any:
    """Compiled (params, tokens, state) -> logits, state."""
    return jax.jit(lambda params, tokens, state=None: merge(config, params)(tokens, state), compiler_options=QUICK)


@functools.cache
def loss_and_gradients(config: ModelConfig, remat: bool = False, chunk: int | None = None) -> Callable[..., Any]:
    """(params, tokens) -> mean loss of the next token and its gradients."""

    def loss(params: Any, tokens: Array) -> Array:
        model = merge(config, params)
        hidden, _ = model.hidden(tokens[:, :-1], remat=remat)
        total = sum_losses(model.logits, hidden, tokens[:, 1:], chunk=chunk)
        return (total.nll + 1e-2 * total.peak) / total.count

    return jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)


# State


def test_shapes_of_the_state() -> None:
    layers, batch, width = SMALL.num_layers, 4, SMALL.width
    state = merge(FLOAT32, in_dtype(random_params(FLOAT32), FLOAT32)).initial_state(batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype.name), state._asdict()) == {
        "att_shift": ((layers, batch, width), "float32"),
        "ffn_shift": ((layers, batch, width), "float32"),
        "wkv": ((layers, batch, SMALL.num_heads, SMALL.head_dim, SMALL.head_dim), "float32"),
    }
    assert not any(np.any(x) for x in state)


@pytest.mark.parametrize(
    "config", [SMALL, FLOAT32, dataclasses.replace(SMALL, dtype="bfloat16")], ids=lambda config: config.dtype
)
def test_the_next_state_has_the_shapes_and_dtypes_of_the_first(config: ModelConfig) -> None:
    # So that a loop over tokens is one program.
    with jax.enable_x64(config.dtype == "float64"):
        params = in_dtype(random_params(config), config)
        first = merge(config, params).initial_state(2)
        logits, state = run(config).eval_shape(params, TOKENS[:, :1], first)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), first)
    assert state.wkv.dtype == config.parameter_dtype
    assert logits.dtype == config.parameter_dtype


def test_no_state_is_the_initial_state(float64: None) -> None:
    params = random_params(SMALL)
    without, _ = run(SMALL)(params, TOKENS)
    empty, _ = run(SMALL)(params, TOKENS, merge(SMALL, params).initial_state(2))
    np.testing.assert_array_equal(without, empty)


@pytest.mark.parametrize("lengths", [(1, 4), (2, 3), (3, 2), (4, 1), (1, 1, 1, 1, 1), (2, 1, 2)], ids=str)
def test_a_text_may_be_split_anywhere(float64: None, lengths: tuple[int, ...]) -> None:
    params, tokens = random_params(SMALL), TOKENS[:, :5]
    whole, final = run(SMALL)(params, tokens)
    pieces, state, start = [], merge(SMALL, params).initial_state(2), 0
    for length in lengths:
        logits, state = run(SMALL)(params, tokens[:, start : start + length], state)
        pieces.append(logits)
        start += length
    assert relative_error(np.concatenate(pieces, axis=1), whole) < 1e-12
    assert_close(state._asdict(), final._asdict(), 1e-12)


def test_rows_of_a_batch_do_not_see_each_other(float64: None) -> None:
    params = random_params(SMALL)
    changed = TOKENS.copy()
    changed[1] = TOKENS[1, ::-1]
    before, after = (run(SMALL)(params, tokens)[0] for tokens in (TOKENS, changed))
    np.testing.assert_array_equal(before[0], after[0])
    assert np.all(np.any(np.asarray(before[1] != after[1]), axis=-1)[:-1])


# Causality


def test_a_token_depends_on_no_later_one(float64: None) -> None:
    """By gradient: of the logits at t with respect to the embedding of the token at s, which occurs nowhere else."""
    tokens = jnp.arange(7)[None]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def gradients(params: Any) -> Array:
        def logits(embedding: Array) -> Array:
            changed = params | {"emb": {"weight": embedding}}
            return jnp.sum(merge(SMALL, changed)(tokens)[0] * weights, axis=(0, 2))

        weights = jax.random.normal(jax.random.key(0), (1, 7, SMALL.vocab_size))
        return jax.jacrev(logits)(params["emb"]["weight"])

    size = np.abs(np.asarray(gradients(random_params(SMALL)))).max(axis=-1)  # [t, token]
    np.testing.assert_array_equal(size[:, :7] > 0, np.tri(7, dtype=bool))
    assert not np.any(size[:, 7:])


# Different ways to the same numbers


@pytest.mark.parametrize(
    ("config", "remat", "chunk"),
    [
        pytest.param(dataclasses.replace(SMALL, wkv_implementation="scan"), False, None, id="scan"),
        pytest.param(SMALL, True, 16, id="remat-and-chunked-loss"),
    ],
)
def test_loss_and_gradients_do_not_depend_on_how_they_are_computed(
    float64: None, config: ModelConfig, remat: bool, chunk: int | None
) -> None:
    params = random_params(SMALL)
    loss, gradients = loss_and_gradients(SMALL)(params, TOKENS)
    other_loss, other_gradients = loss_and_gradients(config, remat, chunk)(params, TOKENS)
    assert relative_error(other_loss, loss) < 1e-12
    assert_close(to_official(other_gradients), to_official(gradients), 1e-11)
    assert all(np.any(x) for x in to_official(gradients).values())


def test_remat_keeps_less_for_the_backward_pass() -> None:
    config = dataclasses.replace(FLOAT32, num_layers=12)
    tokens = jnp.zeros((8, 256), jnp.int32)

    def kept(remat: bool) -> int:
        def hidden(params: Any) -> Array:
            return merge(config, params).hidden(tokens, remat=remat)[0]

        return sum(
            x.size for x in jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(hidden, p)[1], abstract(config)[1]))
        )

    block_inputs = config.num_layers * tokens.size * config.width
    assert block_inputs < kept(remat=True) < 3 * block_inputs < kept(remat=False) / 3


def test_bfloat16_is_close_to_float32_and_keeps_its_memory_in_float32() -> None:
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    params = in_dtype(random_params(FLOAT32), FLOAT32)
    exact, exact_state = run(FLOAT32)(params, TOKENS)
    logits, state = run(config)(params, TOKENS)
    assert logits.dtype == jnp.float32
    assert (state.att_shift.dtype, state.ffn_shift.dtype, state.wkv.dtype) == ("bfloat16", "bfloat16", "float32")
    # Three layers of operands that are rounded to 8 bits.
    assert 1e-4 < relative_error(logits, exact) < 3e-2
    assert relative_error(state.wkv, exact_state.wkv) < 3e-2


# A new model


def test_every_branch_starts_at_zero() -> None:
    """So the first logits are those of the embedding, normalised twice."""

    def build(key: Array) -> Any:
        return nnx.to_pure_dict(nnx.state(RWKV7(FLOAT32, rngs=nnx.Rngs(key)), nnx.Param))

    params = jax.jit(build, compiler_options=QUICK)(jax.random.key(0))
    logits, _ = run(FLOAT32)(params, TOKENS)

    def normalise(x: np.ndarray) -> np.ndarray:
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)

    embedding = np.asarray(params["emb"]["weight"], np.float64)[TOKENS]
    expected = normalise(normalise(embedding)) @ np.asarray(params["head"]["weight"], np.float64).T
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        ModelConfig(vocab_size=300, num_layers=2, width=64),
        ModelConfig(vocab_size=8192, num_layers=7, width=768, gate_rank=96),
        ModelConfig(vocab_size=65536, num_layers=61, width=4096, ffn_width=3 * 4096),
    ],
    ids=lambda config: f"L{config.num_layers}-D{config.width}",
)
def test_the_number_of_parameters_is_the_closed_form(config: ModelConfig) -> None:
    shapes = jax.tree.leaves(abstract(config)[1])
    assert sum(x.size for x in shapes) == config.num_parameters()
    assert {x.dtype.name for x in shapes} == {config.parameter_dtype}


# Arguments


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((2, 3), np.float32), r"tokens: float32 of shape \(2, 3\) must be integers of shape \[B, T\]"),
        (np.zeros(3, np.int32), r"tokens: int32 of shape \(3,\) must be integers of shape \[B, T\]"),
        (np.zeros((1, 2, 3), np.int32), r"tokens: int32 of shape \(1, 2, 3\) must be integers"),
    ],
)
def test_wrong_tokens_are_named(tokens: np.ndarray, message: str) -> None:
    model = merge(FLOAT32, in_dtype(random_params(FLOAT32), FLOAT32))
    with pytest.raises(ValueError, match=message):
        model(jnp.asarray(tokens))


def test_an_unknown_implementation_is_refused() -> None:
    config = dataclasses.replace(FLOAT32, wkv_implementation="cuda")
    model = merge(config, in_dtype(random_params(config), config))
    with pytest.raises(ValueError, match="implementation = 'cuda': wkv7 has scan, associative_scan, chunked"):
        model(jnp.asarray(TOKENS))


@pytest.mark.long  # without jit every operation is compiled by itself
def test_a_model_is_a_module_that_can_be_called() -> None:
    config = dataclasses.replace(FLOAT32, num_layers=2)
    model = RWKV7(config, rngs=nnx.Rngs(0))
    logits, state = model(jnp.asarray(TOKENS[:, :3]))
    more, _ = model(jnp.asarray(TOKENS[:, 3:4]), state)
    whole, _ = model(jnp.asarray(TOKENS[:, :4]))
    np.testing.assert_allclose(jnp.concatenate([logits, more], axis=1), whole, rtol=0, atol=1e-5)
