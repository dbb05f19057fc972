"""What operators accept, and what they say of arguments that cannot be right."""

from __future__ import annotations

from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_kernels.arguments import values_at_hand
from rwkv_kernels.testing.cases import Shape
from tests.kernels.operators import OPERATORS, Operator, Way, as_jax, each_operator, each_way, named

SMALL = Shape(2, 4, 3, 6, 5)

DTYPES = [
    # Of the inputs, of the state, of y and of the final state.
    ("bfloat16", None, "bfloat16", "float32"),
    ("float16", "float32", "float16", "float32"),
    ("bfloat16", "float64", "bfloat16", "float64"),
    ("float32", None, "float32", "float32"),
    ("float32", "float64", "float32", "float64"),
    ("float64", "float32", "float64", "float64"),
]


def small_inputs(operator: Operator) -> dict[str, Any]:
    return as_jax(operator.make_inputs("realistic", SMALL), jnp.float32)


@pytest.mark.parametrize(("inputs_dtype", "state_dtype", "y_dtype", "final_dtype"), DTYPES)
@each_way
def test_dtypes(
    float64: None, way: Way, inputs_dtype: str, state_dtype: str | None, y_dtype: str, final_dtype: str
) -> None:
    if way.is_pallas and final_dtype == "float64":
        return  # kernels refuse it: test_choice.py
    inputs = way.operator.make_inputs("realistic", SMALL)
    state = inputs.pop("state")
    arguments = as_jax(inputs, inputs_dtype)
    arguments["state"] = None if state_dtype is None else as_jax(state, state_dtype)
    y, final = jax.eval_shape(lambda arguments: way.run(**arguments), arguments)
    assert y.shape == inputs["v"].shape
    assert jax.tree.map(lambda x: x.shape, final) == jax.tree.map(lambda x: x.shape, state)
    assert y.dtype == y_dtype
    assert {x.dtype for x in jax.tree.leaves(final)} == {jnp.dtype(final_dtype)}


@each_operator
def test_numpy_arrays_are_accepted(operator: Operator) -> None:
    given = jax.tree.map(lambda x: x.astype(np.float32), operator.make_inputs("realistic", SMALL))
    results, expected = named(*operator.run(**given)), named(*operator.run(**small_inputs(operator)))
    for name, x in expected.items():
        np.testing.assert_array_equal(results[name], x)


@each_operator
def test_an_empty_sequence_is_refused(operator: Operator) -> None:
    inputs = small_inputs(operator)
    with pytest.raises(ValueError, match=r"shape \(2, 0, .*\) has an empty axis"):
        operator.run(**inputs | {name: inputs[name][:, :0] for name in operator.over_time})


KEYS = (2, 4, 3, 6)
MATRIX = ("wkv5", "wkv6", "wkv7")

