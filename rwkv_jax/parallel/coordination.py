"""What the processes of a run do together: agree on its settings, take turns, stop at one step, read their own rows."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding

from rwkv_jax.parallel.processes import FOREVER, DisagreementError, LostProcessError, Processes, coordination_client
from rwkv_jax.tables import format_table

Result = TypeVar("Result")


def assert_same(
    processes: Processes, values: Mapping[str, object], *, seconds: float, subject: str = "settings"
) -> None:
    """Makes sure that all processes were given the same values, before any work is lost.

    Args:
      values: by field; compared by their text.
      seconds: how long the processes wait for each other.
      subject: of the comparison; one name is compared once in a run.

    Raises:
      DisagreementError: in every process, with a table of the values that differ and which process has which.
      LostProcessError: not every process has come.
    """
    text = json.dumps({name: str(value) for name, value in values.items()})
    texts = allgather_text(processes, f"their {subject}", text, seconds=seconds)
    table = differences([json.loads(text) for text in texts])
    if table:
        raise DisagreementError(
            f"{processes}: the processes were started with different {subject}; start all with the same:\n{table}"
        )


def allgather_text(processes: Processes, subject: str, text: str, *, seconds: float = FOREVER / 1000) -> list[str]:
    """What each process says, in their order; none goes on before all have spoken.

    Args:
      subject: of what they say; one name is used once in a run.
      seconds: how long the processes wait for each other.

    Raises:
      LostProcessError: not every process has come.
    """
    if processes.count == 1:
        return [text]
    client, place = coordination_client(), f"rwkv_jax/gather/{subject}"
    client.key_value_set(f"{place}/{processes.index}", text)
    try:
        client.wait_at_barrier(place, int(seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        came: dict[int, str] = dict.fromkeys(range(processes.count), "")
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # The service may be gone, and cannot say who came.
            came = _said(client, place)
        missing = [index for index in range(processes.count) if index not in came]
        plural = "es" if len(missing) > 1 else ""
        who = f"process{plural} {_ranges(missing)} did not come" if missing else "not all processes came in time"
        raise LostProcessError(
            f"{processes}: {who} to compare {subject}, for which the others wait {seconds:g} seconds "
            f"({str(error).splitlines()[0]}); see what each printed last, and start all processes again with the same "
            "command; where the start alone takes long, with a larger --distributed.join-seconds"
        ) from error
    texts = _said(client, place)
    return [texts[index] for index in range(processes.count)]


def _said(client: Any, place: str) -> dict[int, str]:
    """What has been said so far, by process."""
    return {int(key.rpartition("/")[2]): text for key, text in client.key_value_dir_get(f"{place}/")}


def differences(values: Sequence[Mapping[str, str]]) -> str:
    """A table of the fields in which some processes' values differ, with the processes that have each; or ''.

    Args:
      values: by field, of each process in order.
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
    """0, 1, 2, 5 as `0-2, 5`; `indices` ascend."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][-1] == index - 1:
            runs[-1] = [runs[-1][0], index]
        else:
            runs.append([index])
    return ", ".join("-".join(map(str, run)) for run in runs)


def run_on_first_process(processes: Processes, name: str, work: Callable[[], Result]) -> Result:
    """What `work` returns, in every process: the first does it alone, then all others at once.

    For work that leaves files behind, a token file say: where processes share a disk the others find it done, and where
    they do not each has its own. If the first process fails, all end as `join` ends them.

    Args:
      name: of the work; one name is used once in a run.
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


class SyncedStop:
    """Turns a request to stop that reaches any process into one that all see after the same step.

    Each call starts a maximum over all devices, and returns that of the call before: no device waits for a host, and
    the request is seen one step after it was made.
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
        """Name of the signal that asks all processes to stop now, or None; every process calls this after each step."""
        requested = self._requested()
        if self._alone:
            return requested
        number = signal.Signals[requested].value if requested else 0
        if number not in self._flags:
            self._flags[number] = global_array(self._sharding, (jax.device_count(),), lambda rows: _fill(rows, number))
        before, self._before = self._before, self._maximum(self._flags[number])
        agreed = 0 if before is None else int(before)
        return signal.Signals(agreed).name if agreed else None


def _fill(rows: slice, number: int) -> np.ndarray:
    return np.full(rows.stop - rows.start, number, np.int32)


def global_array(sharding: Sharding, shape: Sequence[int], read_rows: Callable[[slice], np.ndarray]) -> jax.Array:
    """An array [B, ...] over the devices of all processes, of which each process reads only its own devices' rows.

    Args:
      sharding: of the array; later axes may be split too.
      shape: of the whole array.
      read_rows: rows start:stop -> array [stop - start, ...]; called once for each distinct slice of rows.
    """
    read: dict[tuple[int, int], np.ndarray] = {}

    def shard(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(shape[0])
        if (start, stop) not in read:
            read[start, stop] = read_rows(slice(start, stop))
        return read[start, stop][(slice(None), *index[1:])]

    return jax.make_array_from_callback(tuple(shape), sharding, shard)
