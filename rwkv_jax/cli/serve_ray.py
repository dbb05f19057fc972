"""`rwkv serve` for a config file of Ray Serve (deploy/kuberay.yaml): `import_path: rwkv_jax.cli.serve_ray:build`."""

from __future__ import annotations

import shlex
from typing import Any

import tyro

from rwkv_jax.checks import ConfigError
from rwkv_jax.cli.program_cache import keep_programs
from rwkv_jax.cli.serve import Serve
from rwkv_jax.serving.ray_app import ray_application


def build(args: dict[str, str]) -> Any:
    """The application that the file's `args` describe.

    Args:
      args: `flags` is what follows `rwkv serve` on a command line. Ray's proxy has the address: --host and --port, and
        --ssl-certfile, have no effect.

    Raises:
      ConfigError: other names, flags that `rwkv serve` does not take, or as `ray_application`.
    """
    if args.keys() != {"flags"}:
        raise ConfigError(f"args = {args}: must have flags, those of `rwkv serve`, and nothing else")
    command = parse(args["flags"])

    def open_service() -> Any:
        keep_programs()
        return command.opened()

    return ray_application(open_service, command.options)


def parse(flags: str) -> Serve:
    """What `rwkv serve FLAGS` would run. Raises ConfigError."""
    try:
        return tyro.cli(Serve, prog="rwkv serve", args=shlex.split(flags))
    except SystemExit as error:  # it has printed why
        raise ConfigError(f"flags = {flags!r}: `rwkv serve` does not take them") from error
