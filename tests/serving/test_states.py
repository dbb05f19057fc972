"""States are the clients': kept by id, given back, continued, and nobody else's."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save
from starlette.testclient import TestClient

from rwkv_jax.inference.engine.engine import Engine
from rwkv_jax.inference.sampling.params import SamplingParams
from rwkv_jax.inference.state.snapshot import Snapshot
from rwkv_jax.inference.state.state_file import decode_snapshot, encode_snapshot
from rwkv_jax.serving.app import create_app
from rwkv_jax.serving.options import ServeOptions
from rwkv_jax.serving.service import Service
from rwkv_jax.serving.states import codec
from rwkv_jax.serving.states.opening import States, states_in_memory
from rwkv_jax.serving.states.redis import RedisStateStore
from rwkv_jax.weights.pth.file import write_torch_file
from tests.inference.models import assert_same
from tests.serving import calls

PATH = "/v1/completions"
GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 6, "ignore_eos": True}
TEXT = "Once upon a time there was"


@pytest.fixture(autouse=True)
def emptied(service: Service) -> Iterator[None]:
    """Each test begins without states."""
    service.states = states_in_memory()
    yield
    service.states.store.close()


def complete(client: TestClient, **fields: Any) -> dict[str, Any]:
    return calls.post(client, PATH, GREEDY | fields)


def greedy(engine: Engine, snapshot: Snapshot | None, ids: list[int], max_tokens: int = 6) -> tuple[str, Snapshot]:
    """What the engine itself writes after a state."""
    arguments: dict[str, Any] = {"max_tokens": max_tokens, "sampling": SamplingParams.greedy(), "stop_ids": ()}
    with engine.stream(ids, state=snapshot, return_state=True, **arguments) as stream:
        text = "".join(chunk.text for chunk in stream)
    assert stream.snapshot is not None
    return text, stream.snapshot


def start(engine: Engine, text: str = TEXT) -> list[int]:
    return engine.encode(text, begins=True)


def state_of(client: TestClient, engine: Engine, id: str) -> Snapshot:
    answer = client.get(f"/v1/states/{id}")
    assert answer.status_code == 200, answer.text
    return decode_snapshot(answer.content, engine.identity)


def error(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


# By id.


def test_a_state_from_a_prompt_is_what_the_engine_reads(client: TestClient, engine: Engine) -> None:
    made = calls.post(client, "/v1/states", {"prompt": TEXT})
    assert made["object"] == "state"
    assert made["kind"] == "state"
    assert made["num_tokens"] == len(start(engine))
    assert made["model"] == engine.identity.model
    expected = engine.prefill(None, start(engine))
    assert_same(state_of(client, engine, made["id"]), expected)
    text = complete(client, prompt=" a fox", state=made["id"])["choices"][0]["text"]
    assert text == greedy(engine, expected, engine.encode(" a fox", begins=False))[0]
    # It stays as it is.
    assert text == complete(client, prompt=" a fox", state=made["id"])["choices"][0]["text"]
    ids = engine.encode(" a fox", begins=False)
    assert text == complete(client, prompt=ids, state=made["id"])["choices"][0]["text"]


def test_an_empty_prompt_goes_on_with_a_state(client: TestClient, engine: Engine) -> None:
    made = calls.post(client, "/v1/states", {"prompt": TEXT, "id": "mine"})
    assert made["id"] == "mine"
    text = complete(client, prompt="", state="mine")["choices"][0]["text"]
    assert text == greedy(engine, None, start(engine))[0]


def test_the_state_after_an_answer(client: TestClient, engine: Engine) -> None:
    text, expected = greedy(engine, None, start(engine))
    kept = complete(client, prompt=TEXT, return_state="id")
    assert kept["choices"][0]["text"] == text
    assert kept["state"].keys() == {"id", "session", "base64", "num_tokens"}
    assert kept["state"]["num_tokens"] == expected.num_tokens
    assert_same(state_of(client, engine, kept["state"]["id"]), expected)
    given = complete(client, prompt=TEXT, return_state="base64")["state"]["base64"]
    assert_same(decode_snapshot(base64.b64decode(given), engine.identity), expected)
    assert [info["id"] for info in client.get("/v1/states").json()["data"]] == [kept["state"]["id"]]
    # Both continue alike.
    texts = [complete(client, prompt="!", state=state)["choices"][0]["text"] for state in (kept["state"]["id"], given)]
    assert texts == [greedy(engine, expected, engine.encode("!", begins=False))[0]] * 2


def test_a_stream_has_the_state_in_its_last_chunk(client: TestClient, engine: Engine) -> None:
    chunks = calls.streamed(client, PATH, GREEDY | {"prompt": TEXT, "return_state": "id"})
    *first, last = chunks
    assert not any("state" in chunk for chunk in first)
    assert last["choices"][0]["finish_reason"] == "length"
    assert_same(state_of(client, engine, last["state"]["id"]), greedy(engine, None, start(engine))[1])
    assert "state" not in complete(client, prompt=TEXT)


@pytest.mark.parametrize("stop", ["stop", "stop_token_ids"])
def test_what_ended_an_answer_is_not_in_its_state(client: TestClient, engine: Engine, stop: str) -> None:
    letters = {"logit_bias": {str(token): 50.0 for token in engine.encode("abcdefghijklm", begins=False)}}
    text = complete(client, prompt=TEXT, **letters)["choices"][0]["text"]
    ids = engine.encode(text, begins=False)
    answer = complete(
        client, prompt=TEXT, return_state="id", **letters, **{stop: [text[3:5] if stop == "stop" else ids[4]]}
    )
    shown = answer["choices"][0]["text"]
    assert text.startswith(shown)
    assert len(shown) < len(text)
    assert answer["state"]["num_tokens"] == len(start(engine)) + len(shown)
    assert_same(state_of(client, engine, answer["state"]["id"]), engine.prefill(None, start(engine, TEXT + shown)))


def test_a_file_goes_out_and_in(client: TestClient, engine: Engine) -> None:
    calls.post(client, "/v1/states", {"prompt": TEXT, "id": "a"})
    file = client.get("/v1/states/a")
    assert file.headers["content-type"] == "application/octet-stream"
    assert file.content == codec.encode(engine.prefill(None, start(engine)), engine)
    put = client.put("/v1/states/b", content=file.content)
    assert put.status_code == 200, put.text
    assert client.get("/v1/states/b").content == file.content
    text = base64.b64encode(file.content).decode()
    again = calls.post(client, "/v1/states", {"state": text, "id": "c"})
    assert client.get(f"/v1/states/{again['id']}").content == file.content
    longer = calls.post(client, "/v1/states", {"state": "a", "prompt": "!", "id": "d"})
    assert longer["num_tokens"] == put.json()["num_tokens"] + 1
    assert client.delete("/v1/states/b").json() == {"id": "b", "object": "state", "deleted": True}
    assert [info["id"] for info in client.get("/v1/states").json()["data"]] == ["d", "a", "c"]
    for method in (client.get, client.delete):
        assert error(method("/v1/states/b"), 404)["message"] == "state 'b': not found or expired"


# State tuning.


def _tuned(shape: tuple[int, ...] = (2, 8, 8), layers: int = 2, scale: float = 1.0) -> dict[str, np.ndarray]:
    draws = np.random.default_rng(1)
    return {
        f"blocks.{i}.att.time_state": scale * draws.standard_normal(shape, np.float32).astype(np.float32)
        for i in range(layers)
    }


def _pth(tmp_path: Path, tensors: dict[str, np.ndarray]) -> bytes:
    write_torch_file(tmp_path / "x.pth", tensors)
    return (tmp_path / "x.pth").read_bytes()


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_a_tuned_state_begins_a_text(client: TestClient, engine: Engine, tmp_path: Path, form: str) -> None:
    tensors = _tuned()
    content = _pth(tmp_path, tensors) if form == "pth" else save(tensors)
    state = tuple(
        dataclasses.replace(part, wkv=jnp.asarray(tensors[f"blocks.{i}.att.time_state"]))
        for i, part in enumerate(engine.first_snapshot().state)
    )
    before = dataclasses.replace(engine.first_snapshot(), state=state)
    put = client.put("/v1/states/tuned", content=content)
    assert put.status_code == 200, put.text
    assert put.json()["num_tokens"] == 1
    expected = engine.prefill(before, [engine.tokenizer.end_of_text])
    assert_same(state_of(client, engine, "tuned"), expected)
    # With a prompt in the same request, and in one after it.
    text = base64.b64encode(content).decode()
    calls.post(client, "/v1/states", {"state": text, "prompt": TEXT, "id": "read"})
    calls.post(client, "/v1/states", {"state": "tuned", "prompt": TEXT, "id": "later"})
    expected = engine.prefill(before, start(engine))
    for id in ("read", "later"):
        assert_same(state_of(client, engine, id), expected)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (_tuned(layers=3), "not expected blocks.2.att.time_state [2, 8, 8]"),
        (_tuned(layers=1), "missing      blocks.1.att.time_state [2, 8, 8]"),
        (_tuned((4, 8, 8)), "blocks.0.att.time_state is float32 [4, 8, 8], must be of floats [2, 8, 8]"),
        (_tuned(scale=np.inf), "holds numbers that are not finite"),
        (_tuned() | {"emb.weight": np.zeros((2, 2), np.float32)}, "not expected emb.weight"),
        ({"blocks.0.att.time_state": np.zeros((2, 8, 8), np.int32)}, "is int32 [2, 8, 8], must be of floats"),
    ],
)
def test_tuned_states_of_other_models(client: TestClient, tensors: dict[str, np.ndarray], message: str) -> None:
    found = error(client.put("/v1/states/x", content=save(tensors)), 409)
    assert message in found["message"]
    assert found["code"] == "state_mismatch"


# Refused.


def test_a_state_of_another_model_is_told_by_the_difference(client: TestClient, engine: Engine) -> None:
    identity = dataclasses.replace(engine.identity, model="f" * 64)
    content = encode_snapshot(engine.prefill(None, [1, 2]), identity)
    found = error(client.put("/v1/states/x", content=content), 409)
    assert f"model: '{'f' * 64}' in the file, '{engine.identity.model}' here" in found["message"]
    body = GREEDY | {"prompt": "x", "state": base64.b64encode(content).decode()}
    assert error(client.post(PATH, json=body), 409)["code"] == "state_mismatch"


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"x" * 1000, 400),
        (bytes(1000), 400),
        (b"\x80\x04\x95" + bytes(100), 400),  # a pickle
        (save({"x": np.zeros(3, np.float32)}), 409),
        (bytes(3 * 10**6), 413),
    ],
)
def test_files_that_are_none(client: TestClient, content: bytes, status: int) -> None:
    error(client.put("/v1/states/x", content=content), status)
    body = GREEDY | {"prompt": "x", "state": base64.b64encode(content + bytes(99)).decode()}
    assert client.post(PATH, json=body).status_code == (400 if status == 409 else status)
    assert client.get("/v1/states").json()["data"] == []


def test_a_pickle_in_a_pth_is_not_run(client: TestClient, tmp_path: Path) -> None:
    hostile = io.BytesIO()
    with zipfile.ZipFile(hostile, "w") as file:
        file.writestr("x/data.pkl", f"cos\nsystem\n(S'touch {tmp_path}/run'\ntR.".encode())
        file.writestr("x/version", b"3\n")
    error(client.put("/v1/states/x", content=hostile.getvalue()), 400)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"state": "nowhere"}, 404, "state 'nowhere': not found or expired"),
        ({"state": "x" * 65}, 400, "neither an id nor base64"),
        ({"state": "\u00e9" * 100}, 400, "neither an id nor base64"),
        ({"return_state": "file"}, 400, "return_state: "),
        ({"session": "../x"}, 400, "session: "),
        ({"session": "x", "n": 2}, 400, "session: is for one text; this request asks for 2"),
        ({"return_state": "id", "prompt": ["a", "b"]}, 400, "return_state: is for one text"),
        ({"cache_prompt": False, "n": 2}, 400, "cache_prompt: is for one text"),
        ({"no_store": True, "echo": True, "logprobs": 1}, 400, "echo: logprobs of a prompt are those of a text that"),
        ({"no_store": True, "session": "x"}, 400, "no_store: a session and a state by id are stored"),
        ({"no_store": True, "return_state": "id"}, 400, "no_store: "),
    ],
)
def test_fields_that_cannot_be(client: TestClient, fields: dict[str, Any], status: int, message: str) -> None:
    found = error(client.post(PATH, json=GREEDY | {"prompt": "x"} | fields), status)
    assert found["message"].startswith(message) or message in found["message"]


@pytest.mark.parametrize("id", ["a b", "%2e%2e", "-x", "x" * 65, "\u00e9"])
def test_ids_that_cannot_be(client: TestClient, id: str) -> None:
    assert client.put(f"/v1/states/{id}", content=b"").status_code in (400, 404)


def test_nothing_to_read(client: TestClient) -> None:
    assert error(client.post("/v1/states", json={}), 400)["param"] == "prompt"


# The prefix cache.


def test_nothing_is_kept_of_what_is_not_to_be(client: TestClient, engine: Engine) -> None:
    assert engine.prefix_cache is not None
    text = "A secret that nobody has told before, nor will after"
    expected = greedy(engine, engine.prefill(None, [engine.tokenizer.end_of_text]), engine.encode(text, begins=False))[
        0
    ]
    for fields in ({"no_store": True}, {"cache_prompt": False}):
        assert complete(client, prompt=text, **fields)["choices"][0]["text"] == expected
        assert engine.prefix_cache.shared_prefix_length(start(engine, text)) < 10
    assert complete(client, prompt=text)["choices"][0]["text"] == expected
    assert engine.prefix_cache.shared_prefix_length(start(engine, text)) == len(start(engine, text))
    kept = complete(client, prompt=text, no_store=True, return_state="base64")["state"]
    assert kept["id"] is None
    assert kept["num_tokens"] == len(start(engine, text)) + 6
    assert client.get("/v1/states").json()["data"] == []


# Tenants.


@pytest.fixture
def tenants(service: Service, tmp_path: Path) -> Iterator[list[TestClient]]:
    """Clients of two tenants."""
    keys = {"a": "a" * 40, "b": "b" * 40}
    (tmp_path / "keys").write_text("".join(f"{name}:{key}\n" for name, key in keys.items()))
    (tmp_path / "keys").chmod(0o600)
    app = create_app(dataclasses.replace(service, options=ServeOptions(api_keys=tmp_path / "keys")))
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(TestClient(app, headers={"Authorization": f"Bearer {key}"})) for key in keys.values()
        ]


def test_tenants_do_not_see_each_others(tenants: list[TestClient]) -> None:
    first, second = tenants
    calls.post(first, "/v1/states", {"prompt": "mine", "id": "x"})
    complete(first, prompt="mine", session="s")
    for answer in (
        second.get("/v1/states/x"),
        second.delete("/v1/states/x"),
        second.post(PATH, json=GREEDY | {"prompt": "x", "state": "x"}),
        second.post(PATH, json=GREEDY | {"prompt": "x", "state": "s"}),
        second.post("/v1/states", json={"state": "x", "prompt": "x"}),
    ):
        assert error(answer, 404)["code"] == "state_not_found"
    assert second.get("/v1/states").json()["data"] == []
    calls.post(second, "/v1/states", {"prompt": "other words", "id": "x"})
    complete(second, prompt="another's", session="s")
    sizes = [{info["id"]: info["num_tokens"] for info in each.get("/v1/states").json()["data"]} for each in tenants]
    assert sizes == [{"x": 5, "s": 11}, {"x": 12, "s": 16}]


# Stores that are away or full.


def test_a_redis_that_is_away_is_503(client: TestClient, service: Service) -> None:
    service.states = States(RedisStateStore("redis://127.0.0.1:1", max_bytes=10**6, max_idle_seconds=1.0))
    for answer in (
        client.get("/v1/states"),
        client.get("/v1/states/x"),
        client.delete("/v1/states/x"),
        client.post("/v1/states", json={"prompt": "x"}),
        client.post(PATH, json=GREEDY | {"prompt": "x", "session": "x"}),
        client.post(PATH, json=GREEDY | {"prompt": "x", "return_state": "id"}),
    ):
        assert error(answer, 503)["code"] == "state_store_unavailable"
        assert int(answer.headers["Retry-After"]) > 0
    assert complete(client, prompt="x")["choices"]  # what needs no store
