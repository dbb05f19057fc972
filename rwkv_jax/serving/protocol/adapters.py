"""Requests and answers of /v1/load_lora_adapter and /v1/unload_lora_adapter, whose fields are vLLM's."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rwkv_jax.serving.protocol.base import Answer, RequestBody

Name = Annotated[str, Field(min_length=1)]


class LoadAdapterBody(RequestBody):
    """An adapter to load."""

    lora_name: Name
    """Name by which requests then ask for it."""
    lora_path: Name
    """A folder or file below the server's adapter folder."""
    alpha: float | None = None
    """Of a LoRA adapter by RWKV-PEFT, whose file does not have it."""


class UnloadAdapterBody(RequestBody):
    """An adapter to remove."""

    lora_name: Name
    lora_int_id: int | None = None
    """Accepted, and not used."""


class AdapterNames(Answer):
    """The adapters that are loaded now."""

    adapters: list[str]
