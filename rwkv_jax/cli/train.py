"""`rwkv train`: trains a model or resumes a run."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated

import tyro

from rwkv_jax.config import ConfigError, TrainConfig


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a language model, or resume the run in --run-dir."""

    config_file: tyro.conf.Positional[Path | None] = None
    """Python file with a `config()`; comes first. Its fields can be changed by flags such as --model.width 512."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=TrainConfig)
    restart: bool = False
    """Set all that the run in --run-dir has left aside, in a folder there, and begin it again at its first step."""

    def run(self) -> None:
        """Trains to the end, or until SIGTERM or SIGINT.

        Raises:
          ConfigError: as `train`, and if the loss was not finite or a process was lost.
        """
        from rwkv_jax.parallel.processes import LostProcessError
        from rwkv_jax.training.loop import train
        from rwkv_jax.training.reporting.step_logger import NonFiniteError

        try:
            train(self.config, restart=self.restart, command=command_line())
        except (NonFiniteError, LostProcessError) as error:
            raise ConfigError(str(error)) from error


def command_line() -> str:
    """This process's command line, for resuming; without `--restart`, which would begin again."""
    program, arguments = Path(sys.argv[0]), [text for text in sys.argv[1:] if text != "--restart"]
    return shlex.join([*(["python", sys.argv[0]] if program.suffix == ".py" else [program.name]), *arguments])
