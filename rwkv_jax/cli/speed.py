"""Reports generation speed."""

from __future__ import annotations

import time
from collections.abc import Callable


class Speed:
    """Counts generated tokens. The first one, which waits for compilation and prefill, is timed separately."""

    def __init__(self, *, is_streamed: bool = True, clock: Callable[[], float] = time.perf_counter) -> None:
        """Starts the clock.

        Args:
          is_streamed: whether tokens are counted as they come; False if all come at once.
          clock: seconds.
        """
        self._is_streamed, self._clock = is_streamed, clock
        self._begin = self._end_of_first = self._end = clock()
        self._num_tokens = 0

    def count(self, num_tokens: int) -> None:
        """Counts some more tokens."""
        if not num_tokens:
            return
        self._end = self._clock()
        if not self._num_tokens:
            self._end_of_first = self._end
        self._num_tokens += num_tokens

    def __str__(self) -> str:
        """The report, one line."""
        if not self._is_streamed or self._num_tokens <= 1:
            seconds = self._end - self._begin
            return f"{self._num_tokens} tokens in {seconds:.2f} s with the prompt and what had to be compiled"
        rate = (self._num_tokens - 1) / max(self._end - self._end_of_first, 1e-9)
        return (
            f"{self._num_tokens} tokens, {rate:.1f} tokens/s; the first took {self._end_of_first - self._begin:.2f} s "
            "with the prompt and what had to be compiled"
        )
