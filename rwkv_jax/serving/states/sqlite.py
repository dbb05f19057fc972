"""States in one SQLite file: what `put` has returned for survives the process and, if the disk is honest, the machine.

The write-ahead log is flushed at every commit, so a process that is killed leaves each record as it was before or after
a `put`. One process has the file at a time; its lock ends with the process.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rwkv_jax.checks import ConfigError, require
from rwkv_jax.serving.states.store import (
    StateInfo,
    StateRecord,
    TooLargeError,
    UnavailableError,
    check_version,
    new_version,
    tenant_key,
)

SCHEMA_VERSION = 1
"""Of the file's tables; a file of another version is refused."""

_APPLICATION_ID = 0x52574B56  # "RWKV", in the file's header
_SCHEMA = """
CREATE TABLE states (
  tenant TEXT NOT NULL,
  id TEXT NOT NULL,
  version INTEGER NOT NULL,
  kind TEXT NOT NULL,
  num_tokens INTEGER NOT NULL,
  model TEXT NOT NULL,
  created REAL NOT NULL,
  used REAL NOT NULL,
  num_bytes INTEGER NOT NULL,
  data BLOB NOT NULL,
  PRIMARY KEY (tenant, id)
);
CREATE INDEX by_use ON states (used, num_bytes);
"""
_LOCK_SECONDS = 5.0  # a server that is just ending still has the file
_ROW_BYTES = 512  # counted for each record besides its data, so that names alone cannot fill the disk
_MAX_LOG_BYTES = 2**24  # to which the write-ahead log shrinks again after a large commit
_MAX_UNWRITTEN_USES = 1024


class SqliteStateStore:
    """Records in a file, or in memory for the path ":memory:"; the least recently used are evicted first.

    Times of use by `get` are written with the next `put`, so after a kill some records may count as older.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_bytes: int,
        max_idle_seconds: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Opens the file, or makes it, readable by its owner only.

        Args:
          max_bytes: maximum of all records together.
          max_idle_seconds: after which an unused record expires.
          clock: Unix time.

        Raises:
          ConfigError: a bound that is not positive; the file is no store of states, of another version, in use by
            another process, or cannot be opened.
        """
        require(max_bytes > 0, "max_bytes", max_bytes, "must be 1 or more")
        require(max_idle_seconds > 0, "max_idle_seconds", max_idle_seconds, "must be positive")
        self._max_bytes, self._max_idle_seconds, self._clock = max_bytes, max_idle_seconds, clock
        self._lock = threading.Lock()
        self._uses: dict[tuple[str, str], float] = {}  # not yet written
        self._connection = _opened(Path(path).expanduser())

    def put(self, tenant: str, id: str, record: StateRecord, *, expected: int | None = None) -> int:
        """As `StateStore.put`."""
        num_bytes = len(record.data) + _ROW_BYTES
        if num_bytes > self._max_bytes:
            raise TooLargeError(f"{id}: takes {num_bytes} bytes where all states together may take {self._max_bytes}")
        key, version, now = (tenant_key(tenant), id), new_version(), self._clock()
        with self._transaction() as run:
            run("DELETE FROM states WHERE used <= ?", (now - self._max_idle_seconds,))
            found = run("SELECT version FROM states WHERE tenant = ? AND id = ?", key).fetchone()
            check_version(id, 0 if found is None else found[0], expected)
            row = (*key, version, record.kind, record.num_tokens, record.model, record.created, now)
            run("REPLACE INTO states VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (*row, num_bytes, record.data))
            (total,) = run("SELECT SUM(num_bytes) FROM states").fetchone()
            others = run("SELECT num_bytes, tenant, id FROM states WHERE (tenant, id) <> (?, ?) ORDER BY used", key)
            while total > self._max_bytes:
                size, *oldest = others.fetchone()
                run("DELETE FROM states WHERE tenant = ? AND id = ?", oldest)
                total -= size
        return version

    def get(self, tenant: str, id: str) -> StateRecord | None:
        """As `StateStore.get`."""
        key, now = (tenant_key(tenant), id), self._clock()
        columns = "data, num_tokens, model, created, kind, version, used"
        with self._lock, _reporting():
            found = self._run(f"SELECT {columns} FROM states WHERE tenant = ? AND id = ?", key).fetchone()
            if found is None or max(found[-1], self._uses.get(key, 0.0)) <= now - self._max_idle_seconds:
                return None
            self._uses[key] = now
        if len(self._uses) > _MAX_UNWRITTEN_USES:
            with self._transaction():
                pass
        return StateRecord(*found[:-1])

    def delete(self, tenant: str, id: str) -> bool:
        """As `StateStore.delete`; the bytes in the file are overwritten."""
        with self._transaction() as run:
            run("DELETE FROM states WHERE used <= ?", (self._clock() - self._max_idle_seconds,))
            return run("DELETE FROM states WHERE tenant = ? AND id = ?", (tenant_key(tenant), id)).rowcount > 0

    def list(self, tenant: str) -> list[StateInfo]:
        """As `StateStore.list`."""
        with self._transaction() as run:
            run("DELETE FROM states WHERE used <= ?", (self._clock() - self._max_idle_seconds,))
            rows = run(
                "SELECT id, kind, num_tokens, num_bytes, model, created, used FROM states WHERE tenant = ? "
                "ORDER BY used DESC, id",
                (tenant_key(tenant),),
            ).fetchall()
        infos = [StateInfo(*row) for row in rows]
        return [info._replace(num_bytes=info.num_bytes - _ROW_BYTES) for info in infos]

    def close(self) -> None:
        """Writes the times of use and lets the file go; does nothing the second time."""
        with self._lock:
            if self._connection is None:
                return
        with contextlib.suppress(UnavailableError), self._transaction():
            pass
        with self._lock:
            self._connection.close()
            self._connection = None

    def _run(self, command: str, arguments: tuple[object, ...] | list[object] = ()) -> sqlite3.Cursor:
        if self._connection is None:
            raise UnavailableError("states: the server is ending")
        return self._connection.execute(command, arguments)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Callable[..., sqlite3.Cursor]]:
        """Commits what its block runs, after the times of use; rolls it back if the block raises."""
        with self._lock, _reporting():
            self._run("BEGIN IMMEDIATE")
            try:
                uses = [(used, *key) for key, used in self._uses.items()]
                for use in uses:
                    self._run("UPDATE states SET used = ? WHERE tenant = ? AND id = ?", use)
                yield self._run
                self._run("COMMIT")
            except BaseException:
                if self._connection is not None and self._connection.in_transaction:
                    self._run("ROLLBACK")
                raise
            self._uses.clear()


