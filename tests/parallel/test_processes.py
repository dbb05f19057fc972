"""Real processes over loopback: they join, and end together when one fails or is lost."""

from __future__ import annotations

import contextlib
import functools
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import pytest

from rwkv_jax.config import ConfigError, DistributedConfig, TrainConfig, from_dict, to_dict
from rwkv_jax.parallel import processes as processes_module
from rwkv_jax.parallel.processes import Processes, exception_handled_in, join, recognized_cluster
from tests.parallel.process_pair import Ended, end_of, free_port, start


def test_a_coordinator_whose_port_is_taken_is_refused() -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        process = start("well", port, 0)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.startswith(f"train.py: distributed.coordinator = '127.0.0.1:{port}': process 0 cannot open that port")


@pytest.mark.long
def test_a_process_that_is_alone_says_so_when_its_time_is_over() -> None:
    process = start("alone", free_port(), 0)
    _, errors = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    last = errors.strip().splitlines()[-1]
    assert "the processes have not found each other within distributed.join_seconds = 1; start every process" in last


@functools.cache
def ends_after_an_error() -> dict[str, list[Ended]]:
    """How two processes end in each scenario in which one fails or both do; mostly waiting, so all at once."""
    scenarios = ("process 0 fails", "process 1 fails", "first alone fails", "both fail")
    with ThreadPoolExecutor(len(scenarios)) as pool:
        return dict(zip(scenarios, pool.map(end_of, scenarios), strict=True))


@pytest.mark.parametrize(
    ("scenario", "failing"), [("process 0 fails", 0), ("process 1 fails", 1), ("first alone fails", 0)]
)
def test_an_error_in_one_process_ends_the_other_which_says_why(scenario: str, failing: int) -> None:
    ended = ends_after_an_error()[scenario]
    failed, waiting = ended[failing], ended[1 - failing]
    assert [process.status for process in ended] == [1, 1]
    assert all(one.output.startswith(f"process {index} of 2: 2 of 4 devices\n") for index, one in enumerate(ended))
    reason = f"process {failing} of 2 has stopped: ConfigError: data.source = 'nothing': no such file"
    assert f"{reason}\nprocess {1 - failing} of 2 ends with it\n" in waiting.errors
    assert reason in failed.errors
    assert "train.py: data.source" in failed.errors
    assert "before its time" not in waiting.errors + failed.errors
    assert f"process {1 - failing} of 2 has stopped" not in waiting.errors


def test_a_process_that_takes_long_to_unwind_ends_with_its_own_error() -> None:
    slow, quick = ends_after_an_error()["both fail"]
    assert (slow.status, quick.status) == (1, 1)
    assert "process 0 of 2 has stopped: ValueError: another error\n" in slow.errors
    assert slow.errors.rstrip().endswith("ValueError: another error")
    assert "process 1 of 2 has stopped: ConfigError: data.source" in quick.errors
    assert "ends with it" not in slow.errors + quick.errors


def test_the_exception_that_a_thread_handles_is_known_until_it_is_handled() -> None:
    seen: list[BaseException | None] = []
    thread = threading.get_ident()

    def look() -> None:
        with ThreadPoolExecutor(1) as pool:
            seen.append(pool.submit(exception_handled_in, thread).result())

    look()
    error = ValueError("leaves a context")
    with contextlib.suppress(ValueError), contextlib.ExitStack() as stack:
        stack.callback(look)
        raise error
    look()
    assert seen == [None, error, None]


