"""Tokens of the request that is being answered, for its line in the access log."""

from __future__ import annotations

import contextvars

_COUNTS: contextvars.ContextVar[dict[str, int] | None] = contextvars.ContextVar("token_counts", default=None)


def begin_counting() -> dict[str, int]:
    """Counts by name, which all tasks and threads that this one starts from here on add to."""
    counts: dict[str, int] = {}
    _COUNTS.set(counts)
    return counts


def count_tokens(name: str, count: int) -> None:
    """Adds to a count of this request, if one is being answered."""
    if (counts := _COUNTS.get()) is not None:
        counts[name] = counts.get(name, 0) + count
