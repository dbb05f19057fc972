"""How a run is distributed over devices and processes."""

from __future__ import annotations

import dataclasses
from typing import Literal

from rwkv_jax.checks import ConfigError, checker, require_positive


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How a run is split over devices; the product of the four sizes is their number."""

    data: int | Literal["auto"] = "auto"
    """Data parallelism: devices that split a step's rows, each with a whole model; auto takes the remaining ones."""
    fsdp: int | Literal["auto"] = "auto"
    """Fully sharded data parallelism: devices that split rows and weights; auto takes the smallest number whose memory
    suffices. RWKV-LM: strategy."""
    tensor: int = 1
    """Tensor parallelism: devices that split heads, feed-forward width and vocabulary; divides the number of heads."""
    sequence: int = 1
    """Sequence parallelism: devices that split the tokens of each row; divides training.sequence_length."""
    offload_optimizer: bool = False
    """Keep the optimizer's moments in the hosts' memory between steps."""

    def __post_init__(self) -> None:
        check = checker(self, "parallel")
        for name in ("data", "fsdp", "tensor", "sequence"):
            size = getattr(self, name)
            auto = name in ("data", "fsdp")
            remedy = "must be a whole number from 1" + (", or auto" if auto else "")
            check((auto and size == "auto") or (type(size) is int and size >= 1), name, remedy)


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """The processes of a run on several hosts, all started with the same command."""

    coordinator: str | None = None
    """HOST:PORT of process 0. None detects SLURM, Open MPI or a TPU pod; otherwise the run has one process."""
    num_processes: int | None = None
    """Number of processes; requires coordinator."""
    process_id: int | None = None
    """Index of this process, from 0; requires coordinator."""
    detect: bool = True
    """Detect SLURM, Open MPI or a TPU pod if no coordinator is given; False runs one process in an allocation."""
    join_seconds: int = 300
    """Seconds that processes wait for each other at the start."""
    heartbeat_seconds: int = 60
    """Seconds without a heartbeat after which a process counts as lost and all others end."""

    def __post_init__(self) -> None:
        check = checker(self, "distributed")
        require_positive(self, "distributed", "join_seconds")
        check(self.heartbeat_seconds >= 2, "heartbeat_seconds", "must be at least 2")
        given = {name: getattr(self, name) for name in ("coordinator", "num_processes", "process_id")}
        missing = [f"distributed.{name}" for name, value in given.items() if value is None]
        if len(missing) == len(given):
            return
        if self.coordinator is None or self.num_processes is None or self.process_id is None:
            name, value = next((name, value) for name, value in given.items() if value is not None)
            raise ConfigError(
                f"distributed.{name} = {value!r}: goes with {' and '.join(missing)}; give all three, or none"
            )
        host, _, port = self.coordinator.rpartition(":")
        check(
            bool(host) and port.isdecimal() and 0 < int(port) < 2**16,
            "coordinator",
            "must be HOST:PORT of process 0, such as node0:1234, with a port from 1 to 65535",
        )
        require_positive(self, "distributed", "num_processes")
        check(
            0 <= self.process_id < self.num_processes,
            "process_id",
            f"must lie between 0 and {self.num_processes - 1}, since distributed.num_processes = {self.num_processes}",
        )
