"""The form that a text is asked to have: OpenAI's `response_format`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from rwkv_jax.serving.protocol.base import RequestBody


class TextFormat(RequestBody):
    """Any text."""

    type: Literal["text"]


class JSONObjectFormat(RequestBody):
    """A JSON object."""

    type: Literal["json_object"]


class NamedSchema(RequestBody):
    """A JSON schema with a name."""

    name: str
    description: str | None = None
    """Accepted; tell the model in a message."""
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None
    """Accepted: the text always matches."""


class JSONSchemaFormat(RequestBody):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JSONObjectFormat | JSONSchemaFormat, Field(discriminator="type")]