@functools.cache
def ends_after_a_loss() -> list[list[Ended]]:
    """How two processes end when the first is killed, and when the second is; mostly waiting, so both at once."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(functools.partial(end_of, "wait"), range(2)))


@pytest.mark.parametrize("killed", [0, 1])
def test_a_lost_process_ends_the_other_which_says_how_to_resume(killed: int) -> None:
    survivor = ends_after_a_loss()[killed][1 - killed]
    assert survivor.status not in (0, None)
    assert survivor.seconds < 30, "heartbeat_seconds is 3, where JAX waits 100"
    last = survivor.errors.strip().splitlines()[-1]
    assert last.startswith(f"process {1 - killed} of 2 has ended before its time")
    assert "start all processes again with the same command" in last
    if killed == 1:  # The service, in process 0, has outlived it and knows its number.
        assert "unhealthy (stopped sending heartbeats):\n1\n" in survivor.errors


@pytest.mark.long
def test_a_process_with_an_id_in_use_is_refused_by_name_and_the_others_go_on() -> None:
    port = free_port()
    pair = [start("wait", port, index) for index in range(2)]
    try:
        for process in pair:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("process ")
        for index in range(2):
            third = start("wait", port, index)
            _, errors = third.communicate(timeout=60)
            assert third.returncode == 1
            assert errors.splitlines()[-1].startswith(
                f"train.py: distributed.process_id = {index}: process {index} of the run at 127.0.0.1:{port} is there "
                f"already: process number {pair[index].pid} on host {socket.gethostname()}; that run goes on"
            )
        time.sleep(5)  # More than heartbeats, after which JAX would tell.
        assert [process.poll() for process in pair] == [None, None]
    finally:
        for process in pair:
            process.kill()
            process.communicate()


@functools.cache
def ends_after_gloos_time() -> dict[str, list[Ended]]:
    """How two processes end of which one makes the other wait for longer than Gloo does; both ways at once."""
    scenarios = ("one comes late", "one compiles long")
    with ThreadPoolExecutor(len(scenarios)) as pool:
        return dict(zip(scenarios, pool.map(end_of, scenarios), strict=True))


@pytest.mark.long
@pytest.mark.parametrize("scenario", ["one comes late", "one compiles long"])
def test_processes_wait_for_a_slow_one_at_the_first_collectives(scenario: str) -> None:
    ended = ends_after_gloos_time()[scenario]
    assert [one.status for one in ended] == [0, 0], ended[0].errors[-3000:] + ended[1].errors[-3000:]
    assert min(one.seconds for one in ended) > 33
    for one in ended:
        assert json.loads(one.output.splitlines()[-1]) == {"None": 6.0, "0": [2.0, 4.0], "1": [1.0, 5.0]}


@pytest.mark.long
def test_a_process_that_failed_ends_though_another_hangs() -> None:
    failed, hanging = end_of("one hangs")
    assert failed.status == 1
    assert failed.seconds < 60
    last = failed.errors.strip().splitlines()[-1]
    assert last.startswith("process 0 of 2 ends without the others, of which one has not ended in 4 seconds")
    assert hanging.status != 0
    assert "process 1 of 2 has ended before its time" in hanging.errors


def test_a_failure_that_names_bytes_which_are_no_text_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, str] = {}

    class Client:
        def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
            raise jax.errors.JaxRuntimeError("the run is over")

        def key_value_set(self, key: str, value: str) -> None:
            sent[key] = value.encode().decode()

    monkeypatch.setattr(processes_module, "coordination_client", Client)
    membership = processes_module._Membership(Processes(1, 2), lambda: None)
    membership.announce(FileNotFoundError("caf\udce9"))
    assert list(sent.values()) == [r"process 1 of 2 has stopped: FileNotFoundError: caf\udce9"]


def test_one_process_has_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    reports: list[str] = []
    with join(DistributedConfig(), reports.append) as processes:
        assert processes == Processes(0, 1)
        assert processes.is_first
    assert reports == []


def test_an_error_in_the_only_process_stays_what_it_is() -> None:
    with pytest.raises(ZeroDivisionError), join(DistributedConfig(detect=False)):
        raise ZeroDivisionError


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("environment", "cluster"),
    [
        ({}, None),
        (SLURM, "SLURM"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "2"}, "SLURM"),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}, "Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, "TPU pod"),
        ({"TPU_PROCESS_ADDRESSES": "host-0:1,host-1:1"}, "TPU pod"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, "TPU pod"),
        ({"TPU_ML_PLATFORM": "JAX"}, "TPU pod"),
        ({"TPU_ML_PLATFORM": "JAX", "TPU_SKIP_MDS_QUERY": "1"}, None),
    ],
)
def test_clusters_are_recognized_by_what_they_set(environment: dict[str, str], cluster: str | None) -> None:
    assert recognized_cluster(environment) == cluster


def test_an_open_mpi_that_does_not_name_its_host_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"distributed\.coordinator = None: .* --distributed\.process-id"):
        recognized_cluster({"OMPI_COMM_WORLD_SIZE": "2"})


def test_distributed_settings_survive_a_trip_through_json() -> None:
    config = TrainConfig(distributed=DistributedConfig("[::1]:80", 2, 1, heartbeat_seconds=9))
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"coordinator": "node0:80"}, r"coordinator = 'node0:80': goes with distributed\.num_processes and "),
        ({"num_processes": 2}, r"num_processes = 2: goes with distributed\.coordinator and distributed\.process_id"),
        ({"process_id": 0, "num_processes": 2}, r"num_processes = 2: goes with distributed\.coordinator; give all"),
        ({"coordinator": "node0", "num_processes": 2, "process_id": 0}, r"coordinator = 'node0': must be HOST:PORT"),
        ({"coordinator": ":80", "num_processes": 2, "process_id": 0}, r"coordinator = ':80': must be HOST:PORT"),
        ({"coordinator": "a:0", "num_processes": 2, "process_id": 0}, r"coordinator = 'a:0': .* from 1 to 65535"),
        (
            {"coordinator": "a:65536", "num_processes": 2, "process_id": 0},
            r"coordinator = 'a:65536': .* from 1 to 65535",
        ),
        ({"coordinator": "a:80", "num_processes": 0, "process_id": 0}, r"num_processes = 0: must be greater than zero"),
        ({"coordinator": "a:80", "num_processes": 2, "process_id": 2}, r"process_id = 2: must lie between 0 and 1"),
        ({"coordinator": "a:80", "num_processes": 2, "process_id": -1}, r"process_id = -1: must lie between 0 and 1"),
        ({"join_seconds": 0}, r"join_seconds = 0: must be greater than zero"),
        ({"heartbeat_seconds": 1}, r"heartbeat_seconds = 1: must be at least 2"),
    ],
)
def test_settings_that_cannot_work_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^distributed\.{message}"):
        DistributedConfig(**values)
