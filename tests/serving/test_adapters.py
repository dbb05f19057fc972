"""Adapters by the names of models: which are listed, whose texts come back, and whose states they are."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from rwkv_jax.cli.flags import TunedFlags, WeightsFlags
from rwkv_jax.cli.serve import Serve
from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.inference.engine.engine import Engine, EngineOptions
from rwkv_jax.serving.app import create_app
from rwkv_jax.serving.options import ServeOptions
from rwkv_jax.serving.service import Service
from rwkv_jax.tuning import save_adapter
from tests.inference.models import CONFIGS, OPTIONS, VOCAB_SIZE, random_model
from tests.inference.test_engine_adapters import ADAPTERS
from tests.programs import compiled_quickly


@pytest.fixture(scope="module")
def client(compiled_programs: None) -> Iterator[TestClient]:
    options, tokenizer = EngineOptions(**OPTIONS), ByteTokenizer(VOCAB_SIZE)
    model = random_model(CONFIGS["7"])
    with compiled_quickly(), Engine(model, tokenizer, options, adapters=ADAPTERS) as engine:
        service = Service(engine, "tiny")
        with TestClient(create_app(service), raise_server_exceptions=False) as client:
            yield client


def complete(client: TestClient, model: str, **fields: Any) -> Any:
    body = {"model": model, "prompt": "Hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True} | fields
    return client.post("/v1/completions", json=body)


def test_adapters_are_listed_behind_their_model(client: TestClient) -> None:
    listed = client.get("/v1/models").json()["data"]
    assert [(each["id"], each.get("parent")) for each in listed] == [
        ("tiny", None),
        ("low", "tiny"),
        ("sums", "tiny"),
        ("part", "tiny"),
    ]
    assert client.get("/v1/models/tiny:low").json()["id"] == "low"
    answer = complete(client, "tiny:gone")
    assert answer.status_code == 404
    assert "there is 'tiny', 'low', 'sums', 'part' here" in answer.json()["error"]["message"]


def test_each_name_has_its_text(client: TestClient) -> None:
    answers = {model: complete(client, model).json() for model in ("tiny", "low", "tiny:low", "sums")}
    texts = {model: answer["choices"][0]["text"] for model, answer in answers.items()}
    assert texts["low"] == texts["tiny:low"]
    assert len({texts["tiny"], texts["low"], texts["sums"]}) == 3
    assert [answer["model"] for answer in answers.values()] == list(answers)
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0}
    chats = {
        model: client.post("/v1/chat/completions", json=body | {"model": model}).json() for model in ("tiny", "low")
    }
    assert chats["low"]["model"] == "low"
    assert chats["low"]["choices"][0]["message"]["content"] != chats["tiny"]["choices"][0]["message"]["content"]


def test_states_and_sessions_are_of_one_adapter(client: TestClient) -> None:
    made = client.post("/v1/states", json={"id": "s", "prompt": "Hello", "model": "low"})
    assert made.status_code == 200
    own = complete(client, "low", prompt="!", state="s")
    assert own.json()["choices"][0]["text"] == complete(client, "low", prompt="Hello!").json()["choices"][0]["text"]
    for model in ("tiny", "sums"):
        answer = complete(client, model, prompt="!", state="s")
        assert answer.status_code in (400, 409)
        assert "choose the adapter that it was made with" in answer.json()["error"]["message"]
    assert complete(client, "low", session="talk").status_code == 200
    assert complete(client, "low", prompt="!", session="talk").status_code == 200
    assert complete(client, "tiny", prompt="!", session="talk").status_code in (400, 409)


def test_echoed_prompts_are_scored_with_the_adapter(client: TestClient) -> None:
    scores = [
        complete(client, model, echo=True, logprobs=0, max_tokens=0).json()["choices"][0]["logprobs"]["token_logprobs"]
        for model in ("tiny", "low")
    ]
    assert scores[0][1:] != scores[1][1:]


def test_embeddings_are_the_models_own(client: TestClient) -> None:
    answer = client.post("/v1/embeddings", json={"model": "low", "input": "Hello"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")


KEYS = {"alice": "alice-has-this-long-key", "bob": "bob-has-this-other-key"}


def load(client: TestClient, name: str, path: str, key: str = "alice", **fields: Any) -> Any:
    body = {"lora_name": name, "lora_path": path} | fields
    return client.post("/v1/load_lora_adapter", json=body, headers={"Authorization": f"Bearer {KEYS[key]}"})


def write_keys(folder: Path) -> Path:
    path = folder / "keys"
    path.write_text("".join(f"{name}:{key}\n" for name, key in KEYS.items()))
    path.chmod(0o600)
    return path


def test_administrators_load_and_remove_adapters_of_a_folder(tmp_path: Path, compiled_programs: None) -> None:
    keys = write_keys(tmp_path)
    folder, model = tmp_path / "adapters", random_model(CONFIGS["7"])
    folder.mkdir()
    for place in (folder / "one", tmp_path / "outside"):
        save_adapter(ADAPTERS["low"], place, model.config, layout="official")
    (folder / "link").symlink_to(tmp_path / "outside")
    options, given = EngineOptions(**OPTIONS, adapter_places=2, adapter_rank=4), {"own": ADAPTERS["low"]}
    served = ServeOptions(api_keys=keys, adapter_folder=folder, adapter_admins=("alice",))
    alice = {"Authorization": f"Bearer {KEYS['alice']}"}
    with compiled_quickly(), Engine(model, ByteTokenizer(VOCAB_SIZE), options, adapters=given) as engine:
        service = Service(engine, "tiny", served)
        with TestClient(create_app(service), raise_server_exceptions=False, headers=alice) as client:
            before = complete(client, "tiny").json()["choices"][0]["text"]
            for key, name, path, status, message in (
                ("bob", "new", "one", 403, "this key may not change adapters"),
                ("alice", "tiny", "one", 400, "is the model's name"),
                ("alice", "new", "two", 404, "no such adapter in the server's adapter folder"),
                ("alice", "new", "../outside", 404, "no such adapter in the server's adapter folder"),
                ("alice", "new", str(tmp_path / "outside"), 404, "no such adapter in the server's adapter folder"),
                ("alice", "new", "link", 404, "no such adapter in the server's adapter folder"),
                ("alice", "new", ".", 404, "no such adapter in the server's adapter folder"),
                ("alice", "new", "one\0", 404, "no such adapter in the server's adapter folder"),
                ("alice", "a b", "one", 400, "must be a name of letters"),
            ):
                answer = load(client, name, path, key)
                assert (answer.status_code, message in answer.json()["error"]["message"]) == (status, True), path
            assert client.post("/v1/load_lora_adapter", json={}, headers={"Authorization": ""}).status_code == 401
            assert load(client, "new", "one").json() == {"adapters": ["own", "new"]}
            assert load(client, "new", "one").status_code == 400
            assert complete(client, "new").json()["choices"][0]["text"] != before
            bob = {"Authorization": f"Bearer {KEYS['bob']}"}
            unload = functools.partial(client.post, "/v1/unload_lora_adapter", json={"lora_name": "new"})
            assert unload(headers=bob).status_code == 403
            assert unload().json() == {"adapters": ["own"]}
            assert unload().status_code == complete(client, "new").status_code == 404
            kept = unload(json={"lora_name": "own"})
            assert (kept.status_code, kept.json()["error"]["param"]) == (400, "lora_name")
            assert "the server was started with it, and it stays" in kept.json()["error"]["message"]
            assert complete(client, "own").status_code == 200


def test_a_server_that_was_not_told_so_loads_nothing(client: TestClient) -> None:
    assert client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "x"}).status_code == 404


def test_who_may_load_adapters_is_told_with_the_folder(tmp_path: Path) -> None:
    for fields, message in (
        ({"adapter_folder": tmp_path}, "adapter_folder = .*: needs --api-keys, and with --adapter-admins"),
        ({"adapter_folder": tmp_path, "adapter_admins": ("a",)}, "adapter_folder = .*: needs --api-keys"),
        ({"adapter_admins": ("a",)}, "adapter_admins = .*: may load adapters from a folder"),
        (
            {"adapter_folder": tmp_path / "x", "adapter_admins": ("a",), "api_keys": tmp_path / "k"},
            "adapter_folder = .*: there is no such folder",
        ),
    ):
        given: dict[str, Any] = fields
        with pytest.raises(ConfigError, match=message):
            ServeOptions(**given)


@pytest.mark.parametrize(
    ("admin", "fields", "message"),
    [
        ("carol", {"adapter_places": 8, "adapter_rank": 4}, "adapter_admins: carol has no key in"),
        ("alice", {}, "adapter_places = 0: leaves no place .* than the 0 of --adapter"),
        ("alice", {"adapter_places": 1, "tuned": TunedFlags(adapter=("a",))}, "adapter_places = 1: .* the 1 of"),
        ("alice", {"adapter_places": 8}, "adapter_rank = 0: no --adapter is given whose rank it could be"),
    ],
)
def test_flags_for_adapters_are_checked_before_weights_are_looked_for(
    tmp_path: Path, admin: str, fields: dict[str, Any], message: str
) -> None:
    options = ServeOptions(api_keys=write_keys(tmp_path), adapter_folder=tmp_path, adapter_admins=(admin,))
    command = Serve(WeightsFlags(str(tmp_path / "none.pth")), options=options, **fields)
    with contextlib.ExitStack() as stack, pytest.raises(ConfigError, match=message):
        stack.enter_context(command.opened())
