"""Descriptions of the machine."""

from __future__ import annotations

import os
import platform
import zlib
from pathlib import Path
from typing import Any

from rwkv_jax.config import ConfigError


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


def find_devices() -> list[Any]:
    """JAX's devices.

    Raises:
      ConfigError: it has none, or none of the requested platforms.
    """
    import jax

    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter if only a plugin without a driver is requested
        problem = " ".join(str(error).split()) or "no platform that is asked for has one"
        raise ConfigError(
            f"JAX finds no device: {problem}; mend the driver or the plugin, or set JAX_PLATFORMS=cpu to do without"
        ) from error


def available_cores() -> int:
    """Number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine() -> str:
    """Processor, cores, accelerator and versions; no host names and no paths."""
    import jax

    device = jax.devices()[0]
    return (
        f"{processor()}, {os.cpu_count()} cores; {device.platform} ({device.device_kind}); "
        f"Python {platform.python_version()}, jax {jax.__version__}"
    )
