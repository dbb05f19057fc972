"""`rwkv tune`: measures which implementation of a run's WKV operator is the fastest on this device."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from rwkv_jax.checks import require_whole
from rwkv_jax.cli.machine import find_devices
from rwkv_jax.cli.train_config import first_config_file, load_config
from rwkv_jax.config import ConfigError, TrainConfig

if TYPE_CHECKING:
    from rwkv_jax.parallel.mesh import MeshShape


@dataclasses.dataclass(frozen=True)
class Tune:
    """Check every implementation of a run's WKV operator against its definition, time them on its sizes, keep that."""

    config_file: tyro.conf.Positional[Path]
    """Python file with a `config()`; comes first. Its fields can be changed by flags such as --parallel.tensor 2."""
    devices: int | None = None
    """Devices that the run will have, which split its rows, heads and tokens; None takes those that are here."""
    prefill: bool = False
    """Measure the prefill of a prompt, for generate, chat and bench on a GPU or TPU, rather than a training step."""
    again: bool = False
    """Try also what did not come back from an earlier trial, which took its process with it or had to be killed."""
    cache: Path | None = None
    """File to keep the result in; None is the one that RWKV_JAX_TUNING names, or tuning.json in the user's caches."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=TrainConfig)

    def run(self) -> None:
        """Measures, prints a line per implementation and keeps the result; exits with 1 if none is right.

        Raises:
          ConfigError: a model without an operator, no device, devices that cannot be used or split time, or a cache
            that is not one of ours.
        """
        if self.devices is not None:
            require_whole("devices", self.devices, 1)
        find_devices()
        from rwkv_jax import autotune
        from rwkv_jax.training.operator_choice import run_workload

        if self.prefill:
            if self.devices is not None:
                raise ConfigError(f"--devices {self.devices}: prefill is measured on one device; leave it out")
            workload = autotune.prefill_workload(self.config.model)
        else:
            shape = self._mesh_shape()
            if shape.sequence > 1:
                raise ConfigError(
                    f"parallel.sequence = {shape.sequence}: nothing is measured for a mesh that splits time, where the "
                    "operator runs twice, on other inputs; runs go by the table there"
                )
            workload = run_workload(self.config, shape)
        if workload is None:
            raise ConfigError(f"model.architecture = {self.config.model.architecture!r}: has no operator to tune")
        path = self.cache or autotune.default_path()
        autotune.find(path, workload)  # or a file that is not ours would be refused only after minutes
        tuning = autotune.measure(workload, path, again=self.again)
        print(tuning, flush=True)
        if not tuning.is_lasting:
            sys.exit("rwkv: not kept, since memory was out or the device failed; try again when nothing else uses it")
        autotune.keep(path, tuning)
        users = "engines take it" if self.prefill else "new runs take it, elsewhere with --training.tune always"
        is_read = path.absolute() == autotune.default_path().absolute()
        where = "" if is_read else f" with {autotune.VARIABLE}={path.absolute()}"
        print(f"kept in {path}; on a GPU or TPU{where} {users}")
        if tuning.chosen is None:
            sys.exit("rwkv: none is right on this device; see rwkv doctor, and report it with what is above")

    def _mesh_shape(self) -> MeshShape:
        import jax

        from rwkv_jax.parallel.mesh import MeshShape, choose_shape, device_memory, make_mesh, mesh_shape

        memory, training = device_memory(jax.local_devices()[0]), self.config.training
        if self.devices is None:
            mesh = make_mesh(self.config, jax.devices(), memory)
            return MeshShape() if mesh is None else mesh_shape(mesh)
        return choose_shape(
            self.config.parallel,
            self.devices,
            num_parameters=self.config.model.num_parameters(),
            rows=training.batch_size // training.accumulation_steps,
            device_memory=memory,
        )


def parse_tune(arguments: Sequence[str]) -> Tune:
    """The command `rwkv tune CONFIG_FILE [--field value ...]`; exits as `parse_train_config` does.

    Raises:
      ConfigError: no config file comes first, or the file or a value is invalid.
    """
    path = first_config_file("tune", arguments, "rwkv tune CONFIG_FILE [--field value ...]")
    if path is None:
        return tyro.cli(Tune, args=arguments, default=Tune(tyro.MISSING), prog="rwkv tune")
    return tyro.cli(Tune, args=arguments, default=Tune(path, config=load_config(path)), prog=f"rwkv tune {path}")
