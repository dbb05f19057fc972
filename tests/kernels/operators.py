"""Every operator as the tests in this folder see it: a new operator or implementation is a row here, and no more."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from numpy.typing import NDArray

from rwkv_kernels import dispatch, wkv4, wkv5, wkv6, wkv7
from rwkv_kernels.operator import Operator as WKVOperator
from rwkv_kernels.ops.wkv4 import cases as wkv4_cases
from rwkv_kernels.ops.wkv4.api import OPERATOR as WKV4
from rwkv_kernels.ops.wkv5 import cases as wkv5_cases
from rwkv_kernels.ops.wkv5.api import OPERATOR as WKV5
from rwkv_kernels.ops.wkv6 import cases as wkv6_cases
from rwkv_kernels.ops.wkv6.api import OPERATOR as WKV6
from rwkv_kernels.ops.wkv7 import cases as wkv7_cases
from rwkv_kernels.ops.wkv7.api import OPERATOR as WKV7
from rwkv_kernels.testing.cases import Shape
from tests.golden import AS_USERS, QUICK

Inputs = dict[str, Any]
"""Arguments by name; `state` is a tree of arrays, all others are arrays."""

Options = Mapping[str, Any]
"""`segment_ids` and `lengths`, or none."""

Results = dict[str, Any]
"""y, the parts of the final state, and gradients, by name."""


@dataclasses.dataclass(frozen=True, eq=False)
class Operator:
    """An operator, its implementations and its test cases."""

    name: str
    parts: WKVOperator
    run: Callable[..., tuple[Array, Any]]
    """(**inputs, **options, implementation) -> (y, state)."""
    cases: tuple[str, ...]
    make_inputs: Callable[[str, Shape], Inputs]
    """(case, shape) -> float64 inputs which float32 holds exactly."""
    over_time: tuple[str, ...]
    """Inputs [B, T, ...]."""
    per_head: tuple[str, ...] = ()
    """Inputs [H, N], or [C], which all rows and steps share."""
    reads_with: tuple[str, ...] = ("r",)
    """Inputs that only the y of their own step sees."""
    empty: float | tuple[float, ...] = 0.0
    """What the parts of the empty state are filled with."""
    drift: float = 2**-25
    """Relative error that each step adds to the definition in float32, where states live long."""
    rounding: float = 5e-6
    """Largest relative error of the definition in float32 that does not grow with the number of steps."""

    @property
    def has_precisions(self) -> bool:
        """Whether it multiplies matrices, so that there is a choice of arithmetic."""
        return "precision" in inspect.signature(self.run).parameters

    def __str__(self) -> str:
        return self.name

    def empty_like(self, state: Any) -> Any:
        """The empty state that is passed for None."""
        if isinstance(self.empty, tuple):
            return tuple(np.full_like(x, value) for x, value in zip(state, self.empty, strict=True))
        return np.full_like(state, self.empty)


OPERATORS: tuple[Operator, ...] = (
    Operator(
        name="wkv4",
        parts=WKV4,
        run=wkv4,
        cases=tuple(wkv4_cases.CASES),
        make_inputs=wkv4_cases.make_inputs,
        over_time=("k", "v"),
        per_head=("log_w", "u"),
        reads_with=(),
        empty=(0.0, 0.0, -1e38),
        # The exponent is rounded at every step; e to it is off by that, and keys of 60 have large ones.
        drift=2**-20,
        rounding=3e-5,
    ),
    Operator(
        name="wkv5",
        parts=WKV5,
        run=wkv5,
        cases=tuple(wkv5_cases.CASES),
        make_inputs=wkv5_cases.make_inputs,
        over_time=("r", "k", "v"),
        per_head=("log_w", "u"),
        drift=2**-22,  # rounding of the one decay never averages out
    ),
    Operator(
        name="wkv6",
        parts=WKV6,
        run=wkv6,
        cases=tuple(wkv6_cases.CASES),
        make_inputs=wkv6_cases.make_inputs,
        over_time=("r", "log_w", "k", "v"),
        per_head=("u",),
    ),
    Operator(
        name="wkv7",
        parts=WKV7,
        run=wkv7,
        cases=tuple(wkv7_cases.CASES),
        make_inputs=wkv7_cases.make_inputs,
        over_time=("r", "log_w", "k", "v", "a", "b"),
    ),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Way:
    """An implementation of an operator, run in the arithmetic in which it is compared with the definition."""

    operator: Operator
    name: str

    def __str__(self) -> str:
        return f"{self.operator}-{self.name}"

    @property
    def is_definition(self) -> bool:
        """Whether it is what all others are held against."""
        return self.name == "scan"

    @property
    def is_pallas(self) -> bool:
        """Whether it is a kernel, which runs here in interpret mode, in float32 and in reverse mode only."""
        return self.name.startswith("pallas")

    @property
    def dtype(self) -> type[np.floating]:
        """The widest arithmetic that it has."""
        return np.float32 if self.is_pallas else np.float64

    @property
    def bound(self) -> float:
        """Relative error that a result may have beside what the equations say, or another way to compute it."""
        return 5e-6 if self.is_pallas else 1e-12

    @functools.cached_property
    def implementation(self) -> str | dispatch.Implementation:
        """What is passed as `implementation`."""
        if not self.is_pallas:
            return self.name
        run = self.operator.parts.implementations[self.name].run
        return dispatch.Implementation(functools.partial(run, interpret=True), dispatch.anything)

    def run(self, **arguments: Any) -> tuple[Array, Any]:
        """The operator by this implementation."""
        return self.operator.run(**arguments, implementation=self.implementation)

    def problem(self, case: str, shape: Shape) -> tuple[Inputs, tuple[Any, Any]]:
        """A case's inputs and cotangents, in this way's arithmetic."""
        return jax.tree.map(lambda x: x.astype(self.dtype), problem(self.operator, case, shape))


WAYS: tuple[Way, ...] = tuple(Way(operator, name) for operator in OPERATORS for name in operator.parts.implementations)
"""Every operator by each of its implementations."""

each_operator = pytest.mark.parametrize("operator", OPERATORS, ids=str)
each_way = pytest.mark.parametrize("way", WAYS, ids=str)


def each_way_but_briefly(*names: str) -> pytest.MarkDecorator:
    """Runs a test with each way, all but those named only where there is time: for what takes long to compile.

    Args:
      names: of implementations, such as "chunked", or of one operator's, such as "wkv7-pallas_triton".
    """
    return pytest.mark.parametrize("way", [briefly(way, *names) for way in WAYS])


def briefly(way: Way, *names: str) -> Any:
    """A way as a parameter, `long` if neither its implementation nor itself is among the names."""
    is_brief = way.name in names or str(way) in names
    return pytest.param(way, marks=() if is_brief else pytest.mark.long, id=str(way))


def definition(operator: Operator) -> Way:
    """The way that all others are held against."""
    return next(way for way in WAYS if way.operator is operator and way.is_definition)


@functools.cache
def forward(way: Way, quick: bool = True) -> Callable[..., Results]:
    """Compiled (inputs, options) -> y and the final state, by name."""

    def run(inputs: Inputs, options: Options) -> Results:
        return named(*way.run(**inputs, **options))

    return jax.jit(run, compiler_options=QUICK if quick else AS_USERS)


@functools.cache
def with_gradients(way: Way, quick: bool = True) -> Callable[..., Results]:
    """Compiled (inputs, cotangents of y and of the final state, options) -> results and gradients, by name."""
    return jax.jit(functools.partial(differentiate, way.run), compiler_options=QUICK if quick else AS_USERS)


def differentiate(run: Callable[..., tuple[Array, Any]], inputs: Inputs, cotangents: Any, options: Options) -> Results:
    """Results of run(**inputs, **options) and the gradients that the cotangents make, by name."""
    results, pull_back = jax.vjp(lambda inputs: run(**inputs, **options), inputs)
    paths = jax.tree.leaves_with_path(pull_back(cotangents)[0])
    return named(*results) | {f"d{jax.tree_util.keystr(path, simple=True, separator='.')}": x for path, x in paths}


def named(y: Array, state: Any) -> Results:
    """y and the parts of a state, by name."""
    paths = jax.tree.leaves_with_path({"state": state})
    return {"y": y} | {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in paths}


@functools.cache
def problem(operator: Operator, case: str, shape: Shape) -> tuple[Inputs, tuple[NDArray, Any]]:
    """A case's inputs, and random cotangents of y and of the final state, in float64."""
    inputs = operator.make_inputs(case, shape)
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(operator.run, **inputs)
    return inputs, jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32).astype(np.float64), shapes)


