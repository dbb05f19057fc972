"""Initial values against the official trainer's formulas, computed here layer by layer in NumPy."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.typing import NDArray

from rwkv_jax.config import ModelConfig
from rwkv_jax.models import RWKV7
from rwkv_jax.models.layers import orthogonal
from tests.golden import QUICK
from tests.models.parameters import to_official

CONFIG = ModelConfig(
    vocab_size=300,
    num_layers=6,
    width=128,
    head_dim=32,
    ffn_width=512,
    decay_rank=16,
    iclr_rank=24,
    value_rank=8,
    gate_rank=40,
    dtype="float64",
)
LAYERS = range(CONFIG.num_layers)


@functools.partial(jax.jit, compiler_options=QUICK)
def build(key: jax.Array) -> Any:
    return nnx.to_pure_dict(nnx.state(RWKV7(CONFIG, rngs=nnx.Rngs(key)), nnx.Param))


@functools.cache
def initial() -> dict[str, NDArray]:
    """Initial parameters by official name."""
    with jax.enable_x64(True):
        return to_official(build(jax.random.key(0)))


def formulas(layer: int) -> dict[str, NDArray]:
    """What the official trainer gives the vectors of one layer (facts: TTm 510-581), written as it writes them."""
    width, head_dim, layers = CONFIG.width, CONFIG.head_dim, CONFIG.num_layers
    ratio_0_to_1 = layer / (layers - 1)
    ratio_1_to_0 = 1 - layer / layers
    ddd = np.array([i / width for i in range(width)])
    www, zigzag, linear = np.zeros(width), np.zeros(width), np.zeros(width)
    for n in range(width):
        linear[n] = n / (width - 1) - 0.5
        zigzag[n] = ((n % head_dim) - ((head_dim - 1) / 2)) / ((head_dim - 1) / 2)
        zigzag[n] = zigzag[n] * abs(zigzag[n])
        www[n] = -6 + 6 * (n / (width - 1)) ** (1 + 1 * ratio_0_to_1**0.3)
    vectors = {
        "att.x_r": 1 - ddd ** (0.2 * ratio_1_to_0),
        "att.x_w": 1 - ddd ** (0.9 * ratio_1_to_0),
        "att.x_k": 1 - ddd ** (0.7 * ratio_1_to_0),
        "att.x_v": 1 - ddd ** (0.7 * ratio_1_to_0),
        "att.x_a": 1 - ddd ** (0.9 * ratio_1_to_0),
        "att.x_g": 1 - ddd ** (0.2 * ratio_1_to_0),
        "att.w0": www + 0.5 + zigzag * 2.5,
        "att.a0": np.zeros(width) - 0.19 + zigzag * 0.3 + linear * 0.4,
        "att.v0": np.zeros(width) + 0.73 - linear * 0.4,
        "att.k_k": np.zeros(width) + 0.71 - linear * 0.1,
        "att.k_a": np.zeros(width) + 1.02,
        "ffn.x_k": 1 - ddd ** (ratio_1_to_0**4),
    }
    values: dict[str, NDArray] = {name: x.reshape(1, 1, width) for name, x in vectors.items()}
    values["att.r_k"] = np.full((width // head_dim, head_dim), -0.04)
    values["att.ln_x.weight"] = np.full(width, ((1 + layer) / layers) ** 0.7)
    values |= {f"{norm}.weight": np.ones(width) for norm in ("ln1", "ln2")}
    values |= {f"{norm}.bias": np.zeros(width) for norm in ("ln1", "ln2", "att.ln_x")}
    if layer == 0:
        values |= {"ln0.weight": np.ones(width), "ln0.bias": np.zeros(width)}
        del values["att.v0"]
    return values


ZERO = ["att.output.weight", "ffn.value.weight", "att.w1", "att.a1", "att.v1", "att.g1"]
GAINS = {
    "att.receptance.weight": 1.0,
    "att.key.weight": 0.1,
    "att.value.weight": 1.0,
    "ffn.key.weight": 1.0,
    "att.w2": 0.1,
    "att.a2": 0.1,
    "att.v2": 0.1,
    "att.g2": 0.1,
}
"""Of the orthogonal initial values; none of these depends on the matrix's shape."""


