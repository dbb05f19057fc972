"""The `rwkv` command, with one module for each of its commands.

Commands import JAX only when they run, so that help and argument errors are instant.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rwkv_jax.config import ConfigError
from rwkv_jax.host import restart_with_huge_pages
from rwkv_jax.lazy import lazy_names

if TYPE_CHECKING:
    from rwkv_jax.cli.plan import parse_plan
    from rwkv_jax.cli.train_config import load_config, parse_train_config

__all__ = ["load_config", "main", "parse_plan", "parse_train_config", "run_as_process"]

__getattr__, __dir__ = lazy_names(
    __name__, {"plan": ("parse_plan",), "train_config": ("load_config", "parse_train_config")}
)


def run_as_process(program: str | None = None) -> None:
    """`main` for a process that does nothing else: one that trains may begin anew with another allocator setting.

    Args:
      program: as Python's command line has it; None is the script that runs, `rwkv`.
    """
    if sys.argv[1:2] == ["train"]:
        restart_with_huge_pages(sys.argv[0] if program is None else program)
    main()


def main(arguments: Sequence[str] | None = None, *, program: str = "rwkv") -> None:
    """The `rwkv` command.

    Args:
      arguments: None takes sys.argv.
      program: name that starts the messages.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        from rwkv_jax.cli.command import run

        run(arguments, program)
    except BrokenPipeError:  # the reader, such as head, has closed the pipe: end quietly
        _discard_output()
        sys.exit(1)
    except (ConfigError, OSError, FloatingPointError) as error:  # a full disk, say, or weights that are not finite
        from rwkv_jax.cli.messages import with_flags

        # A run is described by fields, in its config file and in its flags.
        sys.exit(f"{program}: {error if arguments[:1] == ['train'] else with_flags(str(error), arguments)}")
    except (RuntimeError, MemoryError) as error:
        from rwkv_jax.cli.messages import out_of_memory

        if arguments[:1] == ["train"] or (message := out_of_memory(error)) is None:
            raise
        sys.exit(f"{program}: {message}")
    except KeyboardInterrupt:
        sys.exit(130)  # what shells make of it
    finally:
        try:
            sys.stdout.flush()  # or Python does, after all that could deal with a reader that has gone
        except BrokenPipeError:
            _discard_output()


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
