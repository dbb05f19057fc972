"""One of two processes with two fake devices each; prints what it saw as JSON. process_pair.py starts them.

python -m tests.parallel.process_coordination SCENARIO PORT INDEX
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rwkv_jax.config import ConfigError, DistributedConfig, ModelConfig
from rwkv_jax.models import abstract_model
from rwkv_jax.parallel import processes as processes_module
from rwkv_jax.parallel.coordination import (
    SyncedStop,
    allgather_text,
    assert_same,
    connect_devices,
    global_array,
    run_on_first_process,
)
from rwkv_jax.parallel.mesh import MeshShape, mesh_from_shape
from rwkv_jax.parallel.processes import DisagreementError, LostProcessError, Processes, join
from rwkv_jax.training.copying import copied_params
from rwkv_jax.training.stopping import stop_requests
from rwkv_jax.weights.official import official_shapes, shardings_on

COUNT = 2
FAILURE = ConfigError("data.source = 'nothing': no such file")
LONGER_THAN_GLOO_WAITS = 33.0


def split(*axes: str, **mesh: int) -> NamedSharding:
    """The sharding of an array whose axes are split over those of a mesh with these sizes."""
    sizes, names = tuple(mesh.values()), tuple(mesh)
    return NamedSharding(jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(mesh)), PartitionSpec(*axes))


def read_array(sharding: NamedSharding) -> dict[str, Any]:
    """Which rows were read for an array [8, 3] of known values, and the largest error of what the devices hold."""
    whole, read = np.arange(24).reshape(8, 3), []

    def read_rows(rows: slice) -> np.ndarray:
        read.append((rows.start, rows.stop))
        return whole[rows]

    array = global_array(sharding, whole.shape, read_rows)
    wrong = max(np.abs(np.asarray(shard.data) - whole[shard.index]).max() for shard in array.addressable_shards)
    return {"read": read, "wrong": int(wrong), "sum": int(jax.jit(jnp.sum)(array))}


def steps_until_stop(processes: Processes, signaled: int) -> dict[str, Any]:
    """The step after which this process stops, if process `signaled` is sent SIGTERM in step 3."""
    with stop_requests() as requested:
        stop = SyncedStop(requested, processes)
        for step in range(20):
            if step == 3 and processes.index == signaled:
                os.kill(os.getpid(), signal.SIGTERM)
            name = stop.name()
            if name is not None:
                return {"step": step, "name": name}
    return {"step": None, "name": None}


def all_is_well(processes: Processes) -> dict[str, Any]:
    """Everything that two processes do together while none fails."""
    with join(DistributedConfig()) as known:
        assert known == processes
    assert_same(processes, {"seed": 0, "corpus": "abc"}, seconds=30)
    order: list[str] = []
    folder = Path(tempfile.gettempdir()) / f"processes-{sys.argv[2]}"

    def work() -> bool:
        found = folder.exists()
        folder.mkdir(exist_ok=True)
        order.append(str(found))
        return found

    result: dict[str, Any] = {"found": run_on_first_process(processes, "a folder", work)}
    result["said"] = allgather_text(processes, "numbers", f"I am {processes.index}")
    for turn in range(COUNT):  # The second comes when the first has given up.
        if processes.index == turn:
            try:
                allgather_text(processes, "what the other does not say", "", seconds=0.2)
            except LostProcessError as error:
                result["lost"] = str(error)
        assert_same(processes, {}, seconds=30, subject=f"turn {turn}")
    result["rows"] = read_array(split("data", data=4))
    result["copies"] = read_array(split("data", "tensor", data=2, tensor=1, copies=2))
    result["copied"] = copied_student()
    result["stops"] = [steps_until_stop(processes, signaled) for signaled in range(COUNT)]
    try:
        assert_same(processes, {"seed": 0, "batch": 8 * (1 + processes.index)}, seconds=30, subject="batches")
    except DisagreementError as error:
        result["disagreement"] = str(error)
    assert_same(processes, {}, seconds=30, subject="end")
    if processes.is_first:
        folder.rmdir()
    return result


def copied_student() -> list[str]:
    """Which parameters of a student, of whose layers 1 and 2 the teacher has one, are not as they should be."""
    sizes: Any = {"vocab_size": 40, "num_layers": 3, "width": 32, "head_dim": 8, "ffn_width": 64, "context_length": 8}
    teacher = ModelConfig(architecture="transformer", rwkv_layers=(1,), **sizes)
    student = dataclasses.replace(teacher, rwkv_layers=(1, 2))
    draws = np.random.default_rng(0)
    tensors = {name: draws.standard_normal(shape, np.float32) for name, shape in official_shapes(teacher).items()}
    where = shardings_on(mesh_from_shape(MeshShape(fsdp=4), jax.devices()), student)

    def ones(path: Any, x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding, np.ones(x.shape, x.dtype).__getitem__)

    drawn = jax.tree.map_with_path(ones, abstract_model(student)[1], where)
    copied = copied_params(tensors, student, drawn, where)["blocks"]["att"]
    expected = {
        name: np.stack([tensors[f"blocks.1.att.{name}"], np.full_like(tensors[f"blocks.1.att.{name}"], rest)])
        for name, rest in {"w1": 1, "w2": 1, "x_r": 0, "g1": 0}.items()
    }
    parts = [(name, shard) for name in expected for shard in copied[name].addressable_shards]
    assert not copied["w1"].is_fully_addressable
    return [name for name, shard in parts if not np.array_equal(shard.data, expected[name][shard.index])]


def wait_in_a_collective(fails_after: int | None = None) -> None:
    """Adds over all devices for a long time, or fails after some additions, for the next of which the other waits."""
    sharding = split("data", data=4)
    x = global_array(sharding, (4,), lambda rows: np.ones(rows.stop - rows.start, np.float32))
    add = jax.jit(lambda x: x + jnp.sum(x), out_shardings=sharding)
    for addition in range(600):
        if addition == fails_after:
            raise FAILURE
        x = add(x * 0).block_until_ready()
        time.sleep(0.1)


def sum_in_every_group(processes: Processes, before: float = 0, after: float = 0) -> dict[str, Any]:
    """Sums along axes of a mesh; process 1 comes late, or takes long to compile the sums, by these seconds."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    time.sleep(before * processes.index)
    connect_devices(processes, mesh, seconds=80)
    time.sleep(after * processes.index)
    x = global_array(
        NamedSharding(mesh, PartitionSpec("data", "tensor")), (2, 2), lambda rows: np.arange(4.0).reshape(2, 2)[rows]
    )
    add = jax.jit(jnp.sum, static_argnums=1, out_shardings=NamedSharding(mesh, PartitionSpec()))
    return {str(axis): np.asarray(add(x, axis)).tolist() for axis in (None, 0, 1)}


