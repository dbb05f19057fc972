"""Requests that are wrong in every way: each is refused with an error of the client's, and the server goes on."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from starlette.testclient import TestClient

from rwkv_jax.inference.engine.engine import Engine
from rwkv_jax.serving.app import create_app
from rwkv_jax.serving.options import ServeOptions
from rwkv_jax.serving.service import Service

MAX_BODY_BYTES = 100_000
JSON = {"Content-Type": "application/json"}
MESSAGE = {"role": "user", "content": "Hi"}
VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": {
        "model": "tiny",
        "prompt": "ab",
        "max_tokens": 2,
        "temperature": 1.0,
        "top_p": 0.5,
        "n": 1,
        "stop": ["x"],
        "seed": 1,
        "stream": False,
        "presence_penalty": 0.5,
        "logit_bias": {"65": 1.0},
    },
    "/v1/chat/completions": {
        "model": "tiny",
        "messages": [MESSAGE],
        "max_tokens": 2,
        "temperature": 1.0,
        "n": 1,
        "logprobs": True,
        "top_logprobs": 1,
        "stream": True,
    },
    "/v1/responses": {"model": "tiny", "input": "Hi", "max_output_tokens": 2, "temperature": 1.0, "stream": False},
    "/v1/embeddings": {"model": "tiny", "input": ["ab", "b"], "encoding_format": "float"},
    "/v1/states": {"id": "mine", "prompt": "ab", "messages": [MESSAGE]},
    "/tokenize": {"prompt": "ab", "add_special_tokens": True},
    "/detokenize": {"tokens": [1, 2]},
    "/apply-template": {"messages": [MESSAGE], "temperature": 1.0},
}
"""A request of each kind that is right."""


class Wrong(NamedTuple):
    """A request that must be refused."""

    method: str
    path: str
    content: bytes
    headers: dict[str, str]


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def changed(body: dict[str, Any], field: str, value: Any) -> bytes:
    return dumped(body | {field: value})


def a_number(draws: random.Random, body: dict[str, Any]) -> str:
    """A field that holds a number, be it none of this body's."""
    numbers = [field for field, value in body.items() if type(value) in (int, float)]
    return draws.choice(numbers or ["temperature"])


def truncated(draws: random.Random, body: dict[str, Any]) -> bytes:
    return dumped(body)[: draws.randrange(1, len(dumped(body)))]


def garbled(draws: random.Random, body: dict[str, Any]) -> bytes:
    text = dumped(body)
    return draws.choice(
        [text + b"}", b"," + text, text.replace(b'"', b"'"), b"", b"null", b"[]", b'"text"', b"\x00" * 9]
    )


def mistyped(draws: random.Random, body: dict[str, Any]) -> bytes:
    field = draws.choice([field for field in body if field != "model"])
    return changed(body, field, draws.choice([[{"no": 1}], [[[1]]], {"no": [1]}, [None], [1.5, {}]]))


def out_of_range(draws: random.Random, body: dict[str, Any]) -> bytes:
    value = draws.choice([-1, -(10**30), 10**30, 1e300, -1e300, True])
    if "seed" in body and value is not True:
        return changed(body, draws.choice(["top_p", "n", "seed" if abs(value) > 2**64 else "n"]), value)
    return changed(body, draws.choice(["n", "top_logprobs", "messages", "prompt", "tokens"]), value)


def not_a_number(draws: random.Random, body: dict[str, Any]) -> bytes:
    value = draws.choice([b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 5000, b"0x10", b"01"])
    return changed(body, a_number(draws, body), 1234567).replace(b"1234567", value)


def nested(draws: random.Random, body: dict[str, Any]) -> bytes:
    opening, depth = draws.choice([b"[", b'{"a":', b'[{"a":']), draws.choice([65, 1000, 16_000])
    return dumped(body)[:-1] + b', "stop": ' + opening * depth


