"""The server on Ray Serve: replicas behind Ray's proxy, any of which continues any conversation (extra `ray`).

Each replica has a model and an engine of its own. What they share is Redis: a conversation is one small state there,
read before a turn and replaced after it. How many replicas there are, on what, and where Ray listens, is said to Ray.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rwkv_jax.checks import ConfigError
from rwkv_jax.serving.options import ServeOptions
from rwkv_jax.serving.states.opening import is_shared

if TYPE_CHECKING:
    from rwkv_jax.serving.service import Service

NAME = "rwkv"
"""Of the deployment, in a config file of Ray Serve."""

_MAX_ONGOING_REQUESTS = 256  # of a replica, whose engine queues them; beyond, Ray's proxy does


def ray_application(
    open_service: Callable[[], contextlib.AbstractContextManager[Service]],
    options: ServeOptions,
    **deployment: Any,
) -> Any:
    """An application for `serve.run`, or for a config file of Ray Serve.

    Args:
      open_service: opens what a replica serves, in its process; closed when the process ends.
      options: those of the service.
      deployment: as of `ray.serve.deployment`, which a config file overrides: num_replicas, ray_actor_options.

    Raises:
      ConfigError: states that replicas cannot share, a folder of adapters, which one replica alone would load, or
        nothing is said about keys; or Ray is not installed.
    """
    if not is_shared(options):
        raise ConfigError(
            f"state_store = {options.state_store!r}: replicas share the states of conversations; give a redis://"
        )
    if options.adapter_folder is not None:
        raise ConfigError(
            f"adapter_folder = {str(options.adapter_folder)!r}: an adapter would be loaded by the one replica that is "
            "asked, and the others would not know it; name adapters with --adapter, which every replica has"
        )
    if options.api_keys is None and not options.public_without_keys:
        raise ConfigError(
            "api_keys = None: who reaches Ray's proxy is not known here; give --api-keys FILE, or --public-without-keys"
        )
    try:
        from ray import serve  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError("ray: is not installed; pip install 'rwkv-jax[serve,redis,ray]'") from error

    def make_app() -> Any:
        from rwkv_jax.serving.app import create_app

        opened = contextlib.ExitStack()
        service = opened.enter_context(open_service())
        service.engine.warm_up()  # Ray sends requests to a replica once it has its app
        app = create_app(service)
        app.state.opened = opened  # for as long as the app
        return app

    settings = {"name": NAME, "max_ongoing_requests": _MAX_ONGOING_REQUESTS} | deployment
    return serve.deployment(serve.ingress(make_app)(), **settings).bind()
