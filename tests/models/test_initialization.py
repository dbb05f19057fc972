"""Initial values against the official trainers' formulas, computed here layer by layer in NumPy.

Every generation is written as its own trainer writes it, in loops over channels and with nothing shared, so that this
is a second opinion; matrices are zero, uniform, or orthogonal times a gain.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from rwkv_jax.config import ConfigError, ModelConfig
from rwkv_jax.models.layers import orthogonal
from tests.golden import QUICK
from tests.models.parameters import SMALL, initial_params, to_official

CONFIGS = SMALL | {"7-unused": dataclasses.replace(SMALL["7"], unused_value_residual=True)}
VOCAB, LAYERS, WIDTH, HEADS, HEAD_DIM, FFN_WIDTH = 41, 3, 32, 4, 8, 48

every_generation = pytest.mark.parametrize("generation", CONFIGS)


@functools.cache
def initial(generation: str, seed: int = 0) -> dict[str, NDArray]:
    """Initial parameters by official name."""
    return to_official(CONFIGS[generation], initial_params(CONFIGS[generation], seed))


def channel_param(values: list[float]) -> NDArray:
    return np.array(values).reshape(1, 1, -1)


class Expected(NamedTuple):
    """What an official trainer gives the parameters of one layer."""

    values: dict[str, NDArray]
    zero: set[str]
    gains: dict[str, float]
    """Of orthogonal matrices."""
    bounds: dict[str, float]
    """Of uniform ones."""


def rwkv4(layer: int) -> Expected:
    """RWKV_Init and the constructors of RWKV-v4/src/model.py, 107-194."""
    ratio_0_to_1 = layer / (LAYERS - 1)
    ratio_1_to_0 = 1.0 - layer / LAYERS
    decay_speed = [-5 + 8 * (h / (WIDTH - 1)) ** (0.7 + 1.3 * ratio_0_to_1) for h in range(WIDTH)]
    zigzag = [((i + 1) % 3 - 1) * 0.5 for i in range(WIDTH)]
    x = [i / WIDTH for i in range(WIDTH)]
    values = {
        "att.time_decay": np.array(decay_speed),
        "att.time_first": np.ones(WIDTH) * math.log(0.3) + np.array(zigzag),
        "att.time_mix_k": channel_param([c**ratio_1_to_0 for c in x]),
        "att.time_mix_v": channel_param([c**ratio_1_to_0 + 0.3 * ratio_0_to_1 for c in x]),
        "att.time_mix_r": channel_param([c ** (0.5 * ratio_1_to_0) for c in x]),
        "ffn.time_mix_k": channel_param([c**ratio_1_to_0 for c in x]),
        "ffn.time_mix_r": channel_param([c**ratio_1_to_0 for c in x]),
    }
    zero = {"att.key", "att.receptance", "att.output", "ffn.value", "ffn.receptance"}
    return Expected(values, zero, {"att.value": 1.0, "ffn.key": math.sqrt(FFN_WIDTH / WIDTH)}, {})


def rwkv5_preview(layer: int, has_gate: bool, exponential_bonus: bool) -> Expected:
    """RWKV_TimeMix_RWKV5_Preview and generate_init_weight of RWKV-v4neo/src/model.py, 139-190 and 913-981."""
    ratio_0_to_1 = layer / (LAYERS - 1)
    ratio_1_to_0 = 1.0 - layer / LAYERS
    x = [i / WIDTH for i in range(WIDTH)]
    values = {
        "att.time_mix_k": channel_param([c**ratio_1_to_0 for c in x]),
        "att.time_mix_v": channel_param([c**ratio_1_to_0 + 0.3 * ratio_0_to_1 for c in x]),
        "att.time_mix_r": channel_param([c ** (0.5 * ratio_1_to_0) for c in x]),
        "att.time_decay": np.array([-6 + 5 * (h / (HEADS - 1)) ** (0.7 + 1.3 * ratio_0_to_1) for h in range(HEADS)]),
        "att.ln_x.weight": np.full(WIDTH, ((1 + layer) / LAYERS) ** 0.7),
        "att.ln_x.bias": np.zeros(WIDTH),
        "ffn.time_mix_k": channel_param([c**ratio_1_to_0 for c in x]),
        "ffn.time_mix_r": channel_param([c**ratio_1_to_0 for c in x]),
    }
    gains = {"att.receptance": 1.0, "att.key": 1.0, "att.value": 1.0, "ffn.key": math.sqrt(FFN_WIDTH / WIDTH)}
    if exponential_bonus:
        values["att.time_first"] = np.ones(HEADS) * -3.0
    else:
        values["att.time_faaaa"] = np.array([ratio_0_to_1 * (1 - h / (HEADS - 1)) for h in range(HEADS)])
    if has_gate:
        values["att.time_mix_g"] = channel_param([c ** (0.5 * ratio_1_to_0) for c in x])
        gains["att.gate"] = 1.0
    return Expected(values, {"att.output", "ffn.value", "ffn.receptance"}, gains, {})


def rwkv5(layer: int) -> Expected:
    """RWKV_TimeMix_RWKV5 and generate_init_weight of RWKV-v5/src/model.py, 241-278 and 1357-1460."""
    ratio_0_to_1 = layer / (LAYERS - 1)
    ratio_1_to_0 = 1.0 - layer / LAYERS
    x = [i / WIDTH for i in range(WIDTH)]
    decay_speed, bonus = np.ones(WIDTH), np.zeros(WIDTH)
    for n in range(WIDTH):
        decay_speed[n] = -6 + 5 * (n / (WIDTH - 1)) ** (0.7 + 1.3 * ratio_0_to_1)
        zigzag = ((n + 1) % 3 - 1) * 0.1
        bonus[n] = ratio_0_to_1 * (1 - (n / (WIDTH - 1))) + zigzag
    values = {
        "att.time_mix_k": channel_param([c**ratio_1_to_0 for c in x]),
        "att.time_mix_v": channel_param([c**ratio_1_to_0 + 0.3 * ratio_0_to_1 for c in x]),
        "att.time_mix_r": channel_param([c ** (0.5 * ratio_1_to_0) for c in x]),
        "att.time_mix_g": channel_param([c ** (0.5 * ratio_1_to_0) for c in x]),
        "att.time_decay": decay_speed.reshape(HEADS, HEAD_DIM),
        "att.time_faaaa": bonus.reshape(HEADS, HEAD_DIM),
        "att.ln_x.weight": np.full(WIDTH, ((1 + layer) / LAYERS) ** 0.7),
        "att.ln_x.bias": np.zeros(WIDTH),
        "ffn.time_mix_k": channel_param([c**ratio_1_to_0 for c in x]),
        "ffn.time_mix_r": channel_param([c**ratio_1_to_0 for c in x]),
    }
    gains = {"att.receptance": 1.0, "att.key": 0.1, "att.value": 1.0, "att.gate": 0.1, "ffn.key": 1.0}
    return Expected(values, {"att.output", "ffn.value", "ffn.receptance"}, gains, {})


def rwkv6(layer: int) -> Expected:
    """RWKV_Tmix_x060, RWKV_CMix_x060 and generate_init_weight of RWKV-v5/src/model.py, 325-369 and 924-940."""
    ratio_0_to_1 = layer / (LAYERS - 1)
    ratio_1_to_0 = 1.0 - layer / LAYERS
    ddd = np.array([i / WIDTH for i in range(WIDTH)])
    decay_speed, bonus = np.ones(WIDTH), np.zeros(WIDTH)
    for n in range(WIDTH):
        decay_speed[n] = -6 + 5 * (n / (WIDTH - 1)) ** (0.7 + 1.3 * ratio_0_to_1)
        zigzag = ((n + 1) % 3 - 1) * 0.1
        bonus[n] = ratio_0_to_1 * (1 - (n / (WIDTH - 1))) + zigzag
    vectors = {
        "att.time_maa_x": 1.0 - ddd**ratio_1_to_0,
        "att.time_maa_w": 1.0 - ddd**ratio_1_to_0,
        "att.time_maa_k": 1.0 - ddd**ratio_1_to_0,
        "att.time_maa_v": 1.0 - (ddd**ratio_1_to_0 + 0.3 * ratio_0_to_1),
        "att.time_maa_r": 1.0 - ddd ** (0.5 * ratio_1_to_0),
        "att.time_maa_g": 1.0 - ddd ** (0.5 * ratio_1_to_0),
        "att.time_decay": decay_speed,
        "ffn.time_maa_k": 1.0 - ddd ** (ratio_1_to_0**3),
        "ffn.time_maa_r": 1.0 - ddd ** (ratio_1_to_0**3),
    }
    values: dict[str, NDArray] = {name: x.reshape(1, 1, WIDTH) for name, x in vectors.items()}
    values["att.time_faaaa"] = bonus.reshape(HEADS, HEAD_DIM)
    values["att.ln_x.weight"] = np.full(WIDTH, ((1 + layer) / LAYERS) ** 0.7)
    values["att.ln_x.bias"] = np.zeros(WIDTH)
    zero = {"att.time_maa_w1", "att.time_decay_w1", "att.output", "ffn.value", "ffn.receptance"}
    gains = {"att.receptance": 1.0, "att.key": 0.1, "att.value": 1.0, "att.gate": 0.1, "ffn.key": 1.0}
    return Expected(values, zero, gains, {"att.time_maa_w2": 0.01, "att.time_decay_w2": 0.01})


def rwkv7(layer: int) -> Expected:
    """RWKV_Tmix_x070, RWKV_CMix_x070 and generate_init_weight of RWKV-v7/train_temp/src/model.py, 510-581, 892-975."""
    ratio_0_to_1 = layer / (LAYERS - 1)
    ratio_1_to_0 = 1 - layer / LAYERS
    ddd = np.array([i / WIDTH for i in range(WIDTH)])
    www, zigzag, linear = np.zeros(WIDTH), np.zeros(WIDTH), np.zeros(WIDTH)
    for n in range(WIDTH):
        linear[n] = n / (WIDTH - 1) - 0.5
        zigzag[n] = ((n % HEAD_DIM) - ((HEAD_DIM - 1) / 2)) / ((HEAD_DIM - 1) / 2)
        zigzag[n] = zigzag[n] * abs(zigzag[n])
        www[n] = -6 + 6 * (n / (WIDTH - 1)) ** (1 + 1 * ratio_0_to_1**0.3)
    vectors = {
        "att.x_r": 1 - ddd ** (0.2 * ratio_1_to_0),
        "att.x_w": 1 - ddd ** (0.9 * ratio_1_to_0),
        "att.x_k": 1 - ddd ** (0.7 * ratio_1_to_0),
        "att.x_v": 1 - ddd ** (0.7 * ratio_1_to_0),
        "att.x_a": 1 - ddd ** (0.9 * ratio_1_to_0),
        "att.x_g": 1 - ddd ** (0.2 * ratio_1_to_0),
        "att.w0": www + 0.5 + zigzag * 2.5,
        "att.a0": np.zeros(WIDTH) - 0.19 + zigzag * 0.3 + linear * 0.4,
        "att.v0": np.zeros(WIDTH) + 0.73 - linear * 0.4,
        "att.k_k": np.zeros(WIDTH) + 0.71 - linear * 0.1,
        "att.k_a": np.zeros(WIDTH) + 1.02,
        "ffn.x_k": 1 - ddd ** (ratio_1_to_0**4),
    }
    values: dict[str, NDArray] = {name: x.reshape(1, 1, WIDTH) for name, x in vectors.items()}
    values["att.r_k"] = np.full((HEADS, HEAD_DIM), -0.04)
    values["att.ln_x.weight"] = np.full(WIDTH, ((1 + layer) / LAYERS) ** 0.7)
    values["att.ln_x.bias"] = np.zeros(WIDTH)
    zero = {"att.w1", "att.a1", "att.v1", "att.g1", "att.output", "ffn.value"}
    gains = {"att.receptance": 1.0, "att.key": 0.1, "att.value": 1.0, "ffn.key": 1.0}
    return Expected(values, zero, gains | {f"att.{name}2": 0.1 for name in "wavg"}, {})


def rwkv7_as_released(layer: int) -> Expected:
    """Without the value residual of the first layer, which nothing reads."""
    expected = rwkv7(layer)
    if layer > 0:
        return expected
    unused = {"att.v0", "att.v1", "att.v2"}
    return Expected(
        {name: x for name, x in expected.values.items() if name not in unused},
        expected.zero - unused,
        {name: gain for name, gain in expected.gains.items() if name not in unused},
        {},
    )


def rosa(layer: int) -> Expected:
    """RWKV_ROSA_1bit of RWKV-v8/260212_rosa1bitLM_L12.py; its output is zero at the start, as those of all others."""
    values = {f"rosa.x_{name}": np.zeros((1, 1, WIDTH)) for name in "qkv"}
    values["rosa.rosa_qkv.emb"] = np.ones((1, 1, WIDTH))
    bounds = {f"rosa.{name}.{part}": 1 / math.sqrt(WIDTH) for name in "qkv" for part in ("weight", "bias")}
    values |= {f"ln3.{part}": np.full(WIDTH, float(part == "weight")) for part in ("weight", "bias")}
    return Expected(values, {"rosa.o.weight", "rosa.o.bias"}, {}, bounds)


def rosa_alone(layer: int) -> Expected:
    """With RWKV-7's channel mixing."""
    mixing, lookups = rwkv7(layer), rosa(layer)
    values = {name: x for name, x in mixing.values.items() if name.startswith("ffn.")}
    return lookups._replace(
        values=lookups.values | values, zero=lookups.zero | {"ffn.value"}, gains={"ffn.key": mixing.gains["ffn.key"]}
    )


