"""`rwkv plan SOURCE --serve`: what a server of a model keeps on its device."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from rwkv_jax.checks import ConfigError, is_number, require_whole
from rwkv_jax.cli.flags import PinFlags, Pinned
from rwkv_jax.cli.train_config import load_config

if TYPE_CHECKING:
    from rwkv_jax.config import ModelConfig
    from rwkv_jax.plan.serving import Format

Kind = Literal["config", "run", "weights"]


@dataclasses.dataclass(frozen=True)
class PlanServe:
    """Say what `rwkv serve` keeps on its device: bytes of weights in each format, of slots and of states."""

    source: tyro.conf.Positional[str]
    """What is to be served, or a config file of a model that is not there yet."""
    slots: int = 16
    """As in rwkv serve."""
    prefix_bytes: int = 256 * 2**20
    """As in rwkv serve."""
    memory: float | None = None
    """GiB of a device, to say how many slots it holds at most."""
    pinned: Pinned = dataclasses.field(default_factory=PinFlags)

    def run(self) -> None:
        """Prints the plan; loads no weights."""
        require_whole("slots", self.slots, 1)
        require_whole("prefix_bytes", self.prefix_bytes, 0)
        if self.memory is not None and not (is_number(self.memory) and 0 < self.memory < 2**20):
            raise ConfigError(f"memory = {self.memory}: must be a number of GiB")

        from rwkv_jax.plan.serving import describe_server

        formats = formats_of(*model_of(self.source, self.pinned))
        sizes = {"num_slots": self.slots, "prefix_bytes": self.prefix_bytes}
        print(describe_server(formats, **sizes, memory=self.memory))


def model_of(source: str, pinned: PinFlags) -> tuple[ModelConfig, Kind]:
    """The model of a config file, a run or weights, whose headers alone are read; and which of these it is.

    Raises:
      ConfigError: as `load_config`, `find_weights` and `read_config`.
    """
    if source.endswith(".py"):
        return load_config(Path(source)).model, "config"

    from rwkv_jax.config import from_dict
    from rwkv_jax.run_folder import read_run_file
    from rwkv_jax.weights.sources import open_weights, prefix_errors

    place = pinned.find(source)
    if place.is_dir():
        return from_dict(read_run_file(place)["config"]).model, "run"
    weights = open_weights(place)
    with prefix_errors(place):
        return weights.model_config(), "weights"


def formats_of(config: ModelConfig, kind: Kind) -> dict[str, Format]:
    """Formats in which `rwkv serve` can have a model: as a run that has trained it, or by its flags."""
    from rwkv_jax.plan.serving import Format
    from rwkv_jax.weights.quantized import QUANTIZATIONS, packed_bytes

    count = config.num_parameters()
    exact, coarse = (dataclasses.replace(config, dtype=dtype) for dtype in ("float32", "bfloat16"))
    formats: dict[str, Format] = {}
    if kind != "weights":
        formats["as trained"] = Format((8 if config.dtype == "float64" else 4) * count, config)
    if kind != "run":  # which has its own dtype
        formats["--dtype float32"] = Format(4 * count, exact)
        formats["--dtype bfloat16"] = Format(2 * count, coarse)
    if config.spec.has_official_names:
        formats |= {f"--quantize {name}": Format(packed_bytes(exact, name), exact) for name in QUANTIZATIONS}
    return formats