def exactly(operator: Operator, inputs: Inputs, cotangents: Any, options: Options | None = None) -> Results:
    """What the definition gives in float64: results and gradients, by name."""
    with jax.enable_x64(True):
        inputs, cotangents = jax.tree.map(lambda x: np.asarray(x).astype(np.float64), (inputs, cotangents))
        return jax.tree.map(np.asarray, with_gradients(definition(operator))(inputs, cotangents, options or {}))


@functools.cache
def reference(operator: Operator, case: str, shape: Shape) -> Results:
    """What the definition gives for a case in float64: results and gradients, by name."""
    return exactly(operator, *problem(operator, case, shape))


def unchanged(inputs: Inputs, dstate: Any) -> Inputs:
    """The gradient of an initial state that no step touches, by name as a result."""
    if not isinstance(dstate, tuple):
        return {"dstate": dstate}
    (numerator, denominator, _), (dnumerator, ddenominator, _) = inputs["state"], dstate
    # The exponent of WKV-4 counts through what it multiplies, and that alone.
    dexponent = numerator * dnumerator + denominator * ddenominator
    return {"dstate.0": dnumerator, "dstate.1": ddenominator, "dstate.2": dexponent}


def cut(operator: Operator, inputs: Inputs, start: int | None, stop: int | None) -> Inputs:
    """Steps [start, stop) of inputs."""
    return inputs | {name: inputs[name][:, start:stop] for name in operator.over_time}


def gradients_of(results: Results, name: str) -> list[NDArray]:
    """The gradients of an input: one array, or one for each part of a state."""
    return [np.asarray(x) for key, x in results.items() if key == f"d{name}" or key.startswith(f"d{name}.")]


def as_jax(tree: Any, dtype: Any) -> Any:
    """A tree of arrays on the device, in dtype."""
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)
