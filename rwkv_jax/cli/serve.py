"""`rwkv serve`: an HTTP server with OpenAI's API."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from rwkv_jax.checks import ConfigError, require_whole
from rwkv_jax.cli.flags import TunedFlags, WeightsFlags
from rwkv_jax.serving.keys import read_keys
from rwkv_jax.serving.options import ServeOptions

if TYPE_CHECKING:
    from rwkv_jax.serving.service import Service


@dataclasses.dataclass(frozen=True)
class Serve:
    """Serve a model over HTTP with OpenAI's API, on this machine unless --host says otherwise (docs/serving.md)."""

    weights: Annotated[WeightsFlags, tyro.conf.arg(name="")]
    tuned: Annotated[TunedFlags, tyro.conf.arg(name="")] = dataclasses.field(default_factory=TunedFlags)
    options: Annotated[ServeOptions, tyro.conf.arg(name="")] = dataclasses.field(default_factory=ServeOptions)
    template: str | None = None
    """Chat template the model was trained with: g1, world, raven, pile-qa or a file of a Jinja template; None takes the
    one beside the weights, or chooses by their name and tokenizer."""
    slots: int = 16
    """Texts generated at once; others are queued."""
    max_queue: int = 1024
    """Texts that may wait for a slot; further requests are answered with status 429."""
    prefix_bytes: int = 256 * 2**20
    """Size of the cache of prompts' states, which tenants share; 0 keeps none."""
    adapter_places: int = 0
    """Adapters that may be loaded at once; 0 is as many as --adapter names."""
    adapter_rank: int = 0
    """Largest rank of an adapter; 0 is that of those of --adapter."""
    tune: Literal["auto", "never"] = "auto"
    """auto takes what is fastest by measurement on this device, measured now if need be; never, the tables' choices."""

    def run(self) -> None:
        """Loads the model and serves it until SIGINT or SIGTERM."""
        with self.opened() as service:
            from rwkv_jax.serving.server import run_server

            run_server(service)

    @contextlib.contextmanager
    def opened(self) -> Iterator[Service]:
        """What is served: a model and its clients' states. The states are let go with the block."""
        require_whole("slots", self.slots, 1)
        require_whole("max_queue", self.max_queue, 1)
        require_whole("prefix_bytes", self.prefix_bytes, 0)
        if self.options.api_keys is not None:
            keys, _ = read_keys(self.options.api_keys)  # a mistake is told before weights are loaded
            if unknown := sorted(set(self.options.adapter_admins) - keys.tenants):
                raise ConfigError(f"adapter_admins: {', '.join(unknown)} has no key in {self.options.api_keys}")
        if self.options.adapter_folder is not None and self.adapter_places <= len(self.tuned.adapter):
            raise ConfigError(
                f"adapter_places = {self.adapter_places}: leaves no place for adapters of --adapter-folder; give more "
                f"than the {len(self.tuned.adapter)} of --adapter, and --adapter-rank"
            )
        if self.adapter_places > 0 and not self.adapter_rank and not self.tuned.adapter:
            raise ConfigError(
                "adapter_rank = 0: no --adapter is given whose rank it could be; give --adapter-rank, the largest one"
            )
        try:
            from rwkv_jax.serving.service import Service
            from rwkv_jax.serving.states.opening import open_states
        except ModuleNotFoundError as error:
            raise ConfigError(f'serve: needs the package {error.name}: pip install "rwkv-jax[serve]"') from error

        from rwkv_jax.inference.engine.engine import Engine, EngineOptions

        engine_options = EngineOptions(
            num_slots=self.slots,
            max_queue=self.max_queue,
            prefix_bytes=self.prefix_bytes,
            adapter_places=self.adapter_places,
            adapter_rank=self.adapter_rank,
            tune=self.tune,
        )
        name = self.options.model_name or Path(self.weights.source).resolve().stem
        tuned = self.tuned.arguments(self.weights, is_server=True)
        adapters = self.tuned.adapters()  # before the weights: mistakes are told at once
        if name in adapters:
            raise ConfigError(f"adapter = {name!r}: is the model's name; give another, NAME=PATH, or --model-name")
        model, tokenizer, template = self.weights.load_with_template(self.template)
        adapters = self.tuned.checked(adapters, model, self.weights)
        with Engine(model, tokenizer, engine_options, adapters=adapters, **tuned) as engine:
            del model  # the engine has copied each layer; the stacked arrays can be freed
            states = open_states(self.options, name)
            with contextlib.closing(states.store):
                yield Service(engine, name, self.options, template=template, states=states)
