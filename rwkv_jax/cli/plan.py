"""`rwkv plan`: compiles a run's training step for devices that need not be present."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from rwkv_jax.atomic import new_file
from rwkv_jax.cli.plan_serve import PlanServe
from rwkv_jax.cli.train_config import first_config_file, load_config
from rwkv_jax.config import ConfigError, TrainConfig


@dataclasses.dataclass(frozen=True)
class Plan:
    """Compile a run's training step for devices that need not be present: memory, FLOPs, collectives, best speed. With
    --serve, say what a server keeps on its device instead (rwkv plan --serve --help)."""

    config_file: tyro.conf.Positional[Path]
    """Python file with a `config()`; comes first. Its fields can be changed by flags such as --parallel.fsdp 64."""
    topology: str
    """HOSTSxGPUS such as h100:8x8 (also h200, a100-80g), a TPU slice such as v5p:4x4x4 or v5e:16x16 (also v4, v6e), or
    a number of CPU devices such as cpu:8."""
    json: Path | None = None
    """File to write the plan to as JSON; must not exist yet."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=TrainConfig)

    def run(self) -> None:
        """Compiles, which takes seconds to minutes, and prints the plan."""
        from rwkv_jax.plan.devices import parse_topology, prepare_compiler

        topology = parse_topology(self.topology)
        if self.json is not None and os.path.lexists(self.json):
            raise ConfigError(f"json = {str(self.json)!r}: is there already; name another file")
        if self.json is not None and not self.json.parent.is_dir():
            raise ConfigError(f"json = {str(self.json)!r}: there is no folder {str(self.json.parent)!r}; make it first")
        prepare_compiler(topology)

        from rwkv_jax.plan.report import describe, to_json
        from rwkv_jax.plan.run import plan_run

        plan = plan_run(self.config, topology)
        print(describe(plan))
        if self.json is not None:
            write_json(to_json(plan), self.json)


def write_json(values: Mapping[str, Any], path: Path) -> None:
    """Writes plain data to a file atomically.

    Raises:
      ConfigError: the file exists.
    """
    with new_file(path, label=f"json = {str(path)!r}") as file:
        file.write((json.dumps(values, indent=2) + "\n").encode())


def parse_plan(arguments: Sequence[str]) -> Plan | PlanServe:
    """The command `rwkv plan CONFIG_FILE --topology NAME [--field value ...]`, or one with --serve (`PlanServe`).

    Exits as `parse_train_config` does.

    Raises:
      ConfigError: no config file comes first, or the file or a value is invalid.
    """
    if "--serve" in arguments:
        others = [argument for argument in arguments if argument != "--serve"]
        return tyro.cli(PlanServe, args=others, prog="rwkv plan --serve")
    path = first_config_file("plan", arguments, "rwkv plan CONFIG_FILE --topology NAME [--field value ...]")
    if path is None:
        return tyro.cli(Plan, args=arguments, default=Plan(tyro.MISSING, tyro.MISSING), prog="rwkv plan")
    default = Plan(path, tyro.MISSING, config=load_config(path))
    return tyro.cli(Plan, args=arguments, default=default, prog=f"rwkv plan {path}")
