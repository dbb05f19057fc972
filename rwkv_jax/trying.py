"""Marks of kernels that are being tried on a device: a kernel that hangs, or kills its process, leaves its own behind.

A mark is a locked file beside the file of measurements; the system frees the lock when a process ends, however it does.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from pathlib import Path

from rwkv_jax.run_lock import take_lock

REMEDY = "rwkv tune --again tries it"


@contextlib.contextmanager
def marked(mark: Path) -> Iterator[None]:
    """Leaves the mark if the process dies meanwhile; not if what is tried raises, or the user breaks it off.

    Where it cannot be written there is none, nor if another process is trying the same. Where a file system has no
    locks it is not heeded.
    """
    try:
        mark.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock, _ = take_lock(mark, wait=0)
    except OSError:
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            mark.unlink(missing_ok=True)
        lock.release()
        with contextlib.suppress(OSError):
            mark.parent.rmdir()  # if it was the last one


def left_since(mark: Path) -> str | None:
    """When the trial began that did not come back; None without a mark, or while its process lives."""
    try:
        found = mark.stat()
        lock, missing = take_lock(mark, wait=0)
        try:
            here = mark.stat()
            if (here.st_ino, here.st_mtime_ns) != (found.st_ino, found.st_mtime_ns):  # its trial has just ended well
                mark.unlink()
                return None
        finally:
            lock.release()
    except OSError:
        return None
    if missing is not None:
        return None
    return datetime.datetime.fromtimestamp(found.st_mtime).isoformat(" ", "seconds")


def forget(mark: Path) -> None:
    """Removes what a trial has left."""
    if left_since(mark) is not None:
        with contextlib.suppress(OSError):
            mark.unlink(missing_ok=True)
