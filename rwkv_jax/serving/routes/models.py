"""/v1/models: the model that is served, and its adapters."""

from __future__ import annotations

from fastapi import APIRouter

from rwkv_jax.serving.protocol.models import Model, Models
from rwkv_jax.serving.service import Service, ServiceOf

router = APIRouter(tags=["models"])


@router.get("/v1/models", response_model_exclude_none=True)
async def list_models(service: ServiceOf) -> Models:
    """The models that requests can ask for."""
    return Models(data=[_model(service, name) for name in service.models])


@router.get("/v1/models/{name:path}", response_model_exclude_none=True)
async def get_model(name: str, service: ServiceOf) -> Model:
    """One model; 404 if there is none of that name."""
    return _model(service, service.check_model(name) or service.model_name)


def _model(service: Service, name: str) -> Model:
    parent = None if name == service.model_name else service.model_name
    return Model(id=name, created=service.created, parent=parent)
