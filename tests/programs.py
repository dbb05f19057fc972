"""What this process compiles: counted, and compiled quickly."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax

from tests.golden import QUICK


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Names of the programs that are compiled meanwhile, such as `jit(step)`."""
    names: list[str] = []

    def listen(event: str, duration_secs: float, **details: Any) -> None:
        del duration_secs
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(details.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def compiled_quickly() -> contextlib.AbstractContextManager[object]:
    """Compiles meanwhile what calls `jax.jit` in a third of the time that users' programs take; see `QUICK`."""
    return mock.patch.object(jax, "jit", functools.partial(jax.jit, compiler_options=QUICK))
