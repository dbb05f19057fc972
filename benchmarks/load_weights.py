"""How long loading weights takes beside a plain read of the file, and how much memory it needs at most.

    python benchmarks/load_weights.py                  # 12 x 768, the 0.1B model
    python benchmarks/load_weights.py --width 2048 --layers 24

Writes a bfloat16 .pth of an RWKV-7 of that shape, of random numbers, into a temporary folder. Read and load take turns
in one process, with the file in the page cache: a file that comes from a disk would hide what loading costs. The first
load of a process also traces the model once, so it is shown by itself. Peak memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from rwkv_jax import from_pretrained
from rwkv_jax.cli.machine import describe_machine
from rwkv_jax.config import ModelConfig
from rwkv_jax.weights.official import official_shapes
from rwkv_jax.weights.pth.file import write_torch_file


class RandomTensors(Mapping[str, NDArray]):
    """bfloat16 tensors of a model, drawn when they are asked for, so that a large file needs little memory."""

    def __init__(self, config: ModelConfig) -> None:
        self._shapes = official_shapes(config)

    def __getitem__(self, name: str) -> NDArray:
        shape = self._shapes[name]
        return (0.02 * np.random.default_rng(0).standard_normal(shape, np.float32)).astype(ml_dtypes.bfloat16)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def write_model(path: Path, layers: int, width: int, vocab_size: int = 65536) -> int:
    """Writes the file; returns its size in bytes."""
    write_torch_file(path, RandomTensors(ModelConfig(vocab_size=vocab_size, num_layers=layers, width=width)))
    return path.stat().st_size


def load(path: Path) -> None:
    model = from_pretrained(path)
    jax.block_until_ready(nnx.state(model, nnx.Param))


def times(path: Path, repetitions: int) -> dict[str, list[float]]:
    """Seconds of each read and load, in turn."""
    jax.block_until_ready(jax.numpy.zeros(1))  # the backend starts
    found: dict[str, list[float]] = {"read": [], "load": []}
    for _ in range(repetitions):
        for name, run in (("read", path.read_bytes), ("load", lambda: load(path))):
            started = time.perf_counter()
            result = run()
            found[name].append(time.perf_counter() - started)
            del result
    return found


_PEAK = """
import json, re, sys
from pathlib import Path
import jax
jax.block_until_ready(jax.numpy.zeros(1))
from rwkv_jax import from_pretrained
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
before = peak()
model = from_pretrained(sys.argv[1])
json.dump({"before": before, "peak": peak()}, sys.stdout)
"""


def peak_memory(path: Path) -> dict[str, int]:
    """Bytes of resident memory before loading, and the most that a process of its own has had (Linux)."""
    done = subprocess.run([sys.executable, "-c", _PEAK, str(path)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--repetitions", type=int, default=9)
    arguments = parser.parse_args()
    print(describe_machine())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        size = write_model(path, arguments.layers, arguments.width)
        path.read_bytes()
        found = times(path, arguments.repetitions)
        ratios = [load / read for read, load in zip(found["read"][1:], found["load"][1:], strict=True)]
        print(f"{arguments.layers} x {arguments.width}, {size / 1e6:.0f} MB, bfloat16 .pth, in the page cache")
        print(f"plain read    {1e3 * statistics.median(found['read'][1:]):6.0f} ms (median)")
        print(f"load          {1e3 * statistics.median(found['load'][1:]):6.0f} ms (median)")
        print(f"first load    {1e3 * found['load'][0]:6.0f} ms, with the model traced")
        print(f"load / read   {statistics.median(ratios):6.2f} (median of {len(ratios)} pairs)")
        memory = peak_memory(path)
        peak, grown = memory["peak"], memory["peak"] - memory["before"]
        print(f"peak memory   {peak / 1e6:6.0f} MB, {grown / 1e6:.0f} MB of it by loading: {grown / size:.2f} files")


if __name__ == "__main__":
    main()
