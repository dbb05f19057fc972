"""What is timed and what is counted when a model is measured."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest

from rwkv_jax.bench import measure
from rwkv_jax.bench.measure import Timing, cache_bytes, latency, memory, state_bytes, throughput, weights_format
from rwkv_jax.bench.random_model import NumberTokenizer, random_model
from rwkv_jax.config import ConfigError, ModelConfig
from rwkv_jax.inference.engine.engine import Engine, EngineOptions
from rwkv_jax.models import model_type
from tests.golden import QUICK
from tests.models.parameters import named_config

SMALL: dict[str, Any] = {"vocab_size": 50, "num_layers": 2, "width": 16, "head_dim": 8}
CONFIGS = [named_config(name, **SMALL) for name in ("4", "5.0", "5.2", "6", "7", "transformer")]


@pytest.fixture(scope="module")
def engine() -> Engine:
    with mock.patch.object(jax, "jit", functools.partial(jax.jit, compiler_options=QUICK)):
        options = EngineOptions(num_slots=2, batch_sizes=(2,), prefill_length=8, short_prefill_length=4, burst_length=4)
        return Engine(random_model(ModelConfig(**SMALL)), NumberTokenizer(50), options)


class Clock:
    """Each look at it is a second later than the one before."""

    def __init__(self) -> None:
        self.looks = 0

    def perf_counter(self) -> float:
        self.looks += 1
        return float(self.looks)


def test_latency_is_of_whole_bursts_after_each_context(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    stream = engine.stream

    def noted(prompts: Any, **arguments: Any) -> Any:
        start = arguments.get("state")
        if start is not None:
            started.append(start.num_tokens)
            assert arguments["max_tokens"] == 1 + 8
        return stream(prompts, **arguments)

    monkeypatch.setattr(engine, "stream", noted)
    monkeypatch.setattr(measure, "time", Clock())
    found = latency(engine, [9, 3, 9], num_tokens=5, repetitions=2)
    assert found == {3: Timing((1 / 8, 1 / 8)), 9: Timing((1 / 8, 1 / 8))}
    assert started == [3, 9] * 3  # in turn; the first of each is not counted


def test_throughput_is_of_all_texts_at_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "time", Clock())
    assert throughput({1: engine, 2: engine}, num_tokens=4, repetitions=3) == {
        1: Timing((0.25,) * 3),
        2: Timing((0.25,) * 3),
    }


def test_the_median() -> None:
    assert Timing((3.0, 1.0, 9.0)).median == 3


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.generation)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_bytes_are_those_of_the_arrays(config: ModelConfig, dtype: Any) -> None:
    config = ModelConfig(config.generation, dtype=dtype, **SMALL)
    state = jax.eval_shape(lambda: model_type(config).initial_block_state(config, 1))
    in_arrays = config.num_layers * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert state_bytes(config) == in_arrays


def test_memory_of_a_model() -> None:
    config = ModelConfig(**SMALL)
    use = memory(random_model(config), [10, 100])
    assert use.parameters == {"float32": 4 * config.num_parameters()}
    # Two inputs of 16 channels, and two heads of 8 x 8, in each of two layers.
    assert use.state == use.state_expected == 2 * (2 * 16 + 2 * 64) * 4
    assert use.logits == 4 * 50
    # A key and a value of 16 channels a token, in each of two layers.
    assert use.caches == {10: 2 * 2 * 16 * 10 * 4, 100: 2 * 2 * 16 * 100 * 4}
    assert cache_bytes(config.transformer_of_equal_size(), 100) == use.caches[100]


def test_memory_of_packed_weights() -> None:
    config = ModelConfig(vocab_size=50, num_layers=2, width=64)
    use = memory(random_model(config, "int8"), [1])
    assert {"int8", "float32"} <= use.parameters.keys()
    assert next(iter(use.parameters)) == "int8"
    assert use.parameters["float32"] < 4 * config.num_parameters() * 0.2
    np.testing.assert_equal(use.state, use.state_expected)


@pytest.mark.parametrize(
    ("dtype", "quantize", "held"),
    [
        ("float32", None, "float32"),
        ("bfloat16", None, "bfloat16"),
        ("float32", "bfloat16", "bfloat16"),
        ("float32", "int8", "int8"),
        ("float32", "int4", "int4"),
    ],
)
def test_how_matrices_are_held_is_seen_from_the_parameters(dtype: Any, quantize: Any, held: str) -> None:
    config = ModelConfig(vocab_size=50, num_layers=2, width=64, dtype=dtype)
    assert weights_format(random_model(config, quantize)) == held


def test_what_cannot_be_measured_is_said(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="contexts = : must be at least 1"):
        latency(engine, [])
    with pytest.raises(ConfigError, match="contexts = 4 0: must be at least 1"):
        memory(engine.model, [4, 0])
    with pytest.raises(ConfigError, match="num_tokens = 0: must be at least 1"):
        latency(engine, [1], num_tokens=0)
    with pytest.raises(ConfigError, match="repetitions = 0: must be at least 1"):
        throughput({1: engine}, repetitions=0)
    with pytest.raises(ConfigError, match="batch size 3: the engine has 2 slots; build it with more"):
        throughput({1: engine, 3: engine})
