"""What is between the network and the routes, from the outside in: log, CORS, access, a request's life, arrivals."""

from __future__ import annotations

import logging

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from rwkv_jax.serving.access import Access, TenantLimits
from rwkv_jax.serving.access_log import AccessLog
from rwkv_jax.serving.arrivals import Arrivals
from rwkv_jax.serving.drain import Lifetime
from rwkv_jax.serving.keys import read_keys
from rwkv_jax.serving.service import Service

_LOG = logging.getLogger(__name__)


def install(app: FastAPI, service: Service) -> None:
    """Adds them as a service's options say.

    Raises:
      ConfigError: as `read_keys`.
    """
    options = service.options
    keys = None
    if options.api_keys is not None:
        keys, warnings = read_keys(options.api_keys)
        for warning in warnings:
            _LOG.warning(warning)
    # The last one that is added is the outermost.
    app.add_middleware(Arrivals, announce=lambda: service.engine.announce())
    app.add_middleware(
        Lifetime,
        running=service.running,
        timeout_seconds=options.timeout_seconds,
        max_body_bytes=options.max_body_bytes,
    )
    app.add_middleware(
        Access,
        keys=keys,
        limits=TenantLimits(options.requests_per_minute, options.max_concurrent),
        cors_origins=options.cors_origins,
    )
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.cors_origins,
            allow_methods=("GET", "POST", "PUT", "DELETE"),
            allow_headers=("*",),
            expose_headers=("X-Request-Id", "Retry-After"),
        )
    app.add_middleware(AccessLog, metrics=service.metrics)
