"""Opens the store that a server is told to keep states in."""

from __future__ import annotations

import dataclasses
import os
import re
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwkv_jax.checks import ConfigError
from rwkv_jax.serving.options import ServeOptions
from rwkv_jax.serving.states.redis import RedisStateStore
from rwkv_jax.serving.states.sqlite import SqliteStateStore
from rwkv_jax.serving.states.store import StateStore

IN_MEMORY = ":memory:"
"""Keeps states until the server ends."""

_SECONDS_PER_DAY = 86_400.0
_URLS = ("redis://", "rediss://", "unix://")


@dataclasses.dataclass(frozen=True)
class States:
    """What a server knows of its clients' states."""

    store: StateStore
    """Has them."""
    busy: weakref.WeakValueDictionary[tuple[str, str | None], Any] = dataclasses.field(
        default_factory=weakref.WeakValueDictionary
    )
    """Turns that are being answered, by tenant and session. Used by the event loop only."""


def open_states(options: ServeOptions, model_name: str) -> States:
    """Opens the store of a server's options. Raises ConfigError, as the stores do."""
    bounds = {"max_bytes": options.state_bytes, "max_idle_seconds": options.state_idle_days * _SECONDS_PER_DAY}
    location = options.state_store
    if location is not None and location.startswith(_URLS):
        return States(RedisStateStore(location, **bounds))
    if location is not None and "://" in location:
        scheme = location.partition("://")[0]  # not more of it, which may have a password
        raise ConfigError(f"state_store: {scheme!r} is not one of {', '.join(_URLS)}; a file has no such beginning")
    return States(SqliteStateStore(default_path(model_name, os.environ) if location is None else location, **bounds))


def is_shared(options: ServeOptions) -> bool:
    """Whether servers on several machines can have the same states."""
    return options.state_store is not None and options.state_store.startswith(_URLS[:2])


def states_in_memory() -> States:
    """Of a server that is given no store."""
    return open_states(ServeOptions(state_store=IN_MEMORY), "")


def default_path(model_name: str, environment: Mapping[str, str]) -> Path:
    """Where the states of a model are kept if nothing else is said: a file in the user's folder for states."""
    base = environment.get("XDG_STATE_HOME", "")
    folder = Path(base) if Path(base).is_absolute() else Path("~/.local/state")
    return folder.expanduser() / "rwkv-jax" / f"{re.sub(r'[^A-Za-z0-9._-]', '_', model_name)}.sqlite"
