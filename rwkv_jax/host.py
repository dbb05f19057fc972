"""The machine that this process runs on: processor, pages, and the user's folder for caches. Standard library only."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
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


_HUGE_PAGES = "glibc.malloc.hugetlb"

_RESTARTED = "RWKV_JAX_RESTARTED"
"""Set in a process that has begun anew, which never does so twice: an environment may lose what glibc reads."""


def huge_page_environment(
    environment: Mapping[str, str], system_setting: str, libc: tuple[str, str]
) -> dict[str, str] | None:
    """The environment in which a new process asks Linux for pages of 2 MB; None where that changes nothing.

    A training step on a CPU takes and returns a gigabyte of memory, and the system hands out pages of 4 KB one by one,
    each filled with zeros: a tenth of a step (benchmarks/README.md).

    Args:
      environment: of this process; what it says of huge pages stands.
      system_setting: `huge_page_setting()`.
      libc: as `platform.libc_ver()` gives it; allocators other than that of glibc from 2.35 on know no such setting.
    """
    tunables = environment.get("GLIBC_TUNABLES", "")
    version = tuple(int(part) for part in libc[1].split(".")[:2] if part.isdecimal())
    if "[madvise]" not in system_setting or _HUGE_PAGES in tunables or libc[0] != "glibc" or version < (2, 35):
        return None
    settings = [*filter(None, [tunables]), f"{_HUGE_PAGES}=1"]
    return {**environment, "GLIBC_TUNABLES": ":".join(settings)}


def huge_page_setting() -> str:
    """When Linux gives processes pages of 2 MB, as it writes it; empty where there is no such setting."""
    try:
        return Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="utf-8")
    except OSError:  # not Linux, or a kernel without them
        return ""


def restart_with_huge_pages(program: str) -> None:
    """Begins this process anew, with the same arguments, in `huge_page_environment`; returns where that is None.

    To be called first of all, as nothing that the process has done is kept. glibc reads its settings only once.

    Args:
      program: what Python was started to run, a file or the M of `python -m M`. Where it runs something else, such as a
        notebook that runs a file of ours, nothing is begun anew.
    """
    environment = huge_page_environment(os.environ, huge_page_setting(), platform.libc_ver())
    if environment is None or _RESTARTED in os.environ or program not in sys.orig_argv or not sys.executable:
        return
    with contextlib.suppress(OSError):  # the pages are small then
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment | {_RESTARTED: "1"})
