"""Plans of small runs for an H100 host and a TPU slice, from the compilers that would compile them there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from rwkv_jax.cli import load_config
from rwkv_jax.config import ModelConfig
from rwkv_jax.plan.devices import parse_topology
from rwkv_jax.plan.planner import Plan
from rwkv_jax.plan.report import describe
from rwkv_jax.plan.run import plan_run
from tests.plan.planned import small_run

pytestmark = pytest.mark.devices

CONFIGS = Path(__file__).parents[2] / "configs"


def check(plan: Plan) -> None:
    assert plan.arguments.compiled == plan.arguments.total + plan.arguments.padding
    assert plan.program is not None
    assert plan.program.unknown_loops == ()
    found = {(total.kind, axis) for total in plan.program.collectives for axis in total.axes}
    assert {("all-gather", "fsdp"), ("reduce-scatter", "fsdp"), ("all-reduce", "tensor")} <= found
    by_hand = (plan.work.model_flops + plan.work.recomputed_flops) / 8
    assert 0.8 * by_hand < sum(plan.program.product_flops.values()) < 4 * by_hand
    assert plan.fits
    assert plan.mfu is not None
    assert 0 < plan.mfu < 1


def test_two_hosts_of_h100() -> None:
    plan = plan_run(small_run("7", fsdp=2, tensor=2), parse_topology("h100:2x4"))
    check(plan)
    assert plan.arguments.padding == 0
    assert plan.program is not None
    across = {total.axes for total in plan.program.collectives if total.across_hosts}
    assert ("data",) in across
    assert ("tensor",) not in across  # neighbors in the mesh are neighbors in a host


def test_a_tpu_slice() -> None:
    plan = plan_run(small_run("4", fsdp=4, tensor=2), parse_topology("v5e:2x4"))
    check(plan)
    assert plan.arguments.padding > 0
    assert plan.program is not None
    assert plan.program.code > 0


def test_one_gpu_is_no_mesh() -> None:
    plan = plan_run(small_run("6"), parse_topology("h100:1x1"))
    assert plan.arguments.compiled == plan.arguments.total
    assert plan.program is not None
    assert plan.program.collectives == ()
    assert (plan.program.unknown_loops, bool(plan.program.chosen_loops)) == ((), True)
    assert plan.fits


@pytest.mark.long
@pytest.mark.parametrize("kernels", ["pallas_triton", "pallas_triton_split"])
def test_formulas_predict_what_a_step_with_kernels_compiles_to(kernels: str) -> None:
    plain = small_run("7")
    named = dataclasses.replace(plain, model=dataclasses.replace(plain.model, wkv_implementation=kernels))
    programs = [plan_run(config, parse_topology("h100:1x1")).program for config in (plain, named)]
    assert all(programs)
    plain_estimates, named_estimates = (
        {estimate.implementation: estimate for estimate in program.estimates} for program in programs if program
    )
    chunked, predicted, compiled = plain_estimates["chunked"], plain_estimates[kernels], named_estimates[kernels]
    assert (chunked.is_compiled, predicted.is_compiled, compiled.is_compiled) == (True, False, True)
    assert compiled.products == pytest.approx(predicted.products, rel=0.02)
    assert compiled.traffic == pytest.approx(predicted.traffic, rel=0.1)
    assert compiled.launches == pytest.approx(predicted.launches, rel=0.1)
    assert compiled.seconds < 0.9 * chunked.seconds


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "topology"),
    [("rwkv7_7_2b", "h100:8x8"), ("rwkv7_7_2b", "v5p:4x4x4"), ("rwkv4_14b", "h100:8x8")],
)
def test_large_recipes_fit(name: str, topology: str) -> None:
    plan = plan_run(load_config(CONFIGS / f"{name}.py"), parse_topology(topology))
    assert plan.program is not None
    assert plan.fits
    assert plan.arguments.compiled == plan.arguments.total + plan.arguments.padding
    assert (plan.arguments.padding == 0) == topology.startswith("h100")
    assert plan.program.unknown_loops == plan.program.chosen_loops == ()
    assert plan.mfu is not None
    assert 0 < plan.mfu < 1


@pytest.mark.long
def test_what_does_not_fit_is_refused_by_a_tpu() -> None:
    run = small_run("4")
    wide = dataclasses.replace(run, model=ModelConfig("4", vocab_size=65536, num_layers=2, width=8192))
    plan = plan_run(wide, parse_topology("v5e:1x1"))
    assert not plan.fits
    assert plan.peak is None
    assert plan.refusal is not None
    assert "RESOURCE_EXHAUSTED" in plan.refusal
    assert describe(plan).endswith("verdict: does not fit")
