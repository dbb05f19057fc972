"""Programs with known answers and the plans of small runs, on eight CPU devices; prints JSON.

A program of its own, because the number of devices is set before JAX starts: test_plan.py runs it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rwkv_jax.config import Generation, ModelConfig, ParallelConfig, StepConfig, TrainConfig
from rwkv_jax.plan.devices import parse_topology, prepare_compiler, topology_devices
from rwkv_jax.plan.planner import Compiled, Work, make_plan
from rwkv_jax.plan.report import describe, to_json
from rwkv_jax.plan.run import plan_run

CPU = parse_topology("cpu:8")


def known() -> dict[str, Any]:
    """Every kind of collective, some in a loop of 5 over weights of its own."""
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def shard(x: jax.Array, weights: jax.Array) -> jax.Array:
        def body(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
            whole = lax.all_gather(weight, "fsdp", axis=0, tiled=True)
            x = lax.pmean(jnp.tanh(x @ whole), "data")
            return lax.pcast(x, "data", to="varying"), None

        x, _ = lax.scan(body, x, weights)
        x = lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)])
        x = lax.all_to_all(x, "fsdp", 1, 0, tiled=True)
        return lax.psum_scatter(x, "data", scatter_dimension=0, tiled=True)

    split = P(("data", "fsdp"))
    run = jax.shard_map(shard, mesh=mesh, in_specs=(split, P(None, "fsdp")), out_specs=P(("fsdp", "data")))

    def step(x: jax.Array, weights: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
        return run(x, weights), count + 1

    arguments = (
        jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, split)),
        jax.ShapeDtypeStruct((5, 32, 32), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp"))),
        jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P())),
    )
    groups = {"rows": arguments[0], "weights": arguments[1], "count": arguments[2]}
    executable = jax.jit(step).lower(*arguments).compile()
    compiled = Compiled(executable, executable.as_text() or "")
    work = Work(tokens=64, model_flops=5 * 2 * 64 * 32 * 32, recomputed_flops=0, dtype="float32")
    return to_json(make_plan(CPU, mesh, work, arguments, groups, compiled))


def small_run(generation: Generation, **parallel: Any) -> TrainConfig:
    """A run of a small model, with the switches of a large one."""
    return TrainConfig(
        model=ModelConfig(generation, vocab_size=256, num_layers=3, width=64, head_dim=16, dtype="bfloat16"),
        training=StepConfig(batch_size=8, sequence_length=32, remat="full", reset_at_documents=False),
        parallel=ParallelConfig(**parallel),
    )


def plans() -> dict[str, Any]:
    """Small runs on meshes with every axis, and each of the switches that make another program of a step."""

    def replaced(config: TrainConfig, **changes: Any) -> TrainConfig:
        return dataclasses.replace(config, training=dataclasses.replace(config.training, **changes))

    runs = {
        "7 data 2 x fsdp 2 x tensor 2": small_run("7", fsdp=2, tensor=2),
        "4 fsdp 4 x sequence 2, carried": replaced(
            small_run("4", fsdp=4, sequence=2), carry_state=True, reset_at_documents=True
        ),
        "4 data 8, offloaded": small_run("4", offload_optimizer=True),
        "6 one row": replaced(small_run("6"), batch_size=1, sequence_length=1024, ema_decay=0.99),
        "4 one row, offloaded": replaced(small_run("4", offload_optimizer=True), batch_size=1),
    }
    found = {name: plan_run(config, CPU) for name, config in runs.items()}
    return {name: to_json(plan) | {"described": describe(plan)} for name, plan in found.items()}


if __name__ == "__main__":
    prepare_compiler(CPU)
    assert len(topology_devices(CPU)) == 8
    json.dump({"known": known()} | plans(), sys.stdout)
