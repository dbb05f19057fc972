"""Language models of ROSA of random weights against other people's numbers, and what the shared suites do not ask."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

from rwkv_jax.config import ConfigError, ModelConfig, ParallelConfig, TrainConfig
from rwkv_jax.models.context import MeshAxes, SequenceContext
from rwkv_jax.models.rosa import TimeMix
from rwkv_jax.weights.pretrained import from_pretrained, save_pretrained
from tests.golden import AS_USERS, GOLDEN_DIR, QUICK, load_golden, relative_error
from tests.models.parameters import SMALL, initial_params, merge, random_params
from tests.models.small_models import TOKENS, segments_of

GOLDEN = load_golden("rosa/models_s0.npz")
MODELS = {"lm1": "rosa1bitLM_s0", "lm4": "rosa4bitLM_s0"}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("float64", 1e-13)])
def test_logits_are_those_of_the_official_models(name: str, dtype: Any, bound: float) -> None:
    with jax.enable_x64(dtype == "float64"):
        model = from_pretrained(GOLDEN_DIR / "rosa" / f"{MODELS[name]}.safetensors", dtype=dtype)
        assert model.config.sizes().rosa_bits == int(name[2:])  # which the file's name tells, and nothing else
        assert model.config.unused_norms
        graphdef, params = nnx.split(model, nnx.Param)
        options = QUICK if dtype == "float64" else AS_USERS
        run = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens)[0], compiler_options=options)
        logits = run(params, GOLDEN[f"{name}.tokens"])
    assert relative_error(logits, GOLDEN[f"{name}.logits"]) < bound


@pytest.mark.parametrize("generation", [pytest.param("7-rosa", marks=pytest.mark.long), "8-rosa"])
def test_the_host_gives_the_same_loss_and_gradient(float64: None, generation: str) -> None:
    """Also of texts packed in a row, and where layers are computed again."""
    segment_ids = np.stack([segments_of(7, 13), segments_of(20), segments_of(1, 19), segments_of(10, 10)])
    params = random_params(SMALL[generation])

    def loss(params: Any, implementation: Any, remat: Any) -> Array:
        config = dataclasses.replace(SMALL[generation], rosa_window=32, rosa_implementation=implementation)
        hidden, _ = merge(config, params).hidden(jnp.asarray(TOKENS), segment_ids=jnp.asarray(segment_ids), remat=remat)
        return jnp.sum(jnp.sin(hidden))

    def of(implementation: str | None, remat: str) -> Any:
        return jax.jit(jax.value_and_grad(lambda params: loss(params, implementation, remat)), compiler_options=QUICK)(
            params
        )

    (value, gradients), (expected, others) = of("host", "full"), of(None, "none")
    assert relative_error(value, expected) < 1e-12
    for path, x in jax.tree.leaves_with_path(gradients):
        other = others
        for entry in path:
            other = other[entry.key]
        assert relative_error(x, other) < 1e-11, path
    assert np.any(np.asarray(gradients["blocks"]["rosa"]["q"]["weight"]) != 0)
    assert np.any(np.asarray(gradients["first_block"]["rosa"]["k"]["weight"]) != 0)


@pytest.mark.parametrize("generation", ["7-rosa", "8-rosa"])
def test_time_is_not_split(generation: str) -> None:
    model = ModelConfig(generation, width=32, head_dim=8)
    with pytest.raises(ConfigError, match=r"parallel.sequence = 2: the lookups of RWKV-. .* are not split over time"):
        TrainConfig(model=model, parallel=ParallelConfig(sequence=2))
    config = dataclasses.replace(SMALL[generation], dtype="float32")
    mixer = nnx.eval_shape(lambda: TimeMix(config, 1, rngs=nnx.Rngs(0)))
    context = SequenceContext(axes=MeshAxes(sequence="time"))
    with pytest.raises(ConfigError, match=r"axes.sequence = 'time': .* not split over time"):
        mixer.mix(jnp.zeros((1, 2, 32)), state=mixer.initial_state(1), context=context)


def test_symbols_are_not_cut() -> None:
    model = ModelConfig("8-rosa", width=36, rosa_bits=4)
    with pytest.raises(ConfigError, match=r"parallel.tensor = 2: would cut symbols of model.rosa_bits = 4 channels"):
        TrainConfig(model=model, parallel=ParallelConfig(tensor=2))


def test_files_say_how_many_bits_a_symbol_has(tmp_path: Path) -> None:
    config = ModelConfig("8-rosa", vocab_size=29, num_layers=2, width=32, rosa_bits=2)
    model = merge(config, jax.tree.map(jnp.asarray, initial_params(config)))
    save_pretrained(model, tmp_path / "model.safetensors")
    assert from_pretrained(tmp_path / "model.safetensors").config.sizes().rosa_bits == 2
