"""States in a real Redis: Debian's redis-server, started here. Run by hand: pytest -m redis."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rwkv_jax.config import ConfigError
from rwkv_jax.serving.states.redis import RedisStateStore
from rwkv_jax.serving.states.store import StateRecord, TooLargeError, UnavailableError
from tests.serving.redis_server import RedisServer
from tests.serving.stores import RECORD, check_race, check_records, check_versions, data_of


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def store(server: RedisServer) -> Iterator[RedisStateStore]:
    with contextlib.closing(opened(server)) as store:
        store._client.flushall()
        yield store


def opened(server: RedisServer, seconds: float = 100.0) -> RedisStateStore:
    return RedisStateStore(server.url, max_bytes=10**6, max_idle_seconds=seconds)


@pytest.mark.redis
def test_records(store: RedisStateStore) -> None:
    check_records(store)


@pytest.mark.redis
def test_versions(store: RedisStateStore) -> None:
    check_versions(store)


@pytest.mark.redis
def test_threads_that_advance_one_record(store: RedisStateStore) -> None:
    check_race(store)


@pytest.mark.redis
def test_two_servers_share_records(server: RedisServer, store: RedisStateStore) -> None:
    version = store.put("t", "x", RECORD)
    with contextlib.closing(opened(server)) as other:
        other.put("t", "x", StateRecord(b"2", 2, "m", 0.0), expected=version)
    assert data_of(store, "t", "x") == b"2"


@pytest.mark.redis
def test_a_put_that_is_sent_twice_counts_once(store: RedisStateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    # As redis-py sends it again where the connection was lost before the answer.
    monkeypatch.setattr("rwkv_jax.serving.states.redis.new_version", lambda: 5)
    assert store.put("t", "x", RECORD, expected=0) == 5
    assert store.put("t", "x", RECORD, expected=0) == 5


@pytest.mark.redis
def test_the_unused_expire(server: RedisServer, store: RedisStateStore) -> None:
    with contextlib.closing(opened(server, 0.4)) as short:
        short.put("t", "a", RECORD)
        short.put("t", "b", RECORD)
        time.sleep(0.25)
        assert short.get("t", "a") is not None
        time.sleep(0.25)
        assert short.get("t", "b") is None
        assert [info.id for info in short.list("t")] == ["a"]
        time.sleep(0.5)
        assert short.list("t") == []
    assert store._client.keys() == []


@pytest.mark.redis
def test_what_redis_evicted_is_not_there(store: RedisStateStore) -> None:
    store.put("t", "x", RECORD)
    (key,) = store._client.keys("*state*")
    store._client.delete(key)
    assert [info.id for info in store.list("t")] == []
    assert store.get("t", "x") is None
    assert store._client.keys() == []


@pytest.mark.redis
def test_keys_do_not_show_the_tenant(store: RedisStateStore) -> None:
    store.put("secret-key", "x", RECORD)
    assert sorted(b"secret-key" in key for key in store._client.scan_iter()) == [False, False]


@pytest.mark.redis
def test_what_is_too_large(store: RedisStateStore) -> None:
    with pytest.raises(TooLargeError, match="takes 1000001 bytes where a state may take 1000000"):
        store.put("t", "x", StateRecord(bytes(10**6 + 1), 1, "m", 0.0))


@pytest.mark.redis
def test_a_restart_loses_only_what_was_not_persisted(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server, contextlib.closing(opened(server)) as store:
        store.put("t", "kept", RECORD)
        store._client.save()
        store.put("t", "lost", RECORD)
        server.kill()
        with pytest.raises(UnavailableError, match="cannot be reached or written now"):
            store.get("t", "kept")
        server.start()
        assert data_of(store, "t", "kept") == RECORD.data
        assert store.get("t", "lost") is None


@pytest.mark.redis
def test_with_an_append_only_file_a_killed_redis_loses_nothing(tmp_path: Path) -> None:
    with RedisServer(tmp_path, "--appendonly", "yes") as server, contextlib.closing(opened(server)) as store:
        store.put("t", "x", RECORD)
        server.kill()
        server.start()
        assert data_of(store, "t", "x") == RECORD.data


@pytest.mark.redis
def test_a_redis_that_is_full_or_wants_a_password(tmp_path: Path) -> None:
    full = ("--maxmemory", "1mb", "--maxmemory-policy", "noeviction")
    with (
        RedisServer(tmp_path, *full) as server,
        contextlib.closing(opened(server)) as store,
        pytest.raises(UnavailableError, match="maxmemory"),
    ):
        list(map(lambda id: store.put("t", id, StateRecord(bytes(10**6), 1, "m", 0.0)), "abc"))
    with RedisServer(tmp_path, "--requirepass", "secret", password="secret") as server:
        with contextlib.closing(opened(server)) as store:
            store.put("t", "x", RECORD)
        with pytest.raises(ConfigError, match="does not let us in"):
            RedisStateStore(server.url.replace(":secret@", ""), max_bytes=1, max_idle_seconds=1.0)


# Without a server, with the other tests.


def test_a_redis_that_is_away() -> None:
    store = RedisStateStore("redis://127.0.0.1:1", max_bytes=10**6, max_idle_seconds=1.0)
    for use in (
        lambda: store.put("t", "x", RECORD),
        lambda: store.get("t", "x"),
        lambda: store.delete("t", "x"),
        lambda: store.list("t"),
    ):
        with pytest.raises(UnavailableError, match="states in Redis: cannot be reached or written now"):
            use()


def test_addresses_that_are_refused() -> None:
    with pytest.raises(ConfigError, match="the address cannot be used") as refusal:
        RedisStateStore("http://u:secret@127.0.0.1", max_bytes=1, max_idle_seconds=1.0)
    assert "secret" not in str(refusal.value)
