"""Builds a run's config from a file and flags, for `rwkv train`, `rwkv plan` and `rwkv tune`."""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from pathlib import Path

import tyro

from rwkv_jax.cli.rwkv_lm import refuse_official_flags
from rwkv_jax.config import ConfigError, TrainConfig


def load_config(path: Path) -> TrainConfig:
    """Loads the TrainConfig that a config file's `config()` returns.

    Raises:
      ConfigError: there is no such file, or it has no `config()` that returns a TrainConfig.
    """
    if not path.is_file():
        raise ConfigError(f"{str(path)!r}: no such config file; configs/ holds those that come with the project")
    function = runpy.run_path(str(path)).get("config")
    config = function() if callable(function) else None
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"{str(path)!r}: must define config() -> TrainConfig")
    return config


def first_config_file(command: str, arguments: Sequence[str], usage: str) -> Path | None:
    """The config file of a command that needs one; None if help is asked for.

    Raises:
      ConfigError: something else comes first.
    """
    first = arguments[0] if arguments else ""
    if first in ("-h", "--help"):
        return None
    if not first or first.startswith("-"):  # a config file after flags would be ignored
        raise ConfigError(
            f"{command}: {first!r} stands where the config file does; name that first, since flags change what it "
            f"says: {usage}"
        )
    return Path(first)


def parse_train_config(arguments: Sequence[str], program: str = "rwkv train") -> TrainConfig:
    """Parses `rwkv train [CONFIG_FILE] [--field value ...]`; exits on --help and on unknown fields.

    Args:
      program: name shown in the help.

    Raises:
      ConfigError: the file or a value is invalid.
    """
    arguments = list(arguments)
    refuse_official_flags(arguments)
    default, place = TrainConfig(), f"{program} [CONFIG_FILE]"
    if arguments and not arguments[0].startswith("-"):
        place = f"{program} {arguments[0]}"
        default = load_config(Path(arguments.pop(0)))
    return tyro.cli(
        type(default),
        args=arguments,
        default=default,
        prog=place,
        description="Train a language model. Defaults shown are those of CONFIG_FILE, if one is named.",
    )
