"""What is special to WKV-7: its chunks, the range of its decays, its arguments."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_kernels import dispatch, wkv7, wkv7_step
from rwkv_kernels.wkv7 import IMPLEMENTATIONS, LOG_DECAY_FLOOR, implementations, wkv7_chunked
from rwkv_kernels.wkv7.cases import MODEL_FLOOR, Shape, make_inputs
from tests.golden import QUICK, assert_close, relative_error
from tests.kernels.operators import OPERATORS, as_jax, at, differentiate, forward, problem, reference, with_gradients

WKV7 = next(operator for operator in OPERATORS if operator.name == "wkv7")
SHAPE = Shape(1, 70, 2, 8, 6)
SMALL = Shape(2, 4, 3, 6, 5)


def small_inputs() -> dict[str, Any]:
    return as_jax(make_inputs("realistic", SMALL), jnp.float32)


# The equation, and the cases themselves


def test_the_definition_is_the_equation_of_the_paper() -> None:
    """S <- S (diag(w) + a b^T) + v k^T, y = S r, written with matrices, in NumPy, one row and head at a time."""
    inputs, _ = problem(WKV7, "realistic", SMALL)
    with jax.enable_x64(True):
        y, final = (np.asarray(x) for x in forward(WKV7, "scan")(inputs))
    for row in range(SMALL.batch):
        for head in range(SMALL.heads):
            state = inputs["state"][row, head]
            for t in range(SMALL.time):
                r, log_w, k, v, a, b = (inputs[name][row, t, head] for name in WKV7.over_time)
                state = state @ (np.diag(np.exp(log_w)) + np.outer(a, b)) + np.outer(v, k)
                np.testing.assert_allclose(y[row, t, head], state @ r, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(final[row, head], state, rtol=1e-12, atol=1e-12)


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
    assert_close(results(inputs, cotangents), reference(WKV7, "aligned_keys", SHAPE), 1e-12)


@pytest.mark.parametrize("chunk_size", [-4, 0, 3, 12, 48])
def test_chunk_sizes_that_are_no_power_of_two_are_refused(chunk_size: int) -> None:
    with pytest.raises(ValueError, match=rf"chunk_size = {chunk_size}: must be a power of two"):
        wkv7_chunked(**small_inputs(), chunk_size=chunk_size)


def test_the_length_of_a_program_does_not_grow_with_the_sequence() -> None:
    def lines(time: int) -> int:
        inputs = jax.tree.map(jnp.asarray, make_inputs("realistic", SHAPE._replace(time=time)))
        gradient = jax.grad(lambda i: jnp.sum(wkv7(**i, implementation="chunked")[0]))
        return jax.jit(gradient).lower(inputs).as_text().count("\n")

    assert lines(4096) == lines(64)


@pytest.mark.parametrize("implementation", WKV7.implementations)
def test_steps_of_zeros_leave_the_state_alone(float64: None, implementation: str) -> None:
    # So a ragged batch may be padded; the chunked form itself pads its last chunk so.
    inputs, _ = problem(WKV7, "realistic", SHAPE)
    padded = {name: np.pad(inputs[name], ((0, 0), (0, 30), (0, 0), (0, 0))) for name in WKV7.over_time}
    run = forward(WKV7, implementation)
    y, state = run(inputs)
    padded_y, padded_state = run(padded | {"state": inputs["state"]})
    assert relative_error(padded_y[:, : SHAPE.time], y) < 1e-13
    assert relative_error(padded_state, state) < 1e-13


# The range of decays


def in_float32_and_exactly(implementation: str, log_w: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results and gradients in float32 and those of the definition in float64, with one decay for every token."""
    inputs, cotangents = problem(WKV7, "realistic", SHAPE)
    inputs = inputs | {"log_w": np.full_like(inputs["log_w"], log_w)}
    with jax.enable_x64(True):
        exact = {name: np.asarray(x) for name, x in with_gradients(WKV7, "scan")(inputs, cotangents).items()}
    return with_gradients(WKV7, implementation, quick=False)(*as_jax((inputs, cotangents), jnp.float32)), exact


@pytest.mark.parametrize(("log_w", "bound"), [(0.0, 5e-6), (MODEL_FLOOR, 5e-6), (LOG_DECAY_FLOOR, 5e-5)])
@pytest.mark.parametrize("implementation", WKV7.implementations)
def test_decays_from_one_down_to_the_documented_floor(implementation: str, log_w: float, bound: float) -> None:
    # Far below what a model makes, the decay's gradient is a small difference of large sums.
    assert_close(*in_float32_and_exactly(implementation, log_w), bound)


@pytest.mark.parametrize("log_w", [-4.5, -5.4, -20])
def test_chunks_give_nan_and_not_wrong_numbers_below_the_floor(log_w: float) -> None:
    results, exact = in_float32_and_exactly("chunked", log_w)
    for name, values in results.items():
        assert np.any(np.isnan(values)), name
        np.testing.assert_allclose(np.where(np.isnan(values), exact[name], values), exact[name], atol=1e-4)


# Arguments


