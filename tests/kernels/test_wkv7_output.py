"""Norm, bonus and gate after WKV-7: kernels and XLA form against the equations in float64, with all gradients."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.sharding import use_abstract_mesh
from numpy.typing import NDArray

import rwkv_kernels
from rwkv_kernels import dispatch, wkv7_output
from rwkv_kernels.ops.wkv7.output_pallas_triton import wkv7_output_pallas_triton
from tests.golden import QUICK
from tests.kernels.test_lowering import mesh_of

# From JAX 0.11 on, each use says so; it works as before.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

Arrays = dict[str, Any]
EPSILON = 64e-5  # the model's
INTERPRETED = dispatch.Implementation(functools.partial(wkv7_output_pallas_triton, interpret=True), dispatch.anything)
WAYS = {"xla": "xla", "pallas_triton": INTERPRETED}
PARAMETERS = ("r_k", "weight", "bias")
SHAPES = [(1, 1, 1, 64), (3, 23, 2, 32), (2, 24, 1, 128), (1, 257, 2, 64)]
each_way = pytest.mark.parametrize("way", WAYS)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def make_inputs(shape: tuple[int, int, int, int], dtype: Any = jnp.float32) -> tuple[Arrays, NDArray]:
    """Arguments by name and the result's cotangent in float64, as values of their dtypes; parameters are float32."""
    rng = np.random.default_rng([*shape])
    inputs = {name: rng.standard_normal(shape) for name in ("y", "r", "k", "v", "g")}
    inputs |= {name: rng.standard_normal(shape[2:]) for name in PARAMETERS}
    inputs["y"][:, :1, :, 1:] *= 1e-3  # a head of little variance beside epsilon
    inputs["y"] += 3.0
    rounded = {name: np.asarray(jnp.asarray(x, dtype_of(name, dtype)), np.float64) for name, x in inputs.items()}
    return rounded, np.asarray(jnp.asarray(rng.standard_normal(shape), dtype), np.float64)


def dtype_of(name: str, dtype: Any) -> Any:
    return jnp.float32 if name in PARAMETERS and dtype == jnp.bfloat16 else dtype


def equations(y: Any, r: Any, k: Any, v: Any, g: Any, r_k: Any, weight: Any, bias: Any) -> Any:
    """RWKV-7's equations 20 to 22, differentiated by JAX for the reference."""
    mean = y.mean(-1, keepdims=True)
    norm = (y - mean) / jnp.sqrt(((y - mean) ** 2).mean(-1, keepdims=True) + EPSILON)
    return (norm * weight[None, None] + bias[None, None] + (r * k * r_k[None, None]).sum(-1, keepdims=True) * v) * g


def results(function: Any, inputs: Arrays, do: Any) -> Arrays:
    """The result and all gradients, by name."""

    def run(inputs: Arrays, do: Any) -> Arrays:
        o, pull_back = jax.vjp(lambda inputs: function(**inputs), inputs)
        return {"o": o} | {f"d{name}": x for name, x in pull_back(do)[0].items()}

    return jax.jit(run, compiler_options=QUICK)(inputs, do)


def exactly(inputs: Arrays, do: NDArray) -> dict[str, NDArray]:
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, results(equations, inputs, do))


def by(way: str, inputs: Arrays, do: NDArray, dtype: Any) -> Arrays:
    arrays = {name: jnp.asarray(x, dtype_of(name, dtype)) for name, x in inputs.items()}
    function = functools.partial(wkv7_output, epsilon=EPSILON, implementation=WAYS[way])
    found = results(function, arrays, jnp.asarray(do, dtype))
    assert found["o"].dtype == dtype
    assert all(found[f"d{name}"].dtype == x.dtype for name, x in arrays.items())
    return {name: np.asarray(x, np.float64) for name, x in found.items()}


@each_shape
@each_way
def test_values_and_gradients_are_what_the_equations_say(way: str, shape: tuple[int, int, int, int]) -> None:
    inputs, do = make_inputs(shape)
    exact = exactly(inputs, do)
    for name, found in by(way, inputs, do, jnp.float32).items():
        assert np.linalg.norm(found - exact[name]) < 3e-6 * np.linalg.norm(exact[name]), name


