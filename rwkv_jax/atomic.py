"""Files and folders that appear whole or not at all, and never in the place of another. Standard library only.

Everything is written under a temporary name beside its own, flushed to disk, and then renamed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rwkv_jax.checks import ConfigError


@contextlib.contextmanager
def new_file(path: Path, error: type[ConfigError] = ConfigError, label: str | None = None) -> Iterator[BinaryIO]:
    """A file to write, which gets its name when the block ends well; its folder is made.

    Args:
      path: the name that it gets.
      error: what is raised, with `label`, or else the path, first in its message.

    Raises:
      ConfigError: `path` exists already, or its folder cannot be written.
      OSError: as it comes, from a disk that is full and from whatever the block reads.
    """
    refuse_existing(path, error, label)
    temporary = temporary_name(path)
    with _said_as(error, label or path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = temporary.open("xb")
    try:
        with file:
            yield file
            flush_to_disk(file)
        try:
            atomic_rename(temporary, path)
        except FileExistsError:
            raise already_exists(path, error, label) from None
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(
    path: Path, error: type[ConfigError] = ConfigError, label: str | None = None, *, exist_ok: bool = False
) -> Iterator[Path]:
    """A folder to fill, under a temporary name, which gets its own when the block ends well. Raises as `new_file`.

    With `exist_ok`, a folder that another process has made meanwhile is kept, and this one dropped.
    """
    if not exist_ok:
        refuse_existing(path, error, label)
    temporary = temporary_name(path)
    with _said_as(error, label or path):
        temporary.mkdir(parents=True)
    try:
        yield temporary
        for written in [*temporary.iterdir(), temporary]:
            flush_to_disk(written)
        try:
            temporary.rename(path)  # a folder takes the place of nothing but an empty folder
        except OSError:
            if exist_ok and path.is_dir():
                return
            if os.path.lexists(path):
                raise already_exists(path, error, label) from None
            raise
        flush_to_disk(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file of ours, perhaps anew: after a crash it is there whole, or as it was before."""
    temporary = temporary_name(path)
    try:
        with temporary.open("xb") as file:
            file.write(content)
            flush_to_disk(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_rename(temporary: Path, path: Path) -> None:
    """Gives a finished file its name; of two who do so at once, one succeeds.

    On a file system without hard links there is a moment between looking for a file and taking its place.

    Args:
      temporary: a file in the folder of `path`; it keeps its name if this fails.
      path: the name that it gets.

    Raises:
      FileExistsError: there is something of that name, which is left as it is; a link that leads nowhere is something.
      OSError: the folder cannot be written.
    """
    try:
        os.link(temporary, path)  # unlike a renaming, never replaces a file
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links, on which hours of work must not be lost
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        temporary.rename(path)
    else:
        temporary.unlink()


def temporary_name(path: Path) -> Path:
    """A hidden name beside a file or folder that nobody else draws: processes of several hosts may write there."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def flush_to_disk(written: BinaryIO | Path) -> None:
    """Waits until an open file, or what a path names, is on the disk; some file systems cannot tell of folders."""
    if not isinstance(written, Path):
        written.flush()
        os.fsync(written.fileno())
        return
    descriptor = os.open(written, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not written.is_dir():
            raise
    finally:
        os.close(descriptor)


def refuse_existing(path: Path, error: type[ConfigError] = ConfigError, label: str | None = None) -> None:
    """Raises the error if there is anything of this name; a link that leads nowhere is the user's, too."""
    if os.path.lexists(path):
        raise already_exists(path, error, label)


def already_exists(path: Path, error: type[ConfigError] = ConfigError, label: str | None = None) -> ConfigError:
    """The error for a name that is taken."""
    return error(f"{label or path}: exists already and is not overwritten; move it away or name another")


@contextlib.contextmanager
def _said_as(error: type[ConfigError], label: object) -> Iterator[None]:
    try:
        yield
    except OSError as reason:
        raise error(f"{label}: cannot be written ({reason.strerror}); name another place") from reason