WRONG: list[tuple[tuple[str, ...], str, Any, str]] = [
    # Operators, argument, value, message.
    (MATRIX, "r", np.zeros((2, 4, 18)), r"r: shape \(2, 4, 18\) must be \[B T H N\]"),
    (MATRIX, "k", np.zeros(KEYS, np.int32), "k: dtype int32 must be a floating one"),
    (MATRIX, "k", np.zeros((2, 4, 3, 7)), r"k: shape \(2, 4, 3, 7\) does not go with r of shape \(2, 4, 3, 6\)"),
    (MATRIX, "k", np.zeros((2, 5, 3, 6)), r"k: shape \(2, 5, 3, 6\) does not .* must be \(2, 4, 3, 6\), \[B T H N\]"),
    (MATRIX, "v", np.zeros((2, 4, 2, 5)), r"v: shape \(2, 4, 2, 5\) does not go with r"),
    (MATRIX, "v", np.zeros((3, 4, 3, 5)), r"v: shape \(3, 4, 3, 5\) does not go with r"),
    (MATRIX, "v", np.zeros((2, 4, 3, 0)), r"v: shape \(2, 4, 3, 0\) has an empty axis"),
    (MATRIX, "v", np.zeros((2, 4, 15)), r"v: shape \(2, 4, 15\) must be \[B T H M\]"),
    (("wkv5",), "log_w", -np.ones(KEYS), r"log_w: shape \(2, 4, 3, 6\) must be \[H N\]"),
    (("wkv5",), "log_w", -np.ones((3, 2)), r"log_w: shape \(3, 2\) does not .* must be \(3, 6\), \[H N\]"),
    (("wkv5",), "log_w", np.full((3, 1), 0.1), r"log_w: its largest value is 0\.1.*at most 0"),
    (("wkv6",), "log_w", -np.ones((3, 6)), r"log_w: shape \(3, 6\) must be \[B T H N\]"),
    (("wkv6", "wkv7"), "log_w", np.full(KEYS, 0.1), r"log_w: its largest value is 0\.1.*at most 0"),
    (("wkv6", "wkv7"), "log_w", np.full(KEYS, np.nan), "log_w: its largest value is nan"),
    (("wkv5", "wkv6"), "u", np.zeros((6, 3)), r"u: shape \(6, 3\) does not go with r .* must be \(3, 6\), \[H N\]"),
    (("wkv5", "wkv6"), "u", np.zeros(6), r"u: shape \(6,\) must be \[H N\]"),
    (("wkv7",), "a", np.zeros((2, 4, 3, 7)), r"a: shape \(2, 4, 3, 7\) does not go with r"),
    (("wkv7",), "b", np.zeros((2, 4, 1, 6)), r"b: shape \(2, 4, 1, 6\) does not go with r"),
    (MATRIX, "state", np.zeros((2, 3, 6, 5)), r"state: shape \(2, 3, 6, 5\) must be \(2, 3, 5, 6\), \[B, H, M, N\]"),
    (MATRIX, "state", np.zeros((1, 3, 5, 6)), r"state: shape \(1, 3, 5, 6\) must be \(2, 3, 5, 6\).*value axis first"),
    (MATRIX, "state", jnp.zeros((2, 3, 5, 6), jnp.bfloat16), "state: dtype bfloat16 must be float32 or float64"),
    (("wkv4",), "k", np.zeros((2, 4)), r"k: shape \(2, 4\) must be \[B T C\]"),
    (("wkv4",), "k", np.zeros((2, 4, 18), np.int32), "k: dtype int32 must be a floating one"),
    (("wkv4",), "v", np.zeros((2, 4, 17)), r"v: shape \(2, 4, 17\) does not go with k of shape \(2, 4, 18\)"),
    (("wkv4",), "v", np.zeros((2, 5, 18)), r"v: shape \(2, 5, 18\) does not .* must be \(2, 4, 18\), \[B T C\]"),
    (("wkv4",), "u", np.zeros(17), r"u: shape \(17,\) does not go with k .* must be \(18,\), \[C\]"),
    (("wkv4",), "log_w", -np.ones((2, 4, 18)), r"log_w: shape \(2, 4, 18\) must be \[C\]"),
    (("wkv4",), "log_w", np.full(18, 0.1), r"log_w: its largest value is 0\.1.*at most 0"),
    (("wkv4",), "state", np.zeros((2, 18)), r"state: ndarray.* must be a tuple \(numerator, denom"),
    (("wkv4",), "state", (np.zeros((2, 18)),) * 2, r"state: tuple of 2 must be a tuple \(numerator, denom"),
    (("wkv4",), "state", (np.zeros((18, 2)),) * 3, r"state \(numerator\): shape \(18, 2\) must be \(2, 18\), \[B, C\]"),
]
WRONG_PACKINGS = [
    ("segment_ids", np.zeros((2, 5), np.int32), r"segment_ids: shape \(2, 5\) must be \(2, 4\), \[B, T\]"),
    ("segment_ids", np.zeros((4, 2), np.int32), r"segment_ids: shape \(4, 2\) must be \(2, 4\), \[B, T\]"),
    ("segment_ids", np.zeros((2, 4)), "segment_ids: dtype float32 must be an integer one"),
    ("lengths", np.zeros((2, 1), np.int32), r"lengths: shape \(2, 1\) must be \(2,\), \[B\]"),
    ("lengths", np.zeros(3, np.int32), r"lengths: shape \(3,\) must be \(2,\), \[B\]"),
    ("lengths", np.zeros(2), "lengths: dtype float32 must be an integer one"),
    ("lengths", np.array([-1, 4]), "lengths: values from -1 to 4 must lie from 0 to T = 4"),
    ("lengths", np.array([0, 5]), "lengths: values from 0 to 5 must lie from 0 to T = 4"),
]
BY_NAME = {operator.name: operator for operator in OPERATORS}
ROWS = [
    pytest.param(BY_NAME[name], argument, value, message, id=f"{name}-{argument}-{number}")
    for number, (names, argument, value, message) in enumerate(WRONG)
    for name in names
]


@pytest.mark.parametrize(("operator", "argument", "value", "message"), ROWS)
def test_errors_name_the_argument_and_what_was_expected(
    operator: Operator, argument: str, value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        operator.run(**small_inputs(operator) | {argument: value})


@each_operator
@pytest.mark.parametrize(("argument", "value", "message"), WRONG_PACKINGS)
def test_errors_name_what_is_wrong_with_a_packing(operator: Operator, argument: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        operator.run(**small_inputs(operator), **{argument: value})


@each_operator
def test_shapes_are_checked_inside_jit_too(operator: Operator) -> None:
    inputs = small_inputs(operator)
    with pytest.raises(ValueError, match=r"^v: shape"):
        jax.jit(operator.run)(**inputs | {"v": inputs["v"][:, :3]})


@each_operator
def test_values_are_checked_unless_that_is_switched_off(operator: Operator) -> None:
    inputs = small_inputs(operator)
    wrong = inputs | {"log_w": -inputs["log_w"]}
    for validate in (None, True):
        with pytest.raises(ValueError, match=r"^log_w: its largest value is"):
            operator.run(**wrong, validate=validate)
    operator.run(**wrong, validate=False)


@pytest.mark.parametrize(
    ("platform", "validate", "checked"),
    [("cpu", None, True), ("cuda", None, False), ("cuda", True, True), ("cpu", False, False)],
)
def test_nothing_is_copied_from_an_accelerator_unless_that_is_asked_for(
    platform: str, validate: bool | None, checked: bool
) -> None:
    x = mock.Mock(spec=jax.Array, is_fully_addressable=True)
    x.devices = mock.Mock(return_value={mock.Mock(platform=platform)})
    assert values_at_hand(x, validate) is checked
