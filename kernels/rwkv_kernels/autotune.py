"""Checks an operator's implementations against its definition in float64, and times them; reads and writes no files.

tuning = tune(workload_here("wkv7", (8, 4096, 12, 64, 64), "bfloat16"))
print(tuning)
y, state = wkv7(..., implementation=tuning.chosen)
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

import rwkv_kernels
from rwkv_kernels import dispatch
from rwkv_kernels.operator import Operator
from rwkv_kernels.testing.cases import Shape

BOUND = 1e-4
"""Largest relative error of a right result in float32; docs/errors.md has 1e-5 at most for these inputs."""

_SMALL = Shape(batch=2, time=80, heads=2, key_dim=2**30, value_dim=2**30)
"""Largest sizes of the check: all of a head, and several chunks, the last one not full."""
_SMALL_CHANNELS = 64  # heads of size 1
_DRAWN_STEPS = 256  # of larger inputs; then they repeat
_HOPELESS = 10.0  # times as slow as the fastest: not timed again

Inputs = dict[str, Any]
"""Arguments by name; WKV-4's state is a tuple."""

Options = dict[str, Array]
"""`segment_ids` or `lengths`, or nothing."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """A call of an operator, as far as its time depends on it."""

    operator: str
    """An operator, or of `rwkv_kernels.PARTS`; T tokens of `wkv7_step` are decoded one by one."""
    problem: dispatch.Problem
    inputs: str
    """Dtype of the arguments; but log_w, u and the state have the recurrence's."""
    gradients: bool
    """Whether it is differentiated, as in training; otherwise rows have lengths, as an engine's have."""
    packed: bool
    """Whether rows have several segments; then they have no lengths."""

    def __str__(self) -> str:
        """Such as `wkv7 B8 T4096 H12 N64 M64 float32 on gpu (NVIDIA H200), bfloat16 inputs, with gradients, packed`."""
        how = "with gradients" if self.gradients else "forward"
        return f"{self.operator} {self.problem}, {self.inputs} inputs, {how}{', packed' if self.packed else ''}"


def workload_here(
    operator: str,
    shape: tuple[int, int, int, int, int],
    inputs: str = "float32",
    *,
    gradients: bool = True,
    packed: bool = False,
) -> Workload:
    """The workload on JAX's default backend; shape is B, T, H, N and M, where WKV-4 has C heads of size 1."""
    recurrence = "float64" if inputs == "float64" else "float32"
    return Workload(operator, dispatch.problem_here(shape, recurrence), inputs, gradients, packed)


class ResultError(NamedTuple):
    """How far one result is from the definition."""

    name: str
    """y, state, or a gradient such as dlog_w; parts of a state are numbered."""
    error: float
    """|result - definition| / |definition| in the L2 norm, |result| where the definition is zero; infinite for NaN."""
    bound: float
    """Largest error of a right one: `BOUND`, or where the result is in half precision two roundings of it."""

    @property
    def is_right(self) -> bool:
        """Whether the error is within the bound."""
        return self.error <= self.bound

    @property
    def share(self) -> float:
        """The error as a share of the bound."""
        return self.error / self.bound


class Trial(NamedTuple):
    """What became of one implementation."""

    name: str
    error: float | None
    """Relative error of its worst result on a small input; None if it gave none."""
    seconds: float | None
    """Median time of a call; None if it was not timed."""
    failure: str | None
    """Why it is never taken: it cannot run, raised, or is wrong; or None."""


@dataclasses.dataclass(frozen=True)
class Tuning:
    """All implementations on one workload; `str` gives a table."""

    workload: Workload
    trials: tuple[Trial, ...]
    is_lasting: bool = True
    """Whether it would be found again; not where memory was out while a program ran, or the device failed."""

    @property
    def chosen(self) -> str | None:
        """The fastest of those that are right; None if none is."""
        timed = [(trial.seconds, trial.name) for trial in self.trials if trial.seconds is not None]
        return min(timed)[1] if timed else None

    def __str__(self) -> str:
        """One line per implementation: largest error, milliseconds, verdict."""
        lines = [f"{self.workload}:"]
        width = max(len(trial.name) for trial in self.trials)
        for name, error, seconds, failure in self.trials:
            shown_error = "-" if error is None else f"{error:.0e}"
            shown_time = "-" if seconds is None else f"{1e3 * seconds:.3f} ms"
            verdict = failure or ("taken: the fastest" if name == self.chosen else "right")
            lines.append(f"  {name:<{width}}  {shown_error:>7}  {shown_time:>14}  {verdict}")
        return "\n".join(lines)


