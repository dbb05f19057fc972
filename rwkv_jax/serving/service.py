"""What all routes share."""

from __future__ import annotations

import dataclasses
import time
from typing import Annotated

from anyio import CapacityLimiter
from fastapi import Depends, Request

from rwkv_jax.chat.formats import G1
from rwkv_jax.chat.template import ChatTemplate
from rwkv_jax.inference.engine.engine import Engine
from rwkv_jax.serving.drain import Running
from rwkv_jax.serving.errors import APIError
from rwkv_jax.serving.metrics import Metrics
from rwkv_jax.serving.options import ServeOptions
from rwkv_jax.serving.states.opening import States, states_in_memory


@dataclasses.dataclass
class Service:
    """A model that is served."""

    engine: Engine
    """Generates the texts."""
    model_name: str
    """Name by which requests ask for the model."""
    options: ServeOptions = dataclasses.field(default_factory=ServeOptions)
    """As the server was started."""
    template: ChatTemplate = G1
    """Writes conversations as the model was trained to read them."""
    states: States = dataclasses.field(default_factory=states_in_memory)
    """States and sessions of its clients; the store remains the caller's to close."""
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    """Unix time at which the model was loaded."""
    metrics: Metrics = dataclasses.field(default_factory=Metrics)
    """What /metrics reports."""
    running: Running = dataclasses.field(default_factory=Running)
    """Requests that are being answered."""
    is_warm: bool = True
    """Whether all programs are compiled; until then /health says that the server is not ready."""
    lasting_adapters: frozenset[str] = dataclasses.field(init=False)
    """Names of the adapters that the server was started with, which no client removes."""
    embedding_turns: CapacityLimiter = dataclasses.field(default_factory=lambda: CapacityLimiter(1))
    """Requests that may embed at once: one."""

    def __post_init__(self) -> None:
        self.metrics.watch(self.engine.stats)
        self.lasting_adapters = frozenset(self.engine.adapters.names)

    @property
    def models(self) -> tuple[str, ...]:
        """What requests can ask for: the model, and its adapters by their names."""
        return (self.model_name, *self.engine.adapters.names)

    def check_model(self, name: str) -> str | None:
        """The adapter that a request asks for, by its name or MODEL:NAME; None for the model itself.

        Raises APIError, status 404, for a name that is neither's.
        """
        if name == self.model_name:
            return None
        adapter = name.removeprefix(f"{self.model_name}:")
        if adapter in self.engine.adapters.names:
            return adapter
        there_is = f"only {self.model_name!r}" if len(self.models) == 1 else ", ".join(map(repr, self.models))
        raise APIError(404, f"model = {name!r}: there is {there_is} here", param="model", code="model_not_found")


def from_request(request: Request) -> Service:
    """The service of the app that answers a request."""
    return request.app.state.service


ServiceOf = Annotated[Service, Depends(from_request)]
"""Type of a route's parameter that gets the service."""


def tenant_of(request: Request) -> str:
    """The tenant that a request belongs to: that of its API key; "" without keys."""
    return request.scope.get("state", {}).get("tenant", "")


TenantOf = Annotated[str, Depends(tenant_of)]
"""Type of a route's parameter that gets the request's tenant."""