def not_utf8(draws: random.Random, body: dict[str, Any]) -> bytes:
    wrong = draws.choice([b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\xc0\xaf"])
    return dumped(body).replace(b"b", b"b" + wrong, 1).replace(b"i", b"i" + wrong, 1) + wrong


def surrogates(draws: random.Random, body: dict[str, Any]) -> bytes:
    field = draws.choice(["prompt" if "prompt" in body else "model", "model", "\ud800"])
    return changed(body, field, draws.choice(["\ud800", "a\udfffb"]))


def huge(draws: random.Random, body: dict[str, Any]) -> bytes:
    filler = draws.choice(["x" * MAX_BODY_BYTES, [1] * MAX_BODY_BYTES, {str(i): i for i in range(20_000)}])
    return changed(body, draws.choice(list(body)), filler)


def unknown_field(draws: random.Random, body: dict[str, Any]) -> bytes:
    return changed(body, draws.choice(["max_token", "__class__", "", "a" * 5000, "stream\x00", "echo "]), 1)


def many(draws: random.Random, body: dict[str, Any]) -> bytes:
    """More of something than anybody needs, in a body of an allowed size."""
    ids = {str(token): 1.0 for token in range(5000)}
    of_any = [("messages", [MESSAGE | {"role": "nobody"}] * 500), ("tokens", [256] * 5000), ("prompt", [["a"]] * 5000)]
    of_completions = [("prompt", ["a"] * 5000), ("n", 129), ("stop", ["x"] * 5000), ("logit_bias", ids)]
    field, value = draws.choice(of_completions if "seed" in body else of_any)
    return changed(body, field, value)


KINDS: tuple[Callable[[random.Random, dict[str, Any]], bytes], ...] = (
    truncated,
    garbled,
    mistyped,
    out_of_range,
    not_a_number,
    nested,
    not_utf8,
    surrogates,
    huge,
    unknown_field,
    many,
)


def elsewhere(draws: random.Random) -> Wrong:
    """To where nothing is, or not in this way."""
    name = draws.choice(["none", "../../etc/passwd", "%00", "%ff%fe", "a" * 3000, "%2e%2e%2f", "\u00e9", "' OR 1=1 --"])
    path = draws.choice(["/v1/models/{}", "/v1/states/{}", "/v1/{}", "/{}x", "/v1/completions/{}"]).format(name)
    method = draws.choice(["GET", "DELETE", "PUT", "PATCH", "POST", "BREW"])
    return Wrong(method, path, draws.choice([b"", b"{}", b"\xff"]), draws.choice([{}, JSON]))


def wrong_requests(seed: int, count: int) -> Iterator[Wrong]:
    """Requests of all kinds in turn, each to another endpoint than the last of its kind."""
    draws = random.Random(seed)
    paths = list(VALID)
    for number in range(count):
        kind, turn = number % (len(KINDS) + 2), number // (len(KINDS) + 2)
        path = paths[turn % len(paths)]
        body = copy.deepcopy(VALID[path])
        if kind < len(KINDS):
            yield Wrong("POST", path, KINDS[kind](draws, body), JSON)
        elif kind == len(KINDS):
            kinds = [{}, {"Content-Type": "text/plain"}, {"Content-Type": "multipart/form-data; boundary=x"}]
            yield Wrong("POST", path, dumped(body), draws.choice(kinds))
        else:
            yield elsewhere(draws)


@pytest.fixture(scope="module")
def hostile_client(engine: Engine) -> Iterator[TestClient]:
    """Of a server with small limits; what it does not expect is an error of the test."""
    service = Service(engine, "tiny", ServeOptions(max_body_bytes=MAX_BODY_BYTES, timeout_seconds=60))
    with TestClient(create_app(service)) as client:
        yield client


def text_of(client: TestClient) -> str:
    body = {"model": "tiny", "prompt": "ab", "max_tokens": 8, "temperature": 0.0, "ignore_eos": True}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200
    return answer.json()["choices"][0]["text"]


def test_what_is_right_is_answered(hostile_client: TestClient) -> None:
    for path, body in VALID.items():
        assert hostile_client.post(path, json=body).status_code == 200, path


@pytest.mark.parametrize(("seed", "count"), [(0, 40), pytest.param(1, 500, marks=pytest.mark.long)])
def test_wrong_requests_are_refused_and_the_server_goes_on(hostile_client: TestClient, seed: int, count: int) -> None:
    before = text_of(hostile_client)
    for wrong in wrong_requests(seed, count):
        answer = hostile_client.request(wrong.method, wrong.path, content=wrong.content, headers=wrong.headers)
        assert 400 <= answer.status_code < 500, (wrong.method, wrong.path, wrong.content[:300], answer.text[:300])
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["message"]
        assert len(answer.content) < 10_000, "what was wrong is not sent back whole"
        assert "Traceback" not in answer.text
    assert text_of(hostile_client) == before
    assert hostile_client.get("/health").json() == {"status": "ok"}