def assert_orthogonal(matrix: NDArray, gain: float, atol: float = 1e-9) -> None:
    """The shorter side's vectors all have length gain and stand at right angles."""
    rows, columns = matrix.shape
    gram = matrix @ matrix.T if rows <= columns else matrix.T @ matrix
    np.testing.assert_allclose(gram / gain**2, np.eye(min(rows, columns)), rtol=0, atol=atol)


def of_layer(layer: int) -> dict[str, NDArray]:
    prefix = f"blocks.{layer}."
    return {name.removeprefix(prefix): x for name, x in initial().items() if name.startswith(prefix)}


@pytest.mark.parametrize("layer", LAYERS)
def test_vectors_follow_the_formulas(layer: int) -> None:
    values = of_layer(layer)
    for name, expected in formulas(layer).items():
        np.testing.assert_allclose(values[name], expected, rtol=1e-13, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("layer", LAYERS)
def test_matrices_are_orthogonal_or_zero(layer: int) -> None:
    values = of_layer(layer)
    value_residual = {"att.v0", "att.v1", "att.v2"} if layer == 0 else set()
    for name in ZERO:
        assert name in value_residual or np.all(values[name] == 0), name
    for name, gain in GAINS.items():
        if name not in value_residual:
            assert_orthogonal(values[name], gain)
    assert values.keys() == {*ZERO, *GAINS, *formulas(layer)} - value_residual


def test_outside_the_blocks() -> None:
    values = {name: x for name, x in initial().items() if not name.startswith("blocks.")}
    assert values.keys() == {"emb.weight", "head.weight", "ln_out.weight", "ln_out.bias"}
    assert_orthogonal(values["head.weight"], 0.5 * math.sqrt(300 / 128))
    embedding = values["emb.weight"]
    # Uniform in +-1e-4: within the bounds, up to them, and of that distribution's mean and spread.
    assert 0.999e-4 < np.abs(embedding).max() <= 1e-4
    assert abs(embedding.mean()) < 5 * 1e-4 / math.sqrt(3 * embedding.size)
    np.testing.assert_allclose(embedding.std(), 1e-4 / math.sqrt(3), rtol=0.02)
    assert np.all(values["ln_out.weight"] == 1)
    assert np.all(values["ln_out.bias"] == 0)


def test_no_two_matrices_are_alike() -> None:
    names = [name for name in initial() if name.endswith(("receptance.weight", "att.key.weight", "att.value.weight"))]
    assert len(names) == 3 * CONFIG.num_layers
    matrices = np.stack([initial()[name].ravel() for name in names])
    matrices /= np.linalg.norm(matrices, axis=1, keepdims=True)
    cosines = matrices @ matrices.T - np.eye(len(names))
    assert np.abs(cosines).max() < 6 / CONFIG.width  # chance gives 1 / C


def test_the_seed_decides(float64: None) -> None:
    again, other = (to_official(build(jax.random.key(seed))) for seed in (0, 1))
    for name, x in initial().items():
        np.testing.assert_array_equal(x, again[name])
    drawn = ["emb.weight", "head.weight", *(f"blocks.{layer}.{name}" for layer in LAYERS[1:] for name in GAINS)]
    for name in drawn:
        assert not np.array_equal(initial()[name], other[name]), name


@pytest.mark.parametrize("shape", [(64, 64), (48, 64), (64, 48), (256, 32), (1, 16), (16, 1), (1, 1)], ids=str)
def test_orthogonal_in_float32(shape: tuple[int, int]) -> None:
    for seed in range(5):
        matrix = np.asarray(jax.jit(orthogonal, static_argnums=(1, 2, 3))(jax.random.key(seed), shape, 0.7, "float32"))
        assert matrix.dtype == np.float32
        assert_orthogonal(matrix.astype(np.float64), 0.7, atol=5e-6)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_orthogonal_has_no_preferred_direction_and_never_fails(size: int) -> None:
    # Over uniformly drawn orthogonal matrices every entry has mean 0 and variance 1 / size.
    draws = 4000
    keys = jax.random.split(jax.random.key(0), draws)
    matrices = jax.jit(jax.vmap(lambda key: orthogonal(key, (size, size), 1.0, "float32")), compiler_options=QUICK)(
        keys
    )
    mean, square = jnp.mean(matrices, axis=0), jnp.mean(jnp.square(matrices), axis=0)
    np.testing.assert_allclose(mean, np.zeros((size, size)), atol=5 / math.sqrt(size * draws))
    np.testing.assert_allclose(square, np.full((size, size), 1 / size), atol=5 / math.sqrt(draws))
