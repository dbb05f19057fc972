"""Selects the `rwkv` command and runs it."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

import tyro

import rwkv_jax
from rwkv_jax.cli.bench import Bench
from rwkv_jax.cli.chat import Chat
from rwkv_jax.cli.convert import Convert
from rwkv_jax.cli.data import Data
from rwkv_jax.cli.doctor import Doctor
from rwkv_jax.cli.evaluate import Evaluate
from rwkv_jax.cli.generate import Generate
from rwkv_jax.cli.info import Info
from rwkv_jax.cli.inspect import Inspect
from rwkv_jax.cli.merge import Merge
from rwkv_jax.cli.plan import Plan, parse_plan
from rwkv_jax.cli.probe import ProbeCommand
from rwkv_jax.cli.program_cache import keep_programs
from rwkv_jax.cli.push import PushCommand
from rwkv_jax.cli.serve import Serve
from rwkv_jax.cli.tokenize import Tokenize
from rwkv_jax.cli.train import Train
from rwkv_jax.cli.train_config import parse_train_config
from rwkv_jax.cli.tune import Tune, parse_tune

COMMANDS = {
    "train": Train,
    "generate": Generate,
    "chat": Chat,
    "serve": Serve,
    "evaluate": Evaluate,
    "probe": ProbeCommand,
    "inspect": Inspect,
    "convert": Convert,
    "merge": Merge,
    "info": Info,
    "push": PushCommand,
    "tokenize": Tokenize,
    "data": Data,
    "plan": Plan,
    "tune": Tune,
    "bench": Bench,
    "doctor": Doctor,
}
"""The class of each command, with its flags and `run()`."""

_DESCRIPTION = """\
Train RWKV language models, generate text and chat with them, serve, evaluate, convert and measure them.
`rwkv COMMAND --help` has a command's flags, `rwkv --version` says which version this is."""


def run(arguments: Sequence[str], program: str = "rwkv") -> None:
    """Runs `rwkv ARGUMENTS`; exits on --help and on unknown flags, and raises what the command raises.

    Args:
      program: rwkv, or the script of a single command.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may generate characters that the terminal's encoding lacks
    if list(arguments) == ["--version"]:
        print(f"rwkv-jax {rwkv_jax.__version__}")
    elif arguments[:1] == ["train"]:  # the config file has the defaults of these three
        name = "rwkv train" if program == "rwkv" else program
        Train(config=parse_train_config(arguments[1:], name)).run()
    elif arguments[:1] == ["plan"]:
        parse_plan(arguments[1:]).run()
    elif arguments[:1] == ["tune"]:
        parse_tune(arguments[1:]).run()
    else:
        command = tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="rwkv", description=_DESCRIPTION, args=list(arguments)
        )
        if isinstance(command, Generate | Chat | Serve | Evaluate | ProbeCommand | Inspect | Bench):
            keep_programs()
        command.run()