def rosa_beside_rwkv7(layer: int) -> Expected:
    """RWKV-v8/251105_reverse_run.py."""
    mixing, lookups = rwkv7_as_released(layer), rosa(layer)
    return Expected(mixing.values | lookups.values, mixing.zero | lookups.zero, mixing.gains, lookups.bounds)


def rc00(layer: int) -> Expected:
    """RWKV-7's, and a table that leaves it as it is: no trainer has been published."""
    expected = rwkv7_as_released(layer)
    return expected._replace(values=expected.values | {"ffn.enn.weight": np.ones((VOCAB, WIDTH))})


def rwkv7a(layer: int) -> Expected:
    """RWKV-7's, and tables that leave it as it is: no trainer has been published."""
    expected, rank = rwkv7_as_released(layer), 3
    values = {"ffn.s_emb.weight": np.tile(np.eye(rank).ravel(), (VOCAB, 1)), "ffn.s0": np.ones((1, 1, FFN_WIDTH))}
    zero = {"ffn.s_emb_x", "ffn.s1"}
    return Expected(expected.values | values, expected.zero | zero, expected.gains | {"ffn.s2": 0.1}, {})


def rwkv7b(layer: int) -> Expected:
    """RWKV-7a's, and an attention that adds nothing: no trainer has been published."""
    expected, sizes = rwkv7a(layer), {"q": 10, "k": 10, "v": WIDTH}
    values = {f"qkv.x_{name}": np.zeros((1, 1, size)) for name, size in sizes.items()}
    values |= {f"qkv.ln{name}.weight": np.full(size, float(name != "v")) for name, size in sizes.items()}
    values |= {f"qkv.ln{name}.bias": np.zeros(size) for name, size in sizes.items()}
    values |= {f"qkv.{name}_emb.weight": np.ones((VOCAB, sizes[name])) for name in "kv"}
    gains = dict.fromkeys(("qkv.qq", "qkv.k1", "qkv.k2", "qkv.v1", "qkv.v2"), 1.0)
    zero = expected.zero | {"qkv.k_emb_x", "qkv.v_emb_x"}
    return Expected(expected.values | values, zero, expected.gains | gains, {})


