"""Coordination of a run's processes: same settings, work done first by one, a common stop, global arrays."""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from rwkv_jax.parallel.processes import FOREVER, DisagreementError, LostProcessError, Processes, coordination_client
from rwkv_jax.tables import format_table

Result = TypeVar("Result")


def assert_same(
    processes: Processes, values: Mapping[str, object], *, seconds: float, subject: str = "settings"
) -> None:
    """Checks that all processes have the same values.

    Args:
      values: by field; compared as text.
      seconds: how long to wait for the other processes.
      subject: name of the comparison, unique within a run.

    Raises:
      DisagreementError: in every process, with a table of the values that differ and the processes that have them.
      LostProcessError: a process did not arrive in time.
    """
    text = json.dumps({name: str(value) for name, value in values.items()})
    texts = allgather_text(processes, f"their {subject}", text, seconds=seconds)
    table = differences([json.loads(text) for text in texts])
    if table:
        raise DisagreementError(
            f"{processes}: the processes were started with different {subject}; start all with the same:\n{table}"
        )


def allgather_text(processes: Processes, subject: str, text: str, *, seconds: float = FOREVER / 1000) -> list[str]:
    """Gathers a text from every process, in process order; a barrier.

    Args:
      subject: name of what is gathered, unique within a run.
      seconds: how long to wait for the other processes.

    Raises:
      LostProcessError: a process did not arrive in time.
    """
    if processes.count == 1:
        return [text]
    client, key = coordination_client(), f"rwkv_jax/gather/{subject}"
    client.key_value_set(f"{key}/{processes.index}", text)
    try:
        client.wait_at_barrier(key, int(seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        arrived: dict[int, str] = dict.fromkeys(range(processes.count), "")
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # The service may be gone, and cannot say who arrived.
            arrived = _texts_by_process(client, key)
        missing = [index for index in range(processes.count) if index not in arrived]
        plural = "es" if len(missing) > 1 else ""
        who = f"process{plural} {_ranges(missing)} did not come" if missing else "not all processes came in time"
        raise LostProcessError(
            f"{processes}: {who} to compare {subject}, for which the others wait {seconds:g} seconds "
            f"({str(error).splitlines()[0]}); see what each printed last, and start all processes again with the same "
            "command; where the start alone takes long, with a larger --distributed.join-seconds"
        ) from error
    texts = _texts_by_process(client, key)
    return [texts[index] for index in range(processes.count)]


def _texts_by_process(client: Any, key: str) -> dict[int, str]:
    return {int(name.rpartition("/")[2]): text for name, text in client.key_value_dir_get(f"{key}/")}


def differences(values: Sequence[Mapping[str, str]]) -> str:
    """Table of the fields that differ between processes, with the processes that have each value; '' if none does.

    Args:
      values: each process' values by field, in process order.
    """
    rows = []
    for name in dict.fromkeys(name for own in values for name in own):
        owners: dict[str, list[int]] = {}
        for index, own in enumerate(values):
            owners.setdefault(own.get(name, "-"), []).append(index)
        if len(owners) > 1:
            rows += [(name, value, _ranges(indices)) for value, indices in owners.items()]
    if not rows:
        return ""
    return format_table([("field", "value", "processes"), *rows], "<<<")


def _ranges(indices: Sequence[int]) -> str:
    """Ascending indices such as 0, 1, 2, 5 as `0-2, 5`."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][-1] == index - 1:
            runs[-1] = [runs[-1][0], index]
        else:
            runs.append([index])
    return ", ".join("-".join(map(str, run)) for run in runs)


def run_on_first_process(processes: Processes, name: str, work: Callable[[], Result]) -> Result:
    """Runs `work` on the first process, then on all others at once; returns its result in each.

    For work that writes files, such as a token file: on a shared disk the others find it done, on separate disks each
    does its own. If the first process fails, `join` ends all of them.

    Args:
      name: of the work, unique within a run.
    """
    if processes.count == 1:
        return work()
    client, key = coordination_client(), f"rwkv_jax/first/{name}"
    if not processes.is_first:
        client.blocking_key_value_get(key, FOREVER)
        return work()
    result = work()
    client.key_value_set(key, "done")
    return result


def connect_devices(processes: Processes, mesh: Mesh | None, *, seconds: float) -> None:
    """Connects the CPU devices of all processes for the collectives of a mesh, once all processes are there.

    Gloo, which carries them, waits at most 30 seconds, whatever the settings, for all devices of a group to come to its
    first collective, and half an hour at later ones. So the processes wait for each other here, then do a first small
    one in each group of devices along axes of the mesh, and may afterwards take half an hour to compile.

    Args:
      seconds: how long to wait for the other processes.

    Raises:
      LostProcessError: a process did not arrive in time.
    """
    if processes.count == 1 or jax.devices()[0].platform != "cpu":
        return
    allgather_text(processes, "their readiness to compute", "", seconds=seconds)
    every = jax.make_mesh((jax.device_count(),), ("device",), axis_types=(AxisType.Auto,))
    for grid in (every, mesh):
        if grid is None:
            continue
        split = [axis for axis, size in grid.shape.items() if size > 1]
        for count in range(1, len(split) + 1):
            # XLA also takes pairs in the other order. Each order has connections of its own, so no more than needed.
            choose = itertools.permutations if count == 2 else itertools.combinations
            for axes in choose(split, count):
                _sum_over(grid, axes).block_until_ready()


def _sum_over(mesh: Mesh, axes: tuple[str, ...]) -> jax.Array:
    """The sums, over some of a mesh's axes, of ones on all its devices."""
    names, shape = mesh.axis_names, tuple(mesh.shape.values())
    ones = jax.make_array_from_callback(
        shape, NamedSharding(mesh, PartitionSpec(*names)), lambda _: np.ones((1,) * len(names), np.float32)
    )
    left = PartitionSpec(*(None if name in axes else name for name in names))
    add = jax.shard_map(
        lambda ones: jax.lax.psum(ones, axes), mesh=mesh, in_specs=PartitionSpec(*names), out_specs=left
    )
    return jax.jit(add)(ones)


class SyncedStop:
    """Makes all processes see a stop request, made to any one of them, after the same step.

    Each call of `name` starts a maximum over all devices and returns the result of the call before: no device waits for
    a host, and a request is seen one step late.
    """

    def __init__(self, requested: Callable[[], str | None], processes: Processes) -> None:
        self._requested, self._alone = requested, processes.count == 1
        self._before: jax.Array | None = None
        self._flags: dict[int, jax.Array] = {}
        if not self._alone:
            mesh = jax.make_mesh((jax.device_count(),), ("device",), axis_types=(AxisType.Auto,))
            self._sharding = NamedSharding(mesh, PartitionSpec("device"))
            self._maximum = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def name(self) -> str | None:
        """Name of the signal that stops all processes now, or None; every process calls this after each step."""
        requested = self._requested()
        if self._alone:
            return requested
        number = signal.Signals[requested].value if requested else 0
        if number not in self._flags:
            self._flags[number] = global_array(
                self._sharding, (jax.device_count(),), lambda rows: np.full(rows.stop - rows.start, number, np.int32)
            )
        before, self._before = self._before, self._maximum(self._flags[number])
        synced = 0 if before is None else int(before)
        return signal.Signals(synced).name if synced else None


def global_array(sharding: Sharding, shape: Sequence[int], read_rows: Callable[[slice], np.ndarray]) -> jax.Array:
    """Builds an array [B, ...] over all processes' devices; each process reads only its own devices' rows.

    Args:
      sharding: may split later axes too.
      shape: of the whole array.
      read_rows: rows start:stop -> array [stop - start, ...]; called once per distinct slice of rows.
    """
    read: dict[tuple[int, int], np.ndarray] = {}

    def shard(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(shape[0])
        if (start, stop) not in read:
            read[start, stop] = read_rows(slice(start, stop))
        return read[start, stop][(slice(None), *index[1:])]

    return jax.make_array_from_callback(tuple(shape), sharding, shard)
