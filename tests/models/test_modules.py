"""TimeMix and ChannelMix alone, as one would take them into a model of one's own, and the layers they are made of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rwkv_jax.models.layers import HeadNorm, LayerNorm, head_gain, linear, token_shift
from rwkv_jax.models.rwkv7 import ChannelMix, TimeMix, TimeMixState
from tests.golden import QUICK, relative_error
from tests.models.parameters import SMALL, random_like

pytestmark = pytest.mark.usefixtures("float64")

BATCH, TIME, WIDTH = 2, 4, SMALL.width
HEADS = (BATCH, SMALL.num_heads, SMALL.head_dim, SMALL.head_dim)


ModuleT = TypeVar("ModuleT", bound=nnx.Module)


def randomised(build: Callable[[], ModuleT]) -> ModuleT:
    """The module with random parameters: as initialised, its output is zero."""
    graphdef, params = nnx.split(nnx.eval_shape(build))
    return nnx.merge(graphdef, jax.tree.map(jnp.asarray, random_like(nnx.to_pure_dict(params))))


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((BATCH, TIME, WIDTH))


@pytest.mark.parametrize("layer", [0, 2])
def test_time_mixing_alone(x: np.ndarray, layer: int) -> None:
    module = randomised(lambda: TimeMix(SMALL, layer, rngs=nnx.Rngs(0)))
    assert hasattr(module, "v0") == (layer > 0)
    graphdef, params = nnx.split(module)
    compiled = jax.jit(lambda params, x, state: nnx.merge(graphdef, params)(x, state), compiler_options=QUICK)
    call = functools.partial(compiled, params)
    whole, final = call(x, None)
    assert whole.shape == x.shape
    assert np.all(np.any(np.asarray(whole) != 0, axis=-1))
    assert (final.shift.shape, final.wkv.shape) == ((BATCH, WIDTH), HEADS)
    np.testing.assert_array_equal(final.shift, x[:, -1])

    empty = TimeMixState(jnp.zeros((BATCH, WIDTH)), jnp.zeros(HEADS))
    np.testing.assert_array_equal(call(x, empty)[0], whole)
    first, state = call(x[:, :2], empty)
    second, state = call(x[:, 2:], state)
    assert relative_error(jnp.concatenate([first, second], axis=1), whole) < 1e-12
    assert relative_error(state.wkv, final.wkv) < 1e-12


@pytest.mark.parametrize("layer", [0, 2])
def test_channel_mixing_alone(x: np.ndarray, layer: int) -> None:
    module = randomised(lambda: ChannelMix(SMALL, layer, rngs=nnx.Rngs(0)))
    whole, shift = module(jnp.asarray(x))
    np.testing.assert_array_equal(shift, x[:, -1])
    np.testing.assert_array_equal(module(jnp.asarray(x), jnp.zeros((BATCH, WIDTH)))[0], whole)

    x_k, key, value = (np.asarray(p[...]) for p in (module.x_k, module.key.weight, module.value.weight))
    previous = np.concatenate([np.zeros((BATCH, 1, WIDTH)), x[:, :-1]], axis=1)
    expected = np.maximum((x + (previous - x) * x_k) @ key.T, 0) ** 2 @ value.T
    np.testing.assert_allclose(whole, expected, rtol=1e-12, atol=1e-12)

    first, state = module(jnp.asarray(x[:, :2]))
    second, state = module(jnp.asarray(x[:, 2:]), state)
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole, rtol=1e-12, atol=1e-12)


def test_token_shift_gives_the_previous_token(x: np.ndarray) -> None:
    before = np.random.default_rng(2).standard_normal((BATCH, WIDTH))
    previous, after = token_shift(jnp.asarray(x), jnp.asarray(before))
    np.testing.assert_array_equal(previous[:, 0], before)
    np.testing.assert_array_equal(previous[:, 1:], x[:, :-1])
    np.testing.assert_array_equal(after, x[:, -1])
    one, after = token_shift(jnp.asarray(x[:, :1]), jnp.asarray(before))
    np.testing.assert_array_equal(one[:, 0], before)
    np.testing.assert_array_equal(after, x[:, 0])


@pytest.mark.parametrize("shape", [(WIDTH,), (TIME, WIDTH), (BATCH, TIME, WIDTH)], ids=str)
def test_linear_maps_take_any_leading_axes(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(3)
    x, weight = rng.standard_normal(shape), rng.standard_normal((7, WIDTH))
    np.testing.assert_allclose(linear(jnp.asarray(x), jnp.asarray(weight)), x @ weight.T, rtol=1e-12, atol=1e-12)


def test_linear_maps_multiply_in_the_dtype_of_their_input() -> None:
    x, weight = jnp.full((3, 4), 0.1, jnp.bfloat16), jnp.full((2, 4), 0.1, jnp.float32)
    assert linear(x, weight).dtype == jnp.bfloat16
    wide = linear(x, weight, out_dtype=jnp.dtype(jnp.float32))
    assert wide.dtype == jnp.float32
    # Operands are rounded to bfloat16, the sum is not.
    np.testing.assert_allclose(wide, np.full((3, 2), 4 * float(jnp.bfloat16(0.1)) ** 2), rtol=1e-6)


def test_layer_norm(x: np.ndarray) -> None:
    norm = LayerNorm(WIDTH, "float64")
    norm.weight[...] = jnp.arange(WIDTH) / WIDTH
    norm.bias[...] = jnp.arange(WIDTH) / 7
    shifted = 3 * x + 5
    expected = (shifted - shifted.mean(-1, keepdims=True)) / np.sqrt(shifted.var(-1, keepdims=True) + 1e-5)
    expected = expected * np.arange(WIDTH) / WIDTH + np.arange(WIDTH) / 7
    np.testing.assert_allclose(norm(jnp.asarray(shifted)), expected, rtol=1e-12, atol=1e-12)


def test_head_norm_normalises_each_head_with_its_own_epsilon(x: np.ndarray) -> None:
    weight = np.random.default_rng(4).standard_normal(WIDTH)
    heads = 0.01 * x.reshape(BATCH, TIME, SMALL.num_heads, SMALL.head_dim)  # so small that epsilon counts
    expected = (heads - heads.mean(-1, keepdims=True)) / np.sqrt(heads.var(-1, keepdims=True) + 64e-5)
    norm = HeadNorm(jnp.asarray(weight), 64e-5)
    np.testing.assert_allclose(norm(jnp.asarray(heads)), expected.reshape(x.shape) * weight, rtol=1e-12, atol=1e-12)


def test_norms_of_bfloat16_are_computed_in_float32() -> None:
    # In bfloat16 the mean of these, 1000.5, would be 1000 and the variance wrong.
    x = jnp.asarray([[1000.0, 1008.0] * 8], jnp.bfloat16)
    y = LayerNorm(16, "float32")(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, jnp.asarray([[-1.0, 1.0] * 8], jnp.bfloat16))


@pytest.mark.parametrize(("vocab_size", "width", "gain"), [(400, 100, 1.0), (100, 100, 0.5), (50, 100, 0.5)])
def test_head_gain(vocab_size: int, width: int, gain: float) -> None:
    assert head_gain(vocab_size, width) == pytest.approx(gain)


def test_a_key_of_zeros_has_finite_gradients() -> None:
    # kappa = k / |k| of a head whose key is zero, as after a token of zeros.
    module = randomised(lambda: TimeMix(SMALL, 0, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(module)

    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(nnx.merge(graphdef, params)(x)[0]))

    gradient = jax.jit(jax.grad(loss), compiler_options=QUICK)(jnp.zeros((1, 3, WIDTH)))
    assert np.all(np.isfinite(gradient))
