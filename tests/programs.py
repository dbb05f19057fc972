"""What this process compiles: counted, compiled quickly, and kept on disk."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from jax.experimental.compilation_cache import compilation_cache

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


@contextlib.contextmanager
def kept_on_disk(folder: Path) -> Iterator[None]:
    """Keeps all programs in a folder, and takes those that are there: compiling them again would take seconds."""
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
