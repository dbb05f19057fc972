"""/v1/states: states that clients make, take, give back and remove."""

from __future__ import annotations

import time
from typing import Annotated, Literal

import anyio.to_thread
from fastapi import APIRouter, Path, Request, Response

from rwkv_jax.checks import ConfigError
from rwkv_jax.inference.state.snapshot import Snapshot
from rwkv_jax.serving.protocol.state_fields import ID_PATTERN
from rwkv_jax.serving.protocol.states import DeletedState, StateBody, StateObject, States
from rwkv_jax.serving.service import Service, ServiceOf, TenantOf
from rwkv_jax.serving.states import codec, turns
from rwkv_jax.serving.states.store import Kind, StateInfo, StateRecord
from rwkv_jax.serving.texts import check_lengths
from rwkv_jax.serving.token_counts import count_tokens

router = APIRouter(tags=["states"])

_FILE = "application/octet-stream"
_FILE_BODY = {"requestBody": {"required": True, "content": {_FILE: {"schema": {"type": "string", "format": "binary"}}}}}

IdOf = Annotated[str, Path(pattern=ID_PATTERN)]
"""Type of a route's parameter that names a state."""


@router.get("/v1/states")
async def list_states(service: ServiceOf, tenant: TenantOf) -> States:
    """All states and sessions of the tenant."""
    infos = await anyio.to_thread.run_sync(service.states.store.list, tenant)
    return States(data=[_object(info) for info in infos])


@router.post("/v1/states")
async def make_state(body: StateBody, service: ServiceOf, tenant: TenantOf) -> StateObject:
    """Reads a text, messages or a file, and keeps the state after it."""
    adapter = None if body.model is None else service.check_model(body.model)

    def make() -> StateObject:
        snapshot = _read(body, service, tenant, adapter)
        return _put(service, tenant, body.id or turns.new_id(), snapshot, adapter)

    return await anyio.to_thread.run_sync(make)


@router.get(
    "/v1/states/{id}",
    response_class=Response,
    responses={200: {"content": {_FILE: {"schema": {"type": "string", "format": "binary"}}}}},
)
async def get_state(id: IdOf, service: ServiceOf, tenant: TenantOf) -> Response:
    """A state as a file, which the same model reads anywhere, also with `rwkv chat`."""
    record = await anyio.to_thread.run_sync(turns.get_record, service, tenant, id)
    headers = {"Content-Disposition": f'attachment; filename="{id}.safetensors"'}
    return Response(record.data, media_type=_FILE, headers=headers)


@router.put("/v1/states/{id}", openapi_extra=_FILE_BODY)
async def put_state(
    id: IdOf,
    request: Request,
    service: ServiceOf,
    tenant: TenantOf,
    kind: Literal["state", "session"] = "state",
    model: str | None = None,
) -> StateObject:
    """Keeps a state file, or an official file of a tuned state, under an id; what was there is replaced."""
    adapter = None if model is None else service.check_model(model)
    limit = await anyio.to_thread.run_sync(lambda: codec.max_file_bytes(service.engine.identity))
    content = bytearray()
    async for piece in request.stream():
        content += piece
        if len(content) > limit:
            raise codec.too_large("body", limit)

    def put() -> StateObject:
        snapshot = codec.decode(bytes(content), service.engine, "body", adapter)
        return _put(service, tenant, id, _begun(snapshot, service, adapter), adapter, kind)

    return await anyio.to_thread.run_sync(put)


@router.delete("/v1/states/{id}")
async def delete_state(id: IdOf, service: ServiceOf, tenant: TenantOf) -> DeletedState:
    """Removes a state or a session."""
    if not await anyio.to_thread.run_sync(service.states.store.delete, tenant, id):
        raise turns.not_found(id)
    return DeletedState(id=id)


def _read(body: StateBody, service: Service, tenant: str, adapter: str | None) -> Snapshot:
    """The state that a request describes."""
    snapshot = None if body.state is None else turns.find_state(service, tenant, body.state, adapter=adapter)
    if body.prompt is not None:
        snapshot = _prefill(service, snapshot, body.prompt, adapter)
    if body.messages is not None:
        messages = [message.model_dump(exclude_none=True) for message in body.messages]
        text = turns.render_after(snapshot, service.template, messages, add_generation_prompt=False)
        snapshot = _prefill(service, snapshot, text + turns.separator(service.template), adapter)
    if snapshot is None:
        raise ConfigError("prompt: there is none, and neither messages nor state; give one of them")
    return _begun(snapshot, service, adapter)


def _prefill(service: Service, snapshot: Snapshot | None, prompt: str | list[int], adapter: str | None) -> Snapshot:
    begins = snapshot is None or snapshot.num_tokens == 0
    ids = service.engine.encode(prompt, begins=begins) if isinstance(prompt, str) else prompt
    check_lengths(service, [ids])
    count_tokens("prompt_tokens", len(ids))
    return service.engine.prefill(snapshot, ids, adapter=adapter)


def _begun(snapshot: Snapshot, service: Service, adapter: str | None) -> Snapshot:
    """A tuned state that has read nothing reads what every text starts with."""
    if snapshot.num_tokens:
        return snapshot
    return service.engine.prefill(snapshot, [service.engine.tokenizer.end_of_text], adapter=adapter)


def _put(
    service: Service, tenant: str, id: str, snapshot: Snapshot, adapter: str | None, kind: Kind = "state"
) -> StateObject:
    data, model = codec.encode(snapshot, service.engine, adapter), service.engine.identity.model
    record = StateRecord(data, snapshot.num_tokens, model, time.time(), kind)
    service.states.store.put(tenant, id, record)
    return _object(StateInfo(id, kind, record.num_tokens, len(data), model, record.created, record.created))


def _object(info: StateInfo) -> StateObject:
    return StateObject(
        id=info.id,
        kind=info.kind,
        model=info.model,
        num_tokens=info.num_tokens,
        num_bytes=info.num_bytes,
        created=int(info.created),
    )
