"""How a run is split: over devices, and over the processes that hold them."""

from __future__ import annotations

import dataclasses
from typing import Literal

from rwkv_jax.checks import ConfigError, require, require_positive


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How a run is split over devices; the four sizes multiply to their number."""

    data: int | Literal["auto"] = "auto"
    """Devices that share a step's rows, each with the whole model; auto takes those that remain."""
    fsdp: int | Literal["auto"] = "auto"
    """Devices that share rows and, scattered between them, each weight; auto takes the fewest whose memory holds it.
    RWKV-LM: strategy."""
    tensor: int = 1
    """Devices that share heads, feed-forward width and vocabulary of each row; divides the number of heads."""
    sequence: int = 1
    """Devices that share the tokens of each row; divides training.sequence_length."""
    offload_optimizer: bool = False
    """Keep the optimizer's moments in the hosts' memory between steps."""

    def __post_init__(self) -> None:
        for name in ("data", "fsdp", "tensor", "sequence"):
            size = getattr(self, name)
            auto = name in ("data", "fsdp")
            remedy = "must be a whole number from 1" + (", or auto" if auto else "")
            require((auto and size == "auto") or (type(size) is int and size >= 1), f"parallel.{name}", size, remedy)


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """The processes of a run on several hosts; each is started with the same command, and knows which one it is."""

    coordinator: str | None = None
    """HOST:PORT at which the others reach process 0. None asks SLURM, Open MPI or the TPU pod, where there is one;
    elsewhere the run has one process."""
    num_processes: int | None = None
    """Processes in all; goes with coordinator."""
    process_id: int | None = None
    """Which of them this one is, from 0; goes with coordinator."""
    detect: bool = True
    """Ask SLURM, Open MPI or the TPU pod when no coordinator is named; False runs one process in an allocation."""
    join_seconds: int = 300
    """How long processes wait for each other at the start."""
    heartbeat_seconds: int = 60
    """How long a process may be silent before it counts as lost, and all others end."""

    def __post_init__(self) -> None:
        require_positive(self, "distributed", "join_seconds")
        require(
            self.heartbeat_seconds >= 2, "distributed.heartbeat_seconds", self.heartbeat_seconds, "must be at least 2"
        )
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
        require(
            bool(host) and port.isdecimal() and 0 < int(port) < 2**16,
            "distributed.coordinator",
            self.coordinator,
            "must be HOST:PORT of process 0, such as node0:1234, with a port from 1 to 65535",
        )
        require_positive(self, "distributed", "num_processes")
        require(
            0 <= self.process_id < self.num_processes,
            "distributed.process_id",
            self.process_id,
            f"must lie between 0 and {self.num_processes - 1}, since distributed.num_processes = {self.num_processes}",
        )