FORMULAS: dict[str, Callable[[int], Expected]] = {
    "4": rwkv4,
    "5.0": lambda layer: rwkv5_preview(layer, has_gate=False, exponential_bonus=True),
    "5.1": lambda layer: rwkv5_preview(layer, has_gate=True, exponential_bonus=False),
    "5.2": rwkv5,
    "6": rwkv6,
    "7": rwkv7_as_released,
    "7-unused": rwkv7,
    "7-rosa": rosa_beside_rwkv7,
    "8-rosa": rosa_alone,
    "8-rc00": rc00,
    "7a": rwkv7a,
    "7b": rwkv7b,
}


def assert_orthogonal(matrix: NDArray, gain: float, atol: float = 1e-9) -> None:
    """The shorter side's vectors all have length gain and stand at right angles."""
    rows, columns = matrix.shape
    gram = matrix @ matrix.T if rows <= columns else matrix.T @ matrix
    np.testing.assert_allclose(gram / gain**2, np.eye(min(rows, columns)), rtol=0, atol=atol)


def assert_uniform(values: NDArray, bound: float) -> None:
    """Within the bounds, up to them, and of that distribution's mean and spread."""
    deviation = bound / math.sqrt(3)
    assert bound * (1 - 10 / values.size) < np.abs(values).max() <= bound
    assert abs(values.mean()) < 5 * deviation / math.sqrt(values.size)
    np.testing.assert_allclose(values.std(), deviation, rtol=3 / math.sqrt(values.size))


