"""What is special to WKV-7: its chunks, the range of its decays, its arguments."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_kernels import dispatch, wkv7
from rwkv_kernels.ops.wkv7 import chunked, pallas
from rwkv_kernels.ops.wkv7.api import log_decay_floor, wkv7_chunked
from rwkv_kernels.ops.wkv7.cases import MODEL_FLOOR, make_inputs
from rwkv_kernels.testing.cases import Shape
from tests.golden import QUICK, assert_close
from tests.kernels.operators import (
    OPERATORS,
    WAYS,
    Results,
    Way,
    as_jax,
    briefly,
    differentiate,
    exactly,
    forward,
    problem,
    reference,
    with_gradients,
)

WKV7 = next(operator for operator in OPERATORS if operator.name == "wkv7")
SHAPE = Shape(2, 70, 2, 8, 6)
each_way = pytest.mark.parametrize("way", [way for way in WAYS if way.operator is WKV7], ids=str)


# The cases themselves


@pytest.mark.parametrize("case", WKV7.cases)
def test_cases_stay_within_what_a_model_can_produce(case: str) -> None:
    inputs = make_inputs(case, SHAPE)
    assert np.all((inputs["log_w"] >= np.float32(MODEL_FLOOR)) & (inputs["log_w"] < 0))
    np.testing.assert_allclose(np.linalg.norm(inputs["a"], axis=-1), 1, rtol=1e-6)
    eta = inputs["b"] / -inputs["a"]
    assert np.all((eta > 0) & (eta < 1 + 1e-6))
    cosine = np.sum(inputs["a"][:, 1:] * inputs["a"][:, :-1], axis=-1)
    assert np.all(cosine > 0.99) == case.startswith("aligned_keys")


# Chunks


@pytest.mark.parametrize("chunk_size", [1, 4, 16, 64])
def test_chunks_of_any_size_give_the_same(float64: None, chunk_size: int) -> None:
    inputs, cotangents = problem(WKV7, "aligned_keys", SHAPE)

    run = functools.partial(wkv7_chunked, chunk_size=chunk_size)
    results = jax.jit(functools.partial(differentiate, run), compiler_options=QUICK)
    assert_close(results(inputs, cotangents, {}), reference(WKV7, "aligned_keys", SHAPE), 1e-12)


def test_gpus_alone_invert_small_blocks_by_products(monkeypatch: pytest.MonkeyPatch) -> None:
    triangle = np.tril(np.random.default_rng(0).normal(size=(2, 32, 32)).astype(np.float32) / 8, k=-1)
    invert = functools.partial(chunked.inverse_of_identity_minus, precision=jax.lax.Precision.HIGHEST)
    traced = jax.jit(invert).trace(triangle)
    texts = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda", "tpu")}
    products = {name: text.count("stablehlo.dot_general") for name, text in texts.items()}
    # Two pairs of blocks of 8 and one of 16 are joined by two products each; blocks of 2, 4, 8 and 16 all at once.
    assert products == {"cpu": 6, "cuda": 8, "tpu": 6}
    assert {name for name, text in texts.items() if "stablehlo.reduce" in text} == {"cpu", "tpu"}

    here = jax.jit(invert, compiler_options=QUICK)(triangle)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arguments, cuda, **_: cuda(*arguments))
    elsewhere = jax.jit(lambda x: invert(x), compiler_options=QUICK)(triangle)
    for inverse in (here, elsewhere):
        product = inverse @ (np.eye(32) - triangle)
        np.testing.assert_allclose(product, np.broadcast_to(np.eye(32), product.shape), atol=1e-5)


@pytest.mark.parametrize("chunk_size", [-4, 0, 3, 12, 48])
def test_chunk_sizes_that_are_no_power_of_two_are_refused(chunk_size: int) -> None:
    with pytest.raises(ValueError, match=rf"chunk_size = {chunk_size}: must be a power of two"):
        wkv7_chunked(**as_jax(make_inputs("realistic", SHAPE), jnp.float32), chunk_size=chunk_size)


def test_the_length_of_a_program_does_not_grow_with_the_sequence() -> None:
    def lines(time: int) -> int:
        inputs = jax.tree.map(jnp.asarray, make_inputs("realistic", SHAPE._replace(time=time)))
        gradient = jax.grad(lambda i: jnp.sum(wkv7(**i, implementation="chunked")[0]))
        return jax.jit(gradient).lower(inputs).as_text().count("\n")

    assert lines(4096) == lines(64)


@pytest.mark.usefixtures("arithmetic")
@each_way
def test_steps_of_zeros_leave_the_state_alone(way: Way) -> None:
    # So a ragged batch may be padded; the chunked form itself pads its last chunk so.
    inputs, _ = way.problem("realistic", SHAPE)
    padded = {name: np.pad(inputs[name], ((0, 0), (0, 30), (0, 0), (0, 0))) for name in WKV7.over_time}
    results = forward(way)(padded | {"state": inputs["state"]}, {})
    within = results | {"y": results["y"][:, : SHAPE.time]}
    assert_close(within, forward(way)(inputs, {}), way.bound)


# The range of decays


def in_float32_and_exactly(way: Way, log_w: float) -> tuple[Results, Results]:
    """Results and gradients in float32 and those of the definition in float64, with one decay for every token."""
    inputs, cotangents = problem(WKV7, "realistic", SHAPE)
    inputs = inputs | {"log_w": np.full_like(inputs["log_w"], log_w)}
    in_float32 = with_gradients(way, quick=way.is_pallas)(*as_jax((inputs, cotangents), jnp.float32), {})
    return in_float32, exactly(WKV7, inputs, cotangents)


@pytest.mark.parametrize(("log_w", "bound"), [(0.0, 5e-6), (MODEL_FLOOR, 1e-5), (log_decay_floor(), 5e-5)])
@pytest.mark.parametrize(
    "way",
    [
        briefly(way, "scan", "chunked", "pallas_triton", "pallas_triton_split", "pallas_mosaic_gpu")
        for way in WAYS
        if way.operator is WKV7
    ],
)
def test_decays_from_one_down_to_the_documented_floor(way: Way, log_w: float, bound: float) -> None:
    # Far below what a model makes, the decay's gradient is a small difference of large sums.
    if way.name.startswith("pallas_mosaic"):  # their chunks are longer, and so their floor is higher
        log_w = max(log_w, log_decay_floor(pallas.MOSAIC_TPU.chunk_size))
    assert_close(*in_float32_and_exactly(way, log_w), bound)


@pytest.mark.parametrize("log_w", [-4.5, -5.4, -20])
@pytest.mark.parametrize("way", [way for way in WAYS if way.operator is WKV7 and not way.is_definition], ids=str)
def test_other_forms_give_nan_and_not_wrong_numbers_below_the_floor(way: Way, log_w: float) -> None:
    results, exact = in_float32_and_exactly(way, log_w)
    for name, values in results.items():
        np.testing.assert_allclose(np.where(np.isnan(values), exact[name], values), exact[name], atol=1e-4)
    if log_w == -20:
        assert all(np.any(np.isnan(values)) for values in results.values())


@pytest.mark.parametrize(
    ("border", "decaying"),
    [
        pytest.param(12, slice(8, 12), id="a segment that ends within the second half"),
        pytest.param(2, slice(3, 8), id="a segment that begins within the first half"),
    ],
)
@pytest.mark.parametrize(
    "way",
    [
        briefly(way, "chunked", "pallas_triton", "pallas_triton_split")
        for way in WAYS
        if way.operator is WKV7 and not way.is_definition
    ],
)
def test_segments_below_the_floor_give_nan_and_not_wrong_numbers(way: Way, border: int, decaying: slice) -> None:
    # Half a chunk decays by e^-88 there, which is no normal number in float32 while e^88 is.
    inputs, cotangents = problem(WKV7, "realistic", Shape(1, 16, 1, 8, 8))
    log_w = np.full_like(inputs["log_w"], -0.01)
    log_w[:, decaying] = -88.0 / len(range(16)[decaying])
    inputs = inputs | {"log_w": log_w}
    options = {"segment_ids": (np.arange(16)[None] >= border).astype(np.int32)}
    inner = WKV7.parts.implementations[way.name].run
    in_chunks = functools.partial(inner, chunk_size=16, **({"interpret": True} if way.is_pallas else {}))
    run = functools.partial(wkv7, implementation=dispatch.Implementation(in_chunks, dispatch.anything))
    compiled = jax.jit(functools.partial(differentiate, run), compiler_options=QUICK)
    results = compiled(*as_jax((inputs, cotangents), jnp.float32), options)
    exact = exactly(WKV7, inputs, cotangents, options)
    for name, values in results.items():
        np.testing.assert_allclose(np.where(np.isnan(values), exact[name], values), exact[name], atol=1e-4)
    assert np.all(np.isnan(results["y"][:, decaying]))
