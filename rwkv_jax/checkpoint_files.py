"""Checkpoint folders: opening them, their metadata and digests, and what an error about one proves."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from rwkv_jax.checks import ConfigError
from rwkv_jax.digests import digest_tree
from rwkv_jax.json_object import is_unchanged, parse_object

if TYPE_CHECKING:  # Orbax takes a second to import, which loading weights from a file should not need.
    from orbax.checkpoint import v1 as ocp


class CheckpointError(ConfigError):
    """A checkpoint that cannot be read or written; the message has the place, the reason and the remedy."""


class DamagedError(CheckpointError):
    """A checkpoint that is proven to be damaged."""


def open_checkpoints(folder: Path, keep: int | None) -> ocp.training.Checkpointer:
    """The checkpoints in a folder.

    Args:
      keep: number of newest checkpoints kept when another is saved; None opens the folder for reading only.
    """
    from orbax.checkpoint import v1 as ocp

    policies: Any = ocp.training.preservation_policies  # Orbax's own annotations do not agree with each other
    every_time: Any = ocp.training.save_decision_policies.FixedIntervalPolicy(1)
    return ocp.training.Checkpointer(
        str(folder.absolute()),
        preservation_policy=policies.PreserveAll() if keep is None else policies.LatestN(keep),
        save_decision_policy=every_time,
        cleanup_tmp_directories=keep is not None,
    )


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turns whatever is raised while a run's file or folder is written into a `CheckpointError`."""
    try:
        yield
    except (ConfigError, jax.errors.JaxRuntimeError):  # which has place and remedy already, or is no matter of files
        raise
    except Exception as error:  # Orbax has no class of its own for it
        raise CheckpointError(
            f"{place}: cannot be written ({first_line(error)}); see to the disk (space, quota, the right to write), "
            "then go on from the last whole checkpoint with the same command"
        ) from error


def changed_arrays(tree: Any, digests: Mapping[str, str]) -> list[str]:
    """Paths of the arrays whose digests are not those that were saved, in the tree's order."""
    return [path for path, digest in digest_tree(tree).items() if digests.get(path) != digest]


def read_metadata(folder: Path) -> dict[str, Any]:
    """A checkpoint's own metadata, which is saved `with_digest`.

    Read without Orbax, which takes unreadable files for missing ones.

    Raises:
      DamagedError: it is missing, or not what was saved.
      OSError: it is there and cannot be read.
    """
    path = folder / "_CHECKPOINT_METADATA"
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamagedError("its description is missing") from error
    metadata = parse_object(content, path.name, DamagedError).get("custom_metadata")
    if not isinstance(metadata, dict) or not is_unchanged(metadata, required=True):
        raise DamagedError("its description has other bits than were saved")
    return metadata


NO_DAMAGE = (
    "Cannot allocate memory",
    "Input/output error",
    "Operation not permitted",
    "Out of memory",
    "PERMISSION_DENIED",
    "Permission denied",
    "RESOURCE_EXHAUSTED",
    "Bad file descriptor",
    "Connection timed out",
    "DEADLINE_EXCEEDED",
    "No space left",
    "Resource temporarily unavailable",
    "Stale file handle",
    "Too many open files",
    "UNAVAILABLE",
    "can't start new thread",
)
"""In the text of an error: the machine's fault, whatever the file holds."""


def is_damage(error: BaseException, folder: Path) -> bool:
    """Whether an error that was raised while a checkpoint was read speaks of what its files hold.

    Not if memory, threads, descriptors or rights were missing, if a file of the folder cannot be opened now, or if the
    code itself is at fault.
    """
    for cause in _causes(error):
        if isinstance(cause, (MemoryError, ImportError, AttributeError, jax.errors.JaxRuntimeError)):
            return False
        if isinstance(cause, OSError) and not isinstance(cause, (FileNotFoundError, NotADirectoryError)):
            return False
        if any(words in str(cause) for words in NO_DAMAGE):
            return False

    def refuse(error: OSError) -> None:
        raise error

    try:
        for place, _, names in os.walk(folder, onerror=refuse):
            for name in names:
                with (Path(place) / name).open("rb") as file:
                    file.read(1)
    except OSError:
        return False
    return True


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, those that led to it, and those grouped in it."""
    waiting, seen = [error], set[int]()
    while waiting:
        current = waiting.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        waiting += [cause for cause in (current.__cause__, current.__context__) if cause is not None]
        if isinstance(current, BaseExceptionGroup):
            waiting += current.exceptions


def first_line(error: BaseException) -> str:
    """An error in one line: what the system said, if that caused it."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.strerror:
            return f"{cause.filename}: {cause.strerror}" if cause.filename else cause.strerror
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
