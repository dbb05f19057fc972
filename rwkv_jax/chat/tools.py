"""Tools in the prompts of G1 models: the list of them in the system's message, and calls in replies."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rwkv_jax.chat.messages import ToolCall, clean
from rwkv_jax.config import ConfigError

_INSTRUCTIONS = {
    "required": "Return only a JSON function call.",
    "auto": "Return only a JSON function call, or answer.",
}


def tools_block(tools: Sequence[Mapping[str, Any]], tool_choice: str) -> str:
    """A list of functions as JSON, one a line, and what to do with them.

    Of the parameters' JSON schema the list has the properties alone, and which of them are required where not all are.

    Raises:
      ConfigError: tools that are not in OpenAI's form, or an unknown `tool_choice`.
    """
    if tool_choice not in _INSTRUCTIONS:
        raise ConfigError(f"tool_choice = {tool_choice!r}: must be one of {', '.join(_INSTRUCTIONS)}")
    lines = [_compact(f"tools[{index}]", tool) for index, tool in enumerate(tools)]
    return "Tools:\n[\n" + ",\n".join(lines) + f"\n]\n{_INSTRUCTIONS[tool_choice]}"


def write_calls(calls: Sequence[ToolCall]) -> str:
    """Calls in a reply, a fenced block each."""
    return "\n".join(
        f'```json\n{{"name":{_json(call.name)},"arguments":{clean(call.arguments)}}}\n```' for call in calls
    )


def _compact(place: str, tool: Mapping[str, Any]) -> str:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name.strip():
        raise ConfigError(
            f'{place}: must be {{"type": "function", "function": {{"name", "description", "parameters"}}}}'
        )
    schema = function.get("parameters") or {}
    if not isinstance(schema, Mapping):
        raise ConfigError(f"{place}: parameters of {name} must be a JSON schema, an object")
    described = {"description": function["description"]} if function.get("description") else {}
    properties = schema.get("properties")
    if not isinstance(properties, Mapping):  # a schema in another form, or none: as it is
        return _json({"name": name, **described, "arguments": schema})
    required = schema.get("required", [])
    if not isinstance(required, Sequence) or not all(isinstance(key, str) for key in required):
        raise ConfigError(f"{place}: required of {name} must be a list of names")
    partly = {} if set(required) == set(properties) else {"required": required}
    return _json({"name": name, **described, "arguments": properties, **partly})


def _json(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        text.encode()  # half a surrogate pair is a string of JSON's, but no text
        return text
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"tools: cannot be written as JSON ({error})") from error
