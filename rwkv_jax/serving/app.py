"""The application: all routes, and how errors are answered."""

from __future__ import annotations

from fastapi import FastAPI

import rwkv_jax
from rwkv_jax.serving import errors, guards
from rwkv_jax.serving.routes import adapters, chat, completions, embeddings, models, operations, page, responses, states
from rwkv_jax.serving.service import Service


def create_app(service: Service) -> FastAPI:
    """An ASGI application that serves a model; its engine remains the caller's to close."""
    app = FastAPI(title="rwkv-jax", version=rwkv_jax.__version__)
    app.state.service = service
    errors.install(app)
    guards.install(app, service)
    app.include_router(models.router)
    app.include_router(completions.router)
    app.include_router(chat.router)
    app.include_router(responses.router)
    app.include_router(embeddings.router)
    app.include_router(states.router)
    if service.options.adapter_folder is not None:
        app.include_router(adapters.router)
    app.include_router(page.router)
    app.include_router(operations.router)
    return app