@every_generation
@pytest.mark.parametrize(
    "layer", [0, LAYERS - 1, *(pytest.param(layer, marks=pytest.mark.long) for layer in range(1, LAYERS - 1))]
)
def test_a_layer_follows_the_official_formulas(generation: str, layer: int) -> None:
    prefix = f"blocks.{layer}."
    found = {name.removeprefix(prefix): x for name, x in initial(generation).items() if name.startswith(prefix)}
    expected = FORMULAS[generation](layer)
    norms = ["ln2"] if generation == "8-rosa" else ["ln1", "ln2"]
    norms += ["ln0"] if layer == 0 and generation != "7-rosa" else []
    values = expected.values | {f"{norm}.weight": np.ones(WIDTH) for norm in norms}
    values |= {f"{norm}.bias": np.zeros(WIDTH) for norm in norms}

    def full(name: str) -> str:
        return f"{name}.weight" if f"{name}.weight" in found else name

    zero = {full(name) for name in expected.zero}
    gains = {full(name): gain for name, gain in expected.gains.items()}
    assert sorted(found) == sorted([*values, *zero, *gains, *expected.bounds])
    for name, x in values.items():
        assert found[name].shape == x.shape, name
        np.testing.assert_allclose(found[name], x, rtol=1e-13, atol=1e-14, err_msg=name)
    for name in zero:
        assert np.all(found[name] == 0), name
    for name, gain in gains.items():
        assert_orthogonal(found[name], gain)
    for name, bound in expected.bounds.items():
        assert_uniform(found[name], bound)


