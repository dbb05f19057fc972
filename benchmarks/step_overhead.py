"""What the training loop adds to a step: steps take their planned time, and everything else is as it is in a run.

    PYTHONPATH=. python benchmarks/step_overhead.py          # RWKV-7 0.1B, B16 T512, a step of 16.6 ms
    PYTHONPATH=. python benchmarks/step_overhead.py --batch 30 --length 4096 --planned-ms 249

Both are one H100 at the rate that `rwkv plan configs/rwkv7_0_1b.py --topology h100:1x8` calls its best: no real step
is shorter. In place of the step stand a compiled function of the same signature, which returns the donated state, and
a device that is busy for the planned time: it takes steps into a queue, and whoever reads a step's loss waits for its
end. Medians and means over the steps:

    longer     by how much a step of the loop exceeds the plan
    host       the loop's own time, in which it does not wait for the device; most of it passes while that is busy
    processor  of it, what this thread computed: the rest is other programs', on a machine that is not idle
    input      the part in which a batch is read and placed, and how many times the planned rate that is

The model is zeros, for no number matters.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from rwkv_jax.cli.machine import describe_machine
from rwkv_jax.config import (
    CheckpointConfig,
    DataConfig,
    DistributedConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    StepConfig,
    TrainConfig,
)
from rwkv_jax.data.tokens.binidx import BinidxWriter
from rwkv_jax.training import loop
from rwkv_jax.training.batch import batch_loader
from rwkv_jax.training.functions import TrainFunctions, abstract_state
from rwkv_jax.training.state import StepMetrics, TrainState

WARM_STEPS = 20


class MeasuredError(Exception):
    """Ends a run whose steps have all been measured, before it saves what nobody wants."""


class Device:
    """A device that is busy for a given time with each step, and takes steps into a queue."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._busy_until = seconds, 0.0
        self.begins: list[float] = []
        """When the loop asked for each step, in seconds."""
        self.processor: list[float] = []
        """Seconds that the loop's thread had computed by then."""
        self.waited: list[float] = [0.0]
        """How long the loop had waited for the device by then; one more value than there are steps."""

    def submit(self) -> Loss:
        """Takes a step; returns its loss, which is there when the step is over."""
        now = time.perf_counter()
        self.begins.append(now)
        self.processor.append(time.thread_time())
        self.waited.append(self.waited[-1])
        self._busy_until = max(now, self._busy_until) + self._seconds
        return Loss(self, self._busy_until)

    def wait_until(self, moment: float) -> None:
        """Sleeps until a moment."""
        begin = time.perf_counter()
        if moment > begin:
            time.sleep(moment - begin)
            self.waited[-1] += time.perf_counter() - begin


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss that is there at a moment."""

    device: Device
    moment: float

    def __float__(self) -> float:
        self.device.wait_until(self.moment)
        return 1.0


def planned_step(device: Device, num_steps: int) -> Callable[..., Any]:
    """What takes the place of the compiled step: the state goes through a compiled function, and the device is busy."""

    def same(state: TrainState, batch: Any) -> TrainState:
        read = sum(jnp.sum(x[:1, :1]) for x in jax.tree.leaves(batch))  # or its arguments would be dropped
        return state._replace(step=state.step + jnp.minimum(read, 0).astype(jnp.int32) + 1)

    compiled = jax.jit(same, donate_argnums=0)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        if len(device.begins) == num_steps:
            raise MeasuredError
        loss = device.submit()
        return compiled(state, batch), StepMetrics(loss, np.float32(1), np.bool_(True))  # pyright: ignore

    return step


def zeros(trainer: TrainFunctions, seed: int) -> TrainState:
    """A state that costs nothing to draw."""
    del seed
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), abstract_state(trainer))


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The function, with the time of each call appended to a list."""

    def call(*arguments: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        result = function(*arguments, **options)
        seconds.append(time.perf_counter() - begin)
        return result

    return call


def run_loop(config: TrainConfig, seconds: float, num_steps: int) -> tuple[Device, list[float]]:
    """Runs the training loop for some steps that take their planned time; returns also how long each batch took."""
    device, loads = Device(seconds), []

    def jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        if getattr(function, "__name__", "") == "train_step":
            return planned_step(device, num_steps)
        return jax.jit(function, **options)

    with (
        mock.patch.object(loop, "jax", types.SimpleNamespace(**vars(jax) | {"jit": jit})),
        mock.patch.object(loop, "new_state", lambda config, functions: zeros(functions, config.seed)),
        mock.patch.object(loop, "batch_loader", lambda *arguments: timed(batch_loader(*arguments), loads)),
        contextlib.suppress(MeasuredError),
    ):
        loop.train(config)
    return device, loads


def write_tokens(target: Path, num_tokens: int) -> Path:
    """Writes documents of 16384 random tokens; returns the .bin."""
    draws = np.random.default_rng(0)
    with BinidxWriter(target, 65536) as writer:
        while writer.num_tokens < num_tokens:
            writer.write(draws.integers(1, 65530, 2**14 - 1, dtype=np.int64))
            writer.write([0])
            writer.end_document()
    return writer.paths[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--planned-ms", type=float, default=16.6, help="of a step of this batch and length")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=100_000_000)
    arguments = parser.parse_args()
    seconds, first = arguments.planned_ms / 1000, WARM_STEPS
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            run_dir=str(Path(folder) / "run"),
            model=ModelConfig(vocab_size=65536, num_layers=arguments.layers, width=arguments.width),
            data=DataConfig(
                source=str(write_tokens(Path(folder) / "tokens", arguments.tokens)), tokenizer="world", held_out=0.0
            ),
            optimizer=OptimizerConfig(warmup_steps=0),
            training=StepConfig(num_steps=10**6, batch_size=arguments.batch, sequence_length=arguments.length),
            distributed=DistributedConfig(detect=False),
            evaluation=EvaluationConfig(every=10**6, sample_prompts=()),
            checkpoint=CheckpointConfig(every=10**6),
            logging=LoggingConfig(every=10),
        )
        device, loads = run_loop(config, seconds, first + arguments.steps)
    print(describe_machine())
    periods = np.diff(device.begins)[first:]
    own = {
        "longer": periods - seconds,
        "host": periods - np.diff(device.waited[1:])[first:],
        "processor": np.diff(device.processor)[first:],
        "input": np.asarray(loads)[first:],
    }
    print(f"{len(periods)} steps, planned {1e3 * seconds:.1f} ms each")
    for name, times in own.items():
        middle, mean = np.median(times), np.mean(times)
        print(f"{name:9} {1e3 * middle:7.3f} ms, {100 * middle / seconds:6.2f}% of the plan; mean {1e3 * mean:7.3f} ms")
    print(f"a batch is read and placed at {seconds / np.median(own['input']):.1f} times the planned rate")


if __name__ == "__main__":
    main()
