"""Command lines: the config of train.py, and the `rwkv` command with one module for each of its commands.

What a command needs of JAX is imported when it runs, so that help and errors of values come at once.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from rwkv_jax.config import ConfigError

if TYPE_CHECKING:
    from rwkv_jax.cli.plan import parse_plan
    from rwkv_jax.cli.train_config import load_config, parse_train_config

__all__ = ["load_config", "main", "parse_plan", "parse_train_config"]

_MODULES = {"load_config": "train_config", "parse_plan": "plan", "parse_train_config": "train_config"}


def __getattr__(name: str) -> Any:
    # Imported when they are asked for, so that whoever interrupts `rwkv` while it starts sees no traceback.
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main() -> None:
    """The `rwkv` command."""
    arguments = sys.argv[1:]
    try:
        from rwkv_jax.cli.command import run

        run(arguments)
    except BrokenPipeError:  # whoever read has had enough, such as head; nothing is left to be said to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ConfigError, OSError, FloatingPointError) as error:  # a full disk, say, or weights that are not finite
        from rwkv_jax.cli.messages import with_flags

        sys.exit(f"rwkv: {with_flags(str(error), arguments)}")
    except (RuntimeError, MemoryError) as error:
        from rwkv_jax.cli.messages import out_of_memory

        if (message := out_of_memory(error)) is None:
            raise
        sys.exit(f"rwkv: {message}")
    except KeyboardInterrupt:
        sys.exit(130)  # what shells make of it
