"""On-disk cache of compiled programs, so that only the first start with a model compiles."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rwkv_jax.host import cache_folder, instruction_sets

MIN_COMPILE_SECONDS = 0.5
"""Programs that compile faster are not cached, unless JAX is configured to."""


def default_folder(environment: Mapping[str, str]) -> Path:
    """A folder in `rwkv-jax/programs` in the user's cache folder, one for each kind of processor.

    Different machines may share the user's folders, and JAX's cache entries do not record which CPU instructions they
    need.
    """
    return cache_folder(environment) / "programs" / instruction_sets()


def keep_programs() -> None:
    """Configures JAX's compilation cache in the default folder, unless the user has configured or disabled it.

    A folder that cannot be written is reported on standard error and otherwise ignored.
    """
    if _is_chosen_by_user():
        return

    folder = default_folder(os.environ)
    try:
        is_new = not folder.exists()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        print(
            f"rwkv: {folder}: cannot be written ({error.strerror}), so that each start compiles anew; set "
            "JAX_COMPILATION_CACHE_DIR to a folder that can",
            file=sys.stderr,
        )
        return
    if is_new and sys.stderr.isatty():
        print(
            f"rwkv: the first start with a model compiles it, which takes up to minutes; {folder} keeps what was "
            "compiled for later ones",
            file=sys.stderr,
        )
    _configure(_settings(folder, min(MIN_COMPILE_SECONDS, _setting("jax_persistent_cache_min_compile_time_secs"))))


@contextlib.contextmanager
def programs_kept_in(folder: Path, *, min_seconds: float = 0.0) -> Iterator[None]:
    """Keeps programs in a folder meanwhile, and takes those that are there.

    Args:
      min_seconds: programs that compile faster are not kept.
    """
    settings = _settings(folder, min_seconds) | {"jax_persistent_cache_min_entry_size_bytes": -1}
    before = {name: _setting(name) for name in settings}
    _configure(settings)
    _forget_open_cache()
    try:
        yield
    finally:
        _configure(before)
        _forget_open_cache()


def describe_program_cache() -> str:
    """One line: where compiled programs are cached."""
    if not _setting("jax_enable_compilation_cache"):
        return "compiled programs: not kept, by JAX_ENABLE_COMPILATION_CACHE"
    if _is_chosen_by_user():
        return f"compiled programs: kept in {_setting('jax_compilation_cache_dir')}, by JAX_COMPILATION_CACHE_DIR"
    return f"compiled programs: generate, chat and bench keep them in {default_folder(os.environ)}"


def _is_chosen_by_user() -> bool:
    """Whether the user has configured or disabled JAX's cache."""
    return _setting("jax_compilation_cache_dir") is not None or not _setting("jax_enable_compilation_cache")


def _setting(name: str) -> Any:
    import jax

    return getattr(jax.config, name)


def _settings(folder: Path, min_seconds: float) -> dict[str, Any]:
    """JAX's settings that keep programs in a folder."""
    return {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": min_seconds,
    }


def _configure(settings: Mapping[str, Any]) -> None:
    import jax

    for name, value in settings.items():
        jax.config.update(name, value)


def _forget_open_cache() -> None:
    """Makes JAX open the folder that is configured now, where it has opened another."""
    from jax.experimental.compilation_cache import compilation_cache

    compilation_cache.reset_cache()
