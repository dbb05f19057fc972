"""What a benchmark ran on, in one line."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import jax


def describe_machine() -> str:
    """Processor, cores, accelerator and versions; no host names and no paths."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux, or not x86: the short name does
    device = jax.devices()[0]
    return (
        f"{cpu}, {os.cpu_count()} cores; {device.platform} ({device.device_kind}); "
        f"Python {platform.python_version()}, jax {jax.__version__}"
    )
