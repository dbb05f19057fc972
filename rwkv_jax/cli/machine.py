"""What a command ran on, in a line."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def processor() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or not x86
        return platform.processor() or platform.machine()


def describe_machine() -> str:
    """Processor, cores, accelerator and versions; no host names and no paths."""
    import jax

    device = jax.devices()[0]
    return (
        f"{processor()}, {os.cpu_count()} cores; {device.platform} ({device.device_kind}); "
        f"Python {platform.python_version()}, jax {jax.__version__}"
    )
