"""/v1/models: the one model that is served."""

from __future__ import annotations

from fastapi import APIRouter

from rwkv_jax.serving.protocol.models import Model, Models
from rwkv_jax.serving.service import Service, ServiceOf

router = APIRouter(tags=["models"])


@router.get("/v1/models")
async def list_models(service: ServiceOf) -> Models:
    """The models that requests can ask for."""
    return Models(data=[_model(service)])


@router.get("/v1/models/{name:path}")
async def get_model(name: str, service: ServiceOf) -> Model:
    """One model; 404 if there is none of that name."""
    service.check_model(name)
    return _model(service)


def _model(service: Service) -> Model:
    return Model(id=service.model_name, created=service.created)
