"""Where the processes of a run meet before JAX connects them: process 0 listens at the coordinator's address.

JAX's coordination service takes a second process with an id for the first one restarted and ends the whole run, and
does not say which processes it still waits for. So each process first tells process 0 its id, and keeps that
connection: an id belongs to a process as long as it lives. Once all are there, process 0 tells them on which port JAX's
service is.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from rwkv_jax.config import ConfigError

_SECONDS_TO_SPEAK = 2.0
_SECONDS_BETWEEN_TRIES = 0.2
_SECONDS_BETWEEN_LOOKS = 0.5
_LONGEST_LINE = 4096


class Place(NamedTuple):
    """Where the processes of a run meet."""

    coordinator: str
    """HOST:PORT of process 0."""
    count: int
    """Number of processes."""
    seconds: int
    """How long they wait for each other."""


@contextlib.contextmanager
def meet(place: Place, index: int) -> Iterator[str]:
    """Waits until all processes are there; yields HOST:PORT for JAX's service. Keep the context as long as the run.

    Raises:
      ConfigError: another process has this one's id, or was told another number of processes; some did not come in
        time; or process 0 cannot open its port.
    """
    with contextlib.ExitStack() as stack:
        if index == 0:
            port = stack.enter_context(_host(place))
        else:
            connection, port = _arrive(place, index)
            stack.enter_context(connection)
        yield f"{place.coordinator.rpartition(':')[0]}:{port}"


@contextlib.contextmanager
def _host(place: Place) -> Iterator[int]:
    """Process 0's side of `meet`; yields a free port."""
    # There may be a process 0 already, on this host or, if this one was given the wrong id, on another.
    with contextlib.suppress(OSError), _connect(place, _SECONDS_TO_SPEAK) as connection:
        if refusal := _ask(connection, place, 0, _SECONDS_TO_SPEAK).get("error"):
            raise ConfigError(refusal)
    with contextlib.closing(_Meeting(place)) as meeting:
        meeting.wait()
        with _listen(0) as free:
            port = free.getsockname()[1]
        meeting.answer({"port": port})
        yield port


