"""Which implementation is taken by measurement: a wrong one never, whatever its time."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from rwkv_kernels import OPERATORS, PARTS, autotune, dispatch
from rwkv_kernels.autotune import BOUND, Trial, Tuning, Workload, workload_here

SCAN = OPERATORS["wkv6"].implementations["scan"]
SHAPE = (2, 5, 1, 4, 4)


def changed(change: Callable[[Any, Any], tuple[Any, Any]]) -> dispatch.Implementation:
    """The definition with other results."""
    return dispatch.Implementation(lambda *inputs, **options: change(*SCAN.run(*inputs, **options)), dispatch.anything)


def raising(*_: object, **__: object) -> tuple:
    raise NotImplementedError("no lowering\nfor this device")


def clock(*durations: float) -> Callable[[], float]:
    """Seconds that pass during one timed call after another; fails if there are more calls."""
    times, now = [], 0.0
    for duration in durations:
        times += [now, now + duration]
        now += duration
    return iter(times).__next__


def tune(workload: Workload, durations: Iterable[float] = (), **implementations: dispatch.Implementation) -> Tuning:
    return autotune.tune(workload, implementations=implementations, repetitions=3, clock=clock(*durations))


def test_the_fastest_that_is_right_is_taken() -> None:
    tuning = tune(
        workload_here("wkv6", SHAPE),
        [9.0, 2.0, 1.0, 8.0, 9.0, 0.5, 7.0, 1.5],  # the first call of each is not counted
        slow=SCAN,
        wrong_y=changed(lambda y, state: (1.001 * y, state)),
        wrong_state=changed(lambda y, state: (y, 1.001 * state)),
        wrong_gradient=changed(lambda y, state: (1.001 * y - 0.001 * jax.lax.stop_gradient(y), state)),
        no_number=changed(lambda y, state: (jnp.nan * y, state)),
        raises=dispatch.Implementation(raising, dispatch.anything),
        elsewhere=dispatch.Implementation(raising, lambda problem: f"this is a {problem.platform}"),
        fast=SCAN,
    )
    trials = {trial.name: trial for trial in tuning.trials}
    assert tuning.chosen == "fast"
    assert (trials["slow"].seconds, trials["fast"].seconds) == (2.0, 1.5)
    assert trials["slow"].failure is trials["fast"].failure is None
    assert 0 < (trials["slow"].error or 0) < 1e-5
    assert trials["wrong_y"].failure == f"WRONG: y is off by 1e-03, at most {BOUND:.0e}"
    assert trials["wrong_state"].failure == f"WRONG: state is off by 1e-03, at most {BOUND:.0e}"
    assert (trials["wrong_gradient"].failure or "").startswith("WRONG: d")
    assert trials["wrong_gradient"].error == pytest.approx(1e-3, rel=0.1)
    assert trials["no_number"].error == math.inf
    assert trials["raises"] == Trial("raises", None, None, "fails: NotImplementedError: no lowering")
    assert trials["elsewhere"] == Trial("elsewhere", None, None, f"cannot: this is a {jax.default_backend()}")

    first, *lines = str(tuning).splitlines()
    assert first.startswith("wkv6 B2 T5 H1 N4 M4 float32 on ")
    assert first.endswith("float32 inputs, with gradients:")
    assert [line.split()[0] for line in lines] == list(trials)
    assert lines[-1].endswith("1500.000 ms  taken: the fastest")
    assert lines[0].endswith("2000.000 ms  right")


def test_what_is_wrong_only_on_the_workloads_sizes_is_never_taken() -> None:
    """As a kernel of which the small input takes another program."""

    def run(*inputs: Any, **options: Any) -> Any:
        y, state = SCAN.run(*inputs, **options)
        return (y if y.shape[1] == 80 else 1.001 * y), state

    workload = workload_here("wkv6", (2, 90, 1, 4, 4), gradients=False)
    wrong = dispatch.Implementation(run, dispatch.anything)
    tuning = tune(workload, [2.0] * 4 + [1.0] * 4, chunked=SCAN, wrong=wrong)
    assert tuning.chosen == "chunked"
    assert tuning.trials[1].seconds is None
    assert (tuning.trials[1].error or 1) < 1e-5
    failure = "WRONG on the sizes of the workload: y is off chunked's by 1e-03, at most 2e-04"
    assert tuning.trials[1].failure == failure


def test_what_takes_ten_times_as_long_is_not_timed_again() -> None:
    """What the table takes is the first to be timed, and so is usually what others are compared with."""
    workload = workload_here("wkv6", SHAPE, gradients=False)
    tuning = tune(workload, [1.0, 1.0, 1.0, 1.0, 12.0, 11.0], associative_scan=SCAN, chunked=SCAN)
    assert [trial[::2] for trial in tuning.trials] == [("associative_scan", 11.0), ("chunked", 1.0)]


def test_a_slow_first_call_is_not_held_against_it() -> None:
    """It may load the program."""
    workload = workload_here("wkv6", SHAPE, gradients=False)
    tuning = tune(workload, [1.0] * 4 + [100.0, 0.5, 0.5, 0.5], associative_scan=SCAN, chunked=SCAN)
    assert tuning.chosen == "associative_scan"


def test_what_is_left_out_is_not_run_and_all_that_is_run_is_surrounded() -> None:
    inside: list[str] = []

    @contextlib.contextmanager
    def trying(name: str) -> Iterator[None]:
        inside.append(name)
        yield
        inside.append(f"{name} ended")

    tuning = autotune.tune(
        workload_here("wkv5", SHAPE, gradients=False),
        implementations={
            "out": dispatch.Implementation(raising, dispatch.anything),
            "in": OPERATORS["wkv5"].implementations["scan"],
        },
        left_out={"out": "not tried", "gone": "not here"},
        trying=trying,
    )
    assert inside == ["in", "in ended"]
    assert (tuning.chosen, tuning.trials[0]) == ("in", Trial("out", None, None, "not tried"))


def test_without_one_that_is_right_nothing_is_taken() -> None:
    workload = workload_here("wkv6", SHAPE, gradients=False)
    tuning = autotune.tune(workload, implementations={"scan": SCAN}, memory=100)
    assert (tuning.chosen, tuning.trials[0].seconds) == (None, None)
    assert (tuning.trials[0].failure or "").startswith("fails: MemoryError: it takes ")
    assert tuning.is_lasting  # and is not tried again at every start


def test_what_a_failing_device_or_full_memory_says_does_not_last(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate"

    def full(*_: object, **__: object) -> tuple:
        raise jax.errors.JaxRuntimeError(said)

    workload = workload_here("wkv6", SHAPE, gradients=False)
    out_of_memory = dispatch.Implementation(full, dispatch.anything)
    fails = dispatch.Implementation(raising, dispatch.anything)
    assert tune(workload, [1.0] * 4, chunked=fails, scan=SCAN).is_lasting
    tuning = tune(workload, [1.0] * 4, chunked=out_of_memory, scan=SCAN)
    assert (tuning.chosen, tuning.is_lasting) == ("scan", False)
    said = "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM"  # a TPU's compiler, libtpu 0.0.51
    assert tune(workload, [1.0] * 4, chunked=out_of_memory, scan=SCAN).is_lasting
    monkeypatch.setattr(autotune, "_device_works", lambda: False)
    tuning = tune(workload, chunked=fails, scan=SCAN)
    assert (tuning.chosen, tuning.is_lasting) == (None, False)
    assert tuning.trials[1].failure == "not tried: the device fails since chunked"


def test_half_precision_may_round_its_results_but_not_the_state() -> None:
    workload = workload_here("wkv6", SHAPE, "bfloat16", gradients=False)
    exact = autotune.exact_results(workload)
    assert autotune.worst_error(workload, SCAN, exact).is_right
    wrong = autotune.worst_error(workload, changed(lambda y, state: (y, 1.001 * state)), exact)
    assert (wrong.name, wrong.bound, wrong.is_right) == ("state", BOUND, False)


def test_an_error_that_half_precision_would_hide_is_found_with_float32_inputs() -> None:
    off = changed(lambda y, state: (1.001 * y, state))
    tuning = tune(workload_here("wkv6", SHAPE, "bfloat16", gradients=False), [1.0] * 4, scan=SCAN, off=off)
    assert tuning.chosen == "scan"
    assert tuning.trials[1].failure == f"WRONG: y is off by 1e-03, at most {BOUND:.0e}"


@pytest.mark.parametrize(("name", "shape"), [("wkv4", (3, 300, 70, 1, 1)), ("wkv5", (3, 300, 3, 4, 4))])
def test_the_timed_call_has_the_sizes_and_dtypes_of_the_workload(name: str, shape: tuple[int, ...]) -> None:
    """And the checked one is smaller, but as large in a head."""
    operator, seen = OPERATORS[name], []

    def run(*inputs: Any, **options: Any) -> Any:
        seen.append((inputs, options["segments"]))
        return operator.implementations["scan"].run(*inputs, **options)

    workload = workload_here(name, shape, "bfloat16", gradients=False, packed=True)  # pyright: ignore[reportArgumentType]
    spy = dispatch.Implementation(run, dispatch.anything)
    tuning = autotune.tune(workload, implementations={"spy": spy}, repetitions=1)
    assert tuning.chosen == "spy"
    (small, _), (widened, _), (timed, segments) = seen
    rows, steps, heads, *_ = shape
    of_head = () if name == "wkv4" else (4,)
    assert [x.shape for x in timed[:-1] if x.ndim > 2] == [(rows, steps, heads, *of_head)] * (
        2 if name == "wkv4" else 3
    )
    assert [x.dtype for x in timed[:-1]] == [
        jnp.float32 if axes in ("C", "H N") else jnp.bfloat16 for axes in operator.axes.values()
    ]
    assert {x.dtype for x in jax.tree.leaves(timed[-1])} == {jnp.dtype(jnp.float32)}
    assert jax.tree.leaves(timed[-1])[0].shape == ((rows, heads) if name == "wkv4" else (rows, heads, 4, 4))
    assert {x.dtype for x in jax.tree.leaves(widened)} == {jnp.dtype(jnp.float32)}
    assert segments.shape == (rows, steps)
    assert next(x.shape for x in small[:-1] if x.ndim > 2) == (2, 80, 64 if name == "wkv4" else 2, *of_head)


@pytest.mark.parametrize("gradients", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_kernel_that_is_right_is_taken(gradients: bool) -> None:
    kernel = OPERATORS["wkv7"].implementations["pallas_triton"]
    interpreted = dispatch.Implementation(functools.partial(kernel.run, interpret=True), dispatch.anything)
    tuning = tune(workload_here("wkv7", (1, 20, 1, 8, 8), gradients=gradients), [1.0] * 4, pallas_triton=interpreted)
    assert tuning.chosen == "pallas_triton"
    assert (tuning.trials[0].error or 1) < 5e-6


# Parts of a model's layer around an operator


def test_a_kernel_for_single_tokens_is_taken_where_it_is_right_and_faster() -> None:
    """On T tokens one by one, of rows of which one pauses."""
    step = PARTS["wkv7_step"].implementations
    kernel = dispatch.Implementation(functools.partial(step["pallas_triton"].run, interpret=True), dispatch.anything)

    def wrong(*inputs: Any, **options: Any) -> Any:
        o, state = step["xla"].run(*inputs, **options)
        return o, 1.001 * state

    seen: list[Any] = []

    def fast(inputs: Any, state: Any, **options: Any) -> Any:
        seen.append((inputs["v"].dtype, state.shape, options["lengths"].shape))
        return kernel.run(inputs, state, **options)

    tuning = tune(
        workload_here("wkv7_step", (3, 4, 3, 8, 8), "bfloat16", gradients=False),
        [2.0] * 4 + [1.0] * 4,
        xla=step["xla"],
        wrong=dispatch.Implementation(wrong, dispatch.anything),
        pallas_triton=dispatch.Implementation(fast, dispatch.anything),
    )
    assert tuning.chosen == "pallas_triton"
    assert (tuning.trials[1].failure or "").startswith("WRONG: state is off by ")
    assert max(trial.error or 0 for trial in tuning.trials if trial.failure is None) < 5e-3
    assert set(seen) == {
        (jnp.dtype(jnp.bfloat16), (2, 2, 8, 8), (2,)),
        (jnp.dtype(jnp.float32), (2, 2, 8, 8), (2,)),
        (jnp.dtype(jnp.bfloat16), (3, 3, 8, 8), (3,)),
    }


def test_what_follows_the_operator_is_checked_with_its_gradients() -> None:
    output = PARTS["wkv7_output"].implementations["xla"]

    def wrong(y: Any, r: Any, *inputs: Any, **options: Any) -> Any:
        return output.run(y, jax.lax.stop_gradient(r), *inputs, **options)

    implementations = {"xla": output, "wrong": dispatch.Implementation(wrong, dispatch.anything)}
    tuning = tune(workload_here("wkv7_output", (2, 5, 1, 8, 8)), [1.0] * 4, **implementations)
    assert tuning.chosen == "xla"
    assert (tuning.trials[1].failure or "").startswith("WRONG: dr is off by 1e+00")


def test_forward_calls_have_the_lengths_of_an_engines_rows() -> None:
    seen: list[Any] = []

    def run(*inputs: Any, **options: Any) -> Any:
        seen.append(options.get("lengths"))
        return OPERATORS["wkv5"].implementations["scan"].run(*inputs, **options)

    ignoring = dispatch.Implementation(
        lambda *inputs, **options: (
            OPERATORS["wkv5"].implementations["scan"].run(*inputs, **options | {"lengths": None})
        ),
        dispatch.anything,
    )
    workload = workload_here("wkv5", (3, 6, 1, 4, 4), gradients=False)
    tuning = tune(workload, [1.0] * 4, spy=dispatch.Implementation(run, dispatch.anything), ignoring=ignoring)
    assert [lengths.shape for lengths in seen] == [(2,), (3,)]
    assert tuning.chosen == "spy"
    assert (tuning.trials[1].failure or "").startswith("WRONG: state is off by ")
