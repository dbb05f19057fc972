"""Reports generation speed."""

from __future__ import annotations

import time
from collections.abc import Callable


class Speed:
    """Counts generated tokens. The first ones, which wait for compilation and prefill, are timed separately."""

    def __init__(self, num_first: int | None, clock: Callable[[], float] = time.perf_counter) -> None:
        """Starts the clock.

        Args:
          num_first: tokens of the first burst; None if all tokens come at once.
          clock: seconds.
        """
        self._num_first, self._clock = num_first, clock
        self._begin = self._end_of_first = self._end = clock()
        self._num_tokens = 0

    def count(self, num_tokens: int) -> None:
        """Counts some more tokens."""
        if not num_tokens:
            return
        self._num_tokens += num_tokens
        self._end = self._clock()
        if self._num_first is not None and self._num_tokens <= self._num_first:
            self._end_of_first = self._end

    def __str__(self) -> str:
        """The report, one line."""
        if self._num_first is None or self._num_tokens <= self._num_first:
            seconds = self._end - self._begin
            return f"{self._num_tokens} tokens in {seconds:.2f} s with the prompt and what had to be compiled"
        rate = (self._num_tokens - self._num_first) / max(self._end - self._end_of_first, 1e-9)
        return (
            f"{self._num_tokens} tokens, {rate:.1f} tokens/s; the first {self._num_first} took "
            f"{self._end_of_first - self._begin:.2f} s with the prompt and what had to be compiled"
        )