def hang() -> None:
    """Holds the interpreter, so that no other thread of it runs, while JAX's own threads send heartbeats."""
    sys.setswitchinterval(1e6)
    while True:
        pass


def fail() -> None:
    """Raises FAILURE."""
    raise FAILURE


def main(scenario: str, port: str, index: int) -> None:
    """Joins the other process and does what the scenario says."""
    config = DistributedConfig(f"127.0.0.1:{port}", COUNT, index)
    if scenario == "alone":
        config = dataclasses.replace(config, join_seconds=1)
    elif scenario in ("wait", "one hangs"):
        config = dataclasses.replace(config, heartbeat_seconds=3)
    with join(config, functools.partial(print, flush=True)) as processes:
        if scenario == "well":
            print(json.dumps(all_is_well(processes)))
        elif scenario == "disagree":
            assert_same(processes, {"batch": index}, seconds=30)
        elif scenario in ("process 0 fails", "process 1 fails"):
            wait_in_a_collective(fails_after=3 if f"process {index} fails" == scenario else None)
        elif scenario == "first alone fails":
            run_on_first_process(processes, "work", fail)
        elif scenario == "one comes late":
            print(json.dumps(sum_in_every_group(processes, before=LONGER_THAN_GLOO_WAITS)))
        elif scenario == "one compiles long":
            print(json.dumps(sum_in_every_group(processes, after=LONGER_THAN_GLOO_WAITS)))
        elif scenario == "one hangs":
            assert_same(processes, {}, seconds=30)
            processes_module._SECONDS_TO_LEAVE_FAILED = 4.0
            (hang if index else fail)()
        elif scenario == "both fail":
            with contextlib.ExitStack() as stack:
                if index == 0:
                    stack.callback(time.sleep, 5)  # as a checkpoint takes that is still being written
                    raise ValueError("another error")
                raise FAILURE
        else:
            wait_in_a_collective()


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    except ConfigError as error:
        sys.exit(f"train.py: {error}")
