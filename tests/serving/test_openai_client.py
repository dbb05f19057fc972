"""The official client of OpenAI, over HTTP: every endpoint."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from openai import OpenAI

from rwkv_jax.inference.engine.engine import Engine
from rwkv_jax.serving.app import create_app
from rwkv_jax.serving.service import Service
from tests.serving.scripted import running

USER: Any = {"role": "user", "content": "Hello"}


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    with running(create_app(service)) as address:
        yield address


@pytest.fixture(scope="module")
def official(address: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(official: OpenAI) -> None:
    assert [model.id for model in official.models.list()] == ["tiny"]
    assert official.models.retrieve("tiny").owned_by == "rwkv-jax"


def test_completions(official: OpenAI, engine: Engine) -> None:
    expected = engine.generate("Hello", max_tokens=6, sampling="greedy")
    whole = official.completions.create(
        model="tiny", prompt="Hello", max_tokens=6, temperature=0, logprobs=2, echo=True
    )
    (choice,) = whole.choices
    assert choice.text == "Hello" + expected.text
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[-6:] == pytest.approx(expected.logprobs, abs=1e-5)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == len(expected.ids)
    stream = official.completions.create(
        model="tiny", prompt="Hello", max_tokens=6, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == expected.text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(expected.ids)


def test_chat(official: OpenAI) -> None:
    whole = official.chat.completions.create(
        model="tiny", messages=[USER], max_completion_tokens=6, temperature=0, logprobs=True, top_logprobs=2
    )
    message = whole.choices[0].message
    assert message.role == "assistant"
    assert whole.choices[0].logprobs is not None
    assert len(whole.choices[0].logprobs.content or ()) == 6
    stream = official.chat.completions.create(
        model="tiny", messages=[USER], max_completion_tokens=6, temperature=0, stream=True
    )
    deltas = [chunk.choices[0].delta for chunk in stream]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == message.content
    # A reply can be sent back as it is.
    again: Any = [USER, message.to_dict(), USER]
    assert official.chat.completions.create(model="tiny", messages=again, max_completion_tokens=1).choices


def test_embeddings(official: OpenAI, address: str) -> None:
    found = official.embeddings.create(model="tiny", input=["a", "b"])  # the client asks for base64
    plain = httpx2.post(f"{address}/v1/embeddings", json={"model": "tiny", "input": ["a", "b"]}).json()
    vectors = [each["embedding"] for each in plain["data"]]
    np.testing.assert_allclose([each.embedding for each in found.data], vectors, atol=1e-6)
    coded = official.embeddings.create(model="tiny", input="a", encoding_format="base64").data[0].embedding
    assert isinstance(coded, str)
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(coded), "<f4"), vectors[0], atol=1e-6)


def test_responses(official: OpenAI) -> None:
    cut = official.responses.create(model="tiny", input="Hello", max_output_tokens=6, temperature=0)
    assert cut.status == "incomplete"
    form: Any = {"format": {"type": "json_schema", "name": "answer", "schema": {"enum": ["yes", "no"]}}}
    with official.responses.stream(model="tiny", input="Hello", max_output_tokens=40, text=form) as stream:
        texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert stream.get_final_response().output_text == "".join(texts) in ('"yes"', '"no"')


def test_errors_are_those_of_the_client(official: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="top_p = 2") as wrong:
        official.completions.create(model="tiny", prompt="a", top_p=2)
    assert wrong.value.param == "top_p"
    with pytest.raises(openai.NotFoundError):
        official.completions.create(model="gpt", prompt="a")
    with pytest.raises(openai.BadRequestError, match="modalities: is not supported"):
        official.chat.completions.create(model="tiny", messages=[USER], modalities=["text"])
