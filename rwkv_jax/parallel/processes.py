"""Several processes as one run: who they are, how they join, and how all of them end when one fails or is lost.

JAX runs the same program in every process, and any collective waits for all of them: a process that raises or dies
would leave the others waiting. So a process that raises tells the others why, through JAX's coordination service, and
they end too. One that dies without a word is missed by that service within `distributed.heartbeat_seconds`, and JAX
aborts the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from rwkv_jax.config import ConfigError, DistributedConfig

FOREVER = 10**9
"""Milliseconds, 11 days: for waits that end when the run does."""

_FAILURE = "rwkv_jax/failure"
_SECONDS_TO_END_BY_ITSELF = 2.0
_SECONDS_TO_UNWIND = 60.0


class DisagreementError(ConfigError):
    """Processes were started with different settings; every one of them raises it."""


class LostProcessError(RuntimeError):
    """Another process did not answer in time."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them."""

    index: int = 0
    """Which one this is."""
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes what is written once."""
        return self.index == 0

    def __str__(self) -> str:
        return f"process {self.index} of {self.count}"


def recognized_cluster(environment: Mapping[str, str]) -> str | None:
    """The launcher that has started this process as one of several, by the variables that it sets; None on a laptop.

    Raises:
      ConfigError: Open MPI 5 or later, which does not say where process 0 runs.
    """

    def number(name: str) -> int:
        return int(environment.get(name, "1"))

    # A step's own number of tasks: a script in an allocation for many tasks may run one process without srun.
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
    if all(name in environment for name in slurm) and int(tasks) > 1:
        return "SLURM"
    if number("OMPI_COMM_WORLD_SIZE") > 1:
        if "OMPI_MCA_orte_hnp_uri" in environment:
            return "Open MPI"
        raise ConfigError(
            "distributed.coordinator = None: this Open MPI does not say where process 0 runs; give --distributed."
            "coordinator HOST:PORT --distributed.num-processes $OMPI_COMM_WORLD_SIZE --distributed.process-id "
            "$OMPI_COMM_WORLD_RANK, or --distributed.no-detect for processes that are strangers to each other"
        )
    hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES", ""))
    # On a TPU machine where nobody has forbidden it, JAX asks the machine for its pod, which may have one host.
    asks = environment.get("TPU_ML_PLATFORM") == "JAX" and "TPU_SKIP_MDS_QUERY" not in environment
    if "," in hosts or number("MEGASCALE_NUM_SLICES") > 1 or asks:
        return "TPU pod"
    return None


@contextlib.contextmanager
def join(config: DistributedConfig, report: Callable[[str], None] = print) -> Iterator[Processes]:
    """Makes this process one of a run's; to be entered before JAX has touched a device, and left at the run's end.

    With one process nothing is done, nor where the program has joined already. With several, an exception that leaves
    the context ends all processes: each prints which one failed and why, and its exit status is not zero. JAX aborts
    processes that do not find each other within `distributed.join_seconds`, or lose one; the last line that each prints
    has the remedy.

    Args:
      report: gets one line, which process this is and how many devices it has.

    Raises:
      ConfigError: JAX could not begin to join, or another program has the coordinator's port.
    """
    if jax.distributed.is_initialized():
        yield Processes(jax.process_index(), jax.process_count())
        return
    cluster = recognized_cluster(os.environ) if config.detect and config.coordinator is None else None
    if config.coordinator is None and cluster is None:
        yield Processes()
        return
    place = cluster or f"distributed.coordinator = {config.coordinator!r}, process {config.process_id}"
    remedy = "start every process" if cluster else "start every process, each with its own distributed.process_id"
    with _last_words(
        f"{place}: the processes have not found each other within distributed.join_seconds = {config.join_seconds}; "
        f"{remedy}, and see that the others can reach process 0"
    ):
        _initialize(config, cluster, place)
        processes = Processes(jax.process_index(), jax.process_count())
        report(f"{processes}: {jax.local_device_count()} of {jax.device_count()} devices")
    with _last_words(
        f"{processes} has ended before its time: it was killed, or JAX ended it because another process was lost, "
        "whose number stands after 'unhealthy' in the lines above (where none does, it was process 0). What was saved "
        "is whole: start all processes again with the same command, and the run goes on from its last checkpoint"
    ) as withdraw:
        membership = _Membership(processes, withdraw)
        try:
            yield processes
        except BaseException as error:
            if not isinstance(error, DisagreementError):  # That one all processes raise: none needs to be told.
                membership.announce(error)
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # Nothing must hide the error itself.
                membership.leave()
            raise
        membership.leave()


def coordination_client() -> Any:
    """JAX's client of the coordination service, which has a key-value store and barriers.

    JAX has no public name for it; Orbax takes it from the same place.
    """
    from jax._src import distributed

    return distributed.global_state.client


def exception_handled_in(thread: int) -> BaseException | None:
    """The exception that a thread, by its identifier, is handling, or that is leaving a `with` or `finally` of it."""
    handled: Any = sys._current_exceptions().get(thread)
    return handled[1] if isinstance(handled, tuple) else handled  # Python 3.11 gives what sys.exc_info() does.


def _initialize(config: DistributedConfig, cluster: str | None, place: str) -> None:
    if config.coordinator is not None and config.process_id == 0:
        _refuse_taken_port(config.coordinator)
    # JAX would take SIGTERM for itself; `SyncedStop` asks about every request to stop, Ctrl-C too.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            # Under SLURM JAX would otherwise leave each process one device of those that it was told to use.
            cluster_detection_method=None if cluster else "deactivate",
            initialization_timeout=config.join_seconds,
            heartbeat_timeout_seconds=config.heartbeat_seconds,
            # At the end process 0 may have more to do than the others, who wait for it; if it is lost, they notice.
            shutdown_timeout_seconds=FOREVER // 1000,
        )
    except (RuntimeError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(
            f"{place}: JAX cannot join the processes ({reason}); name them with --distributed.coordinator HOST:PORT, "
            "--distributed.num-processes and --distributed.process-id, or run one with --distributed.no-detect"
        ) from error


def _refuse_taken_port(coordinator: str) -> None:
    """Raises ConfigError if the port cannot be opened on this host, which JAX answers with a crash."""
    port = int(coordinator.rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise ConfigError(
            f"distributed.coordinator = {coordinator!r}: process 0 cannot open that port ({error.strerror}); name one "
            "that is free, to all processes alike"
        ) from error


class _Membership:
    """This process' place in the coordination service: hears of other processes' failures and tells them of its own."""

    def __init__(self, processes: Processes, withdraw_last_words: Callable[[], None]) -> None:
        self._processes, self._client = processes, coordination_client()
        self._withdraw_last_words = withdraw_last_words
        self._member_thread = threading.get_ident()
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._listener = threading.Thread(target=self._listen, name="failures of other processes", daemon=True)
        self._listener.start()

    def announce(self, error: BaseException) -> None:
        """Tells all other processes why this one ends."""
        message = f"{self._processes} has stopped: {type(error).__name__}: {error}"
        with self._lock:  # Held by the listener for good if it is ending the process, which may have caused this error.
            self._ending.set()
            print(message, file=sys.stderr, flush=True)  # Before anything can hang: the others may be gone.
            # Another has failed before us, or the service is gone.
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._client.key_value_set(_FAILURE, message)

    def leave(self) -> None:
        """Leaves, once all others do."""
        try:
            with self._lock:
                self._ending.set()
                jax.distributed.shutdown()
        finally:
            # A thread that comes back from JAX while the interpreter ends would abort the process.
            self._listener.join(_SECONDS_TO_END_BY_ITSELF)

    def _listen(self) -> None:
        try:
            message = self._client.blocking_key_value_get(_FAILURE, FOREVER)
        except jax.errors.JaxRuntimeError:
            return  # The run is over.
        # The same may have befallen this process: it then ends by itself, with its own words, once it has unwound.
        for _ in range(round(_SECONDS_TO_UNWIND / _SECONDS_TO_END_BY_ITSELF)):
            if self._ending.wait(_SECONDS_TO_END_BY_ITSELF) or exception_handled_in(self._member_thread) is None:
                break
        with self._lock:
            if self._ending.is_set():
                return
            error = exception_handled_in(self._member_thread)
            own = "" if error is None else f", before it could end by itself after {type(error).__name__}: {error}"
            print(f"{message}\n{self._processes} ends with it{own}", file=sys.stderr, flush=True)
            self._withdraw_last_words()
            # The main thread may wait for the other process within a collective, where no exception reaches it.
            jax.distributed.shutdown()
            os._exit(1)


@contextlib.contextmanager
def _last_words(message: str) -> Iterator[Callable[[], None]]:
    """Prints a message, from a shell beside this process, if the process ends without leaving the context.

    JAX aborts a process from a thread of its own, after which no Python runs. Yields what withdraws the message.
    """
    shell = shutil.which("sh")
    if shell is None:
        yield lambda: None
        return
    # Ctrl-C in a terminal is for the run, which may yet save, so the shell has a session of its own.
    speaker = subprocess.Popen(
        [shell, "-c", 'read -r withdrawn || printf "%s\\n" "$0" >&2', message],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )

    def withdraw() -> None:
        if speaker.poll() is None:
            speaker.communicate(b"withdrawn\n")

    try:
        yield withdraw
    finally:
        withdraw()
