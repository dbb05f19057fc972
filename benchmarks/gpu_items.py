"""Pieces of a measurement within a budget of time: programs are compiled side by side, then run one after another."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Record = dict[str, Any]
"""What was found, or `skipped` or `failed` with a reason; JSON."""

NO_TIME, NOT_COMPILED = "no time was left", "it was not compiled in time"
OUT_OF_TIME = (NO_TIME, NOT_COMPILED)
"""Why an item was skipped that could have been run."""

COMPILING = 2 / 3
"""Share of a part's time after which what is not compiled is given up."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One row of a table."""

    part: str
    name: str
    prepare: Callable[[], Callable[[], Record]]
    """Compiles, in a thread beside others; what it returns is called alone, and measures."""


def skipping(part: str, name: str, reason: str) -> Item:
    """An item that only says why it is none."""
    return Item(part, name, lambda: lambda: {"skipped": reason})


def run_items(items: Sequence[Item], seconds: float, *, threads: int | None = None) -> Iterator[Record]:
    """Runs items in order, and yields a record of each as soon as it is there.

    Nothing that has begun is broken off, so this may take longer by one item. Programs that are still being compiled
    when the first one is timed are counted in the records, since they disturb it.

    Args:
      seconds: for all of them.
      threads: that compile; None is one for each core.
    """
    if seconds <= 0:
        yield from ({"part": item.part, "name": item.name, "skipped": NO_TIME} for item in items)
        return
    deadline = time.monotonic() + seconds
    pool = concurrent.futures.ThreadPoolExecutor(threads or os.cpu_count())
    prepared = [pool.submit(item.prepare) for item in items]
    concurrent.futures.wait(prepared, timeout=COMPILING * seconds)
    pool.shutdown(wait=False, cancel_futures=True)
    for item, future in zip(items, prepared, strict=True):
        record: Record = {"part": item.part, "name": item.name}
        if not future.done() or future.cancelled():
            yield record | {"skipped": NOT_COMPILED}
        elif time.monotonic() > deadline:
            yield record | {"skipped": NO_TIME}
        else:
            beside = sum(not other.done() for other in prepared)
            if beside:
                record["compiled_beside"] = beside
            yield record | _outcome(future)


def _outcome(future: concurrent.futures.Future[Callable[[], Record]]) -> Record:
    try:
        return future.result()()
    except Exception as error:  # whatever a compiler, a device or a peer raises, the others are still measured
        text = str(error).strip().splitlines() or [""]
        return {"failed": f"{type(error).__name__}: {text[0][:200]}"}
