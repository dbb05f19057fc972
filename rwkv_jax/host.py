"""The machine that this process runs on: its processor, and the user's folder for caches. Standard library only."""

from __future__ import annotations

import os
import platform
import zlib
from collections.abc import Mapping
from pathlib import Path


def processor() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or not x86
        return platform.processor() or platform.machine()


def instruction_sets() -> str:
    """The architecture and a hash of the processor's instruction sets, such as `x86_64-1b2c3d4e`.

    Programs compiled for a CPU run on processors with the same instruction sets.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        found = next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):  # not Linux
        found = processor()
    return f"{platform.machine()}-{zlib.crc32(found.encode()):08x}"


def available_cores() -> int:
    """Number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> int | None:
    """Bytes of memory; None where the system does not say."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None


def cache_folder(environment: Mapping[str, str]) -> Path:
    """The folder `rwkv-jax` in the user's cache folder.

    Source: the XDG Base Directory Specification, which says to ignore relative paths in XDG_CACHE_HOME.
    """
    given = environment.get("XDG_CACHE_HOME", "")
    root = Path(given) if os.path.isabs(given) else Path(os.path.expanduser("~/.cache"))
    return root / "rwkv-jax"
