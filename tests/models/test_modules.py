"""TimeMix and ChannelMix alone, as one would take them into a model of one's own, and the layers they are made of."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array
from numpy.typing import NDArray

from rwkv_jax.config import ConfigError, ModelConfig
from rwkv_jax.models import model_type, rosa, rwkv4, rwkv5, rwkv6, rwkv7
from rwkv_jax.models.context import SequenceContext
from rwkv_jax.models.layers import HeadNorm, LayerNorm, head_gain, linear, token_shift
from rwkv_jax.models.state import TimeMixState
from tests.golden import QUICK, relative_error
from tests.models.parameters import SMALL, random_like

pytestmark = pytest.mark.usefixtures("float64")

BATCH, TIME, WIDTH, NUM_HEADS, HEAD_DIM = 2, 4, 32, 4, 8
FAMILIES = {"4": rwkv4, "5.0": rwkv5, "5.1": rwkv5, "5.2": rwkv5, "6": rwkv6, "7": rwkv7}
FAMILIES |= {"7-rosa": rwkv7, "8-rosa": rosa}
# Whose time mixing is the same, and whose channel mixing reads tokens.
FAMILIES |= {"7a": rwkv7, "7b": rwkv7, "8-rc00": rwkv7}

every_generation = pytest.mark.parametrize("generation", SMALL)

ModuleT = TypeVar("ModuleT", bound=nnx.Module)
Parameters = dict[str, NDArray]


def randomized(build: Callable[[], ModuleT]) -> ModuleT:
    """The module with random parameters: as initialized, its output is zero."""
    graphdef, params = nnx.split(nnx.eval_shape(build))
    return nnx.merge(graphdef, jax.tree.map(jnp.asarray, random_like(nnx.to_pure_dict(params))))


def parameters_of(module: nnx.Module) -> Parameters:
    """By official name within the module, such as `key.weight`."""
    leaves = jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(x) for path, x in leaves}


@pytest.fixture(scope="module")
def x() -> NDArray:
    return np.random.default_rng(1).standard_normal((BATCH, TIME, WIDTH))


def previous(x: NDArray) -> NDArray:
    return np.concatenate([np.zeros((len(x), 1, WIDTH)), x[:, :-1]], axis=1)


def sigmoid(x: NDArray) -> NDArray:
    return 1 / (1 + np.exp(-x))


@every_generation
@pytest.mark.parametrize("layer", [0, 2])
def test_time_mixing_alone(x: NDArray, generation: str, layer: int) -> None:
    config = SMALL[generation]
    module = randomized(lambda: FAMILIES[generation].TimeMix(config, layer, rngs=nnx.Rngs(0)))
    assert hasattr(module, "v0") == (FAMILIES[generation] is rwkv7 and layer > 0)
    graphdef, params = nnx.split(module)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def call(params: Any, x: Array, state: TimeMixState | None) -> tuple[Array, TimeMixState]:
        return nnx.merge(graphdef, params)(x, state)

    whole, final = call(params, jnp.asarray(x), None)
    assert whole.shape == x.shape
    assert np.all(np.any(np.asarray(whole) != 0, axis=-1))
    np.testing.assert_array_equal(final.shift, x[:, -1])
    first, state = call(params, jnp.asarray(x[:, :2]), None)
    second, state = call(params, jnp.asarray(x[:, 2:]), state)
    assert relative_error(jnp.concatenate([first, second], axis=1), whole) < 1e-12
    empty = model_type(config).initial_block_state(config, BATCH)
    parts = (state.wkv, final.wkv, getattr(empty, "recurrence", empty).wkv)
    for a, b, like in zip(*map(jax.tree.leaves, parts), strict=True):
        assert b.shape == like.shape
        assert relative_error(a, b) < 1e-12


def time_mixing_of_rwkv5(config: ModelConfig, p: Parameters, x: NDArray) -> NDArray:
    """As the dossier has it, token by token; the state is [key, value] and read before it takes the present token."""

    def project(name: str, blend: str) -> NDArray:
        mix = p[f"time_mix_{blend}"]
        return (x * mix + previous(x) * (1 - mix)) @ p[f"{name}.weight"].T

    shape = (BATCH, TIME, NUM_HEADS, HEAD_DIM)
    r, k, v = (project(*names).reshape(shape) for names in (("receptance", "r"), ("key", "k"), ("value", "v")))
    u = np.exp(p["time_first"]) if config.exponential_bonus else p["time_faaaa"]
    w = np.exp(-np.exp(p["time_decay"]))
    u, w = (np.broadcast_to(z.reshape(NUM_HEADS, -1), (NUM_HEADS, HEAD_DIM)) for z in (u, w))
    state, y = np.zeros((BATCH, NUM_HEADS, HEAD_DIM, HEAD_DIM)), np.zeros(shape)
    for t in range(TIME):
        new = k[:, t, :, :, None] * v[:, t, :, None, :]
        y[:, t] = np.einsum("bhn,bhnm->bhm", r[:, t], u[:, :, None] * new + state)
        state = w[:, :, None] * state + new
    y = y / 8
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
    y = y.reshape(BATCH, TIME, WIDTH) * p["ln_x.weight"] + p["ln_x.bias"]
    if config.generation != "5.0":
        g = project("gate", "g")
        y = y * g * sigmoid(g)
    return y @ p["output.weight"].T


@pytest.mark.parametrize("exponential_bonus", [False, True], ids=["faaaa", "exponential"])
@pytest.mark.parametrize("generation", ["5.0", "5.1", "5.2"])
def test_time_mixing_of_the_previews(x: NDArray, generation: str, exponential_bonus: bool) -> None:
    """There are no numbers of other people's for them."""
    if generation == "5.2" and exponential_bonus:
        with pytest.raises(ConfigError, match="exponential_bonus"):
            dataclasses.replace(SMALL[generation], exponential_bonus=True)
        return
    config = dataclasses.replace(SMALL[generation], exponential_bonus=exponential_bonus)
    module = randomized(lambda: rwkv5.TimeMix(config, 1, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(module)
    call = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x)[0], compiler_options=QUICK)
    expected = time_mixing_of_rwkv5(config, parameters_of(module), x)
    assert relative_error(call(params, jnp.asarray(x)), expected) < 1e-12


