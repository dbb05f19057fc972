"""One token of RWKV-7's heads: the kernel and the XLA form against the equations in float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.sharding import use_abstract_mesh
from numpy.typing import NDArray

import rwkv_kernels
from rwkv_kernels import dispatch, wkv7_step
from rwkv_kernels.ops.wkv7 import cases
from rwkv_kernels.ops.wkv7.step import PER_HEAD, PER_TOKEN, RESIDUAL, STEP
from rwkv_kernels.ops.wkv7.step_pallas_triton import wkv7_step_pallas_triton
from rwkv_kernels.testing.cases import Shape
from tests.golden import QUICK
from tests.kernels.test_lowering import mesh_of

# From JAX 0.11 on, each use says so; it works as before.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

Inputs = dict[str, Any]
CONSTANTS: dict[str, Any] = {"epsilon": 64e-5, "decay_scale": -math.exp(-0.5)}  # the model's
INTERPRETED = dispatch.Implementation(functools.partial(wkv7_step_pallas_triton, interpret=True), dispatch.anything)
WAYS = {"xla": "xla", "pallas_triton": INTERPRETED}
LENGTHS = np.array([1, 0, 1], np.int32)
each_way = pytest.mark.parametrize("way", WAYS)


def make_inputs(batch: int, heads: int, size: int, case: str = "realistic", *, residual: bool = True) -> Inputs:
    """Arguments by name as float64 arrays whose values float32 holds exactly."""
    inputs = cases.make_step_inputs(case, Shape(batch, 1, heads, size, size))
    return {name: x for name, x in inputs.items() if residual or name not in RESIDUAL}


def sigmoid(x: NDArray) -> NDArray:
    return 1 / (1 + np.exp(-x))


def equations(inputs: Inputs, lengths: NDArray | None = None, rate_scale: float = 1.0) -> tuple[NDArray, NDArray]:
    """RWKV-7's equations 4 to 22 for a token in NumPy, for each row and head by itself."""
    outputs, states = np.zeros_like(inputs["v"]), np.array(inputs["state"])
    for row, head in np.ndindex(outputs.shape[:2]):
        one = {
            name: x[row, head] if name in ("state", "v_first", "nu", *PER_TOKEN) else x[head]
            for name, x in inputs.items()
        }
        eta = rate_scale * sigmoid(one["a0"] + one["a"])
        kappa = one["k"] * one["k_k"]
        kappa = kappa / max(np.linalg.norm(kappa), 1e-12)
        k, v = one["k"] * (1 + (eta - 1) * one["k_a"]), one["v"]
        if "v0" in one:
            v = v + (one["v_first"] - v) * sigmoid(one["v0"] + one["nu"])
        y = np.zeros_like(v)
        if lengths is None or lengths[row]:
            decay = np.exp(-np.exp(-0.5) * sigmoid(one["w0"] + one["w"]))
            transition = np.diag(decay) - np.outer(kappa, eta * kappa)
            states[row, head] = one["state"] @ transition + np.outer(v, k)
            y = states[row, head] @ one["r"]
        norm = (y - y.mean()) / np.sqrt(y.var() + CONSTANTS["epsilon"]) * one["weight"] + one["bias"]
        outputs[row, head] = (norm + np.sum(one["r"] * one["r_k"] * k) * v) * one["g"]
    return outputs, states


def run(
    way: str, inputs: Inputs, dtype: Any = jnp.float32, lengths: NDArray | None = None, **options: float
) -> tuple[NDArray, NDArray]:
    """o and the next state; the state and parameters are kept in at least float32, as by a model that is trained."""
    kept = ("state", "v0", *PER_HEAD)
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    arrays = {name: jnp.asarray(x, wide if name in kept else dtype) for name, x in inputs.items()}
    step = functools.partial(wkv7_step, **CONSTANTS, **options, implementation=WAYS[way])
    o, state = jax.jit(step)(**arrays, lengths=lengths)
    assert o.dtype == dtype
    assert state.dtype == wide
    return np.asarray(o, np.float64), np.asarray(state, np.float64)


