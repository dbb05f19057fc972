"""The models to compare RWKV with: other people's numbers, states carried, packed and ragged rows, sizes, runs."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array
from numpy.typing import NDArray

from rwkv_jax.config import ConfigError, ModelConfig, ParallelConfig, TrainConfig
from rwkv_jax.config.generations import OTHER_ARCHITECTURES
from rwkv_jax.config.generations.baseline import BaselineSpec
from rwkv_jax.models import deltanet, gated_deltanet, gla, mamba2, model_type
from rwkv_jax.plan.devices import parse_topology
from rwkv_jax.plan.run import plan_run
from rwkv_jax.weights import save_pretrained
from rwkv_jax.weights.tensors import WeightsError
from tests.golden import QUICK, assert_close, load_golden, relative_error
from tests.inference import models as engines
from tests.models.parameters import abstract, in_dtype, merge, named_config, random_params
from tests.small_runs import small_config, train_and_learn

NAMES = [name for name, spec in OTHER_ARCHITECTURES.items() if isinstance(spec, BaselineSpec)]
SIZES: dict[str, Any] = {"num_layers": 2, "width": 16, "head_dim": 8, "ffn_width": 24}
OWN: dict[str, dict[str, Any]] = {"mamba2": {"state_size": 6}}
SMALL = {name: named_config(name, vocab_size=41, dtype="float64", **SIZES, **OWN.get(name, {})) for name in NAMES}
ROWS, TIME = 4, 20
TOKENS: Any = np.random.default_rng(0).integers(0, 41, (ROWS, TIME)).astype(np.int32)
each_baseline = pytest.mark.parametrize("name", NAMES)


# Other people's numbers (tests/golden/mixers/README.md)

OPERATORS: dict[str, Callable[..., tuple[Array, Array]]] = {
    "delta_rule": deltanet.delta_rule,
    "gated_delta_rule": gated_deltanet.gated_delta_rule,
    "gated_linear_attention": gla.gated_linear_attention,
    "state_space_dual": mamba2.state_space_dual,
}


def part_of(golden: dict[str, NDArray], part: str) -> dict[str, NDArray]:
    """Its arrays of one part, in float64."""
    return {name.removeprefix(f"{part}."): x.astype(float) for name, x in golden.items() if name.startswith(f"{part}.")}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_and_their_gradients_are_those_of_flash_linear_attention(float64: None, name: str) -> None:
    golden = load_golden(f"mixers/{name}.npz")
    given, cotangents, expected = (part_of(golden, part) for part in ("in", "ct", "out"))
    given["q"] = given["q"] * (1 if name == "state_space_dual" else given["q"].shape[-1] ** -0.5)  # theirs scale it

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(given: Any) -> Any:
        (y, state), pull_back = jax.vjp(lambda x: OPERATORS[name](**x), given)
        return {"y": y, "state": state}, pull_back((cotangents["y"], cotangents["state"]))[0]

    found, gradients = run(given)
    assert_close(found, expected, 1e-6)
    gradients["q"] = gradients["q"] * (1 if name == "state_space_dual" else given["q"].shape[-1] ** -0.5)
    assert_close(gradients, part_of(golden, "g"), 1e-6)


@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet"])
def test_rates_of_the_delta_rule_may_reach_two(float64: None, name: str) -> None:
    """A text's first token is then written twice as strongly."""
    narrow = SMALL[name]
    params, x = random_params(narrow)["first_block"]["att"], np.random.default_rng(1).standard_normal((1, 1, 16))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def memories(params: Any) -> list[Array]:
        found = []
        for config in (narrow, dataclasses.replace(narrow, negative_eigenvalues=True)):
            mixer: Any = merge(config, random_params(config)).first_block.att
            found.append(nnx.merge(nnx.split(mixer)[0], params)(x).state.memory)
        return found

    first, second = memories(params)
    np.testing.assert_allclose(second, 2 * first, rtol=1e-12)


def nested(flat: dict[str, NDArray]) -> dict[str, Any]:
    """By parts of their names."""
    tree: dict[str, Any] = {}
    for name, x in flat.items():
        *folders, last = name.split(".")
        functools.reduce(lambda node, folder: node.setdefault(folder, {}), folders, tree)[last] = x
    return tree


@each_baseline
def test_mixers_and_their_gradients_are_those_of_others(float64: None, name: str) -> None:
    golden = load_golden(f"mixers/{name}.npz")
    params, (x,), (cotangent,) = part_of(golden, "p"), part_of(golden, "in").values(), part_of(golden, "ct").values()
    kind = model_type(SMALL[name]).block_type.time_mix_type
    module = nnx.eval_shape(lambda: kind(SMALL[name], rngs=nnx.Rngs(0)))
    graphdef, shapes = nnx.split(module, nnx.Param)
    assert jax.tree.map(lambda x: x.shape, nested(params)) == jax.tree.map(lambda x: x.shape, nnx.to_pure_dict(shapes))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params: Any, x: Array) -> Any:
        y, pull_back = jax.vjp(lambda params, x: nnx.merge(graphdef, nested(params))(x).y, params, x)
        return y, pull_back(cotangent)

    y, (gradients, dx) = run(params, x)
    assert_close({"y": y}, part_of(golden, "out"), 1e-6)
    assert_close(gradients | {"x": dx}, part_of(golden, "g"), 1e-6)


