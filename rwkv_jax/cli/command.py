"""Which command of `rwkv` is meant, and what holds for all of them."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

import tyro

import rwkv_jax
from rwkv_jax.cli.bench import Bench
from rwkv_jax.cli.chat import Chat
from rwkv_jax.cli.convert import Convert
from rwkv_jax.cli.doctor import Doctor
from rwkv_jax.cli.generate import Generate
from rwkv_jax.cli.plan import Plan, parse_plan
from rwkv_jax.cli.program_cache import keep_programs
from rwkv_jax.cli.tokenize import Tokenize

COMMANDS = {
    "generate": Generate,
    "chat": Chat,
    "convert": Convert,
    "tokenize": Tokenize,
    "plan": Plan,
    "bench": Bench,
    "doctor": Doctor,
}
"""A class for each, with its flags and `run()`."""

_DESCRIPTION = """\
Write text and converse with RWKV language models, convert and measure them, and prepare their training, which train.py
does. `rwkv COMMAND --help` has a command's flags, `rwkv --version` says which version this is."""


def run(arguments: Sequence[str]) -> None:
    """Runs `rwkv ARGUMENTS`; exits on --help and on flags that do not exist, and raises what a command raises."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write what the terminal's encoding does not have
    if list(arguments) == ["--version"]:
        print(f"rwkv-jax {rwkv_jax.__version__}")
    elif arguments[:1] == ["plan"]:  # its defaults are those of the file that it names
        parse_plan(arguments[1:]).run()
    else:
        command = tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="rwkv", description=_DESCRIPTION, args=list(arguments)
        )
        if isinstance(command, Generate | Chat | Bench):
            keep_programs()
        command.run()