@pytest.mark.parametrize(
    ("inputs_dtype", "state_dtype", "y_dtype", "final_dtype"),
    [
        ("bfloat16", None, "bfloat16", "float32"),
        ("float16", "float32", "float16", "float32"),
        ("bfloat16", "float64", "bfloat16", "float64"),
        ("float32", None, "float32", "float32"),
        ("float32", "float64", "float32", "float64"),
        ("float64", "float32", "float64", "float64"),
    ],
)
@pytest.mark.parametrize("implementation", WKV7.implementations)
def test_dtypes(
    float64: None, implementation: str, inputs_dtype: str, state_dtype: str | None, y_dtype: str, final_dtype: str
) -> None:
    inputs = make_inputs("realistic", SMALL)
    state = inputs.pop("state")
    arguments = as_jax(inputs, inputs_dtype) | {
        "state": None if state_dtype is None else jnp.asarray(state, state_dtype)
    }
    run = functools.partial(wkv7, implementation=implementation)
    y, final = jax.eval_shape(lambda arguments: run(**arguments), arguments)
    assert (y.dtype, final.dtype) == (y_dtype, final_dtype)
    assert (y.shape, final.shape) == ((2, 4, 3, 5), (2, 3, 5, 6))
    y, final = jax.eval_shape(lambda arguments: wkv7_step(**arguments), at(WKV7, arguments, 0))
    assert (y.dtype, final.dtype) == (y_dtype, final_dtype)
    assert (y.shape, final.shape) == ((2, 3, 5), (2, 3, 5, 6))


WRONG = [
    ("r", jnp.zeros((2, 4, 18)), r"r: shape \(2, 4, 18\) must be \[B T H N\]"),
    ("k", jnp.zeros((2, 4, 3, 6), jnp.int32), "k: dtype int32 must be a floating one"),
    ("a", jnp.zeros((2, 4, 3, 7)), r"a: shape \(2, 4, 3, 7\) does not go with r"),
    ("b", jnp.zeros((2, 5, 3, 6)), r"b: shape \(2, 5, 3, 6\) does not go with r"),
    ("v", jnp.zeros((2, 4, 2, 5)), r"v: shape \(2, 4, 2, 5\) does not go with r"),
    ("v", jnp.zeros((2, 4, 3, 0)), r"v: shape \(2, 4, 3, 0\) has an empty axis"),
    ("log_w", jnp.full((2, 4, 3, 6), 0.1), r"log_w: its largest value is 0\.1.*at most 0"),
    ("log_w", jnp.full((2, 4, 3, 6), jnp.nan), "log_w: its largest value is nan"),
    ("state", jnp.zeros((2, 3, 6, 5)), r"state: shape \(2, 3, 6, 5\) must be \(2, 3, 5, 6\), \[B, H, M, N\]"),
    ("state", jnp.zeros((1, 3, 5, 6)), r"state: shape \(1, 3, 5, 6\) must be \(2, 3, 5, 6\)"),
    ("state", jnp.zeros((2, 3, 5, 6), jnp.bfloat16), "state: dtype bfloat16 must be float32 or float64"),
    ("implementation", "cuda", "implementation = 'cuda': wkv7 has scan, chunked"),
]


@pytest.mark.parametrize(("argument", "value", "message"), WRONG)
def test_errors_name_the_argument(argument: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wkv7(**small_inputs() | {argument: value})


@pytest.mark.parametrize(("argument", "value"), [(name, x) for name, x, _ in WRONG if name != "implementation"])
def test_errors_of_a_step_name_the_argument(argument: str, value: Any) -> None:
    inputs = at(WKV7, small_inputs(), 0)
    wrong = value if argument == "state" else value[:, 0]
    if argument == "b":  # it was the length that was wrong, of which a step has none
        wrong = jnp.zeros((2, 3, 7))
    with pytest.raises(ValueError, match=f"{argument}: "):
        wkv7_step(**inputs | {argument: wrong})


def test_an_empty_sequence_is_refused() -> None:
    inputs = small_inputs()
    with pytest.raises(ValueError, match="has an empty axis"):
        wkv7(**{name: x[:, :0] for name, x in inputs.items() if name != "state"})


def test_numpy_arrays_are_accepted() -> None:
    inputs = make_inputs("realistic", SMALL)
    y, _ = wkv7(**jax.tree.map(lambda x: x.astype(np.float32), inputs))
    np.testing.assert_array_equal(y, wkv7(**small_inputs())[0])


# Which implementation


def test_implementations_that_can_run_are_listed_without_a_reason() -> None:
    inputs = small_inputs()
    assert implementations(inputs["r"], inputs["v"]) == {name: None for name in WKV7.implementations}


def refusing(reason: str | None) -> dispatch.Implementation:
    return dispatch.Implementation(IMPLEMENTATIONS["scan"].run, refuses=lambda problem: reason)


PROBLEM = dispatch.Problem("cpu", (1, 2, 3, 4, 5), "float32")


def test_explain_gives_each_reason() -> None:
    table = {"slow": refusing(None), "fast": refusing("needs a GPU")}
    assert dispatch.explain(table, PROBLEM) == {"slow": None, "fast": "needs a GPU"}


def test_the_first_preferred_that_can_run_is_taken() -> None:
    table = {"slow": refusing(None), "middle": refusing(None), "fast": refusing("needs a GPU")}
    chosen = dispatch.choose("wkv7", table, ("fast", "middle", "slow"), PROBLEM, None)
    assert chosen is table["middle"]
    assert dispatch.choose("wkv7", table, ("fast", "middle", "slow"), PROBLEM, "slow") is table["slow"]


def test_asking_for_one_that_cannot_run_raises_with_the_reason_and_a_way_out() -> None:
    table = {"slow": refusing(None), "fast": refusing("needs a GPU")}
    with pytest.raises(ValueError, match="implementation = 'fast': wkv7 cannot run it here: needs a GPU; use 'slow'"):
        dispatch.choose("wkv7", table, ("fast", "slow"), PROBLEM, "fast")