# The model with random parameters


@functools.cache
def program(config: ModelConfig) -> Callable[..., tuple[Array, Any]]:
    """(params, tokens, state, segment_ids, lengths) -> logits, state."""

    def call(params: Any, tokens: Array, state: Any, segment_ids: Array, lengths: Array) -> tuple[Array, Any]:
        return merge(config, params)(tokens, state, segment_ids=segment_ids, lengths=lengths)

    return jax.jit(call, compiler_options=QUICK)


def run(name: str, tokens: NDArray, state: Any, segment_ids: NDArray | None = None, lengths: Any = None) -> Any:
    """Logits and state; None is the empty state."""
    config, time = SMALL[name], tokens.shape[1]
    state = merge(config, random_params(config)).initial_state(ROWS) if state is None else state
    segment_ids = np.zeros(tokens.shape, np.int32) if segment_ids is None else segment_ids
    lengths = np.asarray(np.full(ROWS, time) if lengths is None else lengths, np.int32)
    return jax.device_get(program(config)(random_params(config), tokens, state, segment_ids, lengths))


def assert_same_rows(found: Any, expected: Any, row: int) -> None:
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x[:, row], y[:, row], rtol=0, atol=1e-10)


@each_baseline
def test_decoding_packed_and_ragged_rows_are_each_text_alone(float64: None, name: str) -> None:
    expected, end = run(name, TOKENS, None)
    logits, states = [], [None]
    for token in TOKENS.T:
        one, state = run(name, token[:, None], states[-1])
        logits.append(one)
        states.append(state)
    assert relative_error(np.concatenate(logits, axis=1), expected) < 1e-11
    for row in range(ROWS):
        assert_same_rows(states[-1], end, row)

    # Texts end where the ids change, rows where their length says; the first text of a row goes on with the state.
    begun = states[5]
    ends, lengths = [(7, 8, 20), (20,), (1, 3, 20), (9, 20)], np.array([20, 13, 2, 0])
    segment_ids = np.stack([np.searchsorted(own, np.arange(TIME), side="right") for own in ends]).astype(np.int32)
    logits, after = run(name, TOKENS, begun, 5 - segment_ids, lengths)
    begin, state = np.zeros(ROWS, int), begun
    for number in range(3):
        stop = np.array(
            [min(own[number] if number < len(own) else 20, length) for own, length in zip(ends, lengths, strict=True)]
        )
        length = np.maximum(stop - begin, 0)
        tokens = np.stack([np.roll(row, -first) for row, first in zip(TOKENS, begin, strict=True)])
        alone, state = run(name, tokens, state if number == 0 else None, lengths=length)
        for row in range(ROWS):
            if length[row]:
                found = logits[row, begin[row] : stop[row]]
                np.testing.assert_allclose(found, alone[row, : length[row]], rtol=0, atol=1e-10)
            if stop[row] == lengths[row] and (length[row] or number == 0):
                assert_same_rows(after, state, row)
        begin = np.maximum(stop, begin)
    assert np.all(begin == lengths)


@each_baseline
def test_sizes_states_and_parts(name: str) -> None:
    config = dataclasses.replace(SMALL[name], dtype="bfloat16")
    kind, (_, params) = model_type(config), abstract(config)
    assert sum(x.size for x in jax.tree.leaves(params)) == config.num_parameters()
    # A multiply and an add for each matrix entry, and something for the recurrence.
    assert config.flops_per_token() > 2 * (config.num_parameters() - 41 * 16) - 1000
    for path, x in jax.tree.leaves_with_path(params):
        names = tuple(entry.key for entry in path)
        ndim = x.ndim - (names[0] == "blocks")
        assert len(kind.parameter_axes(names)) == ndim
        assert kind.parameter_group(names, ndim) == (1.0, names[-1] == "weight" and ndim == 2)
    with jax.numpy_dtype_promotion("strict"):
        before = jax.eval_shape(lambda: merge(config, params).initial_state(ROWS))
        logits, after = program(config).eval_shape(params, TOKENS, before, TOKENS, jnp.zeros(ROWS, jnp.int32))
    assert (logits.dtype, after) == (jnp.float32, before)
    rwkv = ModelConfig(vocab_size=512, num_layers=4, width=256, dtype="bfloat16")
    equal = rwkv.of_equal_size(config.architecture)
    assert (equal.spec.name, equal.num_layers, equal.width, equal.dtype) == (name, 4, 256, "bfloat16")
    assert equal.num_parameters() == pytest.approx(rwkv.num_parameters(), rel=0.02)