class _Meeting:
    """Which process holds which id, and the connections to them."""

    def __init__(self, place: Place) -> None:
        self._place, self._has_begun = place, False
        try:
            self._listener = _listen(int(place.coordinator.rpartition(":")[2]))
        except OSError as error:
            raise ConfigError(
                f"distributed.coordinator = {place.coordinator!r}: process 0 cannot open that port "
                f"({error.strerror}); name one that is free, to all processes alike"
            ) from error
        self._names, self._connections = {0: _own_name()}, dict[int, socket.socket]()
        self._changed = threading.Condition()
        threading.Thread(target=self._receive, name="processes that join", daemon=True).start()

    def wait(self) -> None:
        """Waits for all processes. Raises ConfigError, here and in those that came, if some do not come in time."""
        deadline = time.monotonic() + self._place.seconds
        with self._changed:
            while missing := self._missing():
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(min(left, _SECONDS_BETWEEN_LOOKS))
            self._has_begun = True
        if missing:
            listed = ", ".join(map(str, missing[:16])) + (", ..." if len(missing) > 16 else "")
            which = f"process{'es' if len(missing) > 1 else ''} {listed} of {self._place.count}"
            problem = _too_late(self._place, f"{which} did not come")
            self.answer({"error": problem})
            raise ConfigError(problem)

    def answer(self, reply: dict[str, Any]) -> None:
        """Replies to all processes that wait."""
        for connection in self._connections.values():
            with contextlib.suppress(OSError):  # One that is lost now, JAX will miss.
                _say(connection, reply)

    def close(self) -> None:
        """Ends all connections."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # which ends the thread's wait
        for connection in (self._listener, *self._connections.values()):
            connection.close()

    def _missing(self) -> list[int]:
        for index in [index for index, connection in self._connections.items() if _has_ended(connection)]:
            self._connections.pop(index).close()
            del self._names[index]
        return [index for index in range(self._place.count) if index not in self._names]

    def _receive(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # The run is over.
            try:
                connection.settimeout(_SECONDS_TO_SPEAK)
                hello = _hear(connection)
                refusal = self._admit(connection, int(hello["index"]), int(hello["count"]), str(hello["name"]))
                if refusal is not None:
                    _say(connection, {"error": refusal})
                    connection.close()
            except (OSError, ValueError, KeyError, TypeError):  # Something else than a process of a run.
                connection.close()

    def _admit(self, connection: socket.socket, index: int, count: int, name: str) -> str | None:
        """Gives a process the id that it asks for, or says why not."""
        coordinator = self._place.coordinator
        if count != self._place.count:
            return (
                f"distributed.num_processes = {count}: process 0 at {coordinator} was started with "
                f"{self._place.count}; start all with the same"
            )
        with self._changed:
            if not self._has_begun:
                self._missing()  # An id whose process has ended meanwhile is free again.
            holder = self._names.get(index)
            if holder is not None:
                return (
                    f"distributed.process_id = {index}: process {index} of the run at {coordinator} is there already: "
                    f"{holder}; that run goes on without this process. Give each process of a run its own "
                    "distributed.process_id, and each run its own distributed.coordinator; if that process was just "
                    "lost, start all again once the others have ended"
                )
            connection.setblocking(False)
            self._names[index], self._connections[index] = name, connection
            self._changed.notify_all()
        return None


def _arrive(place: Place, index: int) -> tuple[socket.socket, int]:
    """Any other process' side of `meet`: the connection that holds its id, and the port that process 0 tells."""
    deadline, reason = time.monotonic() + place.seconds, "no reply"
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.ExitStack() as stack:
            try:
                connection = stack.enter_context(_connect(place, left))
                reply = _ask(connection, place, index, left + _SECONDS_TO_SPEAK)
            except OSError as error:  # Process 0 is not there yet.
                reply, reason = {}, error.strerror or str(error)
            if refusal := reply.get("error"):
                raise ConfigError(refusal)
            if "port" in reply:
                stack.pop_all()
                return connection, int(reply["port"])
        time.sleep(_SECONDS_BETWEEN_TRIES)
    raise ConfigError(_too_late(place, f"process 0 does not answer ({reason})"))


def _too_late(place: Place, problem: str) -> str:
    return (
        f"distributed.coordinator = {place.coordinator!r}: the processes have not found each other within "
        f"distributed.join_seconds = {place.seconds}; start every process, each with its own distributed.process_id, "
        f"and see that the others can reach process 0: {problem}"
    )


def _own_name() -> str:
    return f"process number {os.getpid()} on host {socket.gethostname()}"


def _listen(port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    return socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)


def _connect(place: Place, seconds: float) -> socket.socket:
    host, _, port = place.coordinator.rpartition(":")
    connection = socket.create_connection((host.strip("[]"), int(port)), timeout=seconds)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return connection


def _ask(connection: socket.socket, place: Place, index: int, seconds: float) -> dict[str, Any]:
    """Asks process 0 for an id; its reply, or nothing from something else."""
    _say(connection, {"index": index, "count": place.count, "name": _own_name()})
    connection.settimeout(seconds)
    try:
        return dict(_hear(connection))
    except (ValueError, TypeError):
        return {}


def _say(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _hear(connection: socket.socket) -> Any:
    """The next line's value. Raises ValueError if it is none, or the connection has ended."""
    line = b""
    while not line.endswith(b"\n"):
        received = connection.recv(_LONGEST_LINE)
        line += received
        if not received or len(line) > _LONGEST_LINE:
            raise ValueError("not a line")
    return json.loads(line)


def _has_ended(connection: socket.socket) -> bool:
    """Whether the other side has closed it; it does not block, and that side says nothing more."""
    try:
        connection.recv(1)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