@each_way
def test_in_bfloat16_results_are_rounded_once(way: str) -> None:
    inputs, do = make_inputs((2, 37, 2, 64), jnp.bfloat16)
    exact = exactly(inputs, do)
    for name, found in by(way, inputs, do, jnp.bfloat16).items():
        kept = name[1:] in PARAMETERS
        bound = 3e-6 if kept else 2**-8
        assert np.linalg.norm(found - exact[name]) < bound * np.linalg.norm(exact[name]), name
        if not kept:
            largest = np.abs(exact[name]).max()
            np.testing.assert_allclose(found, exact[name], rtol=2**-8, atol=1e-5 * largest, err_msg=name)


def test_the_xla_form_has_float64(float64: None) -> None:
    inputs, do = make_inputs((2, 3, 2, 24), jnp.float64)
    for name, found in by("xla", inputs, do, jnp.float64).items():
        np.testing.assert_allclose(found, exactly(inputs, do)[name], rtol=1e-10, atol=1e-12, err_msg=name)


def test_a_long_sequence_adds_up_the_gradients_of_parameters() -> None:
    """Several programs, each with several tiles, and a last tile that is not full."""
    inputs, do = make_inputs((1, 1277, 1, 128))
    exact = exactly(inputs, do)
    for name, found in by("pallas_triton", inputs, do, jnp.float32).items():
        assert np.linalg.norm(found - exact[name]) < 3e-6 * np.linalg.norm(exact[name]), name


# The choice


def test_the_kernels_run_only_where_they_can_and_are_named() -> None:
    assert rwkv_kernels.implementations("wkv7_output") == ("xla", "pallas_triton")
    assert rwkv_kernels.explain("wkv7_output", (8, 4096, 12, 64), platform="gpu").chosen == "xla"
    refusals = [
        rwkv_kernels.explain("wkv7_output", (8, 4096, 8, size), dtype, platform).refusals["pallas_triton"] or ""
        for size, dtype, platform in ((64, "float32", "cpu"), (64, "float64", "gpu"), (96, "float32", "gpu"))
    ]
    for refusal, reason in zip(refusals, ("an NVIDIA GPU", "float64", "this one is 96"), strict=True):
        assert reason in refusal


def test_wrong_arguments_are_named() -> None:
    inputs = jax.tree.map(jnp.float32, make_inputs((2, 3, 2, 8))[0])
    for changed, message in (
        ({"y": inputs["y"][0]}, r"y: shape \(3, 2, 8\) must be \[B T H N\]"),
        ({"g": inputs["g"].reshape(2, 3, 16)}, r"g: shape \(2, 3, 16\) must be \[B T H N\]"),
        ({"r_k": inputs["r_k"][:1]}, r"r_k: shape \(1, 8\) does not go with y"),
        ({"implementation": "pallas_triton"}, "wkv7_output cannot run it here"),
    ):
        with pytest.raises(ValueError, match=message):
            wkv7_output(**(inputs | changed), epsilon=EPSILON)


# For an NVIDIA GPU


@pytest.mark.parametrize("split", [False, True], ids=["whole", "shard_map"])
@pytest.mark.parametrize("size", [32, 128])
def test_gradients_are_lowered(size: int, split: bool) -> None:
    named = dispatch.Implementation(wkv7_output_pallas_triton, dispatch.anything)
    arrays = {
        name: jax.ShapeDtypeStruct(x.shape, dtype_of(name, jnp.bfloat16))
        for name, x in make_inputs((2, 70, 2, size), jnp.bfloat16)[0].items()
    }

    def total(inputs: Arrays) -> jax.Array:
        return jnp.sum(wkv7_output(**inputs, epsilon=EPSILON, implementation=named).astype(jnp.float32))

    def loss(inputs: Arrays) -> jax.Array:
        specs = {name: P() if name in PARAMETERS else P("data") for name in inputs}
        mesh = jax.sharding.get_abstract_mesh()
        summed = jax.shard_map(lambda x: jax.lax.psum(total(x), "data"), mesh=mesh, in_specs=(specs,), out_specs=P())
        return summed(inputs)

    with use_abstract_mesh(mesh_of("pallas_triton")):
        traced = jax.jit(jax.grad(loss if split else total)).trace(arrays)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "wkv7_output_backward" in text
