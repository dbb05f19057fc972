"""What every store of states must do."""

from __future__ import annotations

import threading

import pytest

from rwkv_jax.serving.states.store import ConflictError, StateRecord, StateStore

RECORD = StateRecord(b"\0\xffdata", num_tokens=17, model="m" * 64, created=1.5)


def data_of(store: StateStore, tenant: str, id: str) -> bytes | None:
    found = store.get(tenant, id)
    return None if found is None else found.data


def check_records(store: StateStore) -> None:
    """What every store does."""
    assert store.get("a", "x") is None
    version = store.put("a", "x", RECORD)
    found = store.get("a", "x")
    assert found is not None
    assert found.version == version != 0
    assert (found.data, found.num_tokens, found.model, found.created, found.kind) == (
        b"\0\xffdata",
        17,
        "m" * 64,
        1.5,
        "state",
    )
    assert [(i.id, i.kind, i.num_tokens, i.num_bytes, i.created) for i in store.list("a")] == [
        ("x", "state", 17, 6, 1.5)
    ]
    # Another tenant.
    assert store.get("b", "x") is None
    assert store.list("b") == []
    assert not store.delete("b", "x")
    store.put("b", "x", StateRecord(b"b's", 1, "m", 0.0, kind="session"))
    assert data_of(store, "a", "x") == b"\0\xffdata"
    # Its end.
    assert store.delete("a", "x")
    assert not store.delete("a", "x")
    assert store.get("a", "x") is None
    assert store.list("a") == []


def check_versions(store: StateStore) -> None:
    """Of two that have read a record, one puts it."""
    with pytest.raises(ConflictError, match="x: was changed, removed or made"):
        store.put("a", "x", RECORD, expected=7)
    first = store.put("a", "x", RECORD, expected=0)
    with pytest.raises(ConflictError):
        store.put("a", "x", RECORD, expected=0)
    second = store.put("a", "x", StateRecord(b"2", 2, "m", 0.0), expected=first)
    assert second != first
    with pytest.raises(ConflictError):
        store.put("a", "x", RECORD, expected=first)
    found = store.get("a", "x")
    assert found is not None
    assert (found.data, found.version) == (b"2", second)
    store.delete("a", "x")
    with pytest.raises(ConflictError):
        store.put("a", "x", RECORD, expected=second)
    store.put("a", "x", RECORD, expected=0)
    with pytest.raises(ConflictError):  # not taken for the deleted one
        store.put("a", "x", RECORD, expected=second)
    store.put("a", "x", RECORD)


def check_race(store: StateStore) -> None:
    """Eight threads advance one record: each step is taken once."""
    store.put("a", "n", StateRecord(b"0", 0, "m", 0.0))

    def advance() -> None:
        for _ in range(10):
            while True:
                found = store.get("a", "n")
                assert found is not None
                try:
                    store.put(
                        "a", "n", StateRecord(str(int(found.data) + 1).encode(), 0, "m", 0.0), expected=found.version
                    )
                    break
                except ConflictError:
                    pass

    threads = [threading.Thread(target=advance) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert data_of(store, "a", "n") == b"80"
