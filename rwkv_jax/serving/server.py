"""Runs the application until a signal ends it."""

from __future__ import annotations

import uvicorn

from rwkv_jax.serving.app import create_app
from rwkv_jax.serving.service import Service


def run_server(service: Service) -> None:
    """Serves a model on the address of its options; returns after SIGINT or SIGTERM."""
    options = service.options
    config = uvicorn.Config(create_app(service), host=options.host, port=options.port, log_level="info")
    uvicorn.Server(config).run()
