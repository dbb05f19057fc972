"""Atomic creation of files and folders, which never replaces existing ones. Standard library only.

Content is written under a temporary name in the same folder, flushed to disk, and then renamed.
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
    """Opens a file for writing; it gets its name when the block succeeds. Creates its folder.

    Args:
      path: the final name.
      error: exception to raise; its message starts with `label`, or else the path.

    Raises:
      ConfigError: `path` exists already, or its folder cannot be written.
      OSError: unchanged, from a full disk or from what the block reads.
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
    """Creates a folder under a temporary name; it gets its own when the block succeeds. Raises as `new_file`.

    With `exist_ok`, a folder that another process has created meanwhile is kept, and this one deleted.
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
            temporary.rename(path)  # renaming a folder replaces an empty folder at most
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
    """Writes or replaces one of our own files: after a crash either the old or the new content is there."""
    temporary = temporary_name(path)
    try:
        with temporary.open("xb") as file:
            file.write(content)
            flush_to_disk(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_rename(temporary: Path, path: Path) -> None:
    """Renames a finished file without replacing another; of two concurrent calls, one succeeds.

    Without hard links there is a short race between the check for an existing file and the rename.

    Args:
      temporary: a file in the folder of `path`; keeps its name on failure.
      path: the final name.

    Raises:
      FileExistsError: the name is taken, even by a dangling link; it is left unchanged.
      OSError: the folder cannot be written.
    """
    try:
        os.link(temporary, path)  # unlike a rename, never replaces a file
    except FileExistsError:
        raise
    except OSError:  # no hard links on this file system: rename instead, hours of work must not be lost
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        temporary.rename(path)
    else:
        temporary.unlink()


def temporary_name(path: Path) -> Path:
    """A unique hidden name beside a file or folder: processes of several hosts may write there."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def flush_to_disk(written: BinaryIO | Path) -> None:
    """Flushes an open file or a path to disk; some file systems do not support this for folders."""
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
    """Raises the error if the name is taken, even by a dangling link."""
    if os.path.lexists(path):
        raise already_exists(path, error, label)


def already_exists(path: Path, error: type[ConfigError] = ConfigError, label: str | None = None) -> ConfigError:
    """The error for a name that is already taken."""
    return error(f"{label or path}: exists already and is not overwritten; move it away or name another")


@contextlib.contextmanager
def _said_as(error: type[ConfigError], label: object) -> Iterator[None]:
    try:
        yield
    except OSError as reason:
        raise error(f"{label}: cannot be written ({reason.strerror}); name another place") from reason
