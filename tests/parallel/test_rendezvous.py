"""Processes meet at process 0 before JAX connects them: threads of this process stand for them."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import pytest

from rwkv_jax.config import ConfigError
from rwkv_jax.parallel import rendezvous
from rwkv_jax.parallel.rendezvous import Place, meet
from tests.parallel.process_pair import free_port


@contextlib.contextmanager
def started(place: Place, *indices: int) -> Iterator[list[Future[str]]]:
    """Processes with these ids, each of which leaves at the end; results are the addresses that they were told."""
    over = threading.Event()
    told: list[Future[str]] = [Future() for _ in indices]

    def be(index: int, told: Future[str]) -> None:
        try:
            with meet(place, index) as address:
                told.set_result(address)
                over.wait(30)
        except ConfigError as error:
            told.set_exception(error)

    with ThreadPoolExecutor(len(indices)) as pool:
        for index, future in zip(indices, told, strict=True):
            pool.submit(be, index, future)
        try:
            yield told
        finally:
            over.set()


def a_place(count: int = 2, seconds: int = 20, host: str = "127.0.0.1") -> Place:
    return Place(f"{host}:{free_port()}", count, seconds)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_all_are_told_one_address_on_the_host_of_process_0(host: str) -> None:
    place = a_place(3, host=host)
    with started(place, 2, 0, 1) as told:
        addresses = {future.result(20) for future in told}
    (address,) = addresses
    assert address.rpartition(":")[0] == host
    assert address != place.coordinator


def reach(place: Place) -> socket.socket:
    """A connection to process 0, once it listens."""
    while True:
        with contextlib.suppress(OSError):
            return rendezvous._connect(place, 10)


@pytest.mark.parametrize("index", [0, 1])
def test_an_id_in_use_is_refused_with_its_holder(index: int) -> None:
    place = a_place()
    message = (
        f"distributed.process_id = {index}: process {index} of the run at {place.coordinator} is there already: "
        f"{rendezvous._own_name()}; that run goes on without this process."
    )
    with started(place, 0, 1) as told:
        assert len({future.result(20) for future in told}) == 1
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}"), meet(place, index):
            pass


def test_an_id_in_use_is_refused_while_others_are_awaited() -> None:
    place = a_place(3)
    with started(place, 0, 1, 1) as (first, *two):
        done, waiting = wait(two, 20, FIRST_COMPLETED)
        with pytest.raises(ConfigError, match=r"process 1 of .* is there already"):
            done.pop().result()
        with started(place, 2) as last:
            assert {first.result(20), waiting.pop().result(20)} == {last[0].result(20)}


def test_an_id_is_free_again_when_its_process_ends_before_all_have_met() -> None:
    place = a_place(3)
    with started(place, 0) as first:
        with reach(place) as ends:
            rendezvous._say(ends, {"index": 1, "count": 3, "name": "one that is killed"})
        with started(place, 1, 2) as others:
            assert {future.result(20) for future in others} == {first[0].result(20)}


def test_those_that_did_not_come_are_named_in_all_that_did() -> None:
    with started(a_place(4, seconds=1), 0, 2) as told:
        for future in told:
            with pytest.raises(
                ConfigError,
                match=r"not found each other within distributed\.join_seconds = 1; start every process, .*: "
                r"processes 1, 3 of 4 did not come$",
            ):
                future.result(20)


def test_without_process_0_the_others_say_so() -> None:
    place = a_place(seconds=1)
    with pytest.raises(ConfigError, match=r"process 0 does not answer \(Connection refused\)$"), meet(place, 1):
        pass


def test_a_process_told_another_number_of_processes_is_refused() -> None:
    place = a_place()
    message = r"num_processes = 3: process 0 at .* was started with 2; start all"
    with started(place, 0, 1) as told:
        told[1].result(20)
        with pytest.raises(ConfigError, match=message), meet(place._replace(count=3), 2):
            pass


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"index": null}\n', b"\xff" * 9000])
def test_what_is_no_process_is_ignored(said: bytes) -> None:
    place = a_place()
    with started(place, 0) as first:
        with reach(place) as stranger:
            stranger.sendall(said)
        with started(place, 1) as second:
            assert second[0].result(20) == first[0].result(20)


def test_something_else_at_the_address_is_no_process_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_SECONDS_TO_SPEAK", 0.2)
    place = a_place(seconds=1)
    port = int(place.coordinator.rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)):
        with pytest.raises(ConfigError, match="process 0 does not answer"), meet(place, 1):
            pass
        with pytest.raises(ConfigError, match="process 0 cannot open that port"), meet(place, 0):
            pass