def tune(
    workload: Workload,
    *,
    implementations: Mapping[str, dispatch.Implementation] | None = None,
    memory: int | None = None,
    repetitions: int = 5,
    clock: Callable[[], float] = time.perf_counter,
    left_out: Mapping[str, str] | None = None,
    trying: Callable[[str], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Tuning:
    """Checks every implementation on a small input, and times those that are right on one of the workload's sizes.

    The results of the timed calls are compared with the first one's, since their programs may be other ones than the
    check's. Most of the time is the compiler's.

    Args:
      implementations: by name; None is all of the operator's.
      memory: bytes of the device; programs that take more are not run, and so never fit. None leaves that to it.
      repetitions: timed calls, of which the median is taken, after one that is not counted.
      clock: seconds.
      left_out: names that are not tried, with the reasons.
      trying: (name) -> what surrounds all that is run of an implementation.
    """
    operator = _find(workload)
    if implementations is None:
        implementations = operator.implementations
    preferred = operator.preferred(workload.problem)  # first, so that what is hopeless beside it is run once
    checked = [workload]
    if jnp.dtype(workload.inputs).itemsize < 4:  # whose rounding would hide errors of a percent
        checked.append(dataclasses.replace(workload, inputs="float32"))
    checks = [(check, exact_results(check)) for check in checked]
    arguments = make_arguments(workload, Shape(*workload.problem.shape))
    trials: list[Trial] = []
    is_lasting, lost_by = True, None
    reference: tuple[str, dict[str, NDArray]] | None = None  # the first right one, and its results for `arguments`
    for name in sorted(
        implementations, key=lambda name: preferred.index(name) if name in preferred else len(preferred)
    ):
        implementation = implementations[name]
        if refusal := implementation.refuses(workload.problem):
            trials.append(Trial(name, None, None, f"cannot: {refusal}"))
            continue
        if left_out and name in left_out:
            trials.append(Trial(name, None, None, left_out[name]))
            continue
        if lost_by is not None:
            trials.append(Trial(name, None, None, f"not tried: the device fails since {lost_by}"))
            continue
        error = None
        try:
            with trying(name):
                errors = [worst_error(check, implementation, exact) for check, exact in checks]
                worst = max(errors, key=lambda found: found.share)
                error = worst.error
                if not worst.is_right:
                    trials.append(
                        Trial(
                            name, error, None, f"WRONG: {worst.name} is off by {error:.0e}, at most {worst.bound:.0e}"
                        )
                    )
                    continue
                fastest = min((trial.seconds for trial in trials if trial.seconds is not None), default=math.inf)
                run = _LastResults(
                    functools.partial(_compiled(workload, implementation, arguments, memory), *arguments)
                )
                seconds = median_seconds(run, repetitions, _HOPELESS * fastest, clock)
                if reference is None:
                    reference = name, jax.device_get(run.results)
                elif not (worst := _worst_difference(run.results, reference[1])).is_right:
                    difference = f"{worst.name} is off {reference[0]}'s by {worst.error:.0e}, at most {worst.bound:.0e}"
                    trials.append(Trial(name, error, None, f"WRONG on the sizes of the workload: {difference}"))
                    continue
                trials.append(Trial(name, error, seconds, None))
        except Exception as failure:  # whatever a compiler or a device raises, this one is not taken
            trials.append(Trial(name, error, None, f"fails: {_first_line(failure)}"))
            is_lasting &= not _may_fit_another_time(failure)
            if not _device_works():
                is_lasting, lost_by = False, name
    ordered = sorted(trials, key=lambda trial: list(implementations).index(trial.name))
    return Tuning(workload, tuple(ordered), is_lasting)


def _may_fit_another_time(failure: Exception) -> bool:
    """Whether memory was out that others held, perhaps; a TPU's compiler places all memory by itself."""
    return "RESOURCE_EXHAUSTED" in str(failure) and "CompileTimeHbmOom" not in str(failure)


def _device_works() -> bool:
    """Whether the device still computes; after an illegal access on a GPU nothing does in the same process."""
    try:
        return int(jnp.asarray(np.ones(2, np.int32)).sum()) == 2
    except jax.errors.JaxRuntimeError:
        return False


def _find(workload: Workload) -> Operator | dispatch.Alternatives:
    return (rwkv_kernels.OPERATORS | rwkv_kernels.PARTS)[workload.operator]


def exact_results(workload: Workload) -> dict[str, NDArray]:
    """What the definition gives for the check's input in float64: y, the final state and gradients, by name."""
    known = _find(workload)
    definition = known.order[0] if isinstance(known, dispatch.Alternatives) else "scan"
    arguments = _small_arguments(workload)
    with jax.enable_x64(True):
        widened = jax.tree.map(
            lambda x: np.asarray(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else np.asarray(x), arguments
        )
        return {name: np.asarray(x) for name, x in jax.jit(make_program(workload, definition))(*widened).items()}


def worst_error(
    workload: Workload, implementation: dispatch.Implementation, exact: Mapping[str, NDArray]
) -> ResultError:
    """Runs an implementation on the check's input; the result that is furthest from `exact_results`."""
    arguments = _small_arguments(workload)
    results = jax.jit(make_program(workload, implementation))(*arguments)
    errors = []
    for name, x in results.items():
        errors.append(ResultError(name, relative_error(np.asarray(x, np.float64), exact[name]), _bound(x)))
    return max(errors, key=lambda found: found.share)


def _bound(x: Array) -> float:
    return BOUND if x.dtype.itemsize >= 4 else max(BOUND, float(jnp.finfo(x.dtype).eps))


def relative_error(x: NDArray, exact: NDArray) -> float:
    """|x - exact| / |exact| in the L2 norm, |x| where exact is zero; infinite if x is not finite."""
    return _relative(np.linalg.norm(x - exact), np.linalg.norm(exact))


def _relative(difference: Any, size: Any) -> float:
    error = float(difference) / (float(size) or 1.0)
    return error if math.isfinite(error) else math.inf


def _limits(workload: Workload) -> Shape:
    """The largest sizes of the check."""
    return _SMALL._replace(heads=_SMALL_CHANNELS) if workload.problem.shape[3] == 1 else _SMALL


def _small_arguments(workload: Workload) -> tuple[Inputs, Options]:
    return make_arguments(workload, Shape(*map(min, workload.problem.shape, _limits(workload))))


def make_arguments(workload: Workload, shape: Shape) -> tuple[Inputs, Options]:
    """Inputs like a trained model's, on the device, large ones repeating over rows, T, heads; segments or lengths."""
    drawn = Shape(*map(min, shape, _limits(workload)._replace(time=_DRAWN_STEPS)))
    operator, _, part = workload.operator.partition("_")
    cases = importlib.import_module(f"rwkv_kernels.ops.{operator}.cases")
    axes = _find(workload).axes
    sizes = dict(zip("BTHNM", shape, strict=True)) | {"C": shape.heads}
    inputs: Inputs = getattr(cases, f"make_{part}_inputs" if part else "make_inputs")("realistic", drawn)
    state = inputs.pop("state", None)
    letters = "BC" if isinstance(state, tuple) else "BHMN"

    def repeated(x: NDArray, axes: Sequence[str], dtype: str) -> Array:
        wanted = [sizes[axis] for axis in axes]
        counts = [-(-size // own) for size, own in zip(wanted, x.shape, strict=True)]
        return jnp.tile(jnp.asarray(x, dtype), counts)[tuple(map(slice, wanted))]

    recurrence = workload.problem.dtype
    over_all = {
        name: repeated(x, axes[name].split(), recurrence if name in ("log_w", "u") else workload.inputs)
        for name, x in inputs.items()
    }
    if state is not None:
        over_all["state"] = jax.tree.map(lambda x: repeated(x, letters, recurrence), state)
    return over_all, _options(workload, shape)


def _options(workload: Workload, shape: Shape) -> Options:
    """Three segments in each row; or lengths, of which the first is full; or nothing."""
    rows = jnp.arange(shape.batch, dtype=jnp.int32)
    if workload.operator == "wkv7_step":
        return {"lengths": (rows != 1).astype(jnp.int32)}  # the second row pauses
    if workload.operator not in rwkv_kernels.OPERATORS:
        return {}
    if workload.packed:
        thirds = 3 * jnp.arange(shape.time, dtype=jnp.int32) // shape.time
        return {"segment_ids": jnp.broadcast_to(thirds, (shape.batch, shape.time))}
    return {} if workload.gradients else {"lengths": jnp.maximum(shape.time - rows, 1)}


def make_program(
    workload: Workload, implementation: str | dispatch.Implementation
) -> Callable[[Inputs, Options], dict[str, Array]]:
    """(inputs, segments or lengths) -> results by name; cotangents of y and of the final state are v and `state`."""

    def run(inputs: Inputs, options: Options) -> dict[str, Array]:
        forward = functools.partial(_results, workload, implementation, options)
        if not workload.gradients:
            return _named(forward(inputs))
        results, pull_back = jax.vjp(forward, inputs)
        cotangents = {name: inputs["state" if name == "state" else "v"] for name in results}
        (gradients,) = pull_back(cotangents)
        return _named(results | {f"d{name}": x for name, x in gradients.items()})

    return run


def _results(
    workload: Workload, implementation: str | dispatch.Implementation, options: Options, inputs: Inputs
) -> dict[str, Any]:
    """y, or the output o of a part, and the final state of what has one."""
    function = functools.partial(getattr(rwkv_kernels, workload.operator), **options, implementation=implementation)
    if workload.operator in rwkv_kernels.OPERATORS:
        return dict(zip(("y", "state"), function(**inputs, validate=False), strict=True))
    constants = importlib.import_module("rwkv_kernels.ops.wkv7.cases").MODEL_CONSTANTS
    if workload.operator == "wkv7_output":
        return {"o": function(**inputs, epsilon=constants["epsilon"])}

    vectors = {name: x for name, x in inputs.items() if name != "state"}

    def token(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        # Behind a barrier, or all that does not depend on the state would be computed once.
        held, state = jax.lax.optimization_barrier((vectors, carry[1]))
        return function(**held, state=state, **constants)

    first = jnp.zeros_like(inputs["v"]), inputs["state"]
    return dict(zip(("o", "state"), jax.lax.fori_loop(0, workload.problem.shape[1], token, first), strict=True))


def _named(results: Mapping[str, Any]) -> dict[str, Array]:
    paths = jax.tree.leaves_with_path(dict(results))
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in paths}


def _compiled(
    workload: Workload, implementation: dispatch.Implementation, arguments: Any, memory: int | None
) -> Callable[..., Any]:
    """The program for arguments of the workload's sizes; raises MemoryError if it takes more than there is."""
    program = jax.jit(make_program(workload, implementation)).lower(*arguments).compile()
    analysis = program.memory_analysis()
    if memory is not None and analysis is not None:
        needed = analysis.argument_size_in_bytes + analysis.output_size_in_bytes + analysis.temp_size_in_bytes
        if needed > memory:
            raise MemoryError(f"it takes {needed / 2**30:.1f} GiB, and there are {memory / 2**30:.1f}")
    return program


class _LastResults:
    """Calls a function and holds what its last call gave, and never the results of two calls."""

    def __init__(self, run: Callable[[], dict[str, Array]]) -> None:
        self.run = run
        self.results: dict[str, Array] = {}

    def __call__(self) -> dict[str, Array]:
        self.results = {}
        self.results = self.run()
        return self.results


def _worst_difference(results: Mapping[str, Array], reference: Mapping[str, NDArray]) -> ResultError:
    """The result that is furthest from the one of a right implementation; each may be off by its bound."""
    errors = []
    for name, x in results.items():
        wide = jnp.promote_types(x.dtype, jnp.float32)
        expected = jnp.asarray(reference[name], wide)
        difference = (x.astype(wide) - expected).ravel()
        error = _relative(jnp.linalg.norm(difference), jnp.linalg.norm(expected.ravel()))
        errors.append(ResultError(name, error, 2 * _bound(x)))
    return max(errors, key=lambda found: found.share)


def median_seconds(run: Callable[[], Any], repetitions: int, limit: float, clock: Callable[[], float]) -> float:
    """Median time from launch to results after a first call, which is not counted, as it may load the program.

    What takes over the limit in the second call is not called again.
    """

    def seconds() -> float:
        started = clock()
        jax.block_until_ready(run())
        return clock() - started

    seconds()
    second = seconds()
    return second if second > limit else statistics.median([second, *(seconds() for _ in range(repetitions - 1))])


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
