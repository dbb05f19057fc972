"""/v1/load_lora_adapter, /v1/unload_lora_adapter: for administrators, of a server that was given a folder for it."""

from __future__ import annotations

from pathlib import Path

import anyio.to_thread
from fastapi import APIRouter

from rwkv_jax.serving.errors import APIError
from rwkv_jax.serving.protocol.adapters import AdapterNames, LoadAdapterBody, UnloadAdapterBody
from rwkv_jax.serving.service import Service, ServiceOf, TenantOf
from rwkv_jax.tuning.files import open_adapter

router = APIRouter(tags=["adapters"])


@router.post("/v1/load_lora_adapter")
async def load_adapter(body: LoadAdapterBody, service: ServiceOf, tenant: TenantOf) -> AdapterNames:
    """Loads an adapter from below the adapter folder; texts go on meanwhile."""
    _require_admin(service, tenant)
    if body.lora_name == service.model_name:
        message = f"lora_name = {body.lora_name!r}: is the model's name; give another"
        raise APIError(400, message, param="lora_name")
    path = _below(service, body.lora_path)

    def load() -> AdapterNames:
        service.engine.adapters.load(body.lora_name, open_adapter(path, alpha=body.alpha))
        return AdapterNames(adapters=list(service.engine.adapters.names))

    return await anyio.to_thread.run_sync(load)


@router.post("/v1/unload_lora_adapter")
async def unload_adapter(body: UnloadAdapterBody, service: ServiceOf, tenant: TenantOf) -> AdapterNames:
    """Removes an adapter that was loaded while the server runs and that no text uses."""
    _require_admin(service, tenant)
    if body.lora_name not in service.engine.adapters.names:
        message = f"lora_name = {body.lora_name!r}: there is no such adapter here"
        raise APIError(404, message, param="lora_name", code="model_not_found")
    if body.lora_name in service.lasting_adapters:
        message = f"lora_name = {body.lora_name!r}: the server was started with it, and it stays; name one loaded since"
        raise APIError(400, message, param="lora_name")

    def unload() -> AdapterNames:
        service.engine.adapters.remove(body.lora_name)
        return AdapterNames(adapters=list(service.engine.adapters.names))

    return await anyio.to_thread.run_sync(unload)


def _require_admin(service: Service, tenant: str) -> None:
    if tenant not in service.options.adapter_admins:
        raise APIError(403, "this key may not change adapters; the server's --adapter-admins names those that may")


def _below(service: Service, given: str) -> Path:
    """A path below the adapter folder, links followed."""
    folder = service.options.adapter_folder
    assert folder is not None  # or there is no such route
    try:
        root = folder.expanduser().resolve()
        path = (root / given).resolve()
        is_below = path.is_relative_to(root) and path != root and path.exists()
    except (OSError, ValueError):  # too long, a null character
        is_below = False
    if not is_below:  # whatever it is: the answer tells nothing of other folders
        raise APIError(404, "lora_path: there is no such adapter in the server's adapter folder", param="lora_path")
    return path
