"""Two replicas on Ray Serve that share a Redis: what one has begun the other continues. Run by hand: pytest -m ray."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import signal
import time
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from rwkv_jax.config import ConfigError
from rwkv_jax.serving.options import ServeOptions
from rwkv_jax.serving.ray_app import ray_application
from tests.serving.redis_server import RedisServer

PORT = 8123
ROOT = Path(__file__).parents[2]
NUM_TURNS = 4


@dataclasses.dataclass(frozen=True)
class OpenTiny:
    """What a replica serves."""

    url: str

    @contextlib.contextmanager
    def __call__(self) -> Iterator[Any]:
        from rwkv_jax.serving.service import Service
        from rwkv_jax.serving.states.opening import open_states
        from tests.inference.models import CONFIGS, quick_engine, random_model

        options = options_of(self.url)
        with quick_engine(random_model(CONFIGS["7"])) as engine:
            yield Service(engine, "tiny", options, states=open_states(options, "tiny"))


def options_of(url: str) -> ServeOptions:
    return ServeOptions(state_store=url, public_without_keys=True)


def call(method: str, path: str, body: Any = None) -> tuple[int, Any, Message]:
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=120)
    content = None if body is None else json.dumps(body)
    connection.request(method, path, content, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    data = answer.read()
    is_json = answer.headers.get("Content-Type", "").startswith("application/json")
    return answer.status, json.loads(data) if is_json else data, answer.headers


def replicas() -> list[int]:
    """Process ids of the replicas that are there."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and b"ray::ServeReplica" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return sorted(found)


def wait_for_replicas(count: int) -> list[int]:
    """Those that answer; one that is new has its model first."""
    from ray import serve  # pyright: ignore[reportMissingImports]

    end = time.monotonic() + 180
    while time.monotonic() < end:
        state = serve.status().applications["default"].deployments["rwkv"].replica_states
        if state.get("RUNNING", 0) == count == len(replicas()):
            return replicas()
        time.sleep(0.2)
    raise AssertionError(serve.status())


def busiest(pids: list[int], seconds: float = 0.4) -> int:
    """The process that computes."""

    def ticks() -> dict[int, int]:
        return {
            pid: sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])) for pid in pids
        }

    before = ticks()
    time.sleep(seconds)
    after = ticks()
    return max(pids, key=lambda pid: after[pid] - before[pid])


def body_of(session: str, index: int, **fields: Any) -> dict[str, Any]:
    message = {"role": "user", "content": f"This is message {index}"}
    body = {"model": "tiny", "temperature": 0, "max_tokens": 12, "ignore_eos": True, "session": session}
    return body | {"messages": [message]} | fields


def turn(session: str, index: int, **fields: Any) -> tuple[str, int]:
    status, answer, _ = call("POST", "/v1/chat/completions", body_of(session, index, **fields))
    assert status == 200, answer
    return answer["choices"][0]["message"]["content"], answer["state"]["num_tokens"]


def interrupted_turn(session: str, index: int) -> None:
    """A long one, whose replica is killed in its midst."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
    body = body_of(session, index, stream=True, max_tokens=30_000)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200
    assert answer.readline().startswith(b"data: ")
    os.kill(busiest(wait_for_replicas(2)), signal.SIGKILL)
    with contextlib.suppress(OSError, http.client.HTTPException):
        assert b"[DONE]" not in answer.read()


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def cluster(redis: RedisServer) -> Iterator[None]:
    import ray  # pyright: ignore[reportMissingImports]
    from ray import serve  # pyright: ignore[reportMissingImports]

    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    ray.init(
        num_cpus=8, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}}
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        deployment = {"num_replicas": 2, "ray_actor_options": {"num_cpus": 1}, "health_check_period_s": 1}
        serve.run(ray_application(OpenTiny(redis.url), options_of(redis.url), **deployment), route_prefix="/")
        wait_for_replicas(2)
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.mark.ray
@pytest.mark.filterwarnings("default")  # Ray's own
def test_a_conversation_outlives_its_replicas(cluster: None) -> None:
    expected = [turn("undisturbed", index) for index in range(NUM_TURNS)]
    assert turn("talk", 0) == expected[0]
    first, second = wait_for_replicas(2)
    os.kill(first, signal.SIGKILL)  # between turns, whichever of both has answered
    assert answered("talk", 1) == expected[1]
    wait_for_replicas(2)
    os.kill(second, signal.SIGKILL)
    assert answered("talk", 2) == expected[2]
    wait_for_replicas(2)
    interrupted_turn("talk", 3)
    assert answered("talk", 3) == expected[3]


def answered(session: str, index: int) -> tuple[str, int]:
    """A turn that is sent again, as clients do, until Ray's proxy knows that the killed replica is gone."""
    for _ in range(20):
        try:
            return turn(session, index)
        except (AssertionError, OSError, http.client.HTTPException):
            time.sleep(0.5)
    return turn(session, index)


@pytest.mark.ray
@pytest.mark.filterwarnings("default")
def test_a_redis_that_starts_again_has_what_it_had_saved(cluster: None, redis: RedisServer) -> None:
    from redis import Redis

    assert call("POST", "/v1/states", {"prompt": "kept", "id": "kept"})[0] == 200
    Redis.from_url(redis.url).save()
    assert call("POST", "/v1/states", {"prompt": "lost", "id": "lost"})[0] == 200
    redis.kill()
    status, answer, headers = call("GET", "/v1/states/kept")
    assert (status, answer["error"]["code"]) == (503, "state_store_unavailable")
    assert int(headers["Retry-After"]) > 0
    redis.start()
    assert call("GET", "/v1/states/kept")[0] == 200
    status, answer, _ = call("GET", "/v1/states/lost")
    assert (status, answer["error"]["message"]) == (404, "state 'lost': not found or expired")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ServeOptions(public_without_keys=True), "replicas share the states of conversations"),
        (ServeOptions(state_store="x.sqlite", public_without_keys=True), "give a redis://"),
        (ServeOptions(state_store="redis://127.0.0.1"), "give --api-keys FILE, or --public-without-keys"),
    ],
)
def test_options_that_replicas_cannot_have(options: ServeOptions, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ray_application(OpenTiny(""), options)


def test_replicas_load_no_adapters_of_their_own(tmp_path: Path) -> None:
    options = ServeOptions(
        state_store="redis://127.0.0.1", api_keys=tmp_path / "keys", adapter_folder=tmp_path, adapter_admins=("a",)
    )
    with pytest.raises(ConfigError, match=r"adapter_folder = .*: an adapter would be loaded by the one replica"):
        ray_application(OpenTiny(""), options)
