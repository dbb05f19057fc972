"""Plans against programs with known answers, arithmetic by hand, and devices that are simple to reckon with."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from rwkv_jax.config import ConfigError, DistillationConfig, ModelConfig, StepConfig, TrainConfig, student_of
from rwkv_jax.plan.costs import Collective, CollectiveKind
from rwkv_jax.plan.devices import DEVICES, Topology, parse_topology
from rwkv_jax.plan.planner import bandwidth, padded_bytes, total_collectives
from rwkv_jax.plan.replica_groups import Groups
from rwkv_jax.plan.run import count_work, plan_run

ROOT = Path(__file__).parents[2]
DEVICES_OF_RUNS = {
    "7 data 2 x fsdp 2 x tensor 2": 8,
    "4 fsdp 4 x sequence 2, carried": 8,
    "4 data 8, offloaded": 8,
    "6 one row": 1,
    "4 one row, offloaded": 1,
}
RUNS = list(DEVICES_OF_RUNS)


@functools.cache
def planned() -> dict[str, Any]:
    """What the program prints, from one process."""
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-W", "error", "-m", "tests.plan.planned"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.long
def test_collectives_of_a_known_program() -> None:
    rows, weights = 8 * 32 * 4, 32 * 32 * 4
    expected = {
        ("all-gather", ("fsdp",)): (5, 5 * weights),
        ("all-reduce", ("data",)): (5, 5 * rows),
        ("collective-permute", ("fsdp",)): (1, rows),
        ("all-to-all", ("fsdp",)): (1, rows),
        ("reduce-scatter", ("data",)): (1, rows),
    }
    totals = planned()["known"]["program"]["collectives"]
    found = {(x["kind"], tuple(x["axes"])): (x["count"], x["bytes"]) for x in totals}
    assert found == expected
    assert {x["kind"]: x["group_size"] for x in totals if x["axes"] == ["fsdp"]} == {
        "all-gather": 4,
        "all-to-all": 4,
        "collective-permute": 2,  # a pair
    }


def test_products_and_floors_of_a_known_program() -> None:
    plan = planned()["known"]
    program, floors = plan["program"], plan["program"]["floors"]
    products = 5 * 2 * 8 * 32 * 32
    assert program["product_flops"] == {"float32 default": products}
    device = DEVICES["cpu"]
    assert floors["arithmetic"] == pytest.approx(products / device.float32_default)
    assert floors["products"] == pytest.approx(products / device.float32_default)
    arguments, results = 8 * 32 * 4 + 5 * 8 * 32 * 4 + 4, 16 * 8 * 4 + 4
    assert floors["memory"] == pytest.approx((arguments + results) / device.memory_bandwidth, rel=0.02)
    assert floors["interconnect"] == pytest.approx(sum(x["seconds"] for x in program["collectives"]))
    assert plan["mfu"] == pytest.approx(floors["arithmetic"] / max(floors.values()))
    assert plan["tokens_per_second"] == pytest.approx(64 / max(floors.values()))


@pytest.mark.parametrize("name", ["known", *RUNS])
def test_argument_bytes_are_what_shapes_and_shardings_say(name: str) -> None:
    arguments = planned()[name]["arguments"]
    assert arguments["compiled"] == arguments["total"] == sum(arguments["groups"].values())
    assert arguments["padding"] == 0


@pytest.mark.parametrize("name", RUNS)
def test_plan_of_a_run(name: str) -> None:
    plan = planned()[name]
    groups, program = plan["arguments"]["groups"], plan["program"]
    assert groups["optimizer"] == pytest.approx(2 * groups["parameters"], rel=1e-3)  # Adam's two moments
    assert groups.get("averages") == (groups["parameters"] if name == "6 one row" else None)
    assert (groups["carried state"] > 0) == name.endswith("carried")
    num_devices = DEVICES_OF_RUNS[name]
    assert math.prod(plan["mesh"].values()) == num_devices
    assert plan["idle_devices"] == 8 - num_devices
    assert ("stay idle" in plan["described"]) == (num_devices < 8)
    on_device = plan["arguments"]["total"] - plan["arguments"]["on_host"]
    assert plan["peak"] == on_device + sum(program[x] for x in ("results", "temporary", "code"))
    assert plan["arguments"]["on_host"] == (groups["optimizer"] if name.endswith("offloaded") else 0)
    assert plan["fits"]
    assert program["unknown_loops"] == []
    # All products, by hand and as compiled: backward passes gather, recompute and pad a little besides.
    by_hand = (plan["work"]["model_flops"] + plan["work"]["recomputed_flops"]) / num_devices
    assert 0.8 * by_hand < sum(program["product_flops"].values()) < 4 * by_hand


def test_all_chunks_count_where_the_data_choose_how_they_are_computed() -> None:
    plan = planned()["6 one row"]
    program = plan["program"]
    assert program["chosen_loops"]
    assert not planned()[RUNS[0]]["program"]["chosen_loops"]
    # What the recurrence writes into the state and reads from it, forward and twice as much going back. A chunk is 32
    # of the row's 1024 steps: one turn of the loops would be far less than that.
    width, head_dim, num_layers = 64, 16, 3
    assert program["product_flops"]["float32 highest"] > 3 * 1024 * num_layers * 4 * head_dim * width
    assert "counted as for weak decays: while" in plan["described"]
    assert plan["described"].endswith("while decays are weak")


def test_collectives_of_a_run_lie_along_the_axes_that_split_it() -> None:
    def along(name: str) -> set[tuple[str, str]]:
        totals = planned()[name]["program"]["collectives"]
        return {(total["kind"], axis) for total in totals for axis in total["axes"]}

    tensor = along(RUNS[0])
    assert {("all-gather", "fsdp"), ("reduce-scatter", "fsdp"), ("all-reduce", "tensor")} <= tensor
    assert not [axis for _, axis in tensor if axis == "sequence"]
    sequence = along(RUNS[1])
    assert ("collective-permute", "sequence") in sequence
    assert not [axis for _, axis in sequence if axis in ("data", "tensor")]


def test_a_plan_in_words() -> None:
    words = planned()[RUNS[0]]["described"]
    assert words.startswith("cpu:8: data 2, fsdp 2, tensor 2; a step has 256 tokens")
    assert "the compiler says the same" in words
    assert "verdict: fits; at best" in words
    assert words.count("<- the highest") == 1


@pytest.mark.parametrize(
    ("shape", "dtype", "order", "tiles", "size"),
    [
        ((768,), jnp.float32, (0,), ((1024,),), 4096),
        ((), jnp.int32, (), ((128,),), 512),
        ((3, 9, 130), jnp.float32, (0, 1, 2), ((8, 128),), 3 * 16 * 256 * 4),
        ((9, 3, 130), jnp.bfloat16, (1, 0, 2), ((8, 128), (2, 1)), 3 * 16 * 256 * 2),
        ((5, 7), jnp.float32, (0, 1), (), 5 * 7 * 4),
    ],
)
def test_tiles_fill_up_what_they_cut(
    shape: tuple[int, ...], dtype: Any, order: tuple[int, ...], tiles: tuple[tuple[int, ...], ...], size: int
) -> None:
    leaf = jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    assert padded_bytes(leaf, SimpleNamespace(major_to_minor=order, tiling=tiles)) == size


def collective(kind: CollectiveKind, groups: Groups, executions: int = 1) -> Collective:
    return Collective(kind, groups, bytes=1 << 20, executions=executions)


HOSTS = (0, 0, 0, 0, 1, 1, 1, 1)
WITHIN, BETWEEN, ALL = ((0, 1, 2, 3), (4, 5, 6, 7)), ((0, 4), (1, 5), (2, 6), (3, 7)), (tuple(range(8)),)


@pytest.mark.parametrize(("groups", "links"), [(WITHIN, 9.0), (BETWEEN, 1.0), (ALL, 4.0), (((0, 1, 4, 5),), 2.0)])
def test_a_ring_between_hosts_has_the_network_of_all_its_members(groups: Groups, links: float) -> None:
    device = dataclasses.replace(DEVICES["h100"], link_bandwidth=9.0, host_bandwidth=1.0)
    assert bandwidth(collective("all-gather", groups), device, HOSTS) == links
    faster = dataclasses.replace(device, host_bandwidth=100.0)
    assert bandwidth(collective("all-gather", groups), faster, HOSTS) == 9.0
    assert bandwidth(collective("all-gather", groups), DEVICES["v5p"], HOSTS) == DEVICES["v5p"].link_bandwidth


def test_totals_tell_kinds_axes_and_hosts_apart() -> None:
    found = total_collectives(
        [collective("all-gather", WITHIN, 3), collective("all-gather", BETWEEN), collective("all-gather", WITHIN)],
        DEVICES["h100"],
        {"data": 2, "fsdp": 4},
        HOSTS,
    )
    assert [(x.axes, x.across_hosts, x.count, x.bytes >> 20) for x in found] == [
        (("data",), True, 1, 1),
        (("fsdp",), False, 4, 4),
    ]
    assert found[1].seconds == pytest.approx(4 * (1 << 20) * 3 / 4 / DEVICES["h100"].link_bandwidth)


def test_work_by_hand() -> None:
    model = ModelConfig(vocab_size=512, num_layers=3, width=64)
    plain = TrainConfig(model=model, training=StepConfig(batch_size=4, sequence_length=8))
    work = count_work(plain)
    assert (work.tokens, work.recomputed_flops, work.dtype) == (32, 0, "float32")
    assert work.model_flops == 3 * 32 * model.flops_per_token()
    again = dataclasses.replace(plain, training=dataclasses.replace(plain.training, remat="full"))
    blocks = model.flops_per_token() - 2 * 512 * 64
    assert count_work(again).recomputed_flops == 32 * blocks
    kept = dataclasses.replace(plain, training=dataclasses.replace(plain.training, remat="operator"))
    assert count_work(kept).recomputed_flops == 32 * blocks  # at most
    pieces = dataclasses.replace(again, training=dataclasses.replace(again.training, loss_chunk=16))
    assert count_work(pieces).recomputed_flops == 32 * model.flops_per_token()
    fused = dataclasses.replace(pieces, training=dataclasses.replace(pieces.training, fused_loss=True))
    assert count_work(fused).recomputed_flops == 32 * blocks
    taught = dataclasses.replace(
        pieces,
        training=dataclasses.replace(pieces.training, objective="distill"),
        distillation=DistillationConfig("teacher"),
    )
    teacher = dataclasses.replace(model, width=128)
    with mock.patch("rwkv_jax.training.teacher.read_model", return_value=(teacher, "bfloat16")):
        work = count_work(taught)  # it has no backward pass
    assert work.model_flops == 32 * (3 * model.flops_per_token() + teacher.flops_per_token())
    assert work.recomputed_flops == 32 * (model.flops_per_token() + 2 * 512 * 128)


def test_the_work_of_an_alignment_is_that_of_mixers_and_of_the_teacher() -> None:
    """Neither model has logits; the teacher's attention is computed again; and only aligned mixers have gradients."""
    sizes: dict[str, Any] = {"vocab_size": 512, "num_layers": 3, "width": 64, "ffn_width": 160}
    teacher = ModelConfig(architecture="transformer", **sizes)
    student = student_of(teacher, (1,))
    training = StepConfig(batch_size=4, sequence_length=8, objective="align")
    config = TrainConfig(model=student, training=training, distillation=DistillationConfig("teacher"))
    whole = teacher.flops_per_token(8) - 2 * 512 * 64
    attention = whole // 3 - 2 * 2 * 64 * 160
    mixing = attention + student.flops_per_token(8) - teacher.flops_per_token(8)
    with mock.patch("rwkv_jax.training.teacher.read_model", return_value=(teacher, "float32")):
        work = count_work(config)
        again = count_work(dataclasses.replace(config, training=dataclasses.replace(training, remat="full")))
    assert (work.model_flops, work.recomputed_flops) == (32 * (whole + 3 * attention + 2 * attention + 3 * mixing), 0)
    assert again.recomputed_flops == 32 * (2 * attention + mixing)


def test_float64_is_refused() -> None:
    config = TrainConfig(model=ModelConfig(vocab_size=64, num_layers=2, width=64, dtype="float64"))
    with pytest.raises(ConfigError, match=r"model.dtype = 'float64': .* plan float32 or bfloat16"):
        plan_run(config, parse_topology("cpu:1"))


def test_mesh_of_is_asked_with_the_memory_that_jax_would_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def eight_devices(topology: Topology) -> list[object]:  # of which no compiler has to know
        return [object()] * topology.num_devices

    def choose(config: TrainConfig, devices: list[object], device_memory: int | None) -> None:
        raise ConfigError(f"{len(devices)} devices of {device_memory} bytes")

    monkeypatch.setattr("rwkv_jax.plan.run.topology_devices", eight_devices)
    monkeypatch.setattr("rwkv_jax.plan.run.make_mesh", choose)
    with pytest.raises(ConfigError, match=f"8 devices of {84_978_434_048 * 3 // 4} bytes"):
        plan_run(TrainConfig(), parse_topology("h100:1x8"))
