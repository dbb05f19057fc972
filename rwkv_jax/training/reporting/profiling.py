"""Profiler traces of selected steps, for TensorBoard or Perfetto."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax


class StepProfiler:
    """Traces steps `steps[0]` to `steps[1]`, inclusive, into a folder; None traces nothing."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path, report: Callable[[str], None]) -> None:
        self._steps, self._folder, self._report = steps, folder, report
        self._running = False

    def before(self, step: int) -> None:
        """Call before a step is dispatched."""
        if self._steps is not None and step == self._steps[0]:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, result: object) -> None:
        """Call with a step's result."""
        if self._running and self._steps is not None and step >= self._steps[1]:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        self._running = False
        jax.profiler.stop_trace()
        self._report(f"trace of steps {self._steps} written to {self._folder}")

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            self._stop()
