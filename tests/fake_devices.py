"""Programs in processes of their own, with more fake devices than the tests' process has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.golden import QUICK_FLAGS

ROOT = Path(__file__).parents[1]


def run_on_fake_devices(count: int, program: str, *arguments: str) -> Any:
    """What a module prints as JSON, run with so many fake devices of the CPU."""
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "XLA_FLAGS": " ".join([*QUICK_FLAGS, f"--xla_force_host_platform_device_count={count}"]),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    command = [sys.executable, "-m", program, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