def error(x: NDArray, exact: NDArray) -> float:
    return float(np.linalg.norm(x - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("sizes", [(1, 1, 32), (3, 2, 64), (1, 5, 128), (2, 3, 16)], ids=str)
@each_way
def test_a_token_is_what_the_equations_say(way: str, sizes: tuple[int, int, int], residual: bool) -> None:
    inputs = make_inputs(*sizes, residual=residual)
    for found, exact in zip(run(way, inputs), equations(inputs), strict=True):
        assert error(found, exact) < 1e-6


@each_way
def test_a_learning_rate_of_up_to_two(way: str) -> None:
    inputs = make_inputs(2, 2, 16)
    for found, exact in zip(run(way, inputs, rate_scale=2.0), equations(inputs, rate_scale=2.0), strict=True):
        assert error(found, exact) < 1e-6


@pytest.mark.parametrize("case", cases.CASES)
def test_the_kernel_is_right_where_the_operator_is_hard(case: str) -> None:
    inputs = make_inputs(2, 2, 32, case)
    for found, exact in zip(run("pallas_triton", inputs), equations(inputs), strict=True):
        assert error(found, exact) < 2e-6


def test_a_key_of_zero_removes_nothing() -> None:
    inputs = make_inputs(1, 2, 32)
    inputs["k"] = np.zeros_like(inputs["k"])
    for found, exact in zip(run("pallas_triton", inputs), equations(inputs), strict=True):
        assert error(found, exact) < 1e-6


def test_the_xla_form_has_float64(float64: None) -> None:
    inputs = make_inputs(2, 3, 24)
    for found, exact in zip(run("xla", inputs, jnp.float64, LENGTHS[:2]), equations(inputs, LENGTHS), strict=True):
        assert error(found, exact) < 1e-14


@each_way
def test_only_the_output_is_rounded_to_bfloat16(way: str) -> None:
    inputs = make_inputs(2, 2, 64)
    rounded = {name: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for name, x in inputs.items()}
    rounded |= {name: inputs[name] for name in ("state", "v0", *PER_HEAD)}
    (o, state), (exact, exact_state) = run(way, inputs, jnp.bfloat16), equations(rounded)
    np.testing.assert_allclose(o, exact, rtol=2**-8, atol=1e-5)
    assert error(state, exact_state) < 1e-6


@each_way
def test_a_row_of_length_zero_keeps_its_state_to_the_bit_whatever_it_holds(way: str) -> None:
    inputs = make_inputs(3, 2, 32)
    (o, state), (exact, exact_state) = run(way, inputs, lengths=LENGTHS), equations(inputs, LENGTHS)
    assert error(o, exact) < 1e-6
    assert error(state, exact_state) < 1e-6
    np.testing.assert_array_equal(state[1], inputs["state"][1])
    inputs = {name: np.array(x) for name, x in inputs.items()}
    for name in ("v_first", "nu", *PER_TOKEN):
        inputs[name][1] = np.nan
    np.testing.assert_array_equal(run(way, inputs, lengths=LENGTHS)[1], state)


def test_gradients_are_those_of_the_definition(float64: None) -> None:
    inputs = make_inputs(2, 2, 32)
    cotangents = np.random.default_rng(3).standard_normal((2, 2, 32)), np.ones((2, 2, 32, 32))

    def gradients(way: str, dtype: Any) -> Inputs:
        arrays, dresults = jax.tree.map(lambda x: jnp.asarray(x, dtype), (inputs, cotangents))
        step = functools.partial(wkv7_step, **CONSTANTS, lengths=jnp.asarray(LENGTHS[:2]), implementation=WAYS[way])

        def pull_back(arrays: Inputs) -> Inputs:
            return jax.vjp(lambda x: step(**x), arrays)[1](dresults)[0]

        return jax.jit(pull_back, compiler_options=QUICK)(arrays)

    exact = gradients("xla", jnp.float64)
    for name, found in gradients("pallas_triton", jnp.float32).items():
        assert error(np.asarray(found, np.float64), np.asarray(exact[name])) < 5e-6, name


# The choice


def test_the_kernel_runs_only_where_it_can_and_is_named() -> None:
    assert rwkv_kernels.implementations("wkv7_step") == ("xla", "pallas_triton")
    explained = rwkv_kernels.explain("wkv7_step", (64, 1, 32, 64), platform="gpu")
    assert explained.chosen == "xla"
    assert explained.refusals["pallas_triton"] is None
    for size in (96, 256):
        refusal = rwkv_kernels.explain("wkv7_step", (64, 1, 32, size), platform="gpu").refusals["pallas_triton"]
        assert f"powers of two up to 128, and this one is {size}" in (refusal or "")
    assert "float64" in (STEP.implementations["pallas_triton"].refuses(problem(dtype="float64")) or "")
    assert "an NVIDIA GPU" in (STEP.implementations["pallas_triton"].refuses(problem(platform="cpu")) or "")


def problem(platform: str = "gpu", dtype: str = "float32") -> dispatch.Problem:
    return dispatch.Problem(platform, (1, 1, 2, 64, 64), dtype)


def test_wrong_arguments_are_named() -> None:
    inputs = jax.tree.map(jnp.float32, make_inputs(2, 2, 8))
    for changed, message in (
        ({"r": inputs["r"][:, None]}, r"r: shape \(2, 1, 2, 8\) must be \[B H N\]"),
        ({"g": inputs["g"][..., :4]}, r"g: shape \(2, 2, 4\) does not go with r"),
        ({"bias": inputs["bias"].reshape(16)}, r"bias: shape \(16,\) must be \[H N\]"),
        ({"state": inputs["state"][:1]}, r"state: shape \(1, 2, 8, 8\) must be \(2, 2, 8, 8\)"),
        ({"lengths": jnp.array([1, 2])}, "lengths: values from 1 to 2 must lie from 0 to T = 1"),
        ({"decay_scale": 0.6}, r"decay_scale = 0\.6: scales the log of a decay, so it is at most 0"),
        ({"rate_scale": 2.5}, r"rate_scale = 2\.5: must be above 0 and at most 2, or the state would grow"),
        ({"nu": None, "v0": None}, "nu, v0: goes with v_first; give all of a residual or none"),
        ({"v0": inputs["v0"][:1]}, r"v0: shape \(1, 8\) does not go with r"),
        ({"implementation": "cuda"}, "implementation = 'cuda': wkv7_step has xla, pallas_triton"),
    ):
        with pytest.raises(ValueError, match=message):
            wkv7_step(**(CONSTANTS | inputs | changed))


# For an NVIDIA GPU


def lowered(function: Callable[..., Any], size: int, dtype: Any) -> str:
    arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), make_inputs(4, 2, size))
    arrays["state"] = jax.ShapeDtypeStruct(arrays["state"].shape, jnp.float32)
    return jax.jit(function).trace(arrays).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("size", [32, 128])
def test_the_kernel_is_lowered_and_writes_the_state_in_place(size: int, dtype: Any) -> None:
    named = dispatch.Implementation(wkv7_step_pallas_triton, dispatch.anything)
    with use_abstract_mesh(mesh_of("pallas_triton")):
        text = lowered(lambda x: wkv7_step(**x, **CONSTANTS, implementation=named), size, dtype)
    assert text.count("custom_call") == 1
    assert "output_operand_alias<output_tuple_indices = [1], operand_index = 0" in text


def test_heads_are_split_by_shard_map() -> None:
    named = dispatch.Implementation(wkv7_step_pallas_triton, dispatch.anything)

    def shard(inputs: Inputs) -> Any:
        return wkv7_step(**inputs, **CONSTANTS, implementation=named)

    def sharded(inputs: Inputs) -> Any:
        specs = {name: P("data") if x.ndim > 2 else P() for name, x in inputs.items()}
        mesh = jax.sharding.get_abstract_mesh()
        return jax.shard_map(shard, mesh=mesh, in_specs=(specs,), out_specs=P("data"))(inputs)

    with use_abstract_mesh(mesh_of("pallas_triton")):
        assert "custom_call" in lowered(sharded, 32, jnp.bfloat16)
