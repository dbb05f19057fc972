"""A run folder has one writer at a time: a lock that the system frees when its process ends, however it ends.

Locks of files work on local disks and, where its lock service runs, on NFS.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from rwkv_jax.atomic import replace_file
from rwkv_jax.checks import ConfigError

LOCK_FILE = ".lock"
OWNER_FILE = ".lock-owner.json"

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""What a file system without locks answers."""


def take_lock(path: Path, wait: float) -> tuple[FileLock, Exception | None]:
    """A lock of a file, held; or free, and why that is, where the file system has no locks.

    Args:
      wait: seconds for which another process may still hold it.

    Raises:
      OSError: it cannot be had; a TimeoutError if another process holds it.
    """
    lock = FileLock(path, timeout=wait, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise TimeoutError(errno.ETIMEDOUT, f"another process holds {path.name}") from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        return lock, error
    return lock, None


@contextlib.contextmanager
def lock_run(run_dir: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock of an existing run folder.

    Args:
      report: told once if the file system has no locks.

    Raises:
      ConfigError: another process holds it; names its host, number and start.
    """
    try:
        lock, missing = take_lock(run_dir / LOCK_FILE, wait=0)
    except TimeoutError:
        raise ConfigError(
            f"run_dir = {str(run_dir)!r}: {_owner(run_dir)} is writing there; wait until it has ended, or name another"
        ) from None
    except OSError as error:
        raise ConfigError(f"run_dir = {str(run_dir)!r}: cannot be locked ({error}); see to its rights") from error
    if missing is not None:
        report(f"{run_dir}: this file system has no locks ({missing}), so see to it that no other run writes there")
    since = datetime.datetime.now().isoformat(" ", "seconds")
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
    try:
        with contextlib.suppress(OSError):  # it only tells others who is here
            replace_file(run_dir / OWNER_FILE, json.dumps(owner).encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            (run_dir / OWNER_FILE).unlink(missing_ok=True)
            if [path.name for path in run_dir.iterdir()] == [LOCK_FILE]:  # what was refused leaves no trace
                (run_dir / LOCK_FILE).unlink()
        lock.release()


def _owner(run_dir: Path) -> str:
    try:
        owner = json.loads((run_dir / OWNER_FILE).read_text(encoding="utf-8"))
        return f"process {owner['pid']} of {owner['host']}, since {owner['since']},"
    except (OSError, ValueError, TypeError, KeyError):  # it has only just taken the lock
        return "another process"
