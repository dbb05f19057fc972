"""Runs of several processes: how they join, and how all of them end when one fails or is lost.

Every process runs the same program, and a collective waits for all of them: if one raised or died, the others would
hang. So a process that raises tells the others why through JAX's coordination service, and they end too. If one is
killed, its heartbeats stop, and JAX aborts the others after `distributed.heartbeat_seconds`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from rwkv_jax.config import ConfigError, DistributedConfig
from rwkv_jax.parallel.rendezvous import Place, meet

FOREVER = 10**9
"""A timeout in milliseconds, 11 days: for waits that end with the run, since JAX ends all if a process is lost."""

_FAILURE = "rwkv_jax/failure"
_SECONDS_TO_END_BY_ITSELF = 2.0
_SECONDS_TO_UNWIND = 60.0
_SECONDS_TO_LEAVE_FAILED = 120.0
"""How long a process waits for the others to end once one has failed; more than they have to unwind."""
_SECONDS_TO_LEAVE = 3600
"""How long a process that is through waits for the others; process 0 may have work of its own at the end."""


class DisagreementError(ConfigError):
    """Processes were started with different settings; raised in all of them."""


class LostProcessError(RuntimeError):
    """Another process did not answer in time."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process' index in a run, and the number of processes."""

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once: console, metrics, run.json."""
        return self.index == 0

    def __str__(self) -> str:
        return f"process {self.index} of {self.count}"


def recognized_cluster(environment: Mapping[str, str]) -> str | None:
    """Name of the launcher that started this process as one of several, from environment variables, or None.

    Raises:
      ConfigError: Open MPI 5 or later, which does not tell the host of process 0.
    """

    def number(name: str) -> int:
        return int(environment.get(name, "1"))

    # The step's number of tasks first: a script in an allocation for many tasks may run one process without srun.
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
            "$OMPI_COMM_WORLD_RANK, or --distributed.no-detect for independent processes"
        )
    hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES", ""))
    # On a TPU VM JAX queries the metadata server for the pod, which may have one host, unless that is disabled.
    queries = environment.get("TPU_ML_PLATFORM") == "JAX" and "TPU_SKIP_MDS_QUERY" not in environment
    if "," in hosts or number("MEGASCALE_NUM_SLICES") > 1 or queries:
        return "TPU pod"
    return None


@contextlib.contextmanager
def join(config: DistributedConfig, report: Callable[[str], None] = print) -> Iterator[Processes]:
    """Joins this process to a run for the duration of the context; enter it before JAX initializes its devices.

    Does nothing for one process, or if JAX is already distributed. With several, an exception that leaves the context
    ends all processes: each prints which one failed and why, and exits with a nonzero status. JAX aborts processes that
    lose one or, started by a launcher, do not find each other within `distributed.join_seconds`; the last line that
    each prints has the remedy.

    Args:
      report: gets one line with this process' index and its number of devices.

    Raises:
      ConfigError: the processes have not found each other in time, another has this one's id, the coordinator's port
        is taken, or JAX cannot initialize.
      LostProcessError: the others have not ended in an hour, or one was lost at the end.
    """
    if jax.distributed.is_initialized():
        yield Processes(jax.process_index(), jax.process_count())
        return
    cluster = recognized_cluster(os.environ) if config.detect and config.coordinator is None else None
    if config.coordinator is None and cluster is None:
        yield Processes()
        return
    if config.coordinator is None or config.num_processes is None or config.process_id is None:
        with _joined(config, cluster, report) as processes:
            yield processes
        return
    place = Place(config.coordinator, config.num_processes, config.join_seconds)
    with (
        meet(place, config.process_id) as address,
        _joined(dataclasses.replace(config, coordinator=address), None, report) as processes,
    ):
        yield processes


@contextlib.contextmanager
def _joined(config: DistributedConfig, cluster: str | None, report: Callable[[str], None]) -> Iterator[Processes]:
    """`join`, once the processes have met or where the launcher `cluster` has placed them."""
    source = cluster or f"distributed.coordinator = {config.coordinator!r}, process {config.process_id}"
    with _last_words(
        f"{source}: the processes have not found each other within distributed.join_seconds = {config.join_seconds}; "
        "start every process, and see that the others can reach process 0"
    ):
        _initialize(config, cluster, source)
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
            if not isinstance(error, DisagreementError):  # All processes raise that one.
                membership.announce(error)
            with contextlib.suppress(jax.errors.JaxRuntimeError), _ended_after(processes, withdraw):
                membership.leave()  # Whose own errors must not hide this one.
            raise
        try:
            membership.leave()
        except jax.errors.JaxRuntimeError as error:
            raise LostProcessError(
                f"{processes} is through, but not all others have ended ({str(error).splitlines()[0]}); see what each "
                "printed last, and start all processes again with the same command if one of them was not"
            ) from error


def coordination_client() -> Any:
    """JAX's client of the coordination service: a key-value store and barriers.

    JAX has no public name for it; Orbax imports it the same way.
    """
    from jax._src import distributed

    return distributed.global_state.client


def exception_handled_in(thread: int) -> BaseException | None:
    """The exception that a thread is handling or that is unwinding its `with` and `finally` blocks, or None."""
    handled: Any = sys._current_exceptions().get(thread)
    return handled[1] if isinstance(handled, tuple) else handled  # Python 3.11 has sys.exc_info() tuples.


def _initialize(config: DistributedConfig, cluster: str | None, source: str) -> None:
    # JAX would handle SIGTERM itself; `SyncedStop` handles all stop requests, Ctrl-C too.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        _extend_cpu_timeouts(config.join_seconds)
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            # Under SLURM, JAX would otherwise give each process only one of the devices that it may use.
            cluster_detection_method=None if cluster else "deactivate",
            initialization_timeout=config.join_seconds,
            heartbeat_timeout_seconds=config.heartbeat_seconds,
            # Heartbeats tell if one is lost meanwhile.
            shutdown_timeout_seconds=_SECONDS_TO_LEAVE,
        )
    except (RuntimeError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(
            f"{source}: JAX cannot join the processes ({reason}); name them with --distributed.coordinator HOST:PORT, "
            "--distributed.num-processes and --distributed.process-id, or run one with --distributed.no-detect"
        ) from error


def _extend_cpu_timeouts(seconds: int) -> None:
    """Gives CPU processes at least this time, rounded up to minutes, to tell each other their devices."""
    minutes = math.ceil(seconds / 60)
    for name, least in (("local", 2), ("global", 5)):  # JAX's defaults; it asks for more for the second
        minutes = max(minutes + (name == "global"), least)
        with contextlib.suppress(AttributeError):  # A version of JAX without that setting.
            jax.config.update(f"jax_cpu_get_{name}_topology_timeout_minutes", minutes)


class _Membership:
    """Sends this process' failure to the others, and ends it when another process fails."""

    def __init__(self, processes: Processes, withdraw_last_words: Callable[[], None]) -> None:
        self._processes, self._client = processes, coordination_client()
        self._withdraw_last_words = withdraw_last_words
        self._member_thread = threading.get_ident()
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._listener = threading.Thread(target=self._listen, name="failures of other processes", daemon=True)
        self._listener.start()

    def announce(self, error: BaseException) -> None:
        """Tells the other processes why this one ends."""
        message = f"{self._processes} has stopped: {type(error).__name__}: {error}"
        # A file's name may hold bytes that are not UTF-8, which the service would refuse.
        message = message.encode("utf-8", "backslashreplace").decode()
        with self._lock:  # The listener keeps it while it ends the process, which may have caused this error.
            self._ending.set()
            print(message, file=sys.stderr, flush=True)  # Before the service, which may hang.
            # Another process failed first, or the service is gone.
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._client.key_value_set(_FAILURE, message)

    def leave(self) -> None:
        """Shuts down, once all processes do."""
        try:
            with self._lock:
                self._ending.set()
                jax.distributed.shutdown()
        finally:
            # A thread that returns from JAX during interpreter shutdown would abort the process.
            self._listener.join(_SECONDS_TO_END_BY_ITSELF)

    def _listen(self) -> None:
        try:
            message = self._client.blocking_key_value_get(_FAILURE, FOREVER)
        except jax.errors.JaxRuntimeError:
            return  # The run is over.
        # The same error may have hit this process: give it time to unwind and end with its own message.
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
            # The main thread may hang in a collective, where no exception reaches it.
            with contextlib.suppress(jax.errors.JaxRuntimeError), _ended_after(self._processes, lambda: None):
                jax.distributed.shutdown()
            os._exit(1)


@contextlib.contextmanager
def _ended_after(processes: Processes, withdraw_last_words: Callable[[], None]) -> Iterator[None]:
    """Ends this process if the context takes too long: another one neither ends nor stops its heartbeats."""

    def end() -> None:
        print(
            f"{processes} ends without the others, of which one has not ended in {_SECONDS_TO_LEAVE_FAILED:g} seconds; "
            "see what each printed last, and kill what still runs",
            file=sys.stderr,
            flush=True,
        )
        withdraw_last_words()
        os._exit(1)

    timer = threading.Timer(_SECONDS_TO_LEAVE_FAILED, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def _last_words(message: str) -> Iterator[Callable[[], None]]:
    """Has a child shell print a message if this process ends without leaving the context.

    JAX aborts the process from its own thread, after which no Python runs. Yields a function that cancels the message.
    """
    shell = shutil.which("sh")
    if shell is None:
        yield lambda: None
        return
    # In a session of its own: Ctrl-C in the terminal is for the run, which may still save.
    speaker = subprocess.Popen(
        [shell, "-c", 'read -r withdrawn || printf "%s\\n" "$0" >&2', message.encode("utf-8", "backslashreplace")],
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
