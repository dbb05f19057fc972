"""Command lines: the config of train.py, and the `rwkv` command with one module for each of its commands.

What a command needs of JAX is imported when it runs, so that help and errors of values come at once.
"""

from __future__ import annotations

import os
import sys

import tyro

from rwkv_jax.cli.bench import Bench
from rwkv_jax.cli.chat import Chat
from rwkv_jax.cli.convert import Convert
from rwkv_jax.cli.doctor import Doctor
from rwkv_jax.cli.generate import Generate
from rwkv_jax.cli.plan import Plan, parse_plan
from rwkv_jax.cli.tokenize import Tokenize
from rwkv_jax.cli.train_config import load_config, parse_train_config
from rwkv_jax.config import ConfigError

_COMMANDS = {
    "generate": Generate,
    "chat": Chat,
    "convert": Convert,
    "tokenize": Tokenize,
    "plan": Plan,
    "bench": Bench,
    "doctor": Doctor,
}


def main() -> None:
    """The `rwkv` command."""
    try:
        if sys.argv[1:2] == ["plan"]:  # its defaults are those of the file that it names
            return parse_plan(sys.argv[2:]).run()
        tyro.extras.subcommand_cli_from_dict(_COMMANDS, prog="rwkv", description="RWKV in JAX.").run()
    except BrokenPipeError:  # whoever read has had enough, such as head; nothing is left to be said to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ConfigError, OSError, FloatingPointError) as error:  # a full disk, say, or weights that are not finite
        sys.exit(f"rwkv: {error}")
    except KeyboardInterrupt:
        sys.exit(130)  # what shells make of it


__all__ = ["load_config", "main", "parse_plan", "parse_train_config"]
