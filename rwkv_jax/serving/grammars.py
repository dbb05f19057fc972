"""What a request says about the form of its text, as a grammar for the engine."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rwkv_jax.checks import ConfigError
from rwkv_jax.inference.sampling.grammar import Grammar
from rwkv_jax.serving.errors import APIError
from rwkv_jax.serving.protocol.formats import JSONObjectFormat, JSONSchemaFormat, ResponseFormat
from rwkv_jax.serving.protocol.sampling import GenerationBody


class Asked(NamedTuple):
    """A grammar and the field of the request that asks for it."""

    field: str
    grammar: Grammar


def grammar_of(body: GenerationBody, response_format: ResponseFormat | None = None) -> Asked | None:
    """The grammar that a request asks for.

    Args:
      response_format: OpenAI's field, in requests that have it.

    Raises:
      ConfigError: there are several.
      APIError: it is none.
    """
    makers: dict[str, Callable[[], Grammar]] = {}
    if isinstance(response_format, JSONObjectFormat):
        makers["response_format"] = Grammar.json_object
    elif isinstance(response_format, JSONSchemaFormat):
        makers["response_format"] = functools.partial(Grammar.json_schema, response_format.json_schema.schema_)
    if body.guided_json is not None:
        makers["guided_json"] = functools.partial(Grammar.json_schema, body.guided_json)
    if body.guided_regex is not None:
        makers["guided_regex"] = functools.partial(Grammar.regex, body.guided_regex)
    if body.guided_grammar is not None:
        makers["guided_grammar"] = functools.partial(Grammar.lark, body.guided_grammar)
    if len(makers) > 1:
        first, second, *_ = makers
        raise ConfigError(f"{first}: and {second} constrain the text twice; leave one of them out")
    for field, make in makers.items():
        try:
            return Asked(field, make())
        except ConfigError as error:
            raise APIError(400, str(error), param=field, code="invalid_grammar") from error
    return None


def call_grammar(tools: Sequence[Mapping[str, Any]]) -> Asked:
    """A reply that calls one of some tools, behind a prompt that ends with a JSON fence."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                "arguments": {"type": "object"} | tool["function"].get("parameters", {}),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return Asked("tools", Grammar.lark(f'start: "\\n" call "\\n```"\ncall: %json {json.dumps({"anyOf": calls})}\n'))