def channel_mixing(generation: str, p: Parameters, x: NDArray) -> NDArray:
    xx = previous(x) - x
    is_newest = "x_k" in p

    def shifted(name: str) -> NDArray:
        if is_newest:
            return x + xx * p[f"x_{name}"]
        return x + xx * (p[f"time_maa_{name}"] if generation == "6" else 1 - p[f"time_mix_{name}"])

    y = np.maximum(shifted("k") @ p["key.weight"].T, 0) ** 2 @ p["value.weight"].T
    return y if is_newest else sigmoid(shifted("r") @ p["receptance.weight"].T) * y


@pytest.mark.parametrize("generation", [name for name in SMALL if not model_type(SMALL[name]).reads_tokens])
def test_channel_mixing_alone(x: NDArray, generation: str) -> None:
    module = randomized(lambda: FAMILIES[generation].ChannelMix(SMALL[generation], 1, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(module)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def call(params: Any, x: Array, shift: Array | None) -> tuple[Array, Array]:
        return nnx.merge(graphdef, params)(x, shift)

    whole, shift = call(params, jnp.asarray(x), None)
    np.testing.assert_array_equal(shift, x[:, -1])
    expected = channel_mixing(generation, parameters_of(module), x)
    np.testing.assert_allclose(whole, expected, rtol=1e-12, atol=1e-12)
    first, state = call(params, jnp.asarray(x[:, :2]), None)
    second, state = call(params, jnp.asarray(x[:, 2:]), state)
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole, rtol=1e-12, atol=1e-12)


def test_token_shift_gives_the_previous_token(x: NDArray) -> None:
    before = np.random.default_rng(2).standard_normal((BATCH, WIDTH))
    shifted, after = token_shift(jnp.asarray(x), jnp.asarray(before), SequenceContext())
    np.testing.assert_array_equal(shifted[:, 0], before)
    np.testing.assert_array_equal(shifted[:, 1:], x[:, :-1])
    np.testing.assert_array_equal(after, x[:, -1])
    one, after = token_shift(jnp.asarray(x[:, :1]), jnp.asarray(before), SequenceContext())
    np.testing.assert_array_equal(one[:, 0], before)
    np.testing.assert_array_equal(after, x[:, 0])


def test_token_shift_begins_anew_in_a_segment_and_ends_with_the_row(x: NDArray) -> None:
    before = np.random.default_rng(2).standard_normal((BATCH, WIDTH))
    segment_ids, lengths = jnp.asarray([[3, 3, 1, 3], [0, 0, 0, 0]]), jnp.asarray([0, 3])
    shifted, after = token_shift(jnp.asarray(x), jnp.asarray(before), SequenceContext(segment_ids, lengths))
    np.testing.assert_array_equal(shifted[0], [before[0], x[0, 0], np.zeros(WIDTH), np.zeros(WIDTH)])
    np.testing.assert_array_equal(shifted[1], [before[1], x[1, 0], x[1, 1], x[1, 2]])
    np.testing.assert_array_equal(after, [before[0], x[1, 2]])


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


def test_layer_norm(x: NDArray) -> None:
    norm = LayerNorm(WIDTH, "float64")
    norm.weight[...] = jnp.arange(WIDTH) / WIDTH
    norm.bias[...] = jnp.arange(WIDTH) / 7
    shifted = 3 * x + 5
    expected = (shifted - shifted.mean(-1, keepdims=True)) / np.sqrt(shifted.var(-1, keepdims=True) + 1e-5)
    expected = expected * np.arange(WIDTH) / WIDTH + np.arange(WIDTH) / 7
    np.testing.assert_allclose(norm(jnp.asarray(shifted)), expected, rtol=1e-12, atol=1e-12)


def test_head_norm_normalizes_each_head_with_its_own_epsilon(x: NDArray) -> None:
    weight = np.random.default_rng(4).standard_normal(WIDTH)
    heads = 0.01 * x.reshape(BATCH, TIME, NUM_HEADS, HEAD_DIM)  # so small that epsilon counts
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
    module = randomized(lambda: rwkv7.TimeMix(SMALL["7"], 0, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(module)

    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(nnx.merge(graphdef, params)(x)[0]))

    gradient = jax.jit(jax.grad(loss), compiler_options=QUICK)(jnp.zeros((1, 3, WIDTH)))
    assert np.all(np.isfinite(gradient))
