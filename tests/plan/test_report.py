"""Plans in words and as files, among them those of devices that are too small."""

from __future__ import annotations

import dataclasses
import json

import pytest

from rwkv_jax.plan.devices import DEVICES
from rwkv_jax.plan.planner import Arguments, CollectiveTotal, Floors, Plan, Program, Work
from rwkv_jax.plan.report import describe, to_json
from rwkv_jax.plan.step_time import OperatorCalls

GIBIBYTE = 1 << 30
PROGRAM = Program(
    results=8,
    temporary=30 * GIBIBYTE,
    code=0,
    product_flops={"bfloat16": 10**15},
    traffic=10**12,
    collectives=(CollectiveTotal("all-gather", ("fsdp",), True, 8, 33, 2 * GIBIBYTE, GIBIBYTE, 0.25),),
    unknown_loops=(),
    chosen_loops=(),
    floors=Floors(arithmetic=0.5, products=1.0, memory=0.01, interconnect=0.25),
)
PLAN = Plan(
    "h100:1x8",
    {"data": 1, "fsdp": 8},
    DEVICES["h100"],
    Work(tokens=4096, model_flops=8 * 10**15, recomputed_flops=0, dtype="bfloat16"),
    Arguments({"parameters": 10 * GIBIBYTE, "batch": 1024}, compiled=10 * GIBIBYTE + 1024),
    PROGRAM,
)


def replaced(**changes: object) -> Plan:
    return dataclasses.replace(PLAN, program=dataclasses.replace(PROGRAM, **changes))  # pyright: ignore


def test_the_words_of_a_plan() -> None:
    words = describe(PLAN)
    assert words.startswith("h100:1x8: fsdp 8; a step has 4,096 tokens")
    assert "10,737,419,264 bytes by shapes and shardings" in words
    assert "the compiler says the same" in words
    assert "40.00 GiB  51% of 79.14 GiB" in words
    assert "verdict: fits; at best 4,096 tokens/s, MFU 50%" in words
    (line,) = (line for line in words.splitlines() if "all-gather" in line)
    assert line.split() == ["all-gather", "fsdp,", "hosts", "8", "33", "2.00", "GiB", "1.00", "GiB", "250.00"]
    (highest,) = (line for line in words.splitlines() if "<- the highest" in line)
    assert highest.split()[0] == "products"
    (estimate,) = (line for line in words.splitlines() if "by ring algorithms, an estimate" in line)
    assert estimate.split()[:2] == ["interconnect", "250.00"]
    assert "stay idle" not in words
    assert "weak" not in words


def test_a_rate_that_only_the_models_arithmetic_bounds_is_called_so() -> None:
    floors = dataclasses.replace(PROGRAM.floors, arithmetic=1.0, products=1.0, memory=0.0, interconnect=0.0)
    assert "verdict: fits; at best 4,096 tokens/s, MFU 100% (of arithmetic alone)" in describe(replaced(floors=floors))


def test_a_compiler_that_counts_otherwise_is_shown() -> None:
    other = dataclasses.replace(PLAN, arguments=dataclasses.replace(PLAN.arguments, compiled=10 * GIBIBYTE))
    assert "the compiler says -1,024 bytes" in describe(other)


def test_too_much_for_the_device() -> None:
    plan = replaced(temporary=80 * GIBIBYTE)
    assert not plan.fits
    assert "verdict: does not fit; at best" in describe(plan)


@pytest.mark.parametrize(("name", "share"), [("h100", 0.95), ("v5p", 1.0), ("cpu", 1.0)])
def test_what_fits_is_what_a_program_can_use(name: str, share: float) -> None:
    device = DEVICES[name]
    most = int(share * device.memory)

    def plan_of(peak: int) -> Plan:
        plan = dataclasses.replace(replaced(temporary=0), device=device)
        assert plan.peak is not None
        return dataclasses.replace(plan, program=dataclasses.replace(PROGRAM, temporary=peak - plan.peak))

    assert plan_of(most).peak == most
    assert plan_of(most).fits
    assert not plan_of(most + 1).fits
    assert "verdict: does not fit" in describe(plan_of(most + 1))
    assert ("leave about 95% of a GPU's memory" in describe(plan_of(most + 1))) == (name == "h100")
    assert "leave about" not in describe(plan_of(device.memory + 1))


def test_more_than_jax_takes_by_itself() -> None:
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in describe(replaced(temporary=60 * GIBIBYTE))
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in describe(PLAN)


def test_what_is_on_the_host_is_not_on_the_device() -> None:
    plan = dataclasses.replace(PLAN, arguments=dataclasses.replace(PLAN.arguments, on_host=4 * GIBIBYTE))
    assert PLAN.peak is not None
    assert plan.peak == PLAN.peak - 4 * GIBIBYTE
    assert "of these on the host" in describe(plan)


def test_loops_that_could_not_be_counted_are_named() -> None:
    words = describe(replaced(unknown_loops=("while.7",)))
    assert "counted once, trip count unknown: while.7" in words
    assert words.endswith("the rate is too high: it leaves out all but one turn of the loops named above")


def test_a_choice_that_a_run_leaves_to_measurement_is_named() -> None:
    calls = OperatorCalls("wkv7", "chunked", 1, 1, 64.0, 8, 8, {"r": 2}, may_be_measured=True)
    measured, named = (
        dataclasses.replace(PLAN, work=dataclasses.replace(PLAN.work, operator=operator))
        for operator in (calls, dataclasses.replace(calls, may_be_measured=False))
    )
    assert "wkv7 by chunked, by the table; a new run measures" in describe(measured)
    on_cpu = dataclasses.replace(measured, device=DEVICES["cpu"])
    assert all("a new run measures" not in describe(plan) for plan in (named, on_cpu))


def test_kernels_whose_products_are_not_known_are_named() -> None:
    words = describe(replaced(uncounted_kernels=("wkv7_of_tomorrow",)))
    assert "products of these kernels are not known, and left out: wkv7_of_tomorrow\n" in words
    assert words.endswith("products of the kernels above are left out")
    assert "left out" not in describe(PLAN)


def test_loops_that_the_data_choose_are_named() -> None:
    words = describe(replaced(chosen_loops=("while.7", "while.8")))
    assert "the data choose one of two loops; counted as for weak decays: while.7, while.8" in words
    assert words.endswith("verdict: fits; at best 4,096 tokens/s, MFU 50% while decays are weak")


def test_devices_that_stay_idle_are_counted() -> None:
    assert "\n5 devices stay idle" in describe(dataclasses.replace(PLAN, idle_devices=5))


def test_a_refusal() -> None:
    plan = dataclasses.replace(PLAN, program=None, refusal="RESOURCE_EXHAUSTED: 20 GiB of 16 GiB")
    assert (plan.fits, plan.peak, plan.tokens_per_second, plan.mfu) == (False, None, None, None)
    assert describe(plan).endswith("the compiler refuses: RESOURCE_EXHAUSTED: 20 GiB of 16 GiB\nverdict: does not fit")
    assert to_json(plan)["program"] is None


def test_plain_data_have_the_verdict_too() -> None:
    found = json.loads(json.dumps(to_json(PLAN)))
    assert (found["version"], found["fits"], found["mfu"], found["tokens_per_second"]) == (3, True, 0.5, 4096)
    assert found["arguments"]["total"] == PLAN.arguments.total
    assert found["device"]["name"] == "h100"