@contextlib.contextmanager
def _reporting() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:  # a full disk, or one that fails
        raise UnavailableError(f"states: cannot be read or written now ({error})") from error


def _opened(path: Path) -> sqlite3.Connection:
    try:
        if str(path) != ":memory:":
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # The log beside the file gets its permissions. An existing file is not opened here: closing it again would
            # end the locks that this process may have on it.
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            path.chmod(0o600)
        connection = sqlite3.connect(path, timeout=_LOCK_SECONDS, isolation_level=None, check_same_thread=False)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"{path}: cannot be opened ({error}); name another file for states") from error
    try:
        _prepare(path, connection)
    except BaseException as error:
        connection.close()
        if not isinstance(error, sqlite3.Error):
            raise
        remedy = "it is in use by another server, or damaged; give each server a file of its own, or share a redis://"
        raise ConfigError(f"{path}: cannot be used for states ({error}): {remedy}") from error
    return connection


def _prepare(path: Path, connection: sqlite3.Connection) -> None:
    """Takes the file for this process, checks that it is a store, and makes the tables of a new one."""
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    connection.execute("BEGIN EXCLUSIVE")
    (tables,) = connection.execute("SELECT COUNT(*) FROM sqlite_schema").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if tables and application != _APPLICATION_ID:
        raise ConfigError(f"{path}: is a database of something else; name another file for states")
    if tables and version != SCHEMA_VERSION:
        raise ConfigError(
            f"{path}: is a store of version {version}, where version {SCHEMA_VERSION} is read; use the rwkv-jax that "
            "made it, or name another file for states"
        )
    if not tables:
        for statement in filter(str.strip, _SCHEMA.split(";")):
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    connection.execute("COMMIT")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA secure_delete = ON")
    connection.execute(f"PRAGMA journal_size_limit = {_MAX_LOG_BYTES}")
