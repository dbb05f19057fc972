"""JAX's devices, and a line about the machine."""

from __future__ import annotations

import os
import platform
from typing import Any

from rwkv_jax.config import ConfigError
from rwkv_jax.host import processor


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


def describe_machine() -> str:
    """Processor, cores, accelerator and versions; no host names and no paths."""
    import jax

    device = jax.devices()[0]
    return (
        f"{processor()}, {os.cpu_count()} cores; {device.platform} ({device.device_kind}); "
        f"Python {platform.python_version()}, jax {jax.__version__}"
    )
