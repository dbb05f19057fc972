"""What computes: versions of this package, of what it stands on, and of its source. Standard library only."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import rwkv_jax

_PACKAGES = ("jax", "jaxlib", "flax", "numpy")
_SECONDS = 10  # for git


@functools.cache
def versions() -> dict[str, str]:
    """By name: rwkv-jax, python, JAX and what else computes; and the commit, if this runs from a clone."""
    found = {"rwkv-jax": rwkv_jax.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = commit_of(Path(rwkv_jax.__file__).parents[1])
    return found if commit is None else {**found, "commit": commit}


def commit_of(folder: Path) -> str | None:
    """The commit of a clone, with " and changes" if it has some; None for a folder that is no clone of its own.

    An installed package may lie in an environment within somebody's repository, whose commit says nothing of it.
    """
    if not (folder / ".git").exists():
        return None
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    if not commit:
        return None
    return commit + (" and changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints of the folder, wherever GIT_DIR leads; None if it cannot be run, or fails."""
    command = ["git", "-C", str(folder), *arguments]
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False, env=env)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
