"""/v1/embeddings: the embedder's vectors, as numbers and in base64."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from rwkv_jax.inference.engine.engine import Engine
from rwkv_jax.serving.protocol.embeddings import EmbeddingBody
from rwkv_jax.serving.routes.embeddings import as_reading
from rwkv_jax.serving.service import Service
from tests.serving import calls

PATH = "/v1/embeddings"


def embed(client: TestClient, **fields: Any) -> dict[str, Any]:
    return calls.post(client, PATH, {"model": "tiny"} | fields)


def test_vectors_and_usage(client: TestClient, service: Service, engine: Engine) -> None:
    texts = ["Hello", "caf\u00e9"]
    ids = [engine.encode(text, begins=True) for text in texts]
    expected = service.engine.embed(ids, skip=1)
    answer = embed(client, input=texts)
    assert (answer["object"], answer["model"]) == ("list", "tiny")
    assert [(each["object"], each["index"]) for each in answer["data"]] == [("embedding", 0), ("embedding", 1)]
    vectors = np.array([each["embedding"] for each in answer["data"]])
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    read = sum(map(len, ids))
    assert answer["usage"] == {"prompt_tokens": read, "total_tokens": read}
    (coded,) = embed(client, input=texts[1], encoding_format="base64")["data"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(coded["embedding"]), "<f4"), expected[1], atol=1e-6)


def test_ids_are_read_as_they_are(client: TestClient, service: Service) -> None:
    (one,) = embed(client, input=[1, 2, 3])["data"]
    np.testing.assert_allclose(one["embedding"], service.engine.embed([[1, 2, 3]])[0], atol=1e-6)
    last = embed(client, input=[[1, 2, 3], [4]], pooling="last")
    expected = service.engine.embed([[1, 2, 3], [4]], "last")
    np.testing.assert_allclose([each["embedding"] for each in last["data"]], expected, atol=1e-6)
    assert last["usage"]["prompt_tokens"] == 4


def test_texts_begin_and_for_the_last_state_end_with_the_end_of_text(engine: Engine) -> None:
    ids = engine.tokenizer.encode("ab")
    for pooling, expected in (("mean", [0, *ids]), ("last", [0, *ids, 0])):
        body = EmbeddingBody.model_validate({"model": "tiny", "input": "ab", "pooling": pooling})
        assert as_reading(body, engine) == ([expected], 1)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": [300]}, "input"),
        ({"input": "\ud800"}, "input"),
        ({"input": "a", "dimensions": 8}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "pooling": "max"}, "pooling"),
        ({}, "input"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(client: TestClient, fields: dict[str, Any], param: str) -> None:
    error = calls.refused(client, PATH, {"model": "tiny"} | fields)
    assert error["param"].startswith(param), error