@every_generation
def test_outside_the_blocks(generation: str) -> None:
    values = {name: x for name, x in initial(generation).items() if not name.startswith("blocks.")}
    assert values.keys() == {"emb.weight", "head.weight", "ln_out.weight", "ln_out.bias"}
    assert_orthogonal(values["head.weight"], 0.5 * math.sqrt(VOCAB / WIDTH))
    if generation == "4":
        assert_orthogonal(values["emb.weight"], 1e-4 * math.sqrt(max(VOCAB, WIDTH)))
    else:
        assert_uniform(values["emb.weight"], 1e-4)
    assert np.all(values["ln_out.weight"] == 1)
    assert np.all(values["ln_out.bias"] == 0)


def test_the_embedding_of_v4neo_is_uniform_within_its_bound() -> None:
    config = dataclasses.replace(SMALL["4"], embedding_bound=6e-4)
    assert_uniform(to_official(config, initial_params(config))["emb.weight"], 6e-4)
    with pytest.raises(ConfigError, match=r"model.embedding_bound = 0.1: RWKV-7 has no such choice, only RWKV-4"):
        dataclasses.replace(SMALL["7"], embedding_bound=0.1)


def test_the_embedding_of_a_wide_rwkv4() -> None:
    config = dataclasses.replace(SMALL["4"], vocab_size=20)
    values = to_official(config, initial_params(config))
    assert_orthogonal(values["emb.weight"], 1e-4 * math.sqrt(WIDTH))
    assert_orthogonal(values["head.weight"], 0.5)


def drawn(generation: str) -> list[str]:
    """Names of what is random."""
    names = ["emb.weight", "head.weight"]
    for layer in range(LAYERS):
        expected = FORMULAS[generation](layer)
        for name in (*expected.gains, *expected.bounds):
            own = f"blocks.{layer}.{name}"
            names.append(own if own in initial(generation) else f"{own}.weight")
    return names


@every_generation
def test_no_two_matrices_are_alike(generation: str) -> None:
    values = initial(generation)
    by_size: dict[int, list[NDArray]] = {}
    for name in drawn(generation):
        x = values[name].ravel()
        by_size.setdefault(x.size, []).append(x / np.linalg.norm(x))
    for size, vectors in by_size.items():
        cosines = np.stack(vectors) @ np.stack(vectors).T - np.eye(len(vectors))
        assert np.abs(cosines).max() < 6 / math.sqrt(size)  # chance gives 1 / sqrt(size)


@every_generation
def test_the_seed_decides(generation: str) -> None:
    values, other = initial(generation), initial(generation, seed=1)
    for name in drawn(generation):
        assert not np.array_equal(values[name], other[name]), name
    for name, x in to_official(CONFIGS[generation], initial_params(CONFIGS[generation], 1)).items():
        np.testing.assert_array_equal(x, other[name])


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


def test_the_small_models_have_these_sizes() -> None:
    for config in CONFIGS.values():
        assert isinstance(config, ModelConfig)
        sizes = (config.vocab_size, config.num_layers, config.width, config.head_dim, config.sizes().ffn_width)
        assert sizes == (VOCAB, LAYERS, WIDTH, HEAD_DIM, FFN_WIDTH)
