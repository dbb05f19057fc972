"""Command lines: the config of train.py, and the `rwkv` command."""

from __future__ import annotations

import dataclasses
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from rwkv_jax.config import ConfigError, TrainConfig


def load_config(path: Path) -> TrainConfig:
    """The TrainConfig that a config file's `config()` returns.

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


def parse_train_config(arguments: Sequence[str]) -> TrainConfig:
    """The config of `train.py [CONFIG_FILE] [--field value ...]`; exits on --help and on fields that do not exist.

    Raises:
      ConfigError: the file, or a value, cannot work.
    """
    arguments = list(arguments)
    default, place = TrainConfig(), "train.py [CONFIG_FILE]"
    if arguments and not arguments[0].startswith("-"):
        place = f"train.py {arguments[0]}"
        default = load_config(Path(arguments.pop(0)))
    return tyro.cli(
        TrainConfig,
        args=arguments,
        default=default,
        prog=place,
        description="Train a language model. Defaults shown are those of CONFIG_FILE, if one is named.",
    )


@dataclasses.dataclass(frozen=True)
class Generate:
    """Sample from a training run."""

    run_dir: tyro.conf.Positional[Path]
    """Folder of the run."""
    prompt: str = ""
    """Text to continue."""
    tokens: int = 256
    """Most tokens to write; the text ends earlier where the model ends it."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_p: float = 0.9
    """Keep the likeliest tokens whose probabilities add up to this."""
    top_k: int = 0
    """Keep this many of the likeliest tokens; 0 keeps all."""
    seed: int = 0
    """Seed of the draws: the same seed writes the same text."""
    checkpoint: Literal["newest", "best"] = "newest"
    """Which of the run's checkpoints to use."""

    def run(self) -> None:
        """Loads the model and writes its text to stdout as it comes."""
        from rwkv_jax.inference.generate import Generator
        from rwkv_jax.inference.sampling import Sampling
        from rwkv_jax.training.checkpoints import load_model

        if self.tokens < 1:
            raise ConfigError(f"tokens = {self.tokens}: must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed = {self.seed}: must fit in 32 bits and not be negative")
        try:
            self.prompt.encode()
        except UnicodeEncodeError as error:  # a command line's stray bytes arrive as lone surrogates
            raise ConfigError(f"prompt = {self.prompt!r}: is not UTF-8") from error
        sampling = Sampling(self.temperature, self.top_p, self.top_k)
        loaded = load_model(self.run_dir, self.checkpoint)
        generator = Generator(loaded.graphdef, loaded.config.model, loaded.tokenizer)
        print(self.prompt, end="", flush=True)
        for text in generator.stream(loaded.params, self.prompt, self.tokens, sampling, self.seed):
            print(text, end="", flush=True)
        print()


def main() -> None:
    """The `rwkv` command."""
    try:
        tyro.extras.subcommand_cli_from_dict({"generate": Generate}, prog="rwkv", description="RWKV in JAX.").run()
    except ConfigError as error:
        sys.exit(f"rwkv: {error}")
