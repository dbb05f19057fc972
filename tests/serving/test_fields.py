"""Every field of OpenAI's requests is taken, or refused by its name and said to be so in docs/serving.md."""

from __future__ import annotations

import re
import typing
from pathlib import Path
from typing import Any

import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params
from starlette.testclient import TestClient

from rwkv_jax.serving.protocol.base import RequestBody
from rwkv_jax.serving.protocol.chat import ChatBody
from rwkv_jax.serving.protocol.completions import CompletionBody
from rwkv_jax.serving.protocol.embeddings import EmbeddingBody
from rwkv_jax.serving.protocol.responses import ResponseBody
from tests.serving import calls

DOCS = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
ENDPOINTS: dict[str, tuple[type[RequestBody], Any, dict[str, Any]]] = {
    "/v1/completions": (CompletionBody, completion_create_params.CompletionCreateParamsBase, {"prompt": "a"}),
    "/v1/chat/completions": (
        ChatBody,
        chat_params.CompletionCreateParamsBase,
        {"messages": [{"role": "user", "content": "a"}]},
    ),
    "/v1/responses": (ResponseBody, response_create_params.ResponseCreateParamsBase, {"input": "a"}),
    "/v1/embeddings": (EmbeddingBody, embedding_create_params.EmbeddingCreateParams, {"input": "a"}),
}
UNSUPPORTED = [
    (path, name)
    for path, (body, params, _) in ENDPOINTS.items()
    for name in sorted(set(typing.get_type_hints(params)) - set(body.model_fields))
]


def section(path: str) -> str:
    """What the page says of an endpoint, and of sampling."""
    found = re.search(rf"### {path}\n(.*?)\n##", DOCS, re.DOTALL)
    assert found is not None, path
    return found[1]


@pytest.mark.parametrize(("path", "name"), UNSUPPORTED)
def test_what_is_not_supported_is_refused_by_name_and_documented(client: TestClient, path: str, name: str) -> None:
    error = calls.refused(client, path, {"model": "tiny", name: 1} | ENDPOINTS[path][2])
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")
    assert f"`{name}`" in section(path)


@pytest.mark.parametrize("path", ENDPOINTS)
def test_what_is_supported_is_documented(path: str) -> None:
    body, _, _ = ENDPOINTS[path]
    code = " ".join(span for line in DOCS.splitlines() for span in re.findall(r"`([^`]+)`", line))
    assert not set(body.model_fields) - set(re.findall(r"\w+", code))
