"""Throughput of a run: tokens per second and time left."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator


class Throughput:
    """Measures the time of steps, excluding compilation, evaluation and saving.

    The time per step is a debiased exponential mean (weight `1 - decay` on the newest step) that excludes the first
    `skip_steps` steps, which compile and fill caches. `clock` returns seconds. Each quantity is None until a step has
    been measured.
    """

    def __init__(
        self,
        tokens_per_step: int,
        *,
        clock: Callable[[], float] = time.perf_counter,
        decay: float = 0.95,
        skip_steps: int = 2,
    ) -> None:
        self._tokens_per_step = tokens_per_step
        self._clock = clock
        self._decay = decay
        self._steps_to_skip = skip_steps
        self._mean = 0.0
        self._weight = 0.0
        self._started = clock()
        self._paused = 0.0
        self._pause_depth = 0

    def step(self) -> None:
        """Call at the end of each step."""
        now = self._clock()
        seconds = now - self._started - self._paused
        self._started, self._paused = now, 0.0
        if self._steps_to_skip > 0:
            self._steps_to_skip -= 1
            return
        self._mean = self._decay * self._mean + (1 - self._decay) * seconds
        self._weight = self._decay * self._weight + (1 - self._decay)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time inside from the current step; may be nested.

        Wait for the device before entering, or the rest of a step that is still running counts as pause.
        """
        began = self._clock()
        self._pause_depth += 1
        try:
            yield
        finally:
            self._pause_depth -= 1
            if self._pause_depth == 0:
                self._paused += self._clock() - began

    @property
    def seconds_per_step(self) -> float | None:
        """Current seconds per step."""
        return self._mean / self._weight if self._weight > 0 else None

    @property
    def tokens_per_second(self) -> float | None:
        """Current training tokens per second."""
        seconds = self.seconds_per_step
        return self._tokens_per_step / seconds if seconds is not None and seconds > 0 else None

    def time_left(self, steps: int) -> float | None:
        """Seconds that `steps` more steps will take, without evaluation and saving."""
        seconds = self.seconds_per_step
        return None if seconds is None else seconds * max(steps, 0)