BOUNDS: dict[str, dict[str, tuple[float, float]]] = {
    "gla": {"a0": (0, 0)},
    "mamba2": {
        "log_rate": (0, np.log(16)),
        "time_step": (np.log(np.expm1(0.001)), np.log(np.expm1(0.1))),
        "skip": (1, 1),
        "input.weight": (-1 / 8, 1 / 8),
        "output.weight": (-1 / np.sqrt(128 * 4), 1 / np.sqrt(128 * 4)),
        "convolution.bias": (-1 / 2, 1 / 2),
    },
    "deltanet": {"convolution.weight": (-1 / 2, 1 / 2), "ln_x.weight": (1, 1)},
    "gated_deltanet": {
        "log_rate": (np.log(1e-6), np.log(16)),
        "time_step": (np.log(np.expm1(0.001)), np.log(np.expm1(0.1))),
    },
    "rnn": {"recurrent.weight": (-1 / 8, 1 / 8), "input_bias": (-1 / 8, 1 / 8)},
    "lstm": {"input.weight": (-1 / 8, 1 / 8), "recurrent_bias": (-1 / 8, 1 / 8)},
}
"""Of initial values of mixers of width 64 in models of two layers, which fill them but for a fifth."""


@each_baseline
def test_initial_values(name: str) -> None:
    config = named_config(name, num_layers=2, width=64, head_dim=2)
    kind = model_type(config).block_type.time_mix_type

    def draw(key: Array) -> Any:
        return nnx.to_pure_dict(nnx.state(kind(config, rngs=nnx.Rngs(key)), nnx.Param))

    drawn = jax.jit(draw, compiler_options=QUICK)(jax.random.key(0))
    flat = {jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in jax.tree.leaves_with_path(drawn)}
    for parameter, (low, high) in BOUNDS[name].items():
        x = np.asarray(flat[parameter], np.float64)
        assert low - 1e-4 <= x.min() <= x.max() <= high + 1e-4, parameter
        if parameter == "log_rate":
            x, low, high = np.exp(x), np.exp(low), np.exp(high)
        fifth = (high - low) / 5
        assert low == high or (x.max() > high - fifth and x.min() < low + fifth), parameter
    if name != "mamba2":  # GPT-2's, as the Transformer has it where the residual stream is written
        assert np.std(flat["output.weight"]) == pytest.approx(0.02 / 2, rel=0.05)


# Runs and engines


@each_baseline
def test_what_it_cannot_do_is_refused(name: str, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL[name], dtype="float32")
    a_title = config.spec.a_title
    changes: list[tuple[dict[str, Any], str]] = [
        ({"parallel": ParallelConfig(tensor=2)}, f"parallel.tensor = 2: {a_title} is not split over heads"),
        ({"parallel": ParallelConfig(sequence=2)}, f"parallel.sequence = 2: {a_title} is not split over time"),
    ]
    for change, message in changes:
        with pytest.raises(ConfigError, match=re.escape(message)):
            TrainConfig(model=config, **change)
    with pytest.raises(ConfigError, match=f"model.generation = '6': {a_title} has no generations"):
        dataclasses.replace(config, generation="6")
    model = merge(config, in_dtype(random_params(config), config))
    with pytest.raises(WeightsError, match=f"only RWKV's weights have official names; {a_title} stays in its run"):
        save_pretrained(model, tmp_path / "x.safetensors")


@pytest.mark.long
@each_baseline
def test_a_run_learns_and_writes_samples(tmp_path: Path, name: str) -> None:
    model = named_config(name, vocab_size=300, num_layers=2, width=32, head_dim=16)
    config = small_config(model, tmp_path)
    train_and_learn(dataclasses.replace(config, training=dataclasses.replace(config.training, carry_state=True)))


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "rnn" else pytest.mark.long) for n in NAMES])
def test_it_writes_through_the_engine_and_is_planned(tmp_path: Path, name: str) -> None:
    config = named_config(name, vocab_size=engines.VOCAB_SIZE, **SIZES)
    engine = engines.quick_engine(engines.random_model(config))
    options: dict[str, Any] = {"max_tokens": 9, "sampling": engines.GREEDY, "stop_ids": ()}
    completion = engine.generate(engines.IDS, **options)
    expected = engines.whole_logits(config, engines.IDS + completion.ids)
    assert completion.ids == tuple(expected[len(engines.IDS) - 1 : -1].argmax(axis=-1).tolist())
    session = engine.session()
    session.append(engines.IDS)
    session.save(tmp_path / "state.safetensors")
    assert engine.load_session(tmp_path / "state.safetensors").generate(**options).ids == completion.ids
    run = TrainConfig(model=dataclasses.replace(config, vocab_size=256))
    plan = plan_run(dataclasses.replace(run, training=dataclasses.replace(run.training, sequence_length=32)), CPU)
    assert plan.fits
    assert plan.work.model_flops > 0


CPU = parse_topology("cpu:1")
