"""Which implementation runs, what is said of the others, and one of one's own."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import rwkv_kernels
from rwkv_kernels import dispatch
from rwkv_kernels.testing.cases import Shape
from tests.kernels.operators import Operator, as_jax, each_operator, problem

SMALL = Shape(2, 4, 3, 6, 5)
on_a_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="what the CPU lacks is the question")


def sizes(operator: Operator, time: int = 1024) -> tuple[int, ...]:
    """A shape as `explain` takes it."""
    return (4, time, 512) if operator.name == "wkv4" else (4, time, 8, 64, 64)


@pytest.mark.parametrize("name", rwkv_kernels.OPERATORS)
def test_modules_of_an_operator_can_be_imported_by_their_names(name: str) -> None:
    module = f"rwkv_kernels.ops.{name}.chunked"
    names: dict[str, Any] = {}
    exec(f"import {module} as chunked", names)  # which an attribute of the same name in a package would hide
    assert names["chunked"] is sys.modules[module]


# The package's two questions


@each_operator
def test_implementations_are_listed_by_name(operator: Operator) -> None:
    assert rwkv_kernels.implementations(operator.name) == tuple(operator.parts.implementations)
    assert {"scan", "chunked", "pallas_triton", "pallas_mosaic_tpu"} <= set(rwkv_kernels.implementations(operator.name))


@each_operator
def test_explain_says_what_a_cpu_would_run_and_why_not_the_others(operator: Operator) -> None:
    explanation = rwkv_kernels.explain(operator.name, sizes(operator), platform="cpu")
    assert explanation.chosen == "chunked"
    assert explanation.refusals["chunked"] is explanation.refusals["scan"] is None
    assert explanation.refusals.keys() == operator.parts.implementations.keys()
    for name, device in (("pallas_triton", "an NVIDIA GPU"), ("pallas_mosaic_tpu", "a TPU")):
        refusal = explanation.refusals[name]
        assert refusal is not None
        assert device in refusal
        assert "cpu" in refusal


@each_operator
def test_an_explanation_is_a_line_an_implementation(operator: Operator) -> None:
    first, *lines = str(rwkv_kernels.explain(operator.name, sizes(operator), platform="cpu")).splitlines()
    assert first.startswith(f"{operator.name} B4 T1024 H")
    assert first.endswith("float32 on cpu:")
    assert [line.split()[0] for line in lines] == list(operator.parts.implementations)
    verdicts = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}
    assert verdicts["chunked"] == "taken, by the table"
    assert verdicts["scan"] == "can, if named"
    assert verdicts["pallas_mosaic_tpu"].startswith("cannot: ")


@each_operator
def test_explain_knows_other_platforms_and_dtypes(operator: Operator) -> None:
    for platform, kernel in (("gpu", "pallas_triton"), ("tpu", "pallas_mosaic_tpu")):
        explanation = rwkv_kernels.explain(operator.name, sizes(operator), platform=platform)
        assert explanation.refusals[kernel] is None
        in_float64 = rwkv_kernels.explain(operator.name, sizes(operator), "float64", platform)
        assert "float64" in (in_float64.refusals[kernel] or "")
        assert in_float64.chosen in ("scan", "chunked", "associative_scan")


@each_operator
def test_one_token_is_a_matter_for_the_definition(operator: Operator) -> None:
    assert rwkv_kernels.explain(operator.name, sizes(operator, time=1), platform="cpu").chosen == "scan"


@each_operator
def test_explain_asks_about_this_machine_unless_told(operator: Operator) -> None:
    problem = rwkv_kernels.explain(operator.name, sizes(operator)).problem
    assert (problem.platform, problem.device_kind) == (jax.default_backend(), jax.devices()[0].device_kind)


@on_a_cpu
def test_an_explanation_names_the_kind_of_device_where_it_is_known() -> None:
    of_h100 = rwkv_kernels.explain("wkv7", (1, 2, 3, 4), platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
    assert str(of_h100).startswith("wkv7 B1 T2 H3 N4 M4 float32 on gpu (NVIDIA H100 80GB HBM3):\n")
    unknown = rwkv_kernels.explain("wkv7", (1, 2, 3, 4), platform="gpu")
    assert unknown.problem.device_kind is None
    assert str(unknown).startswith("wkv7 B1 T2 H3 N4 M4 float32 on gpu:\n")


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA H100 PCIe", "NVIDIA GH200 480GB"])
def test_kernels_for_hopper_are_known_to_run_on_it(kind: str) -> None:
    explanation = rwkv_kernels.explain("wkv7", (1, 2, 3, 64), platform="gpu", device_kind=kind)
    assert explanation.refusals["pallas_mosaic_gpu"] is None
    assert explanation.chosen == "chunked"


@pytest.mark.parametrize(
    ("platform", "kind", "sizes", "reason"),
    [
        ("cpu", "cpu", (64, 64), "it needs an NVIDIA Hopper GPU, and this is cpu"),
        ("gpu", None, (64, 64), "it needs an NVIDIA Hopper GPU, such as H100, and this is an unnamed GPU"),
        ("gpu", "NVIDIA A100-SXM4-80GB", (64, 64), "and this is NVIDIA A100-SXM4-80GB"),
        ("gpu", "NVIDIA B200", (64, 64), "and this is NVIDIA B200"),
        ("gpu", "NVIDIA H200", (64, 65), "its heads have at most 64 keys and values, and these 65"),
        ("gpu", "NVIDIA H200", (128, 64), "its heads have at most 64 keys and values, and these 128"),
    ],
)
def test_kernels_for_hopper_are_refused_elsewhere_with_the_reason(
    platform: str, kind: str | None, sizes: tuple[int, int], reason: str
) -> None:
    explanation = rwkv_kernels.explain("wkv7", (1, 2, 3, *sizes), platform=platform, device_kind=kind)
    assert reason in (explanation.refusals["pallas_mosaic_gpu"] or "")


def test_values_have_the_size_of_keys_unless_told() -> None:
    assert rwkv_kernels.explain("wkv7", (1, 2, 3, 4)) == rwkv_kernels.explain("wkv7", (1, 2, 3, 4, 4))


def test_an_unknown_operator_or_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"operator = 'wkv8': must be one of .*wkv7"):
        rwkv_kernels.implementations("wkv8")
    with pytest.raises(ValueError, match=r"operator = 'wkv8': must be one of .*wkv7"):
        rwkv_kernels.explain("wkv8", (1, 2, 3, 4))
    with pytest.raises(ValueError, match=r"shape = \(1, 2\): must be \(B, T, H, N\)"):
        rwkv_kernels.explain("wkv7", (1, 2))


# Asking by name


@on_a_cpu
@each_operator
@pytest.mark.parametrize(("name", "device"), [("pallas_triton", "an NVIDIA GPU"), ("pallas_mosaic_tpu", "a TPU")])
def test_one_that_cannot_run_here_is_refused_with_the_reason_and_a_way_out(
    operator: Operator, name: str, device: str
) -> None:
    inputs = as_jax(problem(operator, "realistic", SMALL)[0], jnp.float32)
    message = f"implementation = '{name}': {operator} cannot run it here: .*needs {device}.*cpu; use 'chunked'"
    with pytest.raises(ValueError, match=message):
        operator.run(**inputs, implementation=name)


@each_operator
def test_an_unknown_implementation_is_refused(operator: Operator) -> None:
    inputs = as_jax(problem(operator, "realistic", SMALL)[0], jnp.float32)
    with pytest.raises(ValueError, match=f"implementation = 'cuda': {operator} has scan, .*chunked, pallas_triton"):
        operator.run(**inputs, implementation="cuda")


@each_operator
def test_an_implementation_of_ones_own_is_taken(operator: Operator) -> None:
    inputs = as_jax(problem(operator, "realistic", SMALL)[0], jnp.float32)
    calls = []

    def run(*arguments: object, **options: object) -> tuple:
        calls.append(options)
        return operator.parts.implementations["scan"].run(*arguments, **options)

    operator.run(**inputs, implementation=dispatch.Implementation(run, dispatch.anything))
    assert len(calls) == 1
    of_another = dispatch.Implementation(run, lambda problem: f"this is {problem.device_kind}, not a Hopper")
    kind = jax.devices()[0].device_kind
    with pytest.raises(ValueError, match=rf"implementation = the given one: .*this is {kind}, not a Hopper"):
        operator.run(**inputs, implementation=of_another)
    refusing = dispatch.Implementation(run, lambda problem: "it is Sunday")
    with pytest.raises(ValueError, match=r"implementation = the given one: .*it is Sunday; use 'chunked'"):
        operator.run(**inputs, implementation=refusing)


# The choice itself


def never_run(*_: object, **__: object) -> tuple:
    raise AssertionError


def refusing(reason: str | None) -> dispatch.Implementation:
    return dispatch.Implementation(never_run, refuses=lambda problem: reason)


PROBLEM = dispatch.Problem("cpu", (1, 2, 3, 4, 5), "float32")
TABLE = {"slow": refusing(None), "middle": refusing(None), "fast": refusing("needs a GPU")}


def test_an_explanation_gives_each_reason() -> None:
    explanation = dispatch.explain("wkv7", TABLE, ("fast", "middle", "slow"), PROBLEM)
    assert explanation.refusals == {"slow": None, "middle": None, "fast": "needs a GPU"}
    assert explanation.chosen == "middle"


def test_an_explanation_says_whether_a_choice_was_measured() -> None:
    by_table = dispatch.explain("wkv7", TABLE, ("fast", "middle", "slow"), PROBLEM)
    measured = dispatch.explain("wkv7", TABLE, ("fast", "middle", "slow"), PROBLEM, "slow")
    assert (by_table.chosen, by_table.is_measured) == ("middle", False)
    assert (measured.chosen, measured.is_measured) == ("slow", True)
    assert str(by_table).splitlines()[2].split(maxsplit=1) == ["middle", "taken, by the table"]
    assert str(measured).splitlines()[1].split(maxsplit=1) == ["slow", "taken, as measured"]
    for name, message in (("fast", "needs a GPU"), ("faster", "wkv7 has slow, middle, fast")):
        with pytest.raises(ValueError, match=f"implementation = '{name}': .*{message}"):
            dispatch.explain("wkv7", TABLE, ("fast", "middle", "slow"), PROBLEM, name)
    assert rwkv_kernels.explain("wkv7", (1, 2, 3, 4), measured="scan").is_measured


def test_the_first_preferred_that_can_run_is_taken() -> None:
    assert dispatch.choose("wkv7", TABLE, ("fast", "middle", "slow"), PROBLEM, None) is TABLE["middle"]
    assert dispatch.choose("wkv7", TABLE, ("fast", "middle", "slow"), PROBLEM, "slow") is TABLE["slow"]


def test_asking_for_one_that_cannot_run_raises_with_the_reason_and_a_way_out() -> None:
    with pytest.raises(ValueError, match="implementation = 'fast': wkv7 cannot run it here: needs a GPU; use 'slow'"):
        dispatch.choose("wkv7", TABLE, ("fast", "slow"), PROBLEM, "fast")
